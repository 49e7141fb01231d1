//! Our SigLIP against Hugging Face's transformers and against candle-transformers, state by state.

use std::collections::HashMap;
use std::path::Path;

use vqrae::encoder::{self, Backend, Encoder, Features};
use vqrae::weights::{self, Loader, Store};
use vqrae::{DType, Device, Tensor};

use crate::compare::{PARITY, Tolerance, assert_close, fixture, say, tensors_of};

/// The grid that the tiny encoder was trained on.
const OWN_GRID: &str = "4x4";

/// The encoder of a Hugging Face folder, strictly loaded.
fn load(folder: &Path, backend: Backend, features: Features) -> Encoder {
    let (mut config, mut tensors) = weights::encoder(folder).unwrap_or_else(|error| panic!("{error}"));
    *config.features_mut() = features;
    if let encoder::Config::Siglip(siglip) = &mut config {
        siglip.backend = backend;
    }
    if features == Features::BeforeNorm {
        tensors.retain(|name, _| !name.contains("post_layernorm"));
    }
    let loader = Loader::new(Store::of_tensors(tensors, folder));
    let vb = loader.builder(DType::F32, &Device::Cpu).pp("encoder");
    loader.finish(Encoder::load(vb, &config)).unwrap_or_else(|error| panic!("{error}"))
}

fn reference(folder: &Path, case: &str) -> HashMap<String, Tensor> {
    tensors_of(&folder.join("reference.safetensors"), case)
}

/// Compares every hidden state and the features; returns the worst relative error and where it is.
fn assert_states(encoder: &Encoder, what: &str, reference: &HashMap<String, Tensor>) -> (f64, String) {
    let pixels = &reference["pixel_values"];
    let mut states: Vec<(String, Tensor)> = encoder
        .hidden_states(pixels)
        .unwrap()
        .into_iter()
        .enumerate()
        .map(|(i, x)| (format!("hidden.{i}"), x))
        .collect();
    let given = reference.keys().filter(|name| name.starts_with("hidden.")).count();
    assert_eq!(states.len(), given, "{what}: number of hidden states");
    states.push(("last_hidden_state".to_string(), encoder.forward(pixels).unwrap()));
    let compare = |(name, got): (String, Tensor)| {
        (assert_close(&format!("{what}: {name}"), &got, &reference[&name], PARITY), name)
    };
    states.into_iter().map(compare).max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
}

#[test]
fn every_hidden_state_equals_transformers_on_the_own_grid_and_on_interpolated_ones() {
    let folder = fixture("siglip/tiny");
    let encoder = load(&folder, Backend::Vit, Features::LastHiddenState);
    for case in [OWN_GRID, "6x8", "3x2"] {
        let (worst, at) = assert_states(&encoder, case, &reference(&folder, case));
        say(&format!("tiny SigLIP, grid {case}: {worst:.1e} at {at}"));
    }
}

#[test]
fn features_before_the_norm_are_the_last_hidden_state_of_the_list() {
    let folder = fixture("siglip/tiny");
    let reference = reference(&folder, OWN_GRID);
    let got = load(&folder, Backend::Vit, Features::BeforeNorm).forward(&reference["pixel_values"]).unwrap();
    assert_close("before_norm", &got, &reference["hidden.2"], PARITY);
}

#[test]
fn our_vit_equals_candle_transformers_on_the_same_folder() {
    let folder = fixture("siglip/tiny");
    let reference = reference(&folder, OWN_GRID);
    let features =
        |backend| load(&folder, backend, Features::LastHiddenState).forward(&reference["pixel_values"]).unwrap();
    let stock = features(Backend::CandleTransformers);
    assert_close("candle-transformers and transformers", &stock, &reference["last_hidden_state"], PARITY);
    let worst = assert_close("vit and candle-transformers", &features(Backend::Vit), &stock, PARITY);
    say(&format!("tiny SigLIP, vit and candle_transformers: {worst:.1e}"));
}

#[test]
fn candle_transformers_refuses_another_grid_and_says_what_to_do() {
    let folder = fixture("siglip/tiny");
    let pixels = &reference(&folder, "6x8")["pixel_values"];
    let error = load(&folder, Backend::CandleTransformers, Features::LastHiddenState).forward(pixels).unwrap_err();
    assert!(error.to_string().contains("32×32 pixels, not 48×64; set backend to vit"), "{error}");
}

#[test]
fn half_precision_stays_within_its_own_rounding() {
    // Eight bits of mantissa, two blocks.
    const BF16: Tolerance = Tolerance { relative: 0.03, absolute: 0.0 };
    let folder = fixture("siglip/tiny");
    let reference = reference(&folder, OWN_GRID);
    let (config, tensors) = weights::encoder(&folder).unwrap();
    let loader = Loader::new(Store::of_tensors(tensors, &folder));
    let vb = loader.builder(DType::BF16, &Device::Cpu).pp("encoder");
    let encoder = loader.finish(Encoder::load(vb, &config)).unwrap();
    let got = encoder.forward(&reference["pixel_values"]).unwrap();
    let worst = assert_close("bf16", &got, &reference["last_hidden_state"], BF16);
    say(&format!("tiny SigLIP in bf16: {worst:.1e}"));
}

#[test]
fn full_size_encoders_equal_transformers_where_a_folder_of_them_is_given() {
    let Some(folder) = std::env::var_os("VQRAE_FULL") else {
        say("VQRAE_FULL is not set: no full-size encoder was compared; fixtures/siglip/make.py says how");
        return;
    };
    let mut models: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    models.retain(|model| model.join("reference.safetensors").exists());
    models.sort();
    assert!(
        !models.is_empty(),
        "VQRAE_FULL: no model with a reference.safetensors in {}",
        Path::new(&folder).display()
    );
    for model in models {
        let name = model.file_name().unwrap().to_string_lossy();
        let reference = reference(&model, "16x16");
        if reference.is_empty() {
            continue; // One of fixtures/encoders/make.py, which tests/encoders.rs compares.
        }
        let encoder = load(&model, Backend::Vit, Features::LastHiddenState);
        let (worst, at) = assert_states(&encoder, &name, &reference);
        say(&format!("{name}: worst relative error {worst:.1e}, at {at}"));
    }
}
