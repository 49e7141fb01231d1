//! LPIPS and ConvNeXt of a few channels against PyPI lpips and torchvision: values, and gradients to the images.

use std::path::PathBuf;

use candle_core::Var;
use vqrae::image::{Preprocessor, Resample};
use vqrae::perceptual::{Backbone, ConvNext, Lpips};
use vqrae::train::loss::{Logits, Losses, Perceptual, Terms, Weights};
use vqrae::weights::{Tensors, read_file, write};
use vqrae::{DType, Device, Tensor};

use crate::compare::{Tolerance, assert_close, assert_same_bits, fixture, noise, say};

const BACKBONES: [(Backbone, &str); 2] = [(Backbone::Vgg16, "vgg16"), (Backbone::Alex, "alex")];
const CLOSE: Tolerance = Tolerance { relative: 1e-5, absolute: 0.0 };

fn file(name: &str) -> PathBuf {
    fixture(&format!("perceptual/{name}.safetensors"))
}

fn lpips(backbone: (Backbone, &str)) -> Lpips {
    Lpips::open(&file(backbone.1), backbone.0, &Device::Cpu).unwrap()
}

/// Images and others `[2, 3, 31, 33]` of the fixture in 0..1, and all that PyTorch made of them.
fn reference() -> (Tensor, Tensor, Tensors) {
    let tensors = read_file(&file("reference")).unwrap();
    let unit = |name: &str| (tensors[name].to_dtype(DType::F32).unwrap() / 255.0).unwrap();
    (unit("images"), unit("others"), tensors)
}

fn signed(x: &Tensor) -> Tensor {
    x.affine(2.0, -1.0).unwrap()
}

fn gradient(value: &Tensor, var: &Var) -> Tensor {
    value.backward().unwrap().get(var).unwrap().clone()
}

#[test]
fn lpips_and_its_gradient_equal_pypi_lpips() {
    let (images, others, reference) = reference();
    for backbone in BACKBONES {
        let lpips = lpips(backbone);
        let x = Var::from_tensor(&signed(&images)).unwrap();
        let distance = lpips.forward(&x, &signed(&others)).unwrap();
        let expected = |what: &str| &reference[&format!("{}.{what}", backbone.1)];
        let value = assert_close("distance", &distance, expected("distance"), CLOSE);
        let gradient = gradient(&distance.mean_all().unwrap(), &x);
        let slope = assert_close("gradient", &gradient, expected("gradient"), CLOSE);
        say(&format!("LPIPS of {}: value {value:.1e}, gradient {slope:.1e}", backbone.1));
    }
}

#[test]
fn convnext_and_its_gradient_equal_torchvision() {
    let (images, others, reference) = reference();
    let convnext = ConvNext::open(&file("convnext"), &Device::Cpu).unwrap();
    let x = Var::from_tensor(&images).unwrap();
    let logits = convnext.forward(&x).unwrap();
    let value = assert_close("logits", &logits, &reference["convnext.logits"], CLOSE);
    let loss = (logits - convnext.forward(&others).unwrap()).unwrap().sqr().unwrap().mean_all().unwrap();
    let wide = Tolerance { relative: 1e-4, absolute: 0.0 };
    let slope = assert_close("gradient", &gradient(&loss, &x), &reference["convnext.gradient"], wide);
    say(&format!("ConvNeXt: logits {value:.1e}, gradient {slope:.1e}"));
}

#[test]
fn an_image_is_at_no_distance_from_itself() {
    let (images, ..) = reference();
    for backbone in BACKBONES {
        let x = Var::from_tensor(&signed(&images)).unwrap();
        let distance = lpips(backbone).forward(&x, &x.detach()).unwrap();
        assert_eq!(distance.to_vec1::<f32>().unwrap(), [0.0; 2]);
        let gradient = gradient(&distance.sum_all().unwrap(), &x).abs().unwrap().sum_all().unwrap();
        assert_eq!(gradient.to_scalar::<f32>().unwrap(), 0.0);
    }
}

#[test]
fn lpips_gives_an_image_the_same_bits_alone_and_in_a_batch() {
    let (images, others, _) = reference();
    for backbone in BACKBONES {
        let lpips = lpips(backbone);
        let all = lpips.forward(&signed(&images), &signed(&others)).unwrap();
        for i in 0..2 {
            let one = |x: &Tensor| signed(&x.narrow(0, i, 1).unwrap());
            let alone = lpips.forward(&one(&images), &one(&others)).unwrap();
            assert_same_bits("distance", &alone, &all.narrow(0, i, 1).unwrap());
        }
    }
}

#[test]
fn wrong_weights_and_images_are_named() {
    let refused = |result: vqrae::Result<()>, words: &[&str]| {
        let said = result.unwrap_err().to_string();
        for word in words {
            assert!(said.contains(word), "`{word}` is not in: {said}");
        }
    };
    let folder = tempfile::tempdir().unwrap();
    let open = |path: &PathBuf, backbone| Lpips::open(path, backbone, &Device::Cpu).map(|_| ());
    let missing = folder.path().join("lpips.safetensors");
    refused(open(&missing, Backbone::Alex), &["lpips.safetensors", "weights/convert_lpips.py"]);
    let convnext = |path: &PathBuf| ConvNext::open(path, &Device::Cpu).map(|_| ());
    refused(convnext(&missing), &["lpips.safetensors", "weights/convert_convnext.py"]);
    refused(open(&file("vgg16"), Backbone::Alex), &["vgg16.safetensors", "`features.3.weight` is missing"]);
    refused(convnext(&file("vgg16")), &["vgg16.safetensors", "`features.1.0.layer_scale` is missing"]);

    let changed = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = read_file(&file("alex")).unwrap();
        change(&mut tensors);
        write(&missing, &tensors, Default::default()).unwrap();
        open(&missing, Backbone::Alex)
    };
    let extra = changed(&|tensors| drop(tensors.insert("lin9.weight".into(), noise("w", &[1, 4, 1, 1]))));
    refused(extra, &["lpips.safetensors", "no use for", "`lin9.weight`"]);
    let misshapen = changed(&|tensors| drop(tensors.insert("lin2.weight".into(), noise("w", &[1, 9, 1, 1]))));
    refused(misshapen, &["lpips.safetensors", "`lin2.weight` has shape [1, 9, 1, 1]"]);

    let small = lpips(BACKBONES[1]).features(&noise("x", &[1, 3, 30, 64])).unwrap_err().to_string();
    assert!(small.contains("at least 31 pixels a side"), "{small}");
    assert!(lpips(BACKBONES[1]).features(&noise("x", &[1, 3, 31, 31])).is_ok());
    let small = lpips(BACKBONES[0]).features(&noise("x", &[1, 3, 15, 64])).unwrap_err().to_string();
    assert!(small.contains("at least 16 pixels a side"), "{small}");
    assert!(lpips(BACKBONES[0]).features(&noise("x", &[1, 3, 16, 16])).is_ok());
}

fn value(terms: &Terms, name: &str) -> f32 {
    let (_, value) = terms.named.iter().find(|(term, _)| *term == name).unwrap();
    value.to_scalar().unwrap()
}

/// Every term there is.
fn all_terms() -> Weights {
    Weights {
        l1: 0.5,
        perceptual: Some(Perceptual { weight: 1.0, weights: file("vgg16"), network: Backbone::Vgg16 }),
        convnext: Some(Logits { weight: 0.1, weights: file("convnext") }),
        ..Default::default()
    }
}

#[test]
fn the_terms_are_what_they_are_called_whatever_the_preprocessor() {
    let (images, others, _) = reference();
    let imagenet = Preprocessor {
        image_mean: [0.485, 0.456, 0.406],
        image_std: [0.229, 0.224, 0.225],
        ..Preprocessor::siglip(32, Resample::Bicubic)
    };
    let plain = Preprocessor { do_normalize: false, ..imagenet.clone() };
    let bytes = Preprocessor { do_rescale: false, ..plain.clone() };
    let loss = Losses::open(&all_terms(), None, &Device::Cpu).unwrap();
    let lpips = lpips(BACKBONES[0]).forward(&signed(&images), &signed(&others)).unwrap();
    let expected = lpips.mean_all().unwrap().to_scalar::<f32>().unwrap();
    for preprocessor in [imagenet, plain, bytes, Preprocessor::siglip(32, Resample::Bicubic)] {
        let [mean, std] = preprocessor.unit_mean_and_std();
        let channels = |x: [f32; 3]| Tensor::new(&x, &Device::Cpu).unwrap().reshape((1, 3, 1, 1)).unwrap();
        let normal = |x: &Tensor| x.broadcast_sub(&channels(mean)).unwrap().broadcast_div(&channels(std)).unwrap();
        let quantizer = Tensor::new(0.25f32, &Device::Cpu).unwrap();
        let terms = loss.of_pixels(&preprocessor, &normal(&others), &normal(&images), quantizer).unwrap();
        let names: Vec<&str> = terms.named.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["reconstruction", "quantizer", "l1", "perceptual", "convnext"]);
        assert!((value(&terms, "perceptual") - expected).abs() < 1e-4 * expected);
        let [l2, quantizer, l1, perceptual, convnext] = [0, 1, 2, 3, 4].map(|i| value(&terms, names[i]));
        let sum = l2 + quantizer + 0.5 * l1 + perceptual + 0.1 * convnext;
        assert!((terms.total.to_scalar::<f32>().unwrap() - sum).abs() < 1e-5 * sum);
    }
}

#[test]
fn without_perceptual_terms_the_loss_is_what_it_was() {
    let (images, others, _) = reference();
    let preprocessor = Preprocessor::siglip(32, Resample::Bicubic);
    let quantizer = Tensor::new(0.37f32, &Device::Cpu).unwrap();
    let weights = Weights { reconstruction: 0.7, quantizer: 1.3, ..Default::default() };
    let loss = Losses::open(&weights, None, &Device::Cpu).unwrap();
    let terms = loss.of_pixels(&preprocessor, &others, &images, quantizer.clone()).unwrap();
    let error = (&images - &others).unwrap().sqr().unwrap().mean_all().unwrap();
    let expected = ((error * 0.7).unwrap() + (quantizer * 1.3).unwrap()).unwrap();
    assert_same_bits("total", &terms.total, &expected);
    let text = serde_json::to_string(&Weights::default()).unwrap();
    assert_eq!(text, r#"{"reconstruction":1.0,"quantizer":1.0}"#, "a checkpoint made before can be resumed");
}

#[test]
fn every_term_falls_when_pixels_follow_its_gradient() {
    let (images, others, _) = reference();
    let preprocessor = Preprocessor::siglip(32, Resample::Bicubic);
    let quantizer = Tensor::new(0f32, &Device::Cpu).unwrap();
    let loss = Losses::open(&all_terms(), None, &Device::Cpu).unwrap();
    for name in ["reconstruction", "l1", "perceptual", "convnext"] {
        let x = Var::from_tensor(&signed(&images)).unwrap();
        let terms = || loss.of_pixels(&preprocessor, &signed(&others), &x, quantizer.clone()).unwrap();
        let before = value(&terms(), name);
        for _ in 0..3 {
            let terms = terms();
            let (_, term) = terms.named.iter().find(|(term, _)| *term == name).unwrap();
            let gradient = gradient(term, &x);
            let norm = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            x.set(&(x.as_tensor() - (gradient * (0.3 / f64::from(norm))).unwrap()).unwrap()).unwrap();
        }
        let after = value(&terms(), name);
        assert!(after < before, "{name}: {before} before, {after} after");
        say(&format!("{name}: {before:.5} before, {after:.5} after three steps"));
    }
}
