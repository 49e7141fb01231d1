//! VQ, its moving averages, SimVQ's routes and the gradient estimators against vector_quantize_pytorch and plain PyTorch.

use std::collections::{BTreeMap, HashMap};

use candle_core::Var;
use candle_nn::VarBuilder;
use vqrae::quantizer::{Config, Quantizer};
use vqrae::weights::{Fresh, Tensors};
use vqrae::{DType, Device, Tensor};

use crate::compare::{PARITY, assert_close, assert_same_bits, fixture, noise, say, tensors_of};

const AVERAGES: [&str; 3] = ["codebook", "cluster_size", "embed_avg"];

/// The quantizers of fixtures/vq/make.py with what it says of them.
fn cases() -> Vec<(String, Config, HashMap<String, Tensor>)> {
    let configs = std::fs::read_to_string(fixture("vq/cases.json")).unwrap();
    let configs: BTreeMap<String, Config> = serde_json::from_str(&configs).unwrap();
    let of = |(case, config): (String, Config)| {
        let file = if case.starts_with("library_") { "library" } else { "formulas" };
        let expected = tensors_of(&fixture(&format!("vq/{file}.safetensors")), &case);
        config.check().unwrap();
        (case, config, expected)
    };
    configs.into_iter().map(of).collect()
}

/// A quantizer whose weights are all variables.
pub(crate) struct Trained {
    pub(crate) quantizer: Quantizer,
    pub(crate) variables: BTreeMap<String, Var>,
}

impl Trained {
    pub(crate) fn new(config: &Config, weights: &HashMap<String, Tensor>) -> Self {
        let variable = |(name, x): (&String, &Tensor)| (name.clone(), Var::from_tensor(x).unwrap());
        let variables: BTreeMap<String, Var> = weights.iter().map(variable).collect();
        let tensors = variables.iter().map(|(name, x)| (name.clone(), x.as_tensor().clone())).collect();
        let quantizer = load(config, tensors);
        Self { quantizer, variables }
    }

    pub(crate) fn set(&self, tensors: Tensors) {
        for (name, tensor) in tensors {
            self.variables[&name].set(&tensor).unwrap();
        }
    }

    /// A training step of the moving averages, whose random choices take the first ones.
    pub(crate) fn update(&self, features: &Tensor) {
        let quantized = self.quantizer.quantize(features).unwrap();
        self.set(self.quantizer.update(&quantized, &mut first).unwrap());
    }
}

pub(crate) fn load(config: &Config, tensors: HashMap<String, Tensor>) -> Quantizer {
    let width = |name: &str, side: usize| tensors[name].dim(side).unwrap();
    let (width_in, width_out) = (width("linear_in.weight", 1), width("linear_out.weight", 0));
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    Quantizer::load(vb, config, width_in, width_out).unwrap()
}

pub(crate) fn first(_: usize, amount: usize) -> Vec<usize> {
    (0..amount).collect()
}

/// The tensors of a case that stand below `weight.`.
pub(crate) fn weights(case: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    case.iter().filter_map(|(name, x)| Some((name.strip_prefix("weight.")?.to_string(), x.clone()))).collect()
}

fn json(config: &str) -> Config {
    serde_json::from_str(config).unwrap()
}

#[test]
fn tokens_indices_loss_and_every_gradient_equal_pytorch() {
    for (case, config, expected) in cases() {
        let trained = Trained::new(&config, &weights(&expected));
        let features = Var::from_tensor(&expected["features.0"]).unwrap();
        trained.set(trained.quantizer.first(|| Ok(features.as_tensor().clone()), &mut first).unwrap());

        let quantized = trained.quantizer.quantize(&features).unwrap();
        let loss = trained.quantizer.loss(&quantized).unwrap();
        let target = ((&quantized.tokens * &expected["upstream"]).unwrap().sum_all().unwrap() + &loss).unwrap();
        let grads = target.backward().unwrap();

        assert_same_bits(&format!("{case}: indices"), &quantized.indices, &expected["indices"]);
        let mut worst = assert_close(&format!("{case}: tokens"), &quantized.tokens, &expected["tokens"], PARITY);
        if case == "library_vq_learned" {
            // The library has one term with both gradients; ours has one for the codes, of weight 1, and one for the
            // features, of weight 0.7.
            let ours = (&expected["loss"] * (1.7 / 0.7)).unwrap();
            assert_close(&format!("{case}: loss"), &loss, &ours, PARITY);
        } else {
            worst = worst.max(assert_close(&format!("{case}: loss"), &loss, &expected["loss"], PARITY));
        }
        for (name, variable) in
            trained.variables.iter().map(|(name, x)| (name.as_str(), x)).chain([("features", &features)])
        {
            let what = format!("{case}: gradient of {name}");
            let frozen = config.is_frozen(name) || config.is_average(name);
            match (grads.get(variable), expected.get(&format!("gradient.{name}"))) {
                (Some(got), Some(expected)) => {
                    let weight = if case == "library_vq_learned" && name == "codebook" { 1.0 / 0.7 } else { 1.0 };
                    worst = worst.max(assert_close(&what, got, &(expected * weight).unwrap(), PARITY));
                }
                (None, Some(_)) => panic!("{what} is missing"),
                // The layers around the library's quantizer are ours alone.
                (Some(_), None) if case.starts_with("library_") && name.starts_with("linear_") => {}
                (Some(_), None) => panic!("{what} exists, but the tensor is frozen"),
                (None, None) => assert!(frozen, "{what} is missing"),
            }
        }
        say(&format!("{case}: {worst:.1e}"));
    }
}

#[test]
fn three_steps_of_moving_averages_equal_vector_quantize_pytorch() {
    let mut compared = 0;
    for (case, config, expected) in cases().into_iter().filter(|(_, _, x)| x.contains_key("after.0.codebook")) {
        let trained = Trained::new(&config, &weights(&expected));
        for step in 0..3 {
            let features = &expected[&format!("features.{step}")];
            trained.set(trained.quantizer.first(|| Ok(features.clone()), &mut first).unwrap());
            trained.update(features);
            for name in AVERAGES {
                let what = format!("{case}: {name} after step {step}");
                let worst =
                    assert_close(&what, &trained.variables[name], &expected[&format!("after.{step}.{name}")], PARITY);
                say(&format!("{what}: {worst:.1e}"));
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 8 * 3 * 3, "cases with moving averages");
}

#[test]
fn looking_codes_up_gives_the_tokens_of_quantising_bit_for_bit() {
    for (case, config, expected) in cases() {
        let weights = weights(&expected);
        let features = noise("features", &[3, 70, 6]);
        let quantizers =
            [("frozen", load(&config, weights.clone())), ("trained", Trained::new(&config, &weights).quantizer)];
        for (how, quantizer) in quantizers {
            let quantized = quantizer.quantize(&features).unwrap();
            let looked_up = quantizer.lookup(&quantized.indices).unwrap();
            assert_same_bits(&format!("{case}, {how}"), &looked_up, &quantized.tokens);
        }
    }
}

#[test]
fn averages_of_zero_stand_for_a_size_of_one_and_the_code_itself() {
    for (case, config, expected) in cases().into_iter().filter(|(case, ..)| case.starts_with("library_vq_ema")) {
        let begun = Trained::new(&config, &weights(&expected));
        let mut fresh = weights(&expected);
        for name in &AVERAGES[1..] {
            fresh.insert((*name).to_string(), fresh[*name].zeros_like().unwrap());
        }
        let fresh = Trained::new(&config, &fresh);
        begun.update(&expected["features.0"]);
        fresh.update(&expected["features.0"]);
        for name in AVERAGES {
            assert_same_bits(&format!("{case}: {name}"), &fresh.variables[name], &begun.variables[name]);
        }
    }
}

#[test]
fn saved_averages_go_on_to_the_same_bits() {
    for (case, config, expected) in cases().into_iter().filter(|(case, ..)| case.contains("restart")) {
        let whole = Trained::new(&config, &weights(&expected));
        (0..3).for_each(|step| whole.update(&expected[&format!("features.{step}")]));

        let half = Trained::new(&config, &weights(&expected));
        half.update(&expected["features.0"]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("quantizer.safetensors");
        let tensors = half.variables.iter().map(|(name, x)| (name.clone(), x.as_detached_tensor())).collect();
        vqrae::weights::write(&path, &tensors, HashMap::new()).unwrap();
        let rest = Trained::new(&config, &vqrae::weights::read_file(&path).unwrap().into_iter().collect());
        (1..3).for_each(|step| rest.update(&expected[&format!("features.{step}")]));
        for name in AVERAGES {
            assert_same_bits(&format!("{case}: {name}"), &rest.variables[name], &whole.variables[name]);
        }
    }
}

#[test]
fn a_codebook_of_data_holds_features_and_starts_once() {
    for ema in ["", r#","ema":{}"#] {
        let config =
            json(&format!(r#"{{"type":"vq","codebook_size":5,"codebook_dim":6,"init":"data","norm":"scale"{ema}}}"#));
        let tensors = Fresh::new(7, Tensors::new()).make(|vb| Quantizer::load(vb, &config, 6, 4)).unwrap();
        let trained = Trained::new(&config, &tensors.into_iter().collect());
        let features = noise("features", &[2, 9, 6]);
        let begin = |features: &Tensor| {
            let made = trained.quantizer.first(|| Ok(features.clone()), &mut first).unwrap();
            let some = !made.is_empty();
            trained.set(made);
            some
        };
        assert!(begin(&features));
        let quantized = trained.quantizer.quantize(&features).unwrap();
        let drawn = quantized.projected.narrow(0, 0, 1).unwrap().narrow(1, 0, 5).unwrap();
        // Laplace smoothing leaves sizes of one at one, to rounding.
        assert_close("codes", trained.variables["codebook"].as_tensor(), &drawn.squeeze(0).unwrap(), PARITY);
        assert!(!begin(&noise("other", &[2, 9, 6])), "it started twice");
    }
}

#[test]
fn fresh_codebooks_are_spread_as_their_names_say() {
    for (init, deviation) in [("kaiming_uniform", (2.0f64 / 16.0).sqrt()), ("normal", 1.0)] {
        let config =
            json(&format!(r#"{{"type":"vq","codebook_size":2000,"codebook_dim":16,"init":"{init}","ema":{{}}}}"#));
        let tensors = Fresh::new(7, Tensors::new()).make(|vb| Quantizer::load(vb, &config, 6, 4)).unwrap();
        let square = tensors["codebook"].sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        assert!((f64::from(square).sqrt() / deviation - 1.0).abs() < 0.02, "{init}: {square}");
        let names: Vec<&str> = tensors.keys().map(String::as_str).collect();
        let layers = ["linear_in.bias", "linear_in.weight", "linear_out.bias", "linear_out.weight"];
        let expected: Vec<&str> = ["cluster_size", "codebook", "embed_avg"].into_iter().chain(layers).collect();
        assert_eq!(names, expected);
    }
}

#[test]
fn hsq_keeps_lengths_and_does_not_route_by_them() {
    // By distance (1, 0.9) is nearest to the short code, by angle to the long one, whose length the decoder sees.
    for (metric, code) in [("euclidean", [1f32, 0.]), ("hsq", [30., 30.]), ("cosine", [0.5f32.sqrt(), 0.5f32.sqrt()])] {
        let config = json(&format!(r#"{{"type":"vq","codebook_size":2,"codebook_dim":2,"metric":"{metric}"}}"#));
        let tensor = |values: &[f32], shape: &[usize]| Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
        let (unit, zero) = (tensor(&[1., 0., 0., 1.], &[2, 2]), tensor(&[0., 0.], &[2]));
        let weights = [
            ("linear_in.weight", unit.clone()),
            ("linear_in.bias", zero.clone()),
            ("linear_out.weight", unit),
            ("linear_out.bias", zero),
            ("codebook", tensor(&[1., 0., 30., 30.], &[2, 2])),
        ];
        let quantizer = load(&config, weights.into_iter().map(|(name, x)| (name.to_string(), x)).collect());
        let features = Tensor::new(&[[[1f32, 0.9]]], &Device::Cpu).unwrap();
        let tokens = quantizer.quantize(&features).unwrap().tokens.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(tokens.iter().zip(code).all(|(token, code)| (token - code).abs() < 1e-6), "{metric}: {tokens:?}");
    }
}

#[test]
fn a_config_that_makes_no_sense_is_refused_by_its_key() {
    for (keys, word) in [
        (r#""ema":{"decay":1.0}"#, "ema.decay"),
        (r#""ema":{"eps":0.0}"#, "ema.eps"),
        (r#""ema":{"threshold_ema_dead_code":-1.0}"#, "ema.threshold_ema_dead_code"),
        (r#""ema":{"reset_cluster_size":-1.0}"#, "ema.reset_cluster_size"),
        (r#""metric":"hsq","ema":{}"#, "hsq"),
        (r#""metric":"cosine","norm":"scale""#, "scale"),
        (r#""ema":{},"train_codebook":false"#, "train_codebook"),
        (r#""entropy":{"temperature":0.0}"#, "entropy.temperature"),
        (r#""codebook_size":0"#, "codebook_size"),
        (r#""commitment_cost":-1.0"#, "commitment_cost"),
    ] {
        let error = json(&format!(r#"{{"type":"vq",{keys}}}"#)).check().unwrap_err();
        assert!(error.contains(word), "{keys}: {error}");
    }
    assert!(serde_json::from_str::<Config>(r#"{"type":"vq","ema":{"decai":0.9}}"#).is_err());
    assert!(serde_json::from_str::<Config>(r#"{"type":"simvq","gradient":"rotate"}"#).is_err());
}

#[test]
fn keys_at_their_defaults_are_not_written() {
    let config = json(r#"{"type":"simvq","gradient":"straight_through","norm":"none"}"#);
    let text = serde_json::to_string(&config).unwrap();
    assert!(!text.contains("gradient") && !text.contains("norm"), "{text}");
    let config = json(r#"{"type":"simvq","gradient":"dynamic_ste","norm":"layer_norm"}"#);
    assert_eq!(json(&serde_json::to_string(&config).unwrap()), config);
}
