//! The adversarial part, through the binary.

use std::collections::HashMap;

use vqrae::weights::{self, Tensors};
use vqrae::{Device, Tensor};

use super::optimisation::sets;
use super::{Bench, fails_with, succeeds};

pub(super) const RATE: &str = "groups.discriminator={peak=2e-3, end=2e-3}";
pub(super) const SMALL: &str = "nlayer={width=32, stages=1}";
const KEEP: &str = "train.keep_checkpoints=99";

/// Of every line of the log that has it, a term.
fn term(bench: &Bench, run: &str, name: &str) -> Vec<(u64, f64)> {
    let value = |line: &serde_json::Value| Some((line["step"].as_u64()?, line["terms"][name].as_f64()?));
    bench.log(run).iter().filter_map(value).collect()
}

#[test]
fn with_a_discriminator_a_run_goes_on_to_the_same_bits_and_its_model_has_none_of_it() {
    let bench = Bench::new();
    let gan = format!(
        "gan={{discriminator=\"nlayer\", adaptive=true, generator_start=4, discriminator_start=2, \
         augment={{probability=0.7, cutout=0.3}}, {SMALL}}}"
    );
    let wishes = sets(&[&gan, RATE, KEEP, "train.ema_decay=0.9"]);
    succeeds(&bench.train("whole", &wishes));
    let steps = |name: &str| term(&bench, "whole", name).iter().map(|(step, _)| *step).collect::<Vec<_>>();
    assert_eq!(steps("discriminator"), [4, 6, 8, 10, 12]);
    assert_eq!(steps("generator_weight"), [6, 8, 10, 12]);
    let weights = term(&bench, "whole", "generator_weight");
    assert!(weights.iter().any(|(_, weight)| *weight != weights[0].1), "adaptive: {weights:?}");

    let file = |run: &str, step: usize| bench.path(run).join(format!("checkpoints/step-{step:08}/gan.safetensors"));
    let read = |step| weights::read_file(&file("whole", step)).expect("a checkpoint");
    let (early, late) = (read(3), read(12));
    for name in ["discriminator.block_in.0.weight", "first.discriminator.to_logits.2.bias", "lecam.real", "lecam.fake"]
    {
        let values = |tensors: &Tensors| tensors[name].flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("values");
        assert!(values(&early) != values(&late), "{name} did not move");
    }
    for step in [1, 5] {
        let run = format!("cut-{step}");
        bench.cut("whole", &run, step);
        succeeds(&bench.train(&run, &wishes));
        assert!(bench.checkpoint("whole", 12) == bench.checkpoint(&run, 12), "from {step}: the weights differ");
        let bytes = |run: &str| std::fs::read(file(run, 12)).expect("a checkpoint");
        assert!(bytes("whole") == bytes(&run), "from {step}: the discriminators differ");
    }
    let model = weights::read(&bench.path("whole/model")).expect("a model");
    assert!(model.keys().all(|name| ["encoder.", "quantizer.", "decoder."].iter().any(|part| name.starts_with(part))));

    std::fs::remove_file(file("whole", 12)).expect("a file");
    fails_with(&bench.train("whole", &wishes), &["discriminator", "missing"]);
}

#[test]
fn a_discriminator_learns_and_one_without_a_say_changes_nothing() {
    let bench = Bench::new();
    let gan = format!("gan={{discriminator=\"nlayer\", weight=0, {SMALL}}}");
    let steps = ["train.steps=40", "train.log_every=10", "train.validate_every=0", "train.checkpoint_every=0"];
    succeeds(&bench.train("with", &sets(&[&steps[..], &[&gan, RATE]].concat())));
    succeeds(&bench.train("without", &sets(&steps)));
    let losses = term(&bench, "with", "discriminator");
    let (first, last) = (losses[0].1, losses[3].1);
    assert!(last < 0.8 * first, "{losses:?}");
    assert!(term(&bench, "with", "generator").is_empty());
    assert!(bench.checkpoint("with", 40) == bench.checkpoint("without", 40), "the model was touched");
    let config = std::fs::read_to_string(bench.path("without/config.toml")).expect("a config");
    assert!(!config.contains("gan") && !config.contains("discriminator"), "{config}");
    assert!(!bench.path("without/checkpoints/step-00000040/gan.safetensors").exists());
}

/// A DINO of 8 channels, two blocks and 2×2 patches of 8 pixels.
pub(super) fn dino() -> Tensors {
    let block = |i: usize| {
        let of = move |name: &str, shape: &[usize]| (format!("blocks.{i}.{name}"), shape.to_vec());
        [
            of("norm1.weight", &[8]),
            of("norm1.bias", &[8]),
            of("attn.qkv.weight", &[24, 8]),
            of("attn.qkv.bias", &[24]),
            of("attn.proj.weight", &[8, 8]),
            of("attn.proj.bias", &[8]),
            of("norm2.weight", &[8]),
            of("norm2.bias", &[8]),
            of("mlp.fc1.weight", &[16, 8]),
            of("mlp.fc1.bias", &[16]),
            of("mlp.fc2.weight", &[8, 16]),
            of("mlp.fc2.bias", &[8]),
        ]
    };
    let around = [
        ("cls_token", vec![1, 1, 8]),
        ("pos_embed", vec![1, 5, 8]),
        ("patch_embed.proj.weight", vec![8, 3, 8, 8]),
        ("patch_embed.proj.bias", vec![8]),
        ("norm.weight", vec![8]),
        ("norm.bias", vec![8]),
    ];
    let all = around.map(|(name, shape)| (name.to_string(), shape)).into_iter().chain((0..2).flat_map(block));
    let value = |i: usize, at: usize| ((i * 31 + at * 17) as f32).sin() * 0.3;
    let tensor = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
        let values = (0..shape.iter().product()).map(|at| value(i, at)).collect::<Vec<_>>();
        (name, Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor"))
    };
    all.enumerate().map(tensor).collect()
}

#[test]
fn with_a_dino_a_run_goes_on_to_the_same_bits() {
    let bench = Bench::new();
    let file = bench.path("dino.safetensors");
    weights::write(&file, &dino(), HashMap::new()).expect("a file");
    let gan = format!("gan={{discriminator=\"dino\", weights={file:?}, loss=\"vanilla\", dino={{taps=[0]}}}}");
    let wishes = sets(&[&gan, RATE, KEEP, "train.batch_size=4", "train.accumulate=2"]);
    succeeds(&bench.train("whole", &wishes));
    assert!(term(&bench, "whole", "discriminator").iter().all(|(_, loss)| loss.is_finite()));
    bench.cut("whole", "cut", 5);
    succeeds(&bench.train("cut", &wishes));
    assert!(bench.checkpoint("whole", 12) == bench.checkpoint("cut", 12), "the weights differ");
    let file = |run: &str| std::fs::read(bench.path(run).join("checkpoints/step-00000012/gan.safetensors"));
    assert!(file("whole").expect("a file") == file("cut").expect("a file"), "the discriminators differ");
}

#[test]
fn a_section_that_makes_no_sense_is_refused_by_its_key() {
    let bench = Bench::new();
    let refused = |gan: &str, more: &[&str], words: &[&str]| {
        let gan = format!("gan={{{gan}}}");
        fails_with(&bench.train("run", &sets(&[&[gan.as_str()], more].concat())), words);
    };
    let nlayer = "discriminator=\"nlayer\"";
    refused(nlayer, &[], &["groups.discriminator"]);
    refused(&format!("{nlayer}, wait=3"), &[RATE], &["wait"]);
    refused(&format!("{nlayer}, discriminator_start=3"), &[RATE], &["gan.generator_start", "3"]);
    refused(&format!("{nlayer}, weights=\"x\""), &[RATE], &["gan.weights"]);
    refused(&format!("{nlayer}, nlayer={{width=48}}"), &[RATE], &["gan.nlayer.width", "48"]);
    refused(&format!("{nlayer}, augment={{cutout=2}}"), &[RATE], &["gan.augment.cutout"]);
    refused(&format!("{nlayer}, adaptive=true"), &[RATE, "groups.decoder={peak=0}"], &["gan.adaptive"]);
    refused("discriminator=\"dino\"", &[RATE], &["gan.weights"]);
    refused("discriminator=\"dino\", weights=\"nowhere\"", &[RATE], &["nowhere"]);
    fails_with(&bench.train("run", &sets(&[RATE])), &["groups.discriminator", "[gan]"]);
}
