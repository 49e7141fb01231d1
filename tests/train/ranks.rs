//! Several ranks, threads on the CPU: they take the step of one rank with the whole batch, and stop, fail and go on together.
//!
//! Ranks compare their weights, moments and averages before every checkpoint, which `train.checkpoint_every = 1` makes every
//! step here: a run that comes to its end has had the same bits on all ranks all the way.

use std::collections::HashMap;

use vqrae::weights::{self, Tensors};

use super::gan::{RATE, SMALL, dino};
use super::optimisation::sets;
use super::stages::joint;
use super::{Bench, fails_with, stderr, succeeds, values, vq};

/// Four images a step, all checkpoints kept, every step logged.
const WISHES: [&str; 4] =
    ["train.batch_size=4", "train.keep_checkpoints=99", "train.validate_every=0", "train.log_every=1"];

/// Name by name, differences of at most `tolerance` of a tensor's largest value, and 5e-7 of the largest of all, which
/// gradients need that are zero but for rounding. Key biases are left out: AdamW makes their rounding as large as any step.
#[track_caller]
fn same(what: &str, one: &Tensors, several: &Tensors, tolerance: f32) {
    assert_eq!(one.keys().collect::<Vec<_>>(), several.keys().collect::<Vec<_>>(), "{what}");
    let largest = |values: &[f32]| values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let floats = one.values().filter(|tensor| tensor.dtype().is_float());
    let of_all = floats.map(|tensor| largest(&values(tensor))).fold(0f32, f32::max);
    for (name, one) in one.iter().filter(|(name, tensor)| !name.ends_with("k_proj.bias") && tensor.dtype().is_float()) {
        let (one, several) = (values(one), values(&several[name]));
        let off = largest(&one.iter().zip(&several).map(|(a, b)| a - b).collect::<Vec<_>>());
        let allowed = tolerance * largest(&one) + 5e-7 * of_all;
        assert!(off <= allowed, "{what}: {name} is off by {off:e}, allowed: {allowed:e}");
    }
}

/// The first step of one rank and of several: losses and every gradient are the same but for the order of sums, codes are
/// the same.
#[track_caller]
fn first_steps_agree(bench: &Bench, one: &str, several: &str) {
    // The first moments of step 1 are a tenth of the gradients.
    let gradients = |run: &str| {
        let all = bench.tensors(run, 1, "optimizer");
        all.into_iter().filter(|(name, _)| name.starts_with("first.")).collect::<Tensors>()
    };
    same(several, &gradients(one), &gradients(several), 2e-5);
    let line = |run: &str| bench.log(run).into_iter().find(|line| line["loss"].is_f64()).expect("a line");
    let (one, several) = (line(one), line(several));
    for key in ["usage", "perplexity", "images_per_step"] {
        assert_eq!(one[key], several[key], "{key}: the ranks' codes are not those of the whole batch");
    }
    let terms = one["terms"].as_object().expect("terms");
    assert!(terms.keys().eq(several["terms"].as_object().expect("terms").keys()));
    let numbers = terms.iter().map(|(name, value)| (name.as_str(), value, &several["terms"][name]));
    for (name, one, several) in numbers.chain([("loss", &one["loss"], &several["loss"])]) {
        let (one, several) = (one.as_f64().expect("a number"), several.as_f64().expect("a number"));
        assert!((one - several).abs() <= 2e-5 * one.abs().max(1e-3), "{name}: {one} and {several}");
    }
}

#[test]
fn ranks_take_the_step_of_one_with_the_whole_batch() {
    let bench = Bench::new();
    let wishes = sets(&WISHES);
    succeeds(&bench.train("one", &wishes));
    let last = |run: &str| bench.tensors(run, 12, "model");
    for ranks in ["2", "4"] {
        let run = format!("ranks{ranks}");
        succeeds(&bench.train(&run, &[&wishes[..], &["--ranks", ranks]].concat()));
        first_steps_agree(&bench, "one", &run);
        same(&run, &last("one"), &last(&run), 1e-4);
    }
    // Two ranks of two parts each.
    succeeds(&bench.train("parts", &[&wishes[..], &["--ranks", "2", "--set", "train.accumulate=2"]].concat()));
    first_steps_agree(&bench, "one", "parts");
    // Sums in the order of the ranks: the same bits every time.
    succeeds(&bench.train("again", &[&wishes[..], &["--ranks", "4"]].concat()));
    assert!(bench.checkpoint("ranks4", 12) == bench.checkpoint("again", 12), "the order of sums changes");
}

#[test]
fn a_codebook_that_starts_from_features_does_so_from_those_of_all_ranks() {
    let bench = Bench::new();
    let more = ["start={from=\"random\"}", "model.quantizer.transform_init=\"data\"", "train.ema_decay=0.9"];
    let wishes = sets(&[&WISHES[..], &more, &["train.steps=3"]].concat());
    succeeds(&bench.train("one", &wishes));
    succeeds(&bench.train("two", &[&wishes[..], &["--ranks", "2"]].concat()));
    first_steps_agree(&bench, "one", "two");
    for file in ["model", "average"] {
        let of_quantizer = |run: &str| {
            let all = bench.tensors(run, 1, file).into_iter();
            all.filter(|(name, _)| name.starts_with("quantizer.transform")).collect::<Tensors>()
        };
        same(file, &of_quantizer("one"), &of_quantizer("two"), 1e-5);
    }
}

#[test]
fn moving_averages_are_those_of_the_whole_batch() {
    let residual = r#"model.quantizer={type="residual",levels=3,level={codebook_size=16,codebook_dim=6,ema={threshold_ema_dead_code=0.5},init="kmeans"},quantize_dropout=true}"#;
    let product = r#"model.quantizer={type="product",groups=2,group={levels=2,shared_codebook=true,level={codebook_size=16,codebook_dim=4,ema={threshold_ema_dead_code=0.9},init="data"}}}"#;
    let of_vq = vq(", ema={threshold_ema_dead_code=0.9}, init=\"kmeans\"");
    let bench = Bench::new();
    for (i, quantizer) in [
        of_vq.iter().map(String::as_str).collect(),
        vec!["--set", residual, "--set", "start={from=\"random\"}"],
        vec!["--set", product, "--set", "start={from=\"random\"}"],
    ]
    .into_iter()
    .enumerate()
    {
        let (one, two) = (format!("one{i}"), format!("two{i}"));
        let wishes = [sets(&WISHES), quantizer].concat();
        succeeds(&bench.train(&one, &wishes));
        succeeds(&bench.train(&two, &[&wishes[..], &["--ranks", "2"]].concat()));
        first_steps_agree(&bench, &one, &two);
        let averages = |run: &str| {
            let of_name = |name: &str| ["cluster_size", "embed_avg", "codebook"].iter().any(|end| name.ends_with(end));
            let all = bench.tensors(run, 1, "model").into_iter();
            all.filter(|(name, _)| of_name(name)).collect::<Tensors>()
        };
        let (one, two) = (averages(&one), averages(&two));
        assert!(one.len() >= 3, "{:?}", one.keys());
        for (name, one) in one.iter().filter(|(name, _)| name.ends_with("cluster_size")) {
            assert!(values(one) == values(&two[name]), "{name}: codes were counted otherwise");
        }
        same(&format!("case {i}"), &one, &two, 2e-7);
    }
}

#[test]
fn a_discriminator_learns_from_all_ranks_and_judges_for_all() {
    let bench = Bench::new();
    let file = bench.path("dino.safetensors");
    weights::write(&file, &dino(), HashMap::new()).expect("a file");
    let more = "adaptive=true, lecam=0.3, augment={probability=0.7, cutout=0.3}";
    let gans = [
        format!("gan={{discriminator=\"nlayer\", {more}, {SMALL}}}"),
        format!("gan={{discriminator=\"dino\", weights={file:?}, {more}, loss=\"vanilla\", dino={{taps=[0]}}}}"),
    ];
    for (i, gan) in gans.iter().enumerate() {
        let (one, two) = (format!("one{i}"), format!("two{i}"));
        let wishes = sets(&[&WISHES[..], &[gan, RATE, "train.steps=4"]].concat());
        succeeds(&bench.train(&one, &wishes));
        succeeds(&bench.train(&two, &[&wishes[..], &["--ranks", "2"]].concat()));
        first_steps_agree(&bench, &one, &two);
        let gan = |run: &str, step: usize, part: &str| {
            let all = bench.tensors(run, step, "gan").into_iter();
            all.filter(|(name, _)| name.starts_with(part)).collect::<Tensors>()
        };
        same("discriminator's gradients", &gan(&one, 1, "first."), &gan(&two, 1, "first."), 2e-4);
        same("LeCam's averages", &gan(&one, 4, "lecam."), &gan(&two, 4, "lecam."), 1e-3);
        let lecam = bench.log(&two).iter().filter_map(|line| line["terms"]["lecam"].as_f64()).fold(0.0, f64::max);
        assert!(lecam > 0.0, "LeCam had no say");
    }
}

#[test]
fn distillation_of_several_ranks_is_that_of_one() {
    let bench = Bench::new();
    let wishes = sets(&[&WISHES[..], &["stage={name=\"joint\", distillation={weight=3}}"]].concat());
    succeeds(&joint(&bench, "one", &wishes));
    succeeds(&joint(&bench, "two", &[&wishes[..], &["--ranks", "2"]].concat()));
    first_steps_agree(&bench, "one", "two");
    let distillation = |run: &str| bench.log(run)[5]["terms"]["distillation"].as_f64().expect("a term");
    let (one, two) = (distillation("one"), distillation("two"));
    assert!(one > 0.0 && (one - two).abs() < 1e-3 * one, "{one} and {two}");
}

#[test]
fn ranks_that_were_stopped_go_on_to_the_same_bits_and_in_another_number() {
    let bench = Bench::new();
    let two = ["--ranks", "2"];
    let wishes = vq(", ema={threshold_ema_dead_code=0.6}, init=\"kmeans\"");
    let wishes = [sets(&WISHES), wishes.iter().map(String::as_str).collect()].concat();
    let with_ranks = [&wishes[..], &two].concat();
    succeeds(&bench.train("whole", &with_ranks));
    bench.cut("whole", "cut", 5);
    succeeds(&bench.train("cut", &with_ranks));
    assert!(bench.checkpoint("whole", 12) == bench.checkpoint("cut", 12), "the weights differ");
    bench.cut("whole", "one", 5);
    succeeds(&bench.train("one", &wishes));
    same("on one rank", &bench.tensors("whole", 12, "model"), &bench.tensors("one", 12, "model"), 1e-3);
}

#[cfg(unix)]
#[test]
fn an_interrupt_stops_all_ranks_at_the_same_step() {
    let bench = Bench::new();
    let wishes = sets(&["train.batch_size=4", "train.steps=400", "train.checkpoint_every=0", "train.validate_every=0"]);
    let wishes = [&wishes[..], &["--ranks", "2"]].concat();
    bench.interrupt("cut", &wishes);
}

#[test]
fn what_one_rank_skips_is_told_and_counted_once() {
    let bench = Bench::new();
    std::fs::write(bench.path("photos/bad.jpg"), "no photo").expect("a file");
    let wishes = sets(&[&WISHES[..], &["train.steps=5"]].concat());
    let run = |name: &str, more: &[&str]| {
        let output = bench.train(name, &[&wishes[..], more].concat());
        succeeds(&output);
        let told =
            stderr(&output).lines().filter(|line| line.starts_with("skipped") && line.contains("bad.jpg")).count();
        let line = bench.log(name).into_iter().rfind(|line| line["loss"].is_f64()).expect("a line");
        let counted = line["skipped_photos"].as_u64().expect("a number");
        (told, counted)
    };
    let one = run("one", &[]);
    assert_eq!(one, run("four", &["--ranks", "4"]));
    assert!(one.1 > 1, "{one:?}");
}

#[test]
fn ranks_and_devices_that_cannot_be_are_refused() {
    let bench = Bench::new();
    let words = ["train.batch_size is 3", "2 ranks", "multiple of 2"];
    fails_with(&bench.train("x", &["--ranks", "2"]), &words);
    let parts = sets(&["train.batch_size=6", "train.accumulate=2"]);
    fails_with(&bench.train("x", &[&parts[..], &["--ranks", "2"]].concat()), &["multiple of 4"]);
    if cfg!(not(feature = "cuda")) {
        fails_with(
            &bench.train("x", &["--device", "cuda:0,1"]),
            &["built without CUDA", "--features cuda", "--device cpu"],
        );
    }
    let output = bench.train("x", &["--device", "cuda:0,0"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("card 0 is named twice"), "{}", stderr(&output));
}
