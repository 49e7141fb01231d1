//! The paper's two stages: what is frozen, what is trained, and the teacher that holds it.

use serde_json::Value;

use super::{Bench, fails_with, stderr, succeeds, values};

const CODEBOOK: [&str; 6] =
    ["--set", "stage={name=\"codebook\"}", "--set", "groups.encoder={peak=0}", "--set", "train.steps=4"];

/// Stage 1 and then stage 2 with these wishes.
pub(super) fn joint(bench: &Bench, run: &str, more: &[&str]) -> std::process::Output {
    if !bench.path("first").exists() {
        succeeds(&bench.train("first", &CODEBOOK));
    }
    let from = bench.path("first");
    let mut wishes = vec!["--from", from.to_str().expect("a path"), "--set", "train.log_every=1"];
    wishes.extend(more);
    bench.train(run, &wishes)
}

fn distillation(log: &[Value]) -> Vec<f64> {
    log.iter().filter_map(|line| line["terms"]["distillation"].as_f64()).collect()
}

#[test]
fn joint_training_moves_every_tensor_of_the_encoder() {
    let bench = Bench::new();
    succeeds(&joint(&bench, "second", &["--set", "stage={name=\"joint\"}"]));
    let read = |run: &str| vqrae::weights::read(&bench.path(run)).expect("a model");
    let (first, second) = (read("first/model"), read("second/checkpoints/step-00000012"));
    for (name, tensor) in first {
        let same = values(&tensor) == values(&second[&name]);
        assert_eq!(same, name == "quantizer.codebook", "{name}");
    }
}

#[test]
fn distillation_holds_the_features_to_those_of_the_original_encoder() {
    let bench = Bench::new();
    let drift = |run: &str, weight: &str| {
        let stage = format!("stage={{name=\"joint\", distillation={{weight={weight}}}}}");
        succeeds(&joint(&bench, run, &["--set", &stage, "--set", "train.steps=20"]));
        let terms = distillation(&bench.log(run));
        assert_eq!(terms.len(), 20, "{weight}");
        // Before the first step the student is the teacher, bit for bit.
        assert_eq!(terms[0], 0.0, "{weight}");
        terms[19]
    };
    let (free, held) = (drift("free", "1e-9"), drift("held", "10"));
    assert!(free > 4.0 * held && held > 0.0, "drift {free} without, {held} with distillation");
    succeeds(&joint(&bench, "none", &["--set", "stage={name=\"joint\", distillation={weight=0}}"]));
    assert!(distillation(&bench.log("none")).is_empty(), "a weight of zero has no teacher");
}

#[test]
fn the_teacher_is_the_original_encoder_and_the_same_when_a_run_goes_on() {
    let bench = Bench::new();
    let stage = ["--set", "stage={name=\"joint\"}", "--set", "train.keep_checkpoints=99"];
    succeeds(&joint(&bench, "second", &stage));

    // A run that goes on with another teacher in the folder is refused.
    bench.cut("second", "cut", 5);
    let file = bench.path("first/model/model.safetensors");
    let original = std::fs::read(&file).expect("a model");
    std::fs::copy(bench.path("second/model/model.safetensors"), &file).expect("copying");
    fails_with(&joint(&bench, "cut", &stage), &["teacher is another one", "--output-dir"]);
    std::fs::write(&file, original).expect("a write");
    succeeds(&joint(&bench, "cut", &stage));
    assert!(bench.checkpoint("second", 12) == bench.checkpoint("cut", 12), "the weights differ");

    // The encoder of a second stage is no original; the first one's folder, named, is.
    let from = bench.path("second");
    let from = ["--from", from.to_str().expect("a path")];
    fails_with(
        &bench.train("third", &[&from[..], &stage].concat()),
        &["second/config.toml", "stage.distillation.teacher"],
    );
    let teacher = bench.path("first/model");
    let named = format!("stage={{name=\"joint\", distillation={{teacher={:?}}}}}", teacher.to_str().expect("a path"));
    succeeds(&bench.train("third", &[&from[..], &["--set", &named, "--set", "train.log_every=1"]].concat()));
    assert!(distillation(&bench.log("third"))[0] > 0.0, "the student has drifted from the original already");
}

#[test]
fn the_starting_documents_distillation_compares_codes_with_features() {
    let bench = Bench::new();
    let stage = ["--set", "stage={name=\"joint\", distillation={weight=2, target=\"quantized\"}}"];
    succeeds(&joint(&bench, "second", &stage));
    let terms = distillation(&bench.log("second"));
    assert!(terms.iter().all(|&term| term > 0.0), "{terms:?}");
    let line = &bench.log("second")[1];
    let sum = line["terms"]["reconstruction"].as_f64().expect("a term")
        + line["terms"]["quantizer"].as_f64().expect("a term");
    assert!((line["loss"].as_f64().expect("a loss") - sum - 2.0 * terms[0]).abs() < 1e-5, "{line}");
    let narrow = [
        "--set",
        "start={from=\"random\"}",
        "--set",
        "model.decoder.hidden_size=16",
        "--set",
        "model.decoder.intermediate_size=24",
    ];
    fails_with(
        &bench.train("x", &[&stage[..], &narrow].concat()),
        &["32 wide", "16 wide", "model.decoder.hidden_size"],
    );
}

#[test]
fn a_stage_and_rates_that_say_different_things_are_refused() {
    let bench = Bench::new();
    fails_with(&bench.train("x", &["--set", "stage={name=\"codebook\"}"]), &["codebook", "groups.encoder.peak = 0"]);
    let still = ["--set", "stage={name=\"joint\"}", "--set", "groups.encoder={peak=0}"];
    fails_with(&bench.train("x", &still), &["joint", "groups.encoder.peak"]);
    fails_with(&bench.train("x", &["--set", "stage={name=\"joint\"}"]), &["stage.distillation.teacher", "start.from"]);
    fails_with(&bench.train("x", &["--set", "stage={name=\"third\"}"]), &["third", "codebook"]);
}

#[test]
fn positions_that_are_interpolated_are_told() {
    let bench = Bench::new();
    let short = ["--set", "train.steps=1", "--set", "start={from=\"random\"}"];
    let output = bench.train("own", &short);
    succeeds(&output);
    assert!(!stderr(&output).contains("interpolated"), "{}", stderr(&output));
    let output = bench.train("other", &[&short[..], &["--set", "train.sizes=[\"24x48\"]"]].concat());
    succeeds(&output);
    assert!(stderr(&output).contains("made for 4x4 patches, are interpolated to 3x6"), "{}", stderr(&output));
}
