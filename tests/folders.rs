//! Model folders: what Hugging Face saves can be started from, and what is broken is refused by name.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use vqrae::weights::{self, Tensors};
use vqrae::{DType, Device, InitReport, Tensor, Vqrae, init};

use crate::compare::{PARITY, assert_close, assert_same_bits, fixture, tensors_of};

const SEED: u64 = 7;
const WEIGHTS: &str = "model.safetensors";

fn temporary() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// A copy of the Hugging Face folder `siglip/tiny`, in `folder/encoder`.
fn encoder_in(folder: &Path) -> PathBuf {
    let encoder = folder.join("encoder");
    fs::create_dir_all(&encoder).unwrap();
    for name in ["config.json", "preprocessor_config.json", WEIGHTS] {
        fs::copy(fixture("siglip/tiny").join(name), encoder.join(name)).unwrap();
    }
    encoder
}

/// Starts a model in `folder/model` from an encoder.
fn start(encoder: &Path, folder: &Path, wishes: &Value) -> vqrae::Result<InitReport> {
    let file = folder.join("wishes.json");
    fs::write(&file, wishes.to_string()).unwrap();
    init(encoder, &file, &[], None, &folder.join("model"), SEED)
}

fn wishes() -> Value {
    json!({ "quantizer": { "type": "simvq", "codebook_size": 16, "codebook_dim": 40 } })
}

/// A started model's folder.
fn started(folder: &Path) -> PathBuf {
    start(&fixture("siglip/tiny"), folder, &wishes()).unwrap_or_else(|error| panic!("{error}")).folder
}

fn open(folder: &Path) -> vqrae::Result<Vqrae> {
    Vqrae::from_pretrained(folder, &Device::Cpu, DType::F32)
}

/// Reads, changes and writes the tensors of a folder.
fn change(folder: &Path, change: impl FnOnce(&mut Tensors)) {
    let mut tensors = weights::read(folder).unwrap();
    change(&mut tensors);
    weights::write(&folder.join(WEIGHTS), &tensors, Default::default()).unwrap();
}

fn change_config(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(&path, config.to_string()).unwrap();
}

#[track_caller]
fn assert_refused<T>(result: vqrae::Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("accepted, but should have been refused with {parts:?}") };
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "`{part}` is not said by: {message}");
    }
}

#[test]
fn a_model_started_from_a_hugging_face_folder_has_its_encoder() {
    let folder = temporary();
    let report = start(&fixture("siglip/tiny"), folder.path(), &wishes()).unwrap();
    let model = open(&report.folder).unwrap();
    let reference = tensors_of(&fixture("siglip/tiny/reference.safetensors"), "4x4");
    let features = model.encode(&reference["pixel_values"]).unwrap();
    assert_close("features", &features, &reference["last_hidden_state"], PARITY);
    assert_eq!((model.id(), model.parameters()), (report.id.as_str(), report.pretrained + report.fresh));
    assert_eq!(model.preprocessor().size, (32, 32));
    let indices = model.encode_to_indices(&reference["pixel_values"]).unwrap();
    assert_eq!(indices.dims(), [2, 4, 4]);
    assert_eq!(model.decode_from_indices(&indices).unwrap().dims(), [2, 3, 32, 32]);
}

#[test]
fn all_layouts_of_hugging_face_give_the_same_model() {
    let folder = temporary();
    let prefixed = encoder_in(folder.path());
    change(&prefixed, |tensors| {
        let renamed = std::mem::take(tensors).into_iter().map(|(name, x)| (format!("vision_model.{name}"), x));
        *tensors = renamed.collect();
    });
    let ids = [fixture("siglip/tiny"), fixture("siglip/whole"), prefixed].map(|encoder| {
        start(&encoder, folder.path(), &wishes()).unwrap_or_else(|error| panic!("{}: {error}", encoder.display())).id
    });
    assert_eq!(ids[0], ids[1], "a lone SiglipVisionModel and a whole SiglipModel");
    assert_eq!(ids[0], ids[2], "without and with the prefix `vision_model.`");
}

#[test]
fn shards_are_read_as_one_file() {
    let folder = temporary();
    let model = started(folder.path());
    let whole = open(&model).unwrap();
    let tensors = weights::read(&model).unwrap();
    fs::remove_file(model.join(WEIGHTS)).unwrap();
    let mut map = serde_json::Map::new();
    for (i, shard) in ["a.safetensors", "b.safetensors"].into_iter().enumerate() {
        let part: Tensors = tensors.clone().into_iter().skip(i).step_by(2).collect();
        map.extend(part.keys().map(|name| (name.clone(), json!(shard))));
        weights::write(&model.join(shard), &part, Default::default()).unwrap();
    }
    let index = model.join("model.safetensors.index.json");
    fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    assert_eq!(open(&model).unwrap().id(), whole.id());

    for outside in ["../a.safetensors", "/a.safetensors", "x/a.safetensors", ".."] {
        fs::write(&index, json!({ "weight_map": { "x": outside } }).to_string()).unwrap();
        assert_refused(open(&model), &["index.json", outside, "is not a file of this folder"]);
    }
}

const TENSORS: [&str; 5] = [
    "encoder.vision_model.encoder.layers.1.self_attn.k_proj.bias",
    "encoder.vision_model.embeddings.position_embedding.weight",
    "quantizer.codebook",
    "quantizer.transform.weight",
    "decoder.layers.0.mlp.fc2.weight",
];

#[test]
fn a_missing_tensor_is_named() {
    let folder = temporary();
    for name in TENSORS {
        let model = started(folder.path());
        change(&model, |tensors| drop(tensors.remove(name)));
        assert_refused(open(&model), &[WEIGHTS, &format!("`{name}` is missing")]);
    }
}

#[test]
fn a_left_over_tensor_is_named() {
    let folder = temporary();
    for name in ["encoder.vision_model.encoder.layers.2.layer_norm1.weight", "quantizer.transform.bias", "extra"] {
        let model = started(folder.path());
        let extra = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
        change(&model, |tensors| drop(tensors.insert(name.to_string(), extra)));
        assert_refused(open(&model), &[WEIGHTS, "1 tensors that the model has no use for", &format!("`{name}`")]);
    }
}

#[test]
fn a_misshapen_tensor_is_named_with_both_shapes() {
    let folder = temporary();
    for name in TENSORS {
        let model = started(folder.path());
        let mut shape = Vec::new();
        change(&model, |tensors| {
            let tensor = &tensors[name];
            shape = tensor.dims().to_vec();
            let flat =
                Tensor::cat(&[tensor.flatten_all().unwrap(), Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap()], 0);
            tensors.insert(name.to_string(), flat.unwrap());
        });
        let elements = shape.iter().product::<usize>() + 1;
        assert_refused(open(&model), &[name, &format!("has shape [{elements}]"), &format!("expected: {shape:?}")]);
    }
}

#[test]
fn a_broken_encoder_folder_is_refused_by_name() {
    const NAME: &str = "encoder.layers.1.mlp.fc1.weight";
    let folder = temporary();
    let encoder = encoder_in(folder.path());
    change(&encoder, |tensors| drop(tensors.remove(NAME)));
    assert_refused(start(&encoder, folder.path(), &wishes()), &[NAME, "is missing"]);

    let encoder = encoder_in(folder.path());
    change(&encoder, |tensors| {
        drop(tensors.insert(NAME.to_string(), Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap()))
    });
    assert_refused(start(&encoder, folder.path(), &wishes()), &[NAME, "has shape [3], expected: [64, 32]"]);

    let encoder = encoder_in(folder.path());
    change(&encoder, |tensors| {
        let copy = tensors[NAME].clone();
        tensors.insert("encoder.layers.2.mlp.fc1.weight".to_string(), copy);
    });
    assert_refused(start(&encoder, folder.path(), &wishes()), &["encoder.layers.2.mlp.fc1.weight", "not one that"]);

    let encoder = encoder_in(folder.path());
    fs::remove_file(encoder.join("preprocessor_config.json")).unwrap();
    assert_refused(start(&encoder, folder.path(), &wishes()), &["preprocessor_config.json"]);

    let encoder = encoder_in(folder.path());
    change_config(&encoder, |config| config["model_type"] = json!("clip_vision_model"));
    assert_refused(
        start(&encoder, folder.path(), &wishes()),
        &["config.json", "clip_vision_model", "siglip_vision_model"],
    );
    assert!(!folder.path().join("model").exists(), "a refused start leaves a folder behind");
}

#[test]
fn a_config_for_another_width_is_refused() {
    let folder = temporary();
    let model = started(folder.path());
    change_config(&model, |config| config["encoder"]["hidden_size"] = json!(64));
    assert_refused(open(&model), &["encoder.vision_model.", "[32", "expected: [64"]);

    let model = started(folder.path());
    change_config(&model, |config| config["quantizer"]["codebook_dim"] = json!(48));
    assert_refused(open(&model), &["quantizer.codebook", "[16, 40]", "expected: [16, 48]"]);

    let model = started(folder.path());
    change_config(&model, |config| config["encoder"]["num_hidden_layers"] = json!(1));
    assert_refused(open(&model), &["no use for", "layers.1.layer_norm1.bias"]);
}

#[test]
fn sizes_that_make_no_sense_are_refused_before_anything_is_allocated() {
    let wrong = [
        ("encoder", "hidden_size", json!(0), "width is 0"),
        ("encoder", "hidden_size", json!(1u64 << 40), "width is"),
        ("encoder", "num_attention_heads", json!(5), "5 heads do not divide the width 32"),
        ("encoder", "num_attention_heads", json!(0), "heads is 0"),
        ("encoder", "num_hidden_layers", json!(1u64 << 40), "depth is"),
        ("encoder", "patch_size", json!(0), "patch_size is 0"),
        ("encoder", "image_size", json!(1u64 << 40), "image_size is"),
        ("encoder", "hidden_act", json!("relu"), "hidden_act is `relu`"),
        ("encoder", "hidden_size", json!(-32), "invalid value"),
        ("quantizer", "codebook_size", json!(0), "codebook_size is 0"),
        ("quantizer", "codebook_dim", json!(1u64 << 40), "codebook_dim is"),
        ("quantizer", "commitment_cost", json!(-1.0), "commitment_cost is -1"),
        ("quantizer", "metric", json!("manhattan"), "manhattan"),
        ("quantizer", "colour", json!("red"), "colour"),
        ("decoder", "patch_size", json!(0), "patch_size is 0"),
        ("decoder", "num_attention_heads", json!(7), "7 heads do not divide"),
    ];
    let folder = temporary();
    for (section, key, value, message) in wrong {
        let model = started(folder.path());
        change_config(&model, |config| config[section][key] = value);
        assert_refused(open(&model), &["config.json", message]);
    }
}

#[test]
fn a_truncated_or_lying_safetensors_file_is_refused_with_its_path() {
    let folder = temporary();
    let model = started(folder.path());
    let path = model.join(WEIGHTS);
    let whole = fs::read(&path).unwrap();
    let header_len = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let with_header =
        |header: &str| [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &whole[8 + header_len..]].concat();
    let header = std::str::from_utf8(&whole[8..8 + header_len]).unwrap();
    let mut broken: Vec<(String, Vec<u8>)> = [0, 7, 8, header_len, 8 + header_len, whole.len() / 2, whole.len() - 1]
        .into_iter()
        .map(|len| (format!("cut to {len} bytes"), whole[..len].to_vec()))
        .collect();
    broken.push(("a byte too many".to_string(), [&whole[..], &[0]].concat()));
    broken.push(("a header of 2⁶⁴ − 1 bytes".to_string(), [&u64::MAX.to_le_bytes(), &whole[8..]].concat()));
    broken.push(("a header of 2⁴⁰ bytes".to_string(), [&(1u64 << 40).to_le_bytes(), &whole[8..]].concat()));
    broken.push(("a header that is not JSON".to_string(), with_header("{\"quantizer.codebook\":")));
    broken.push(("a shape larger than its bytes".to_string(), with_header(&header.replace("[16,40]", "[16,41]"))));
    broken.push((
        "a shape that overflows".to_string(),
        with_header(&header.replace("[16,40]", "[4611686018427387904,40]")),
    ));
    broken.push(("an unknown dtype".to_string(), with_header(&header.replacen("\"F32\"", "\"F33\"", 1))));
    for (what, bytes) in broken {
        assert_ne!(bytes, whole, "{what}: nothing was changed");
        fs::write(&path, bytes).unwrap();
        let Err(error) = open(&model) else { panic!("{what}: accepted") };
        assert!(error.to_string().contains(WEIGHTS), "{what}: {error}");
    }
    fs::write(&path, whole).unwrap();
    open(&model).unwrap();
}

#[test]
fn the_backend_can_be_wished_for_and_keeps_its_features() {
    let folder = temporary();
    let pixels = &tensors_of(&fixture("siglip/tiny/reference.safetensors"), "4x4")["pixel_values"];
    let features = |encoder: Value| {
        let mut wishes = wishes();
        wishes["encoder"] = encoder;
        let report = start(&fixture("siglip/tiny"), folder.path(), &wishes).unwrap_or_else(|error| panic!("{error}"));
        open(&report.folder).unwrap().encode(pixels).unwrap()
    };
    let ours = features(json!({ "backend": "vit" }));
    assert_same_bits("the default backend", &features(json!({})), &ours);
    assert_close("candle_transformers", &features(json!({ "backend": "candle_transformers" })), &ours, PARITY);
}
