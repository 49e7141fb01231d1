//! Every encoder against transformers, state by state: with tensor operations and with packed weights, on grids that are
//! not square, from Hugging Face's names and from the authors'.

use std::path::Path;

use vqrae::encoder::Encoder;
use vqrae::image::{Preprocessor, Resample};
use vqrae::model::{fresh_tensors, save};
use vqrae::weights::{self, Loader, Store};
use vqrae::{Config, DType, Device, Tensor, Vqrae};

use crate::compare::{PARITY, Tolerance, assert_close, assert_same_bits, fixture, noise, say, tensors_of};

const FOLDERS: [&str; 9] = [
    "dinov2",
    "dinov2-swiglu",
    "dinov2-registers",
    "dinov2-authors",
    "internvit-300m",
    "internvit-6b",
    "internvit-authors",
    "mae",
    "naflex",
];

/// Eight bits of mantissa, two blocks.
const BF16: Tolerance = Tolerance { relative: 0.03, absolute: 0.0 };

fn tolerance(dtype: DType) -> Tolerance {
    if dtype == DType::F32 { PARITY } else { BF16 }
}

/// The encoder on tensor operations, strictly loaded, and how many tokens of its own it has.
fn load(folder: &Path, dtype: DType) -> (Encoder, usize) {
    let (config, tensors) = weights::encoder(folder).unwrap_or_else(|error| panic!("{error}"));
    let loader = Loader::new(Store::of_tensors(tensors, folder));
    let encoder = loader.finish(Encoder::load(loader.builder(dtype, &Device::Cpu).pp("encoder"), &config));
    (encoder.unwrap_or_else(|error| panic!("{error}")), config.layout().prefix)
}

/// A whole model of the encoder, the rest random.
fn whole(folder: &Path, decoder: &str, dtype: DType) -> Vqrae {
    let (config, given) = weights::encoder(folder).unwrap_or_else(|error| panic!("{error}"));
    let config = Config::new(config, serde_json::from_str(SIMVQ).unwrap(), serde_json::from_str(decoder).unwrap());
    let tensors = fresh_tensors(&config, given, 5).unwrap();
    let preprocessor = Preprocessor::siglip(32, Resample::Bicubic);
    Vqrae::new(config, preprocessor, tensors, folder, &Device::Cpu, dtype).unwrap_or_else(|error| panic!("{error}"))
}

/// A decoder that mirrors the encoder, and one that takes no memory beside a large one.
const SYMMETRIC: &str = "{}";
const NARROW: &str =
    r#"{"hidden_size": 8, "num_hidden_layers": 0, "num_attention_heads": 1, "intermediate_size": 8, "patch_size": 1}"#;

const SIMVQ: &str = r#"{"type": "simvq", "codebook_size": 40, "codebook_dim": 8}"#;

/// The grids that a folder's reference holds.
fn cases(folder: &Path) -> Vec<String> {
    let tensors = weights::read_file(&folder.join("reference.safetensors")).unwrap_or_else(|error| panic!("{error}"));
    let cases: Vec<_> =
        tensors.keys().filter_map(|name| Some(name.strip_suffix(".pixel_values")?.to_string())).collect();
    assert!(cases.len() >= 3, "{}: {cases:?}", folder.display());
    cases
}

/// What follows an encoder's own tokens.
fn patches(states: &Tensor, prefix: usize) -> Tensor {
    states.narrow(1, prefix, states.dim(1).unwrap() - prefix).unwrap()
}

#[test]
fn tensor_operations_equal_transformers_in_every_state() {
    for (name, dtype) in FOLDERS.iter().flat_map(|name| [(name, DType::F32), (name, DType::BF16)]) {
        let (folder, tolerance) = (fixture("encoders").join(name), tolerance(dtype));
        let (encoder, prefix) = load(&folder, dtype);
        let mut worst = 0f64;
        for case in cases(&folder) {
            let reference = tensors_of(&folder.join("reference.safetensors"), &case);
            for (i, state) in encoder.hidden_states(&reference["pixel_values"]).unwrap().iter().enumerate() {
                let what = format!("{name} {case} hidden.{i}");
                worst = worst.max(assert_close(&what, state, &reference[&format!("hidden.{i}")], tolerance));
            }
            let features = encoder.forward(&reference["pixel_values"]).unwrap();
            let expected = patches(&reference["last_hidden_state"], prefix);
            worst = worst.max(assert_close(&format!("{name} {case} features"), &features, &expected, tolerance));
        }
        say(&format!("{name} in {}: worst relative error {worst:.1e}", dtype.as_str()));
    }
}

#[test]
fn packed_weights_equal_transformers_in_every_state() {
    for (name, dtype) in FOLDERS.iter().flat_map(|name| [(name, DType::F32), (name, DType::BF16)]) {
        let folder = fixture("encoders").join(name);
        let model = whole(&folder, SYMMETRIC, dtype);
        let prefix = model.config().encoder.layout().prefix;
        let mut worst = 0f64;
        for case in cases(&folder) {
            let reference = tensors_of(&folder.join("reference.safetensors"), &case);
            for (i, state) in model.hidden_states(&reference["pixel_values"]).unwrap().iter().enumerate() {
                let what = format!("packed {name} {case} hidden.{i}");
                worst = worst.max(assert_close(&what, state, &reference[&format!("hidden.{i}")], tolerance(dtype)));
            }
            let features = model.encode(&reference["pixel_values"]).unwrap();
            let expected = patches(&reference["last_hidden_state"], prefix);
            let what = format!("packed {name} {case} features");
            worst = worst.max(assert_close(&what, &features, &expected, tolerance(dtype)));
        }
        say(&format!("packed {name} in {}: worst relative error {worst:.1e}", model.precision()));
    }
}

#[test]
fn every_encoder_goes_from_pixels_to_codes_and_back_and_through_a_folder() {
    for name in FOLDERS {
        let folder = fixture("encoders").join(name);
        for dtype in [DType::F32, DType::BF16] {
            let model = whole(&folder, SYMMETRIC, dtype);
            for (h, w) in [(32, 32), (40, 16)] {
                let pixels = noise(name, &[2, 3, h, w]);
                let codes = model.encode_to_indices(&pixels).unwrap();
                assert_eq!(codes.dims(), [2, h / 8, w / 8]);
                let alone = model.encode_to_indices(&pixels.narrow(0, 1, 1).unwrap()).unwrap();
                assert_same_bits(name, &alone, &codes.narrow(0, 1, 1).unwrap());
                assert_eq!(model.decode_from_indices(&codes).unwrap().dims(), [2, 3, h, w]);
            }
        }
        let (config, given) = weights::encoder(&folder).unwrap();
        let config = Config::new(config, serde_json::from_str(SIMVQ).unwrap(), Default::default());
        let tensors = fresh_tensors(&config, given, 5).unwrap();
        let place = tempfile::tempdir().unwrap();
        save(place.path(), &config, &Preprocessor::siglip(32, Resample::Bicubic), &tensors).unwrap();
        let loaded = Vqrae::from_pretrained(place.path(), &Device::Cpu, DType::F32).unwrap();
        let model = whole(&folder, SYMMETRIC, DType::F32);
        assert_eq!(loaded.id(), model.id(), "{name}");
        let pixels = noise(name, &[1, 3, 32, 32]);
        let codes = |model: &Vqrae| model.encode_to_indices(&pixels).unwrap();
        assert_same_bits(name, &codes(&loaded), &codes(&model));
    }
}

#[test]
fn full_size_encoders_equal_transformers_where_a_folder_of_them_is_given() {
    let Some(folder) = std::env::var_os("VQRAE_FULL") else {
        say("VQRAE_FULL is not set: no full-size encoder was compared; fixtures/encoders/make.py says how");
        return;
    };
    let mut models: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    models.retain(|model| model.join("reference.safetensors").exists());
    models.sort();
    for folder in models {
        let name = folder.file_name().unwrap().to_string_lossy().to_string();
        let reference = tensors_of(&folder.join("reference.safetensors"), "full");
        if reference.is_empty() {
            continue; // One of fixtures/siglip/make.py, which tests/parity.rs compares.
        }
        let model = whole(&folder, NARROW, DType::F32);
        let mut worst = (0f64, 0);
        for (i, state) in model.hidden_states(&reference["pixel_values"]).unwrap().iter().enumerate() {
            let off = assert_close(&format!("{name} {i}"), state, &reference[&format!("hidden.{i}")], PARITY);
            worst = if off > worst.0 { (off, i) } else { worst };
        }
        let prefix = model.config().encoder.layout().prefix;
        let features = model.encode(&reference["pixel_values"]).unwrap();
        assert_close(&format!("{name} features"), &features, &patches(&reference["last_hidden_state"], prefix), PARITY);
        say(&format!("{name}: worst relative error {:.1e}, at hidden state {}", worst.0, worst.1));
    }
}
