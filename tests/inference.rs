//! The packed network against transformers, against our tensor operations and against PyTorch's whole model: in f32 and in
//! bf16, with every instruction set of this machine.

use std::path::Path;
use std::process::Command;

use candle_nn::VarBuilder;
use vqrae::image::{Preprocessor, Resample};
use vqrae::model::fresh_tensors;
use vqrae::weights::{self, Tensors};
use vqrae::{Config, DType, Device, Network, Tensor, Vqrae};
use vqrae_kernels::cpu::{Isa, VARIABLE};

use crate::compare::{PARITY, Tolerance, assert_close, fixture, noise, say, tensors_of};

/// Eight bits of mantissa, a few layers.
const BF16: Tolerance = Tolerance { relative: 0.02, absolute: 0.0 };

fn tolerance(dtype: DType) -> Tolerance {
    if dtype == DType::F32 { PARITY } else { BF16 }
}

/// The tiny SigLIP that transformers computed the fixtures with, in a whole model whose other parts are random.
fn tiny_siglip(dtype: DType) -> Vqrae {
    let folder = fixture("siglip/tiny");
    let (encoder, given) = weights::encoder(&folder).unwrap();
    let config = r#"{"type": "simvq", "codebook_size": 40, "codebook_dim": 8}"#;
    let quantizer = serde_json::from_str(config).unwrap();
    let config = Config::new(encoder, quantizer, Default::default());
    let tensors = fresh_tensors(&config, given, 5).unwrap();
    let preprocessor = Preprocessor::siglip(32, Resample::Bicubic);
    Vqrae::new(config, preprocessor, tensors, &folder, &Device::Cpu, dtype).unwrap()
}

#[test]
fn every_hidden_state_equals_transformers() {
    for dtype in [DType::F32, DType::BF16] {
        let model = tiny_siglip(dtype);
        for case in ["4x4", "6x8", "3x2"] {
            let reference = tensors_of(&fixture("siglip/tiny/reference.safetensors"), case);
            let states = model.hidden_states(&reference["pixel_values"]).unwrap();
            assert_eq!(states.len(), 3);
            let mut worst = 0f64;
            for (i, state) in states.iter().enumerate() {
                let name = format!("hidden.{i}");
                worst = worst.max(assert_close(&name, state, &reference[&name], tolerance(dtype)));
            }
            let features = model.encode(&reference["pixel_values"]).unwrap();
            worst = worst.max(assert_close("features", &features, &reference["last_hidden_state"], tolerance(dtype)));
            say(&format!("packed tiny SigLIP in {}, grid {case}: {worst:.1e}", model.precision()));
        }
    }
}

#[test]
fn a_whole_model_equals_pytorch() {
    let folder = fixture("vqrae");
    for dtype in [DType::F32, DType::BF16] {
        let model = Vqrae::from_pretrained(&folder, &Device::Cpu, dtype).unwrap();
        for case in ["4x4", "3x5"] {
            let reference = tensors_of(&folder.join("reference.safetensors"), case);
            let features = model.encode(&reference["pixels"]).unwrap();
            assert_close("features", &features, &reference["features"], tolerance(dtype));
            // The image of PyTorch's own codes: a code that bf16 chooses otherwise is no error of the decoder.
            let (b, _, height, width) = reference["pixels"].dims4().unwrap();
            let indices = reference["indices"].to_dtype(DType::U32).unwrap();
            let indices = indices.reshape((b, height / 8, width / 8)).unwrap();
            let image = model.decode_from_indices(&indices).unwrap();
            assert_close("image", &image, &reference["image"], tolerance(dtype));
            if dtype == DType::F32 {
                let own = model.encode_to_indices(&reference["pixels"]).unwrap();
                assert_eq!(own.to_vec3::<u32>().unwrap(), indices.to_vec3::<u32>().unwrap());
            }
        }
    }
}

/// Head width 36, MLP width 100 and code width 30 are no multiples of what any instruction takes at once.
fn odd() -> (Config, Tensors) {
    let config = r#"{"model_type":"vqrae","format":1,
        "encoder":{"model_type":"siglip_vision_model","hidden_size":72,"intermediate_size":100,"num_hidden_layers":2,
                   "num_attention_heads":2,"image_size":60,"patch_size":5},
        "quantizer":{"type":"simvq","codebook_size":300,"codebook_dim":30,"transform_bias":true},
        "decoder":{"hidden_size":40,"num_attention_heads":4,"intermediate_size":70,"patch_size":7}}"#;
    let config = Config::from_json(config, Path::new("odd")).unwrap();
    let mut tensors = fresh_tensors(&config, Tensors::new(), 2).unwrap();
    // Fresh weights are small and fresh biases zero: with larger ones no part can be left out unseen.
    for (name, tensor) in &mut tensors {
        let noise = noise(name, tensor.dims());
        *tensor = (&*tensor + (noise * 0.1).unwrap()).unwrap();
    }
    (config, tensors)
}

#[test]
fn the_packed_network_equals_the_tensor_operations() {
    let (config, tensors) = odd();
    let vb = VarBuilder::from_tensors(tensors.clone().into_iter().collect(), DType::F32, &Device::Cpu);
    let network = Network::load(vb, &config).unwrap();
    let preprocessor = Preprocessor::siglip(60, Resample::Bicubic);
    for dtype in [DType::F32, DType::BF16] {
        let model =
            Vqrae::new(config.clone(), preprocessor.clone(), tensors.clone(), Path::new("odd"), &Device::Cpu, dtype);
        let model = model.unwrap();
        for (h, w) in [(60, 60), (35, 95)] {
            let pixels = noise("pixels", &[2, 3, h, w]);
            let grid = (h / 5, w / 5);
            let expected = network.encoder.forward(&pixels).unwrap();
            let features = model.encode(&pixels).unwrap();
            assert_close("features", &features, &expected, tolerance(dtype));
            let states = network.encoder.hidden_states(&pixels).unwrap();
            for (got, expected) in model.hidden_states(&pixels).unwrap().iter().zip(&states) {
                assert_close("hidden state", got, expected, tolerance(dtype));
            }
            // From here on both take the same input, so that one token's other code spoils nothing.
            let quantized = model.quantize(&expected).unwrap();
            let reference = network.quantizer.quantize(&expected).unwrap();
            assert_close("projected", &quantized.projected, &reference.projected, tolerance(dtype));
            let tokens = network.quantizer.lookup(&quantized.indices).unwrap();
            assert_close("tokens", &quantized.tokens, &tokens, tolerance(dtype));
            let image = network.paint(&tokens, grid, DType::F32).unwrap();
            assert_close("image", &model.decode(&tokens, grid).unwrap(), &image, tolerance(dtype));
            if dtype == DType::F32 {
                assert_eq!(
                    quantized.indices.to_vec2::<u32>().unwrap(),
                    reference.indices.to_vec2::<u32>().unwrap(),
                    "codes"
                );
            }
        }
        assert_close("codebook", &model.codebook().unwrap(), &network.quantizer.codebook().unwrap(), PARITY);
    }
}

/// Codes and images of the odd model, in both formats, as one text.
fn fingerprint() -> String {
    let (config, tensors) = odd();
    let preprocessor = Preprocessor::siglip(60, Resample::Bicubic);
    let mut lines = Vec::new();
    for dtype in [DType::F32, DType::BF16] {
        let (config, tensors) = (config.clone(), tensors.clone());
        let model = Vqrae::new(config, preprocessor.clone(), tensors, Path::new("odd"), &Device::Cpu, dtype).unwrap();
        let pixels = noise("pixels", &[3, 3, 60, 60]);
        let indices = model.encode_to_indices(&pixels).unwrap();
        let image = model.decode_from_indices(&indices).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let bits = image.iter().fold(0u64, |hash, x| hash.wrapping_mul(31).wrapping_add(u64::from(x.to_bits())));
        lines.push(format!("{} {:?} {bits}", model.precision(), indices.flatten_all().unwrap().to_vec1::<u32>()));
    }
    lines.join("\n")
}

/// Run by [`every_instruction_set_computes_the_same_model`] in processes of its own.
#[test]
fn prints_its_fingerprint() {
    say(&format!("fingerprint of {}\n{}\nend", Isa::detect().unwrap().name(), fingerprint()));
}

#[test]
fn every_instruction_set_computes_the_same_model() {
    let run = |test: &str, isa: &Isa| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([test, "--exact", "--nocapture"]).env(VARIABLE, isa.name());
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{test} with {}:\n{text}", isa.name());
        text
    };
    let mut seen: Vec<(String, String)> = Vec::new();
    for isa in Isa::available() {
        for test in ["every_hidden_state_equals_transformers", "a_whole_model_equals_pytorch"] {
            run(&format!("inference::{test}"), isa);
        }
        run("inference::the_packed_network_equals_the_tensor_operations", isa);
        let text = run("inference::prints_its_fingerprint", isa);
        let begin = text.find(&format!("fingerprint of {}", isa.name())).expect("the set that was asked for");
        for line in text[begin..].lines().skip(1).take_while(|line| *line != "end") {
            // Lines of one precision are the same, whatever the instructions.
            let (precision, rest) = line.split_once(' ').unwrap();
            match seen.iter().find(|(known, _)| known == precision) {
                Some((_, other)) => assert_eq!(other, rest, "{precision} with {}", isa.name()),
                None => seen.push((precision.to_string(), rest.to_string())),
            }
        }
    }
    let precisions: Vec<&str> = seen.iter().map(|(precision, _)| precision.as_str()).collect();
    say(&format!("precisions of this machine: {}", precisions.join(", ")));
    assert!(precisions.contains(&"f32/portable"));
}

#[test]
fn instructions_that_are_not_here_are_refused_by_name() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["inference::prints_its_fingerprint", "--exact"])
        .env(VARIABLE, "abacus")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).to_string() + &String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("abacus") && text.contains("portable"), "{text}");
}

#[test]
fn f16_on_the_cpu_is_refused_with_what_to_use() {
    let error = Vqrae::from_pretrained(fixture("vqrae"), &Device::Cpu, DType::F16).unwrap_err().to_string();
    assert!(error.contains("f16") && error.contains("bf16"), "{error}");
}

#[test]
fn tensors_of_another_shape_are_refused_before_they_are_computed_with() {
    let model = tiny_siglip(DType::BF16);
    let grey = Tensor::zeros((1, 1, 32, 32), DType::F32, &Device::Cpu).unwrap();
    assert!(model.encode(&grey).unwrap_err().to_string().contains("1 channels"));
    let tokens = Tensor::zeros((1, 9, 32), DType::F32, &Device::Cpu).unwrap();
    assert!(model.decode(&tokens, (4, 4)).unwrap_err().to_string().contains("4×4"));
}

#[test]
fn the_packed_quantizer_follows_every_route_and_norm() {
    let (mut config, _) = odd();
    for (metric, norm) in
        [("euclidean", "layer_norm"), ("euclidean", "scale"), ("cosine", "layer_norm"), ("hsq", "scale")]
    {
        let quantizer =
            format!(r#"{{"type":"simvq","codebook_size":300,"codebook_dim":30,"metric":"{metric}","norm":"{norm}"}}"#);
        config.quantizer = serde_json::from_str(&quantizer).unwrap();
        config.check().unwrap();
        let mut tensors = fresh_tensors(&config, Tensors::new(), 2).unwrap();
        for (name, tensor) in &mut tensors {
            let noise = noise(name, tensor.dims());
            *tensor = (&*tensor + (noise * 0.1).unwrap()).unwrap();
        }
        let vb = VarBuilder::from_tensors(tensors.clone().into_iter().collect(), DType::F32, &Device::Cpu);
        let network = Network::load(vb, &config).unwrap();
        let preprocessor = Preprocessor::siglip(60, Resample::Bicubic);
        let model =
            Vqrae::new(config.clone(), preprocessor, tensors, Path::new("odd"), &Device::Cpu, DType::F32).unwrap();
        let features = noise("features", &[2, 12, 72]);
        let quantized = model.quantize(&features).unwrap();
        let expected = network.quantizer.quantize(&features).unwrap();
        let what = |part: &str| format!("{metric}, {norm}: {part}");
        assert_close(&what("projected"), &quantized.projected, &expected.projected, PARITY);
        assert_eq!(
            quantized.indices.to_vec2::<u32>().unwrap(),
            expected.indices.to_vec2::<u32>().unwrap(),
            "{metric}, {norm}"
        );
        assert_close(&what("codes"), &quantized.codes, &expected.codes, PARITY);
        assert_close(&what("tokens"), &quantized.tokens, &expected.tokens, PARITY);
        assert_close(&what("codebook"), &model.codebook().unwrap(), &network.quantizer.codebook().unwrap(), PARITY);
    }
}
