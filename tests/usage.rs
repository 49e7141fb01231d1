//! Whether SimVQ's codes come into use when they begin far too short or too long for the features
//! (examples/02_usage_recovery.rs tries more options, for longer).

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vqrae::image::{self, Limits, Rgb};
use vqrae::train::{self, Config, Event, Files};
use vqrae::weights;

use crate::compare::say;

const CONFIG: &str = r#"
[start]
from = "random"

[train]
steps = 120
batch_size = 8
warmup_steps = 12
log_every = 40
validate_every = 0
checkpoint_every = 0
tensorboard = false

[groups]
encoder = { peak = 0.0 }
quantizer = { peak = 3e-3, schedule = "constant", warmup_steps = 0 }
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
codebook_size = 256
codebook_dim = 16
"#;

const SIDE: usize = 32;

/// A folder with tiles of a photo, and room for runs.
struct Bench(TempDir);

impl Bench {
    fn new() -> Self {
        let bench = Self(tempfile::tempdir().unwrap());
        std::fs::create_dir(bench.path("tiles")).unwrap();
        let photo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/photos/astronaut.png");
        let photo = image::open(&photo, &Limits::default()).unwrap();
        let corners = (0..photo.height / SIDE).flat_map(|y| (0..photo.width / SIDE).map(move |x| (y * SIDE, x * SIDE)));
        for (top, left) in corners {
            let rows = (top..top + SIDE).flat_map(|y| &photo.data[3 * (y * photo.width + left)..][..3 * SIDE]);
            let tile = Rgb { width: SIDE, height: SIDE, data: rows.copied().collect() };
            image::save_png(&bench.path(&format!("tiles/{top}-{left}.png")), &tile).unwrap();
        }
        std::fs::write(bench.path("config.toml"), CONFIG).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Trains with some options; the share of the codes that the last 40 steps chose.
    fn usage(&self, options: &[&str]) -> f64 {
        let overrides: Vec<String> = options.iter().map(ToString::to_string).collect();
        let config = Config::read(&self.path("config.toml"), &overrides).unwrap();
        let files = Files { train: vec![self.path("tiles")], validation: Vec::new(), output: self.path("run") };
        let mut usage = f64::NAN;
        let mut tell = |event: Event| {
            if let Event::Step(log) = event {
                usage = log.usage;
            }
            ControlFlow::Continue(())
        };
        train::run(&config, &files, false, &mut tell).unwrap();
        usage
    }

    /// [`Bench::usage`] of codes a hundred times too short, of SimVQ's own, and of codes a hundred times too long.
    fn usages(&self, options: &[&str]) -> [f64; 3] {
        let of = |scale: f64| {
            let std = format!("model.quantizer.codebook_std={}", scale / 16f64.sqrt());
            self.usage(&[options, &[&std]].concat())
        };
        let usages = [0.01, 1.0, 100.0].map(of);
        say(&format!("usage of codes 0.01, 1 and 100 times as long, {options:?}: {usages:.3?}"));
        usages
    }
}

#[test]
fn codes_a_hundred_times_too_short_or_too_long_come_into_use_with_the_options_of_the_readme() {
    let bench = Bench::new();
    let [short, own, long] = bench.usages(&[]);
    assert!(short < 0.5 * own && long < 0.1 * own, "without options, or the rest shows nothing");
    for options in [
        &["model.quantizer.transform_init=\"data\""][..],
        &["model.quantizer.transform_init=\"data\"", "model.quantizer.transform_bias=true"],
        &["model.quantizer.metric=\"cosine\""],
    ] {
        let recovered = bench.usages(options);
        assert!(
            recovered.iter().all(|&usage| usage >= 0.8 * own.max(recovered[1])),
            "{options:?}: {recovered:?}, {own}"
        );
    }
}

#[test]
fn an_average_of_the_weights_follows_from_what_features_made() {
    let bench = Bench::new();
    bench.usage(&["model.quantizer.transform_init=\"data\"", "train.ema_decay=0.999", "train.steps=1"]);
    let read = |file: &str| {
        let tensors =
            weights::read_file(&bench.path(&format!("run/checkpoints/step-00000001/{file}.safetensors"))).unwrap();
        tensors["quantizer.transform.weight"].flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    let (average, weight) = (read("average"), read("model"));
    let size = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
    let difference: Vec<f32> = average.iter().zip(&weight).map(|(a, w)| a - w).collect();
    assert!(size(&difference) < 0.1 * size(&weight), "{} of {}", size(&difference), size(&weight));
}
