//! FSQ, LFQ and BSQ, residual and product quantizers against vector_quantize_pytorch, and every quantizer in a model.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::Var;
use candle_nn::VarBuilder;
use vqrae::image::{Preprocessor, Resample};
use vqrae::quantizer::{self, DROPPED, Quantized, Quantizer};
use vqrae::weights::{Fresh, Tensors};
use vqrae::{Config, DType, Device, Tensor, Vqrae, encoder, model};

use crate::compare::{PARITY, assert_close, assert_same_bits, fixture, noise, say, tensors_of};
use crate::vq::{Trained, first, load, weights};

/// The quantizers of fixtures/quantizers/make.py, and how many times the reference's loss theirs is.
fn cases() -> BTreeMap<String, (quantizer::Config, f64)> {
    serde_json::from_str(&std::fs::read_to_string(fixture("quantizers/cases.json")).unwrap()).unwrap()
}

fn expected(case: &str) -> HashMap<String, Tensor> {
    tensors_of(&fixture("quantizers/quantizers.safetensors"), case)
}

/// The case's tensors between projections that are the identity.
fn identity(config: &quantizer::Config, case: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    let (e, cpu) = (config.width(), &Device::Cpu);
    let mut tensors = weights(case);
    for name in ["linear_in", "linear_out"] {
        tensors.insert(format!("{name}.weight"), Tensor::eye(e, DType::F32, cpu).unwrap());
        tensors.insert(format!("{name}.bias"), Tensor::zeros(e, DType::F32, cpu).unwrap());
    }
    tensors
}

/// Number of levels that were kept, from the first token's codes.
fn kept(indices: &Tensor) -> usize {
    let first = indices.get(0).unwrap().get(0).unwrap().flatten_all().unwrap().to_vec1::<u32>().unwrap();
    first.iter().filter(|&&index| index != DROPPED).count()
}

/// Quantises with the levels that the reference kept, some seed of ours keeping as many.
fn quantize(quantizer: &Quantizer, features: &Tensor, expected: &Tensor) -> Quantized {
    let mut made = (0..100).map(|seed| quantizer.quantize_in_training(features, seed).unwrap());
    made.find(|quantized| kept(&quantized.indices) == kept(expected)).expect("a seed that keeps as many levels")
}

#[test]
fn quantizers_equal_vector_quantize_pytorch_in_tokens_indices_loss_and_every_gradient() {
    for (case, (config, loss_times)) in cases() {
        let expected = expected(&case);
        let trained = Trained::new(&config, &identity(&config, &expected));
        let features = Var::from_tensor(&expected["features"]).unwrap();
        trained.set(trained.quantizer.first(|| Ok(features.as_tensor().clone()), &mut first).unwrap());

        let quantized = quantize(&trained.quantizer, &features, &expected["indices"]);
        let loss = trained.quantizer.loss(&quantized).unwrap();
        let target = ((&quantized.tokens * &expected["upstream"]).unwrap().sum_all().unwrap() + &loss).unwrap();
        let grads = target.backward().unwrap();

        assert_same_bits(&format!("{case}: indices"), &quantized.indices, &expected["indices"]);
        let mut worst = assert_close(&format!("{case}: tokens"), &quantized.tokens, &expected["tokens"], PARITY);
        let expected_loss = (&expected["loss"] * loss_times).unwrap();
        worst = worst.max(assert_close(&format!("{case}: loss"), &loss, &expected_loss, PARITY));
        let variables = trained.variables.iter().map(|(name, x)| (name.as_str(), x)).chain([("features", &features)]);
        for (name, variable) in variables.filter(|(name, _)| !name.starts_with("linear_")) {
            let what = format!("{case}: gradient of {name}");
            match (grads.get(variable), expected.get(&format!("gradient.{name}"))) {
                (Some(got), Some(expected)) => worst = worst.max(assert_close(&what, got, expected, PARITY)),
                (None, Some(_)) => panic!("{what} is missing"),
                (Some(_), None) => panic!("{what} exists, but the tensor is frozen"),
                (None, None) => assert!(config.is_frozen(name) || config.is_average(name), "{what} is missing"),
            }
        }
        say(&format!("{case}: {worst:.1e}"));
    }
}

#[test]
fn three_steps_of_every_levels_moving_averages_equal_vector_quantize_pytorch() {
    let mut compared = 0;
    for (case, (config, _)) in cases() {
        let expected = expected(&case);
        if !expected.keys().any(|name| name.starts_with("after.")) {
            continue;
        }
        let trained = Trained::new(&config, &identity(&config, &expected));
        for step in 0..3 {
            let name = if step == 0 { "features".to_string() } else { format!("features.{step}") };
            trained.set(trained.quantizer.first(|| Ok(expected[&name].clone()), &mut first).unwrap());
            trained.update(&expected[&name]);
            for (name, average) in trained.variables.iter().filter(|(name, _)| config.is_average(name)) {
                let what = format!("{case}: {name} after step {step}");
                assert_close(&what, average, &expected[&format!("after.{step}.{name}")], PARITY);
                compared += 1;
            }
        }
    }
    // Codebooks of the cases with moving averages, three tensors each, three steps.
    assert_eq!(compared, (3 + 2 + 2 + 1 + 2 + 4) * 3 * 3);
}

/// Fresh weights between features 6 wide and tokens 5 wide, with projections that use all of their input.
fn fresh(config: &quantizer::Config) -> Tensors {
    let made = Fresh::new(7, Tensors::new()).make(|vb| Quantizer::load(vb, config, 6, 5)).unwrap();
    let louder = |(name, tensor): (String, Tensor)| {
        let scale = if name.ends_with("linear_in.weight") { 50.0 } else { 1.0 };
        (name, (tensor * scale).unwrap())
    };
    made.into_iter().map(louder).collect()
}

#[test]
fn looking_codes_up_gives_the_tokens_of_quantising_bit_for_bit() {
    for (case, (config, _)) in cases() {
        let tensors = fresh(&config);
        let variables: HashMap<String, Var> =
            tensors.iter().map(|(name, x)| (name.clone(), Var::from_tensor(x).unwrap())).collect();
        let tracked = variables.iter().map(|(name, x)| (name.clone(), x.as_tensor().clone())).collect();
        for (how, tensors) in [("frozen", tensors.into_iter().collect()), ("trained", tracked)] {
            let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
            let quantizer = Quantizer::load(vb, &config, 6, 5).unwrap();
            let features = noise("features", &[3, 70, 6]);
            for seed in 0..3 {
                let quantized = quantizer.quantize_in_training(&features, seed).unwrap();
                let looked_up = quantizer.lookup(&quantized.indices).unwrap();
                assert_same_bits(&format!("{case}, {how}"), &looked_up, &quantized.tokens);
            }
            let codes = quantizer.quantize(&features).unwrap().indices.flatten_all().unwrap().to_vec1::<u32>().unwrap();
            assert!(codes.iter().collect::<std::collections::BTreeSet<_>>().len() > 5, "{case}: too few codes in use");
        }
    }
}

#[test]
fn every_code_is_listed_in_the_codebook() {
    for (case, (config, _)) in cases() {
        let quantizer = load(&config, identity(&config, &expected(&case)));
        let codebook = quantizer.codebook().unwrap();
        if config.codes_per_token() == 1 {
            let all = Tensor::arange(0u32, config.codebook_size() as u32, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            assert_same_bits(&case, &quantizer.lookup(&all).unwrap().squeeze(0).unwrap(), &codebook);
        } else {
            assert_eq!(codebook.dim(0).unwrap() % config.codebook_size(), 0, "{case}");
        }
    }
}

#[test]
fn dropout_follows_the_seed_and_only_in_training() {
    let config =
        r#"{"type":"residual","levels":4,"level":{"codebook_size":9,"codebook_dim":3},"quantize_dropout":true}"#;
    let config: quantizer::Config = serde_json::from_str(config).unwrap();
    let vb = VarBuilder::from_tensors(fresh(&config).into_iter().collect(), DType::F32, &Device::Cpu);
    let quantizer = Quantizer::load(vb, &config, 6, 5).unwrap();
    let features = noise("features", &[1, 8, 6]);
    let of = |seed| kept(&quantizer.quantize_in_training(&features, seed).unwrap().indices);
    let all: Vec<usize> = (0..40).map(of).collect();
    assert_eq!(all, (0..40).map(of).collect::<Vec<_>>());
    assert!((1..=4).all(|levels| all.contains(&levels)), "{all:?}");
    assert_eq!(kept(&quantizer.quantize(&features).unwrap().indices), 4);
    assert!(quantizer.loss(&quantizer.quantize_in_training(&features, 0).unwrap()).is_ok());
}

/// A tiny model's quantizer of every type.
const IN_MODELS: [(&str, &str, usize); 9] = [
    ("simvq", r#"{"type":"simvq","codebook_size":50,"codebook_dim":12}"#, 1),
    ("simvq, cosine", r#"{"type":"simvq","codebook_size":50,"codebook_dim":12,"metric":"cosine"}"#, 1),
    ("fsq", r#"{"type":"fsq","levels":[8,5,5,5]}"#, 1),
    ("fsq, symmetric", r#"{"type":"fsq","levels":[2,4,6],"preserve_symmetry":true}"#, 1),
    ("lfq", r#"{"type":"lfq","codebook_dim":14}"#, 1),
    ("bsq", r#"{"type":"lfq","codebook_dim":31,"spherical":true}"#, 1),
    (
        "residual",
        r#"{"type":"residual","levels":3,"level":{"codebook_size":20,"codebook_dim":8},"quantize_dropout":true}"#,
        3,
    ),
    ("product", r#"{"type":"product","groups":4}"#, 4),
    (
        "product of residuals",
        r#"{"type":"product","groups":2,"group":{"levels":3,"level":{"codebook_size":20,"codebook_dim":5},"shared_codebook":true}}"#,
        6,
    ),
];

fn config(quantizer: &str) -> Config {
    let siglip = encoder::SiglipConfig {
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        image_size: 32,
        patch_size: 8,
        ..encoder::SiglipConfig::default()
    };
    let quantizer = serde_json::from_str(quantizer).unwrap();
    Config::new(encoder::Config::Siglip(siglip), quantizer, Default::default())
}

fn tiny(config: &Config, dtype: DType) -> (Vqrae, Tensors) {
    let tensors = model::fresh_tensors(config, Tensors::new(), 3).unwrap();
    let tensors: Tensors = tensors
        .into_iter()
        .map(|(name, x)| {
            // As many codes in use as there are: fresh projections are next to nothing.
            let scale = if name == "quantizer.linear_in.weight" { 30.0 } else { 1.0 };
            (name, (x * scale).unwrap())
        })
        .collect();
    let preprocessor = Preprocessor::siglip(32, Resample::Bicubic);
    let made = Vqrae::new(config.clone(), preprocessor, tensors.clone(), Path::new("tiny"), &Device::Cpu, dtype);
    (made.unwrap(), tensors)
}

fn codes(indices: &Tensor) -> Vec<u32> {
    indices.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_quantizer_works_in_a_model_from_weights_to_pixels_and_through_its_folder() {
    let pixels = noise("pixels", &[3, 3, 16, 32]);
    for ((name, quantizer, c), dtype) in
        IN_MODELS.into_iter().flat_map(|case| [DType::F32, DType::BF16].map(|dtype| (case, dtype)))
    {
        let what = format!("{name}, {dtype:?}");
        let config = config(quantizer);
        let (model, tensors) = tiny(&config, dtype);
        assert_eq!(model.codes_per_token(), c, "{what}");

        let indices = model.encode_to_indices(&pixels).unwrap();
        let shape = if c == 1 { vec![3, 2, 4] } else { vec![3, 2, 4, c] };
        assert_eq!(indices.dims(), shape, "{what}");
        assert!(codes(&indices).iter().all(|&index| (index as usize) < model.codebook_size()), "{what}");
        let distinct: std::collections::BTreeSet<u32> = codes(&indices).into_iter().collect();
        assert!(distinct.len() > 3, "{what}: {distinct:?}");

        let quantized = model.quantize(&model.encode(&pixels).unwrap()).unwrap();
        assert_eq!(codes(&quantized.indices), codes(&indices), "{what}");
        let from_features = model.decode(&quantized.tokens, (2, 4)).unwrap();
        let from_indices = model.decode_from_indices(&indices).unwrap();
        assert_eq!(from_indices.dims(), [3, 3, 16, 32], "{what}");
        assert_same_bits(&what, &from_indices, &from_features);

        for i in 0..3 {
            let alone = pixels.narrow(0, i, 1).unwrap();
            let own = model.encode_to_indices(&alone).unwrap();
            assert_eq!(codes(&own), codes(&indices.narrow(0, i, 1).unwrap()), "{what}: image {i} alone");
            let painted = model.decode_from_indices(&own).unwrap();
            assert_same_bits(&what, &painted, &from_indices.narrow(0, i, 1).unwrap());
        }

        let folder = tempfile::tempdir().unwrap();
        model::save(folder.path(), &config, model.preprocessor(), &tensors).unwrap();
        let read = Vqrae::from_pretrained(folder.path(), &Device::Cpu, dtype).unwrap();
        assert_eq!(read.id(), model.id(), "{what}");
        assert_eq!(read.config(), &config, "{what}");
        assert_eq!(codes(&read.encode_to_indices(&pixels).unwrap()), codes(&indices), "{what}");
        assert_same_bits(&what, &read.decode_from_indices(&indices).unwrap(), &from_indices);
    }
}

#[test]
fn the_packed_stages_agree_with_the_tensors_of_the_network() {
    let features = noise("features", &[2, 6, 24]);
    for (name, quantizer, _) in IN_MODELS {
        let config = config(quantizer);
        let (model, tensors) = tiny(&config, DType::F32);
        let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
        let network = model::Network::load(vb, &config).unwrap();
        let (got, expected) = (model.quantize(&features).unwrap(), network.quantizer.quantize(&features).unwrap());
        assert_eq!(codes(&got.indices), codes(&expected.indices), "{name}");
        assert_close(name, &got.tokens, &expected.tokens, PARITY);
        assert_close(name, &got.projected, &expected.projected, PARITY);
        assert_close(name, &got.codes, &expected.codes, PARITY);
        assert_eq!(got.indices.dims(), expected.indices.dims(), "{name}");
    }
}

#[test]
fn codes_that_a_model_has_not_are_errors_that_say_what_to_do() {
    for (name, quantizer, c) in IN_MODELS {
        let (model, _) = tiny(&config(quantizer), DType::F32);
        let (k, shape) = (model.codebook_size() as u32, if c == 1 { vec![1, 2, 2] } else { vec![1, 2, 2, c] });
        let full = |value: u32, shape: &[usize]| Tensor::full(value, shape, &Device::Cpu).unwrap();
        let refused = |indices: Tensor| model.decode_from_indices(&indices).expect_err(name).to_string();

        assert!(model.decode_from_indices(&full(k - 1, &shape)).is_ok(), "{name}");
        let message = refused(full(k, &shape));
        assert!(message.contains(&format!("code {k} is outside the codebook of {k} codes")), "{name}: {message}");
        let message = refused(full(0, &[1, 2, 2, c + 1]));
        assert!(message.contains("decode with the model that made the codes"), "{name}: {message}");
        assert!(model.quantize(&(noise("x", &[1, 2, 24]) * f64::NAN).unwrap()).is_err(), "{name}");
    }
    // A model trained with quantize dropout takes its first levels alone.
    let (residual, _) = tiny(&config(IN_MODELS[6].1), DType::F32);
    for shape in [vec![1, 2, 2], vec![1, 2, 2, 2]] {
        let coarse = Tensor::zeros(shape.as_slice(), DType::U32, &Device::Cpu).unwrap();
        assert_eq!(residual.decode_from_indices(&coarse).unwrap().dims(), [1, 3, 16, 16]);
    }
}

#[test]
fn configs_that_make_no_sense_are_refused() {
    for (quantizer, because) in [
        (r#"{"type":"vqgan"}"#, "expected one of `simvq`"),
        (r#"{"type":"fsq","levels":[]}"#, "the number of levels is 0"),
        (r#"{"type":"fsq","levels":[8,2]}"#, "preserve_symmetry"),
        (r#"{"type":"fsq","levels":[65536,65536]}"#, "do not fit the i32 of a code file"),
        (r#"{"type":"fsq","level":[8]}"#, "unknown field `level`"),
        (r#"{"type":"lfq","codebook_dim":32}"#, "set codebook_dim to 31 or less"),
        (r#"{"type":"lfq","entropy_bits":17}"#, "entropy_bits is 17"),
        (r#"{"type":"lfq","scale":0}"#, "scale is 0"),
        (r#"{"type":"residual","levels":0}"#, "levels is 0"),
        (r#"{"type":"residual","levels":2,"dropout_cutoff":2}"#, "dropout_cutoff is 2"),
        (r#"{"type":"residual","level":{"commitment_cost":-1}}"#, "commitment_cost is -1"),
        (r#"{"type":"residual","level":{"metric":"hsq"}}"#, "metric is `hsq`"),
        (r#"{"type":"residual","level":{"norm":"layer_norm"}}"#, "set norm beside level"),
        (r#"{"type":"lfq","spherical":true,"norm":"scale"}"#, "norm `scale` changes nothing"),
        (r#"{"type":"product","groups":0}"#, "groups is 0"),
        (r#"{"type":"product","group":{"level":{"codebook_dim":0}}}"#, "codebook_dim is 0"),
    ] {
        let mut json: serde_json::Value = serde_json::from_str(&config(IN_MODELS[0].1).to_json().unwrap()).unwrap();
        json["quantizer"] = serde_json::from_str(quantizer).unwrap();
        let message = Config::from_json(&json.to_string(), Path::new("config.json")).expect_err(quantizer).to_string();
        assert!(message.contains("config.json") && message.contains(because), "{quantizer}: {message}");
    }
}

#[test]
fn the_shipped_model_keeps_its_id() {
    let model = Vqrae::shipped(&Device::Cpu, DType::F32).unwrap();
    assert_eq!(model.id(), "5e6f838f97a11fa9bcc8add8712b62d6");
    assert_eq!(model.codes_per_token(), 1);
}
