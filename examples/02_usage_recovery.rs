//! Codes that begin 100 times too short or too long for the features: with which options they come into use all the same
//! (StableVQ's question to SimVQ, arXiv 2609.26774).
//!
//! `cargo run --release --example 02_usage_recovery -- [PHOTOS…]`
//!
//! A small VQRAE is trained on 32×32 tiles of the photos, its encoder frozen, and the share of its 1,024 codes is printed that
//! the last 50 steps chose.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use vqrae::image::{self, Limits, Rgb};
use vqrae::train::{self, Config, Event, Files};

const SIDE: usize = 32;
const WIDTH: f64 = 16.0;

const CONFIG: &str = r#"
[start]
from = "random"

[train]
steps = 150
batch_size = 16
warmup_steps = 15
log_every = 50
validate_every = 0
checkpoint_every = 0
tensorboard = false

[groups]
encoder = { peak = 0.0 }
quantizer = { peak = 1e-3 }
decoder = { peak = 1e-3 }

[model.encoder]
model_type = "siglip_vision_model"
hidden_size = 32
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
image_size = 32
patch_size = 4

[model.quantizer]
type = "simvq"
codebook_size = 1024
codebook_dim = 16
"#;

/// The quantizer at a rate of its own, without warm-up or annealing, as StableVQ has it.
const CONSTANT: &str = "groups.quantizer={peak=1e-3, schedule=\"constant\", warmup_steps=0}";
const FASTER: &str = "groups.quantizer={peak=1e-2, schedule=\"constant\", warmup_steps=0}";
const DATA: &str = "model.quantizer.transform_init=\"data\"";

const OPTIONS: [(&str, &[&str]); 12] = [
    ("none", &[]),
    ("constant rate 1e-3", &[CONSTANT]),
    ("constant rate 1e-2", &[FASTER]),
    ("transform_init = identity, constant rate 1e-3", &[CONSTANT, "model.quantizer.transform_init=\"identity\""]),
    ("gradient = dynamic_ste, constant rate 1e-3", &[CONSTANT, "model.quantizer.gradient=\"dynamic_ste\""]),
    ("norm = layer_norm, constant rate 1e-3", &[CONSTANT, "model.quantizer.norm=\"layer_norm\""]),
    ("metric = hsq, constant rate 1e-3", &[CONSTANT, "model.quantizer.metric=\"hsq\""]),
    ("metric = cosine, constant rate 1e-3", &[CONSTANT, "model.quantizer.metric=\"cosine\""]),
    ("transform_init = data", &[DATA]),
    ("transform_init = data, constant rate 1e-3", &[CONSTANT, DATA]),
    ("transform_init = data, constant rate 1e-2", &[FASTER, DATA]),
    (
        "transform_init = data, transform_bias, constant rate 1e-2",
        &[FASTER, DATA, "model.quantizer.transform_bias=true"],
    ),
];

#[allow(clippy::print_stdout, reason = "an example prints what it shows")]
fn main() -> anyhow::Result<()> {
    let mut photos: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    if photos.is_empty() {
        let own = concat!(env!("CARGO_MANIFEST_DIR"), "/photos");
        photos = ["astronaut.png", "chelsea.png", "china.jpg", "coffee.png", "flower.jpg"]
            .map(|p| Path::new(own).join(p))
            .into();
    }
    let folder = std::env::temp_dir().join(format!("usage_recovery-{}", std::process::id()));
    tiles(&photos, &folder.join("tiles"))?;
    let config = folder.join("config.toml");
    std::fs::write(&config, CONFIG)?;
    println!("| options | 100 times too short | SimVQ's own | 100 times too long |\n|---|---|---|---|");
    for (name, options) in OPTIONS {
        let usage = [0.01, 1.0, 100.0].map(|scale| usage(&config, options, scale, &folder));
        let [short, own, long] = usage.map(|usage| usage.map(|usage| format!("{:.0} %", 100.0 * usage)));
        println!("| {name} | {} | {} | {} |", short?, own?, long?);
    }
    Ok(std::fs::remove_dir_all(folder)?)
}

/// The share of the codes that the last 50 steps chose, of a codebook `scale` times as long as SimVQ's.
fn usage(config: &Path, options: &[&str], scale: f64, folder: &Path) -> anyhow::Result<f64> {
    let mut overrides: Vec<String> = options.iter().map(ToString::to_string).collect();
    overrides.push(format!("model.quantizer.codebook_std={}", scale / WIDTH.sqrt()));
    let config = Config::read(config, &overrides)?;
    let output = folder.join("run");
    let files = Files { train: vec![folder.join("tiles")], validation: Vec::new(), output: output.clone() };
    let mut usage = f64::NAN;
    train::run(&config, &files, false, &mut |event| {
        if let Event::Step(log) = event {
            usage = log.usage;
        }
        ControlFlow::Continue(())
    })?;
    std::fs::remove_dir_all(output)?;
    Ok(usage)
}

/// Cuts photos into squares, so that a step decodes small files.
fn tiles(photos: &[PathBuf], folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    for (i, photo) in photos.iter().enumerate() {
        let photo = image::open(photo, &Limits::default())?;
        for (top, left) in
            (0..photo.height / SIDE).flat_map(|y| (0..photo.width / SIDE).map(move |x| (y * SIDE, x * SIDE)))
        {
            let rows = (top..top + SIDE).flat_map(|y| &photo.data[3 * (y * photo.width + left)..][..3 * SIDE]);
            let tile = Rgb { width: SIDE, height: SIDE, data: rows.copied().collect() };
            image::save_png(&folder.join(format!("{i}-{top}-{left}.png")), &tile)?;
        }
    }
    Ok(())
}
