//! SimVQ against vector_quantize_pytorch and plain PyTorch: values, indices, loss and every gradient.

use std::collections::{BTreeMap, HashMap};

use candle_core::Var;
use candle_nn::VarBuilder;
use vqrae::quantizer::{Config, Quantizer};
use vqrae::weights::{Fresh, Tensors};
use vqrae::{DType, Device, Tensor};

use crate::compare::{PARITY, assert_close, assert_same_bits, fixture, noise, say, tensors_of};

/// The quantizers of fixtures/simvq/make.py.
fn cases() -> BTreeMap<String, Config> {
    serde_json::from_str(&std::fs::read_to_string(fixture("simvq/cases.json")).unwrap()).unwrap()
}

/// A quantizer whose weights are all variables.
struct Trained {
    quantizer: Quantizer,
    variables: BTreeMap<String, Var>,
}

impl Trained {
    fn new(config: &Config, weights: &HashMap<String, Tensor>) -> Self {
        let variable = |(name, x): (&String, &Tensor)| (name.clone(), Var::from_tensor(x).unwrap());
        let variables: BTreeMap<String, Var> = weights.iter().map(variable).collect();
        let tensors = variables.iter().map(|(name, x)| (name.clone(), x.as_tensor().clone())).collect();
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let (width_in, width_out) =
            (weights["linear_in.weight"].dim(1).unwrap(), weights["linear_out.weight"].dim(0).unwrap());
        Self { quantizer: Quantizer::load(vb, config, width_in, width_out).unwrap(), variables }
    }
}

/// The tensors of a case that stand below `weight.`.
fn weights(case: &HashMap<String, Tensor>) -> HashMap<String, Tensor> {
    case.iter().filter_map(|(name, x)| Some((name.strip_prefix("weight.")?.to_string(), x.clone()))).collect()
}

#[test]
fn simvq_equals_pytorch_in_tokens_indices_loss_and_every_gradient() {
    for (case, config) in cases() {
        let expected = tensors_of(&fixture("simvq/simvq.safetensors"), &case);
        let trained = Trained::new(&config, &weights(&expected));
        let features = Var::from_tensor(&expected["features"]).unwrap();

        let quantized = trained.quantizer.quantize(&features).unwrap();
        let loss = trained.quantizer.loss(&quantized).unwrap();
        let target = ((&quantized.tokens * &expected["upstream"]).unwrap().sum_all().unwrap() + &loss).unwrap();
        let grads = target.backward().unwrap();

        assert_same_bits(&format!("{case}: indices"), &quantized.indices, &expected["indices"]);
        let mut worst = assert_close(&format!("{case}: tokens"), &quantized.tokens, &expected["tokens"], PARITY);
        worst = worst.max(assert_close(&format!("{case}: loss"), &loss, &expected["loss"], PARITY));
        for (name, variable) in
            trained.variables.iter().map(|(name, x)| (name.as_str(), x)).chain([("features", &features)])
        {
            let what = format!("{case}: gradient of {name}");
            match (grads.get(variable), expected.get(&format!("gradient.{name}"))) {
                (Some(got), Some(expected)) => worst = worst.max(assert_close(&what, got, expected, PARITY)),
                (None, Some(_)) => panic!("{what} is missing"),
                // The layers around vector_quantize_pytorch's quantizer are ours alone.
                (Some(_), None) if case == "lucidrains" && name.starts_with("linear_") => {}
                (Some(_), None) => panic!("{what} exists, but the tensor is frozen"),
                (None, None) => assert_eq!(name, "codebook", "{what} is missing"),
            }
        }
        say(&format!("simvq {case}: {worst:.1e}"));
    }
}

#[test]
fn looking_codes_up_gives_the_tokens_of_quantising_bit_for_bit() {
    for (case, config) in cases() {
        let fixture = tensors_of(&fixture("simvq/simvq.safetensors"), &case);
        let weights = weights(&fixture);
        let frozen = VarBuilder::from_tensors(weights.clone(), DType::F32, &Device::Cpu);
        let frozen = Quantizer::load(frozen, &config, 6, fixture["tokens"].dim(2).unwrap()).unwrap();
        let features = noise("features", &[3, 70, 6]);
        for (how, quantizer) in [("frozen", frozen), ("trained", Trained::new(&config, &weights).quantizer)] {
            let quantized = quantizer.quantize(&features).unwrap();
            let looked_up = quantizer.lookup(&quantized.indices).unwrap();
            assert_same_bits(&format!("{case}, {how}"), &looked_up, &quantized.tokens);
        }
    }
}

/// C = [[1], [10]], W = [[2]]: the codes are 2 and 20.
fn two_codes(beta: f64) -> Trained {
    let config = format!(r#"{{"type":"simvq","codebook_size":2,"codebook_dim":1,"commitment_cost":{beta}}}"#);
    let tensor = |values: &[f32], shape: &[usize]| Tensor::from_slice(values, shape, &Device::Cpu).unwrap();
    let weights = HashMap::from([
        ("linear_in.weight", tensor(&[1.], &[1, 1])),
        ("linear_in.bias", tensor(&[0.], &[1])),
        ("linear_out.weight", tensor(&[1.], &[1, 1])),
        ("linear_out.bias", tensor(&[0.], &[1])),
        ("codebook", tensor(&[1., 10.], &[2, 1])),
        ("transform.weight", tensor(&[2.], &[1, 1])),
    ]);
    let weights = weights.into_iter().map(|(name, x)| (name.to_string(), x)).collect();
    Trained::new(&serde_json::from_str(&config).unwrap(), &weights)
}

#[test]
fn beta_weighs_the_commitment_term_alone() {
    // h = (5, 21), codes (2, 20): both terms are (3² + 1²) / 2 = 5.
    // d/dh of β·mean(h − q)² = β·(3, 1); d/dW of mean(h − W c)² = −(3·1 + 1·10) = −13, whatever β.
    for (beta, loss, feature_gradient) in
        [(0.25f32, 6.25f32, [0.75f32, 0.25]), (2.0, 15.0, [6.0, 2.0]), (0.0, 5.0, [0.0, 0.0])]
    {
        let trained = two_codes(beta.into());
        let features = Var::new(&[[[5f32], [21.]]], &Device::Cpu).unwrap();
        let quantized = trained.quantizer.quantize(&features).unwrap();
        assert_eq!(quantized.indices.to_vec2::<u32>().unwrap(), [[0, 1]]);
        let got = trained.quantizer.loss(&quantized).unwrap();
        assert_eq!(got.to_scalar::<f32>().unwrap(), loss);
        let grads = got.backward().unwrap();
        // candle gives no gradient at all to what is multiplied by 0.
        let of = |x: &Var| grads.get(x).cloned().unwrap_or_else(|| x.zeros_like().unwrap());
        let gradient = |x: &Var| of(x).flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(gradient(&features), feature_gradient);
        assert_eq!(gradient(&trained.variables["transform.weight"]), [-13.]);
        assert!(grads.get(&trained.variables["codebook"]).is_none());
    }
}

#[test]
fn one_step_moves_codes_that_nobody_chose() {
    let trained = two_codes(0.25);
    let before = trained.quantizer.codebook().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let features = Tensor::new(&[[[5f32]]], &Device::Cpu).unwrap();
    let quantized = trained.quantizer.quantize(&features).unwrap();
    let grads = trained.quantizer.loss(&quantized).unwrap().backward().unwrap();
    let transform = &trained.variables["transform.weight"];
    transform.set(&(transform.as_tensor() - (grads.get(transform).unwrap() * 0.1).unwrap()).unwrap()).unwrap();
    // dW = −2·3·1, so W = 2.6: code 0 goes from 2 to 2.6, and code 1, chosen by nobody, from 20 to 26.
    let after = trained.quantizer.codebook().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!((before, after), (vec![2., 20.], vec![2.6, 26.]));
}

/// Mean `[e]` and covariance `[e, e]` of rows `[M, e]`, one after the other.
fn moments(rows: &Tensor) -> Vec<f32> {
    let mean = rows.mean_keepdim(0).unwrap();
    let centred = rows.broadcast_sub(&mean).unwrap();
    let covariance = (centred.t().unwrap().matmul(&centred).unwrap() / rows.dim(0).unwrap() as f64).unwrap();
    [mean, covariance].iter().flat_map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
}

#[test]
fn codes_that_start_from_features_have_their_mean_and_covariance_whatever_the_codebook_was() {
    let mixture = Tensor::new(&[[3f32, 0., 0.], [2., 0.5, 0.], [-1., 0.2, 0.1]], &Device::Cpu).unwrap();
    let offset = Tensor::new(&[5f32, -2., 1.], &Device::Cpu).unwrap();
    let features = noise("features", &[2000, 3]).matmul(&mixture.t().unwrap()).unwrap();
    let features = features.broadcast_add(&offset).unwrap().unsqueeze(0).unwrap();
    let of = |std: f64, bias: bool| {
        let config = format!(
            r#"{{"type":"simvq","codebook_size":8192,"codebook_dim":3,"transform_init":"data","transform_bias":{bias},
                "codebook_std":{std}}}"#
        );
        let config: Config = serde_json::from_str(&config).unwrap();
        let mut weights = Fresh::new(1, Tensors::new()).make(|vb| Quantizer::load(vb, &config, 3, 3)).unwrap();
        weights.insert("linear_in.weight".to_string(), Tensor::eye(3, DType::F32, &Device::Cpu).unwrap());
        let trained = Trained::new(&config, &weights.into_iter().collect());
        let first = || trained.quantizer.first(|| Ok(features.clone()), &mut |_, _| Vec::new()).unwrap();
        for (name, tensor) in first() {
            trained.variables[&name].set(&tensor).unwrap();
        }
        assert!(first().is_empty(), "a second time");
        trained.quantizer.codebook().unwrap()
    };
    let expected = moments(&features.squeeze(0).unwrap());
    let codes = of(0.01, true);
    let got = moments(&codes);
    assert!(got.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 0.2), "{got:?}, expected: {expected:?}");
    assert_close("codes 10,000 times as long", &of(100.0, true), &codes, PARITY);
    // Without a bias they lie about zero, as far from it as the features.
    let got = moments(&of(1.0, false));
    let square = |i: usize| expected[3 + 4 * i] + expected[i].powi(2);
    assert!((0..3).all(|i| got[i].abs() < 0.2 && (got[3 + 4 * i] / square(i) - 1.0).abs() < 0.05), "{got:?}");
}

#[test]
fn a_zero_feature_has_a_code_and_a_finite_gradient_under_both_metrics() {
    for (case, config) in cases() {
        let fixture = tensors_of(&fixture("simvq/simvq.safetensors"), &case);
        let mut weights = weights(&fixture);
        weights.insert("linear_in.bias".to_string(), weights["linear_in.bias"].zeros_like().unwrap());
        let trained = Trained::new(&config, &weights);
        let features = Var::zeros((1, 2, 6), DType::F32, &Device::Cpu).unwrap();
        let quantized = trained.quantizer.quantize(&features).unwrap();
        let grads = trained.quantizer.loss(&quantized).unwrap().backward().unwrap();
        for (name, variable) in trained.variables.iter().filter(|(name, _)| !name.starts_with("linear_out")) {
            let Some(grad) = grads.get(variable) else { continue };
            let values = grad.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(values.iter().all(|x| x.is_finite()), "{case}: gradient of {name} for a zero feature: {values:?}");
        }
    }
}

#[test]
fn features_that_are_not_finite_and_codes_outside_the_codebook_are_errors() {
    let quantizer = two_codes(0.25).quantizer;
    for bad in [f32::NAN, f32::INFINITY] {
        let features = Tensor::new(&[[[1f32], [bad]]], &Device::Cpu).unwrap();
        assert!(quantizer.quantize(&features).is_err(), "{bad} was quantised");
    }
    let error = quantizer.lookup(&Tensor::new(&[[0u32, 2]], &Device::Cpu).unwrap()).unwrap_err().to_string();
    assert!(error.contains("code 2 is outside the codebook of 2 codes"), "{error}");
}
