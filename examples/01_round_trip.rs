//! Photo → codes → photo, with the calls that a generator would make.
//!
//! `cargo run --release --example 01_round_trip -- [PHOTO] [OUTPUT.png]`

use std::path::PathBuf;

use vqrae::{DType, Device, Tensor, Vqrae, image, metrics};

#[allow(clippy::print_stdout, reason = "an example prints what it shows")]
fn main() -> anyhow::Result<()> {
    let mut words = std::env::args_os().skip(1).map(PathBuf::from);
    let photo = words.next().unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/photos/coffee.png").into());
    let output = words.next().unwrap_or_else(|| std::env::temp_dir().join("round_trip.png"));

    let model = Vqrae::shipped(&Device::Cpu, DType::F32)?;
    println!("model {}: {} codes", model.id(), model.codebook_size());

    // A photo becomes what the encoder wants: resized and normalised as the model folder says.
    let preprocessor = model.preprocessor();
    let prepared = preprocessor.prepare(&image::open(&photo, &image::Limits::default())?)?;
    let (h, w) = (prepared.height, prepared.width);
    let pixels = Tensor::from_vec(preprocessor.normalize(&prepared), (1, 3, h, w), &Device::Cpu)?;

    // Continuous features are for understanding, codes are for generation.
    let features = model.encode(&pixels)?;
    let codes = model.encode_to_indices(&pixels)?;
    println!("features {:?}, codes {:?}, codebook {:?}", features.dims(), codes.dims(), model.codebook()?.dims());
    println!("first row of codes: {:?}", codes.get(0)?.get(0)?.to_vec1::<u32>()?);

    // A generator makes codes of its own here; these go straight back.
    let painted = model.decode_from_indices(&codes)?;
    let (_, _, h, w) = painted.dims4()?;
    let painted = preprocessor.denormalize_to_rgb(&painted.flatten_all()?.to_vec1::<f32>()?, h, w);
    image::save_png(&output, &painted)?;
    if let Some(psnr) = metrics::psnr(&prepared, &painted) {
        println!("{}: {psnr:.2} dB", output.display());
    }
    Ok(())
}
