//! Every encoder with every quantizer, from a pretrained folder through init, tokenizing and painting to another folder.

use std::fs;
use std::path::{Path, PathBuf};

use vqrae::image::{Preprocessor, Resample};
use vqrae::{DType, Device, Tensor, Vqrae, init, model, weights};

use crate::compare::{assert_same_bits, fixture, noise};

/// Folders of tiny encoders, each with its hidden width.
pub(crate) const ENCODERS: [&str; 8] = [
    "siglip/tiny",
    "encoders/naflex",
    "encoders/dinov2",
    "encoders/dinov2-swiglu",
    "encoders/dinov2-registers",
    "encoders/internvit-300m",
    "encoders/internvit-6b",
    "encoders/mae",
];

/// Quantizers as config.json has them, each with its number of codes a token.
pub(crate) const QUANTIZERS: [(&str, usize); 12] = [
    (r#"{"type":"simvq","codebook_size":40,"codebook_dim":12}"#, 1),
    (r#"{"type":"simvq","codebook_size":40,"codebook_dim":12,"metric":"cosine","transform_bias":true}"#, 1),
    (r#"{"type":"simvq","codebook_size":40,"codebook_dim":12,"metric":"hsq","norm":"layer_norm"}"#, 1),
    (r#"{"type":"vq","codebook_size":40,"codebook_dim":12,"norm":"scale"}"#, 1),
    (r#"{"type":"vq","codebook_size":40,"codebook_dim":12,"metric":"cosine","ema":{}}"#, 1),
    (r#"{"type":"fsq","levels":[5,4,3],"norm":"layer_norm"}"#, 1),
    (r#"{"type":"lfq","codebook_dim":9,"norm":"layer_norm"}"#, 1),
    (r#"{"type":"lfq","codebook_dim":9,"spherical":true}"#, 1),
    (r#"{"type":"residual","levels":3,"level":{"codebook_size":20,"codebook_dim":6},"norm":"layer_norm"}"#, 3),
    (
        r#"{"type":"residual","levels":2,"level":{"codebook_size":20,"codebook_dim":6,"ema":{}},"shared_codebook":true}"#,
        2,
    ),
    (r#"{"type":"product","groups":4,"group":{"levels":1,"level":{"codebook_size":20,"codebook_dim":4}}}"#, 4),
    (r#"{"type":"product","groups":2,"group":{"levels":2,"level":{"codebook_size":20,"codebook_dim":4}}}"#, 4),
];

/// A copy of an encoder's folder with a preprocessor.
pub(crate) fn encoder(name: &str, place: &Path) -> PathBuf {
    let folder = place.join(name.replace('/', "-"));
    fs::create_dir_all(&folder).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture(name).join(file), folder.join(file)).unwrap();
    }
    let preprocessor = Preprocessor::siglip(32, Resample::Bicubic).to_json().to_string();
    fs::write(folder.join("preprocessor_config.json"), preprocessor).unwrap();
    folder
}

fn open(folder: &Path, dtype: DType) -> Vqrae {
    Vqrae::from_pretrained(folder, &Device::Cpu, dtype).unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
}

#[test]
fn every_encoder_works_with_every_quantizer_from_init_to_a_saved_model() {
    let place = tempfile::tempdir().unwrap();
    let pixels = noise("pixels", &[2, 3, 32, 24]);
    let mut pairs = 0;
    for name in ENCODERS {
        let encoder = encoder(name, place.path());
        for (i, (quantizer, c)) in QUANTIZERS.into_iter().enumerate() {
            let what = format!("{name} with {quantizer}");
            let [wishes, started, saved] =
                ["json", "started", "saved"].map(|kind| place.path().join(format!("{pairs}-{i}.{kind}")));
            fs::write(&wishes, format!(r#"{{"quantizer":{quantizer},"decoder":{{"num_hidden_layers":1}}}}"#)).unwrap();
            let report = init(&encoder, &wishes, &[], None, &started, 7).unwrap_or_else(|e| panic!("{what}: {e}"));

            let model = open(&started, DType::F32);
            assert_eq!(model.id(), report.id, "{what}");
            let codes = model.encode_to_indices(&pixels).unwrap();
            let (h, w) = model.grid_of(32, 24).unwrap();
            assert_eq!(codes.dims(), if c == 1 { vec![2, h, w] } else { vec![2, h, w, c] }, "{what}");
            let largest = codes.flatten_all().unwrap().max(0).unwrap().to_scalar::<u32>().unwrap();
            assert!((largest as usize) < model.codebook_size(), "{what}");
            let painted = model.decode_from_indices(&codes).unwrap();
            assert_eq!(painted.dims(), [2, 3, 32, 24], "{what}");
            let quantized = model.quantize(&model.encode(&pixels).unwrap()).unwrap();
            let flat = |x: &Tensor| x.flatten_all().unwrap();
            assert_same_bits(&format!("{what}: codes of features"), &flat(&quantized.indices), &flat(&codes));
            let by_features = model.decode(&quantized.tokens, (h, w)).unwrap();
            assert_same_bits(&format!("{what}: pixels of features"), &by_features, &painted);

            let tensors = weights::read(&started).unwrap();
            model::save(&saved, model.config(), model.preprocessor(), &tensors).unwrap();
            let loaded = open(&saved, DType::F32);
            assert_eq!(loaded.id(), model.id(), "{what}");
            assert_same_bits(&format!("{what}: loaded"), &loaded.encode_to_indices(&pixels).unwrap(), &codes);
            assert_same_bits(&format!("{what}: loaded"), &loaded.decode_from_indices(&codes).unwrap(), &painted);

            let small = open(&saved, DType::BF16);
            let codes = small.encode_to_indices(&pixels).unwrap();
            let alone = small.encode_to_indices(&pixels.narrow(0, 1, 1).unwrap()).unwrap();
            assert_same_bits(&format!("{what}: alone in bf16"), &alone, &codes.narrow(0, 1, 1).unwrap());
            pairs += 1;
        }
    }
    assert_eq!(pairs, ENCODERS.len() * QUANTIZERS.len());
}
