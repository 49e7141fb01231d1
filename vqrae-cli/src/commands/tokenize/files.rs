//! A code file an image: for a look at single images, and for readers that want files.

use std::path::{Path, PathBuf};

use anyhow::Result;
use vqrae::Tensor;
use vqrae::codes::{Codes, Format};

use super::super::{RUN_AGAIN, finish, start};
use super::{Args, Computed, Engine, write_sheet_of};
use crate::alike::Alike;
use crate::inputs::{Input, Kind};
use crate::load::{Loaded, stack_alike};
use crate::output::{Origin, Output, save_pngs, split_done};
use crate::pipeline::each_batch;
use crate::report::{Exit, Progress, Quality};
use crate::view::View;

/// The checked plan, with everything opened.
struct Job<'a> {
    engine: &'a Engine,
    output: Output,
    extension: &'static str,
}

/// Tokenizes into a file an image, going on where an earlier run stopped.
pub(super) fn run(args: &Args, engine: &Engine, format: Format) -> Result<Exit> {
    let inputs = args.inputs.find(Kind::Images)?;
    let output = Output::open(&args.inputs.output, engine.model(), &engine.reading.views, args.if_exists)?;
    let job = Job { engine, output, extension: format.extension() };

    let all = inputs.files.clone();
    let (left, resumed) = split_done(inputs.files, |input| job.is_done(input))?;
    let mut progress = start(&args.inputs, left.len(), resumed, &inputs.unreadable)?;
    let read = |input: &Input| engine.reading.load(input);
    let prepare = |batch: &mut [(&Input, Vec<Loaded>)]| {
        stack_alike(batch.iter_mut().flat_map(|(_, views)| views), engine.model(), engine.pace)
    };
    let write = |_: &mut Progress, batch: &[(&Input, Vec<Loaded>)], computed| job.write(batch, computed);
    let exit = each_batch(&left, engine.pace, &mut progress, read, prepare, engine.computes(), write)?;
    if let (Some(path), Exit::Success) = (&args.sheet, exit) {
        write_sheet_of(engine, path, &all, all.len())?;
    }
    finish(progress, exit, engine.devices(), Quality::default(), RUN_AGAIN)
}

impl Job<'_> {
    fn code_file(&self, input: &Input, view: &View) -> PathBuf {
        self.output.path("codes", input, view, self.extension)
    }

    fn picture(&self, input: &Input, view: &View) -> PathBuf {
        self.output.path("reconstructions", input, view, "png")
    }

    /// Whether an earlier run has made all of an image's files.
    fn is_done(&self, input: &Input) -> Result<bool> {
        for view in &self.engine.reading.views {
            let painted = !self.engine.reconstruct || self.picture(input, view).exists();
            if !self.output.has(&self.code_file(input, view), view, origin)? || !painted {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes the files of one batch, the code files last: where they are, the image is done.
    fn write(&self, batch: &[(&Input, Vec<Loaded>)], computed: Alike<Computed>) -> Result<()> {
        let computed = computed.into_items(|group| self.engine.each_image(group))?;
        let views =
            || batch.iter().flat_map(|(input, _)| self.engine.reading.views.iter().map(move |view| (*input, view)));
        let painted = views()
            .zip(&computed)
            .filter_map(|((input, view), (_, painted))| Some((self.picture(input, view), painted.as_ref()?)));
        save_pngs(painted)?;
        for ((input, view), (indices, _)) in views().zip(&computed) {
            self.codes(indices, input, view)?.write(self.code_file(input, view))?;
        }
        Ok(())
    }

    /// The record of one image, from its indices `[h, w]` or `[h, w, c]`.
    fn codes(&self, indices: &Tensor, input: &Input, view: &View) -> Result<Codes> {
        let (h, w) = (indices.dim(0)?, indices.dim(1)?);
        let Origin { model_id, preprocessing, dtype } = self.output.origin(view);
        let model = self.engine.model();
        Ok(Codes {
            indices: indices.flatten_all()?.to_vec1()?,
            h,
            w,
            c: model.codes_per_token(),
            model_id,
            codebook_size: model.codebook_size(),
            source: input.source(),
            preprocessing,
            dtype,
        })
    }
}

/// Who made a code file.
fn origin(path: &Path) -> vqrae::Result<Origin> {
    let codes = Codes::read(path)?;
    Ok(Origin { model_id: codes.model_id, preprocessing: codes.preprocessing, dtype: codes.dtype })
}
