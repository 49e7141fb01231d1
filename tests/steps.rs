//! Ten steps of either stage by the trainer itself, beside PyTorch's: every number of the log, and where the weights went.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;
use vqrae::image::{self, Limits, Preprocessor};
use vqrae::train::checkpoint::{self, Checkpoint, State};
use vqrae::train::data::{Crops, Photos, Sizes};
use vqrae::train::{self, Config, Event, Files, guard};
use vqrae::weights::{self, Tensors};
use vqrae::{DType, Tensor};

use crate::compare::{fixture, say, tensors_of};
use crate::gan::filled;

/// What a number may be off by, relative to its own size; PyTorch's is computed in f64.
const ALLOWED: f64 = 2e-4;
/// make.py keeps every seventh number of a weight.
const EVERY: usize = 7;

/// The settings beside make.py, with paths that fit, and `more`.
fn config(stage: &str, start: &Path, more: &[&str]) -> Config {
    let mut overrides = vec![format!("start.path={:?}", start.to_str().unwrap())];
    if stage == "stage2" {
        let network = fixture("perceptual/vgg16.safetensors");
        overrides.push(format!("loss.perceptual.weights={:?}", network.to_str().unwrap()));
    }
    overrides.extend(more.iter().map(ToString::to_string));
    Config::read(&fixture(&format!("train/{stage}.toml")), &overrides).unwrap()
}

/// A run in `output`, all of it or its first step alone.
fn trains(config: &Config, output: PathBuf, whole: bool) {
    let files = Files { train: vec![fixture("train/photos")], validation: Vec::new(), output };
    let mut tell = |event: Event| match event {
        Event::Step(_) if !whole => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    train::run(config, &files, true, &mut tell).unwrap();
}

fn values(x: &Tensor) -> Vec<f64> {
    x.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// How far the run in `output` is from PyTorch's: of every number of the log relative to itself, or to a hundredth of the
/// largest of its name where it is smaller still; of a weight's way relative to the longest in its tensor.
fn differences(stage: &str, start: &Path, output: &Path) -> BTreeMap<String, f64> {
    let reference = tensors_of(&fixture("train/reference.safetensors"), stage);
    let text = std::fs::read_to_string(output.join("log.jsonl")).unwrap();
    let log: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(log.len(), 10, "{stage}: a line a step");
    let known: usize = log.iter().map(|line| line["terms"].as_object().unwrap().len()).sum();
    let of_reference = |name: &String| name.starts_with("log.terms/");
    let expected = reference.iter().filter(|(name, _)| of_reference(name));
    let expected: usize = expected.map(|(_, x)| values(x).iter().filter(|x| !x.is_nan()).count()).sum();
    assert_eq!(known, expected, "{stage}: terms that the other one has not");

    let before = weights::read(start).unwrap();
    let after = weights::read_file(&output.join("checkpoints/step-00000010/model.safetensors")).unwrap();
    let difference = |(name, expected): (String, Tensor)| {
        let expected = values(&expected);
        let largest = expected.iter().fold(0f64, |largest, x| largest.max(x.abs()));
        let (got, least) = match name.strip_prefix("log.") {
            Some(key) => {
                let number = |line: &Value| line.pointer(&format!("/{key}")).map_or(f64::NAN, |x| x.as_f64().unwrap());
                (log.iter().map(number).collect::<Vec<_>>(), 0.01 * largest)
            }
            None => {
                let name = name.strip_prefix("moved.").unwrap();
                let way = (&after[name] - &before[name]).unwrap();
                (values(&way).into_iter().step_by(EVERY).collect(), largest)
            }
        };
        assert_eq!(got.len(), expected.len(), "{stage}: {name}");
        let off = |(got, expected): (&f64, &f64)| match (got.is_nan(), expected.is_nan()) {
            (true, true) => 0.0,
            (false, false) => (got - expected).abs() / expected.abs().max(least).max(f64::MIN_POSITIVE),
            _ => f64::INFINITY,
        };
        let worst = got.iter().zip(&expected).map(off).fold(0.0, f64::max);
        (name, worst)
    };
    reference.into_iter().map(difference).collect()
}

fn worst(differences: &BTreeMap<String, f64>) -> (&str, f64) {
    let worst = differences.iter().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    (worst.0, *worst.1)
}

#[track_caller]
fn assert_follows(stage: &str, start: &Path, output: &Path) {
    let differences = differences(stage, start, output);
    let wrong: Vec<String> = differences
        .iter()
        .filter(|(_, off)| **off > ALLOWED)
        .map(|(name, off)| format!("{name} is off by {off:.1e}"))
        .collect();
    assert!(wrong.is_empty(), "{stage}, {} of {}: {}", wrong.len(), differences.len(), wrong.join(", "));
    for kind in ["log.terms", "log.gradient_norms", "log.", "moved."] {
        let of_kind = differences.iter().filter(|(name, _)| name.starts_with(kind));
        let of_kind: BTreeMap<_, _> = of_kind.map(|(name, off)| (name.clone(), *off)).collect();
        let (name, off) = worst(&of_kind);
        say(&format!("{stage}, ten steps, trainer and PyTorch, {} of {kind}*: {off:.1e} ({name})", of_kind.len()));
    }
}

/// A run's folder at step 0, whose discriminator is the fixture's.
fn with_discriminator(config: &Config, bench: &TempDir) -> PathBuf {
    let (first, output) = (bench.path().join("first"), bench.path().join("stage2"));
    trains(config, first.clone(), false);
    let Checkpoint { state, optimizer, gan, .. } = checkpoint::newest(&first).unwrap().unwrap();
    let zeros = |tensors: Tensors| -> Tensors {
        tensors.into_iter().map(|(name, x)| (name, x.zeros_like().unwrap())).collect()
    };
    let mut gan = zeros(gan.unwrap());
    for (name, tensor) in filled("nlayer_1") {
        assert!(gan.insert(format!("discriminator.{name}"), tensor).is_some(), "`{name}` is no tensor of ours");
    }
    let state = State { step: 0, guard: guard::Seen::default(), ..state };
    let model = weights::read(config_start(config)).unwrap();
    let checkpoint = Checkpoint { state, model, optimizer: zeros(optimizer), average: None, gan: Some(gan) };
    checkpoint::write(&output, &checkpoint, 1).unwrap();
    output
}

fn config_start(config: &Config) -> &Path {
    match &config.start {
        train::Start::Folder { path } => path,
        _ => panic!("the stages start from folders"),
    }
}

#[test]
fn ten_steps_of_both_stages_are_pytorchs() {
    let bench = tempfile::tempdir().unwrap();
    let (original, first) = (fixture("vqrae"), bench.path().join("stage1"));
    trains(&config("stage1", &original, &[]), first.clone(), true);
    assert_follows("stage1", &original, &first);
    // From what stage 1 has written, as `train --from` does.
    let model = first.join("model");
    let joint = config("stage2", &model, &[]);
    let second = with_discriminator(&joint, &bench);
    trains(&joint, second.clone(), true);
    assert_follows("stage2", &model, &second);
}

/// So that the test above can fail.
#[test]
fn settings_that_are_a_little_wrong_show_within_ten_steps() {
    let original = fixture("vqrae");
    for wrong in [
        "optimizer.weight_decay=0.48",
        "optimizer.beta2=0.991",
        "optimizer.max_grad_norm=2.1",
        "train.warmup_steps=2",
        "train.seed=13",
        "groups.decoder.end=1.1e-3",
        "groups.quantizer.warmup_steps=2",
        "loss.quantizer=0.71",
    ] {
        let bench = tempfile::tempdir().unwrap();
        trains(&config("stage1", &original, &[wrong]), bench.path().to_path_buf(), true);
        let differences = differences("stage1", &original, bench.path());
        let (name, off) = worst(&differences);
        assert!(off > 2.0 * ALLOWED, "{wrong}: {name} is off by {off:.1e} only");
    }
}

/// Photos and mirrors of each step, `[photo, mirrored]`.
fn drawn(stage: &str) -> Value {
    let original = fixture("vqrae");
    let config = config(stage, &original, &[]);
    let preprocessor = Preprocessor::from_file(&original.join("preprocessor_config.json")).unwrap();
    let photos = Photos::list(&[fixture("train/photos")]).unwrap();
    let mut views = HashMap::new();
    for photo in 0..photos.len() {
        let image = image::open(&fixture(&format!("train/photos/{photo}.png")), &Limits::default()).unwrap();
        let mut mirrored = image.clone();
        mirrored.data = image
            .data
            .chunks_exact(3 * image.width)
            .flat_map(|row| row.chunks_exact(3).rev())
            .flatten()
            .copied()
            .collect();
        let key = |image| preprocessor.normalize(image).iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
        views.insert(key(&image), serde_json::json!([photo, false]));
        views.insert(key(&mirrored), serde_json::json!([photo, true]));
    }
    let sizes = Sizes::of(preprocessor.size, &config.model.config()).unwrap();
    let size = config.train.batch_size;
    let mut crops = Crops::new(&photos, &preprocessor, None, config.train.seed);
    let mut step = |step: usize| -> Value {
        let inputs = crops.batch(step * size, size, sizes).unwrap().inputs;
        let bits: Vec<u32> = inputs.iter().map(|x| x.to_bits()).collect();
        bits.chunks_exact(inputs.len() / size).map(|crop| views[crop].clone()).collect()
    };
    (0..config.train.steps).map(&mut step).collect()
}

#[test]
fn the_batches_are_those_that_pytorch_was_given() {
    let stored = std::fs::read_to_string(fixture("train/batches.json")).unwrap();
    let stored: Value = serde_json::from_str(&stored).unwrap();
    let drawn = serde_json::json!({ "stage1": drawn("stage1"), "stage2": drawn("stage2") });
    assert!(drawn == stored, "tests/fixtures/train/batches.json is to be\n{drawn}\nand make.py to be run again");
}
