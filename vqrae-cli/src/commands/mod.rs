//! One file a subcommand: its words (`Args`) and its work (`execute`).

pub(crate) mod bench;
pub(crate) mod cache;
pub(crate) mod codebook;
pub(crate) mod convert;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod features;
pub(crate) mod generate;
pub(crate) mod init;
pub(crate) mod inspect;
pub(crate) mod reconstruct;
pub(crate) mod tokenize;
pub(crate) mod train;
pub(crate) mod verify;
pub(crate) mod vocab;

use std::path::{Path, PathBuf};

use anyhow::Result;
use vqrae::codes::Codes;
use vqrae::image::{Preprocessor, ResizeMode, Rgb};
use vqrae::{DType, Device, Tensor};

use crate::inputs::Input;
use crate::interrupts::catch_interrupts;
use crate::plan::{FileArgs, InputArgs};
use crate::report::{Exit, Progress, Quality};
use crate::{output, report, sheet};

/// What to say after Ctrl-C where finished files are kept.
const RUN_AGAIN: &str = "run the same command again to go on from here";

/// Starts to count: `left` files to do, `resumed` done before, and those that could not even be listed.
fn start(args: &InputArgs, left: usize, resumed: usize, unreadable: &[(Input, String)]) -> Result<Progress> {
    begin(&args.files, args.output.join("errors.jsonl"), left, resumed, unreadable)
}

/// [`start`] for a command that names its output otherwise; what could not be read is written to the file `errors`.
fn begin(
    args: &FileArgs,
    errors: PathBuf,
    left: usize,
    resumed: usize,
    unreadable: &[(Input, String)],
) -> Result<Progress> {
    catch_interrupts()?;
    let total = left + resumed + unreadable.len();
    let mut progress = Progress::new(total, resumed, args.max_errors(), Some(errors))?;
    for (input, reason) in unreadable {
        progress.skip(input, reason)?;
    }
    Ok(progress)
}

/// Ends a run on `device`: the summary goes to stdout, after Ctrl-C with the `next_step` on stderr.
fn finish(progress: Progress, exit: Exit, device: String, quality: Quality, next_step: &str) -> Result<Exit> {
    if exit == Exit::Interrupted {
        progress.interrupted(next_step);
    }
    let (summary, skipped) = progress.finish(device, quality);
    report::data(&summary.line()?);
    Ok(exit.merge(skipped))
}

/// The codes of several images of one grid, as a model takes them: u32 `[B, h, w]` or `[B, h, w, c]`.
fn stack_codes(codes: &[&Codes], device: &Device) -> Result<Tensor> {
    let indices: Vec<u32> = codes.iter().flat_map(|codes| codes.indices.iter().copied()).collect();
    let Some(first) = codes.first() else { anyhow::bail!("no codes to decode") };
    let (b, h, w, c) = (codes.len(), first.h, first.w, first.c);
    Ok(match c {
        1 => Tensor::from_vec(indices, (b, h, w), device)?,
        c => Tensor::from_vec(indices, (b, h, w, c), device)?,
    })
}

/// Decoded pixels `[B, 3, H, W]`, as images.
fn to_images(decoded: &Tensor, preprocessor: &Preprocessor) -> Result<Vec<Rgb>> {
    let (b, _, h, w) = decoded.dims4()?;
    // At once: an image at a time, a GPU would copy the whole batch for each.
    let decoded = decoded.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
    let image = |i: usize| Ok(preprocessor.denormalize_to_rgb(&decoded.get(i)?.flatten_all()?.to_vec1()?, h, w));
    (0..b).map(image).collect()
}

/// An image of `size` (rows, columns), with the model's resampling filter.
fn resized(image: &Rgb, size: (usize, usize), preprocessor: &Preprocessor) -> Result<Rgb> {
    if (image.height, image.width) == size {
        return Ok(image.clone());
    }
    let resize = Preprocessor { size, resize_mode: ResizeMode::Squash, do_resize: true, ..preprocessor.clone() };
    Ok(resize.prepare(image)?)
}

/// Writes a contact sheet and says so.
fn write_sheet(path: &Path, pairs: &[(Rgb, Rgb)], of_total: usize) -> Result<()> {
    let Some(sheet) = sheet::compose(pairs) else {
        report::say("no sheet: there is no image to show");
        return Ok(());
    };
    output::save_png(path, &sheet)?;
    let shown = pairs.len();
    report::say(&format!("{}: original, reconstruction, error for {shown} of {of_total} images", path.display()));
    Ok(())
}
