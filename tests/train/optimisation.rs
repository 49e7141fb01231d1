//! What a step does with its gradients, and that none of it is lost when a run goes on.

use super::{Bench, fails_with, stderr, succeeds, values, vq};
use vqrae::weights::{Tensors, read_file};

impl Bench {
    /// A file of a checkpoint.
    pub(super) fn tensors(&self, run: &str, step: usize, file: &str) -> Tensors {
        let path = self.path(run).join(format!("checkpoints/step-{step:08}/{file}.safetensors"));
        read_file(&path).expect("a checkpoint")
    }

    /// `from`, as a kill after `step` leaves it.
    pub(super) fn cut(&self, from: &str, to: &str, step: usize) {
        let (from, to) = (self.path(from), self.path(to));
        copy(&from, &to);
        for entry in std::fs::read_dir(to.join("checkpoints")).expect("checkpoints") {
            let path = entry.expect("a checkpoint").path();
            if *path.file_name().expect("a name") > *format!("step-{step:08}") {
                std::fs::remove_dir_all(path).expect("a checkpoint");
            }
        }
    }
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let path = entry.expect("a file").path();
        let target = to.join(path.file_name().expect("a name"));
        if path.is_dir() {
            copy(&path, &target);
        } else {
            std::fs::copy(&path, &target).expect("copying");
        }
    }
}

pub(super) fn sets<'a>(wishes: &[&'a str]) -> Vec<&'a str> {
    wishes.iter().flat_map(|wish| ["--set", wish]).collect()
}

/// The largest difference of two files' tensors. Key biases are left out: their gradient is zero but for rounding, which
/// AdamW makes as large as any other.
fn off(a: &Tensors, b: &Tensors) -> f32 {
    let differences = a.iter().filter(|(name, _)| !name.ends_with("k_proj.bias")).map(|(name, a)| {
        let (a, b) = (values(a), values(&b[name]));
        a.iter().zip(&b).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()))
    });
    differences.fold(0.0, f32::max)
}

#[test]
fn gradients_accumulated_over_parts_are_those_of_the_whole_batch() {
    let residual = r#"model.quantizer={type="residual",levels=3,level={codebook_size=16,codebook_dim=6,ema={threshold_ema_dead_code=0.5},init="kmeans"},quantize_dropout=true}"#;
    let of_vq = vq(", ema={threshold_ema_dead_code=0.6}, init=\"kmeans\"");
    let simvq: [&str; 0] = [];
    let bench = Bench::new();
    for (i, quantizer) in [
        simvq.to_vec(),
        of_vq.iter().map(String::as_str).collect(),
        vec!["--set", residual, "--set", "start={from=\"random\"}"],
    ]
    .iter()
    .enumerate()
    {
        let (whole, parts) = (format!("whole{i}"), format!("parts{i}"));
        let mut wishes = sets(&["train.batch_size=4", "train.keep_checkpoints=99", "train.validate_every=0"]);
        wishes.extend(quantizer);
        succeeds(&bench.train(&whole, &wishes));
        wishes.extend(["--set", "train.accumulate=2"]);
        succeeds(&bench.train(&parts, &wishes));
        // The first moments of step 1 are a tenth of the gradients.
        let gradients = |run: &str| bench.tensors(run, 1, "optimizer");
        let gradient = off(&gradients(&whole), &gradients(&parts));
        assert!(gradient < 1e-7, "case {i}: gradients are off by {gradient:e}");
        let weights = |run: &str| bench.tensors(run, 12, "model");
        let weight = off(&weights(&whole), &weights(&parts));
        assert!(weight < 2e-6, "case {i}: weights are off by {weight:e} after 12 steps");
    }
    fails_with(&bench.train("x", &["--set", "train.accumulate=2"]), &["train.accumulate", "divisor", "batch_size = 3"]);
}

#[test]
fn blocks_that_are_computed_again_give_the_same_bits() {
    let bench = Bench::new();
    let deep = ["model.encoder.num_hidden_layers=2", "start={from=\"random\"}", "train.validate_every=0"];
    let frozen = ["groups.encoder={peak=0}"];
    for (i, more) in [&[][..], &frozen[..]].into_iter().enumerate() {
        let mut wishes = sets(&deep);
        wishes.extend(sets(more));
        succeeds(&bench.train(&format!("kept{i}"), &wishes));
        wishes.extend(["--set", "train.checkpoint_blocks=true"]);
        succeeds(&bench.train(&format!("again{i}"), &wishes));
        let of = |run: &str| bench.checkpoint(&format!("{run}{i}"), 12);
        assert!(of("kept") == of("again"), "the weights or moments differ, case {i}");
    }
}

#[test]
fn products_in_bf16_train_nearly_as_those_in_f32() {
    let bench = Bench::new();
    let last = |run: &str, more: &str| {
        succeeds(&bench.train(run, &["--set", "start={from=\"random\"}", "--set", more]));
        let log = bench.log(run);
        log.iter()
            .filter_map(|line| line["terms"]["reconstruction"].as_f64())
            .next_back()
            .expect("a line of the last step")
    };
    let (f32, bf16) = (last("f32", "train.compute=\"f32\""), last("bf16", "train.compute=\"bf16\""));
    assert!((bf16 / f32 - 1.0).abs() < 0.02 && bf16 != f32, "f32 {f32}, bf16 {bf16}");
    // Weights and moments of both are f32.
    let of = |run: &str| bench.tensors(run, 12, "model");
    for (name, tensor) in of("bf16") {
        assert_eq!(tensor.dtype(), vqrae::DType::F32, "{name}");
        assert!(values(&tensor).iter().zip(values(&of("f32")[&name])).all(|(a, b)| (a - b).abs() < 0.02), "{name}");
    }
}

#[test]
fn the_average_of_the_weights_is_saved_validated_and_written() {
    let bench = Bench::new();
    let wishes = sets(&["train.ema_decay=0.75", "train.keep_checkpoints=99", "train.validate_every=1"]);
    succeeds(&bench.train("run", &wishes));
    let raw = |step| bench.tensors("run", step, "model");
    for step in 2..=12 {
        let (before, now, raw) =
            (bench.tensors("run", step - 1, "average"), bench.tensors("run", step, "average"), raw(step));
        for (name, now) in &now {
            let pairs = values(&before[name]).into_iter().zip(values(&raw[name]));
            let expected: Vec<f32> = pairs.map(|(old, new)| 0.75 * old + 0.25 * new).collect();
            assert!(values(now) == expected, "{name} after step {step}");
        }
    }
    // model/ is the best validation's, so it is the average of its step and not that step's weights.
    let best = std::fs::read_to_string(bench.path("run/checkpoints/step-00000012/state.json")).expect("a state");
    let best: serde_json::Value = serde_json::from_str(&best).expect("JSON");
    let step = best["best"][1].as_u64().expect("a step") as usize;
    assert!(step > 0, "training improved nothing");
    let (model, average) =
        (vqrae::weights::read(&bench.path("run/model")).expect("a model"), bench.tensors("run", step, "average"));
    let name = "decoder.head.weight";
    assert!(values(&model[name]) == values(&average[name]));
    assert!(values(&model[name]) != values(&raw(step)[name]));
}

#[test]
fn a_gradient_far_above_the_usual_is_skipped_and_too_many_end_the_run() {
    let bench = Bench::new();
    // Half of the usual is far above it for this guard, so every step after the first ten is skipped.
    let guard = [
        "train.guard=0.01",
        "train.ema_decay=0.9",
        "train.keep_checkpoints=99",
        "train.steps=40",
        "train.max_skipped=3",
    ];
    let output = bench.train("run", &sets(&guard));
    fails_with(
        &output,
        &["step 14:", "4 steps in a row", "train.max_skipped = 3", "step-00000013", "lower learning rate"],
    );
    assert!(stderr(&output).contains("step 11 is skipped: the gradients' norm is"), "{}", stderr(&output));
    for file in ["model", "optimizer", "average"] {
        let of = |step: usize| {
            let path = bench.path("run").join(format!("checkpoints/step-{step:08}/{file}.safetensors"));
            std::fs::read(path).expect("a checkpoint")
        };
        assert!(of(9) != of(10), "{file}: a step that was taken moves it");
        assert!(of(10) == of(13), "{file}: a step that was skipped does not");
    }
    let lines = bench.log("run");
    assert_eq!(lines.iter().filter_map(|line| line["skipped_steps"].as_u64()).next_back(), Some(2), "after 12 steps");
}

#[test]
fn everything_together_goes_on_to_the_same_bits() {
    let bench = Bench::new();
    succeeds(&bench.train("first", &sets(&["train.steps=2", "groups.encoder={peak=0}", "stage={name=\"codebook\"}"])));
    let from = bench.path("first");
    let mut wishes = sets(&[
        "stage={name=\"joint\"}",
        "train.accumulate=3",
        "train.ema_decay=0.9",
        "train.guard=1.2",
        "train.checkpoint_blocks=true",
        "train.sizes=[\"32x32\", \"16x48\", \"24x24\"]",
        "train.crop={scale=[0.3, 1.0]}",
        "train.keep_checkpoints=99",
        "groups.quantizer={peak=1e-3, schedule=\"constant\", warmup_steps=0}",
        "train.steps=24",
    ]);
    wishes.extend(["--from", from.to_str().expect("a path")]);
    succeeds(&bench.train("whole", &wishes));
    let skipped = bench.log("whole").iter().filter_map(|line| line["skipped_steps"].as_u64()).max();
    assert!(skipped > Some(0), "the guard skipped nothing, so the test shows less than it says");
    bench.cut("whole", "cut", 13);
    succeeds(&bench.train("cut", &wishes));
    assert!(bench.checkpoint("whole", 24) == bench.checkpoint("cut", 24), "the weights differ");
    let (whole, cut) = (bench.tensors("whole", 24, "average"), bench.tensors("cut", 24, "average"));
    assert!(whole.iter().all(|(name, average)| values(average) == values(&cut[name])), "the averages differ");
    let state =
        |run: &str| std::fs::read(bench.path(run).join("checkpoints/step-00000024/state.json")).expect("a state");
    assert!(state("whole") == state("cut"), "the guard or the best differ");
}
