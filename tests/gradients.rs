//! A whole VQRAE, everything trainable: every parameter has a gradient, by name, and it is the right one.

use std::collections::BTreeMap;

use candle_core::Var;
use candle_nn::VarBuilder;
use vqrae::{Config, DType, Device, Network, Tensor, weights};

use crate::compare::{PARITY, Tolerance, assert_close, assert_same_bits, fixture, say, tensors_of};

/// The encoder's own grid, and one with interpolated positions.
const CASES: [&str; 2] = ["4x4", "3x5"];
const FROZEN: &str = "quantizer.codebook";

/// The gradient of a key's bias is zero, since a softmax ignores what all scores share: what is left is rounding, which
/// only an absolute allowance can judge. Other gradients here are of the order of 0.1.
const GRADIENT: Tolerance = Tolerance { relative: 1e-4, absolute: 1e-7 };

/// What a forward and a backward pass give.
struct Pass {
    features: Tensor,
    indices: Tensor,
    image: Tensor,
    loss: Tensor,
    /// By name; `None` where the pass gave none.
    gradients: BTreeMap<String, Option<Tensor>>,
}

/// Runs the model of fixtures/vqrae, the codebook too as a variable. In f64 the network takes the composed ops.
fn pass(case: &str, dtype: DType) -> candle_core::Result<Pass> {
    let folder = fixture("vqrae");
    let text = std::fs::read_to_string(folder.join("config.json"))?;
    let config = Config::from_json(&text, &folder).unwrap();
    let variable = |(name, x): (String, Tensor)| Ok((name, Var::from_tensor(&x)?));
    let variables: BTreeMap<String, Var> =
        weights::read(&folder).unwrap().into_iter().map(variable).collect::<candle_core::Result<_>>()?;
    let tensors = variables.iter().map(|(name, x)| (name.clone(), x.as_tensor().clone())).collect();
    let network = Network::load(VarBuilder::from_tensors(tensors, dtype, &Device::Cpu), &config)?;

    let given = tensors_of(&folder.join("reference.safetensors"), case);
    let (_, _, height, width) = given["pixels"].dims4()?;
    let features = network.encoder.forward(&given["pixels"])?;
    let quantized = network.quantizer.quantize(&features)?;
    let image = network.paint(&quantized.tokens, network.grid(height, width)?, dtype)?;
    let error = (&image - given["target"].to_dtype(dtype)?)?.sqr()?.mean_all()?;
    let loss = (error.to_dtype(DType::F32)? + network.quantizer.loss(&quantized)?)?;
    let grads = loss.backward()?;
    let gradients = variables.iter().map(|(name, x)| (name.clone(), grads.get(x).cloned())).collect();
    Ok(Pass { features, indices: quantized.indices, image, loss, gradients })
}

#[test]
fn every_trainable_parameter_gets_a_gradient_and_the_frozen_codebook_none() {
    for case in CASES {
        for (name, gradient) in pass(case, DType::F32).unwrap().gradients {
            let Some(gradient) = gradient else {
                assert_eq!(name, FROZEN, "{case}: `{name}` gets no gradient");
                continue;
            };
            assert_ne!(name, FROZEN, "{case}: the frozen codebook gets a gradient");
            let largest = gradient.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(
                largest > 1e-4 || name.ends_with("k_proj.bias"),
                "{case}: the gradient of `{name}` is only {largest:e}"
            );
        }
    }
}

#[test]
fn fused_gradients_equal_those_of_the_composed_ops_by_name() {
    for case in CASES {
        let (fused, composed) = (pass(case, DType::F32).unwrap(), pass(case, DType::F64).unwrap());
        assert_same_bits(&format!("{case}: indices"), &fused.indices, &composed.indices);
        let mut worst = assert_close(&format!("{case}: image"), &fused.image, &composed.image, PARITY);
        for (name, composed) in &composed.gradients {
            if let (Some(got), Some(expected)) = (&fused.gradients[name], composed) {
                let off = assert_close(&format!("{case}: gradient of {name}"), got, expected, GRADIENT);
                worst = if name.ends_with("k_proj.bias") { worst } else { worst.max(off) };
            } else {
                assert_eq!(name, FROZEN, "{case}: `{name}` gets no gradient");
            }
        }
        say(&format!("vqrae {case}, fused and composed: {worst:.1e}"));
    }
}

#[test]
fn values_and_gradients_equal_those_of_pytorch_by_name() {
    for case in CASES {
        let expected = tensors_of(&fixture("vqrae/reference.safetensors"), case);
        let got = pass(case, DType::F32).unwrap();
        assert_same_bits(&format!("{case}: indices"), &got.indices, &expected["indices"]);
        let outputs = [("features", &got.features), ("image", &got.image), ("loss", &got.loss)];
        let compare =
            |(name, got): (&str, &Tensor)| assert_close(&format!("{case}: {name}"), got, &expected[name], PARITY);
        let mut worst = outputs.into_iter().map(compare).fold(0.0, f64::max);
        for (name, gradient) in &got.gradients {
            match (gradient, expected.get(&format!("gradient.{name}"))) {
                (Some(got), Some(expected)) => {
                    let off = assert_close(&format!("{case}: gradient of {name}"), got, expected, GRADIENT);
                    worst = if name.ends_with("k_proj.bias") { worst } else { worst.max(off) };
                }
                _ => assert_eq!(name, FROZEN, "{case}: `{name}` has a gradient in only one of the two"),
            }
        }
        let ours = got.gradients.values().flatten().count();
        let theirs = expected.keys().filter(|name| name.starts_with("gradient.")).count();
        assert_eq!(ours, theirs, "{case}: number of gradients");
        say(&format!("vqrae {case}, candle and PyTorch: {worst:.1e}"));
    }
}
