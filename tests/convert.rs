//! Checkpoints of other projects, converted: the features, codes and pixels are those projects' own.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use vqrae::convert::{Options, Report, convert};
use vqrae::weights::{Tensors, TorchFile, read_file};
use vqrae::{DType, Device, Vqrae};

use crate::compare::{Tolerance, assert_close, assert_same_bits, fixture, noise, say};

/// Widths so small that heads do not follow from them.
const HEADS: [(&str, usize); 2] = [("encoder.num_attention_heads", 2), ("decoder.num_attention_heads", 3)];

/// All that a checkpoint holds is representable in its number format, so nothing but the order of sums differs.
const CLOSE: Tolerance = Tolerance { relative: 2e-6, absolute: 0.0 };

/// A case of fixtures/convert.
struct Case {
    folder: TempDir,
    checkpoint: PathBuf,
    reference: Tensors,
}

impl Case {
    fn new(name: &str) -> Self {
        let source = fixture("convert").join(name);
        let file = source.join("checkpoint.pt");
        Self {
            folder: tempfile::tempdir().unwrap(),
            checkpoint: if file.exists() { file } else { source.clone() },
            reference: read_file(&source.join("reference.safetensors")).unwrap(),
        }
    }

    fn output(&self) -> PathBuf {
        self.folder.path().join("model")
    }

    fn convert(&self, options: &Options) -> Report {
        convert(&self.checkpoint, &self.output(), options).unwrap_or_else(|error| panic!("{error}"))
    }

    fn refused(&self, options: &Options) -> String {
        let error = convert(&self.checkpoint, &self.output(), options).unwrap_err().to_string();
        assert!(!self.output().exists(), "{error}");
        error
    }

    fn model(&self) -> Vqrae {
        Vqrae::from_pretrained(self.output(), &Device::Cpu, DType::F32).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Compares all that the reference has; returns the worst relative error.
    fn compare(&self, model: &Vqrae) -> f64 {
        let mut worst: f64 = 0.0;
        let mut close = |what: &str, got, expected| worst = worst.max(assert_close(what, &got, expected, CLOSE));
        let reference = &self.reference;
        if let Some(pixels) = reference.get("pixels") {
            close("features", model.encode(pixels).unwrap(), &reference["features"]);
        }
        if let Some(indices) = reference.get("indices") {
            let quantized = model.quantize(&reference["features"]).unwrap();
            assert_same_bits("indices", &quantized.indices, indices);
            close("tokens", quantized.tokens, &reference["tokens"]);
        }
        if let Some(image) = reference.get("image") {
            let tokens = reference.get("tokens").or(reference.get("latent")).unwrap();
            close("image", model.decode(tokens, (3, 3)).unwrap(), image);
        }
        worst
    }
}

fn settings(pairs: &[(&str, Value)]) -> Vec<(String, Value)> {
    pairs.iter().map(|(key, value)| ((*key).to_string(), value.clone())).collect()
}

fn options(heads: &[(&str, usize)], base: Option<&Path>) -> Options {
    let set = heads.iter().map(|(key, value)| ((*key).to_string(), json!(value))).collect();
    Options { set, base: base.map(Path::to_path_buf), ..Options::default() }
}

/// A converted checkpoint of the fork, to be a base.
fn base() -> (TempDir, PathBuf) {
    let case = Case::new("fork-siglip");
    case.convert(&options(&HEADS, None));
    let output = case.output();
    (case.folder, output)
}

#[test]
fn the_forks_checkpoints_give_its_features_codes_and_pixels() {
    for (name, key, dropped) in [("fork-siglip", Some("ema"), 2), ("fork-dinov2-vq", None, 0)] {
        let case = Case::new(name);
        let report = case.convert(&options(&HEADS, None));
        assert_eq!((report.map.as_str(), report.key.as_deref(), report.dropped), (name, key, dropped));
        assert!(report.parts.values().all(|origin| origin == "the checkpoint"), "{report:?}");
        let model = case.model();
        let worst = case.compare(&model);
        let codes = model.encode_to_indices(&case.reference["pixels"]).unwrap();
        assert_same_bits("codes", &codes.reshape((1, 9)).unwrap(), &case.reference["indices"]);
        let painted = model.decode_from_indices(&codes).unwrap();
        assert_close("painted", &painted, &case.reference["image"], CLOSE);
        assert_eq!((model.preprocessor().size, model.id()), ((12, 12), report.id.as_str()));
        say(&format!("{name}: {worst:.1e}"));
    }
}

#[test]
fn raes_and_diffusers_checkpoints_give_their_features_and_pixels() {
    for name in ["rae-mae", "diffusers-rae-dinov2", "diffusers-rae-siglip2", "diffusers-rae-mae"] {
        let case = Case::new(name);
        let mut options = options(&HEADS, None);
        options.set.extend(settings(&[
            ("quantizer.type", json!("simvq")),
            ("quantizer.codebook_size", json!(16)),
            ("quantizer.codebook_dim", json!(4)),
        ]));
        let report = case.convert(&options);
        assert_eq!((report.map.as_str(), report.parts["quantizer"].as_str()), (name, "fresh, wants training"));
        say(&format!("{name}: {:.1e}", case.compare(&case.model())));
    }
}

#[test]
fn a_decoder_alone_takes_the_rest_from_a_base() {
    let (_folder, base) = base();
    let case = Case::new("rae-decoder");
    let mut options = options(&HEADS[1..], Some(&base));
    let report = case.convert(&options);
    assert_eq!((report.map.as_str(), report.parts["decoder"].as_str()), ("rae-decoder", "the checkpoint"));
    assert_eq!(report.parts["encoder"], base.display().to_string());
    case.compare(&case.model());
    let before = Vqrae::from_pretrained(&base, &Device::Cpu, DType::F32).unwrap();
    let pixels = noise("pixels", &[1, 3, 12, 12]);
    let codes = |model: &Vqrae| model.encode_to_indices(&pixels).unwrap();
    assert_same_bits("codes", &codes(&case.model()), &codes(&before));

    options.fresh = vec!["quantizer".to_string()];
    assert_eq!(case.convert(&options).parts["quantizer"], "fresh, wants training");
    options.fresh = vec!["head".to_string()];
    let error = convert(&case.checkpoint, &case.folder.path().join("other"), &options).unwrap_err().to_string();
    assert!(error.contains("--fresh head: expected: encoder, fusion, latent, quantizer, decoder"), "{error}");
    options = Options { base: None, ..options };
    options.fresh.clear();
    let error = convert(&case.checkpoint, &case.folder.path().join("other"), &options).unwrap_err().to_string();
    assert!(
        error.contains("it makes no encoder; name a model folder or a pretrained encoder's with --base"),
        "{error}"
    );
}

#[test]
fn an_encoders_own_folder_is_a_base() {
    let case = Case::new("rae-decoder");
    let encoder = fixture("siglip/tiny");
    let (_folder, base) = base();
    let mut options = options(&HEADS[1..], Some(&encoder));
    options.preprocessor = Some(base.join("preprocessor_config.json"));
    options.set.extend(settings(&[("quantizer", json!({ "type": "fsq", "levels": [4, 4] }))]));
    let report = case.convert(&options);
    assert_eq!(report.parts["encoder"], encoder.display().to_string());
    assert_eq!(report.parts["quantizer"], "fresh, wants training");
    case.compare(&case.model());
}

#[test]
fn quantizers_of_vector_quantize_pytorch_give_its_codes_and_tokens() {
    let (_folder, base) = base();
    let cosine = [("quantizer.metric", json!("cosine"))];
    let levels = [("quantizer.levels", json!([5, 4, 3]))];
    for (name, map, set) in [
        ("vqp-vq", "vqp-vq", &[][..]),
        ("vqp-vq-norm", "vqp-vq-norm", &[]),
        ("vqp-vq-cosine", "vqp-vq", &cosine),
        ("vqp-simvq", "vqp-simvq", &[]),
        ("vqp-fsq", "vqp-fsq", &levels),
        ("vqp-lfq", "vqp-lfq", &[]),
        ("vqp-residual-vq", "vqp-residual-vq", &[]),
        ("vqp-grouped-residual-vq", "vqp-grouped-residual-vq", &[]),
    ] {
        let case = Case::new(name);
        let mut options = options(&[], Some(&base));
        options.set = settings(set);
        let report = case.convert(&options);
        assert_eq!((report.map.as_str(), report.parts["quantizer"].as_str()), (map, "the checkpoint"));
        say(&format!("{name}: {:.1e}", case.compare(&case.model())));
    }
    let error = Case::new("vqp-fsq").refused(&options(&[], Some(&base)));
    assert!(error.contains("give it with --set quantizer.levels=…"), "{error}");
}

#[test]
fn codes_that_learn_by_gradient_need_no_averages() {
    let (_folder, base) = base();
    let case = Case::new("vqp-vq");
    let mut options = options(&[], Some(&base));
    options.set = settings(&[("quantizer.ema", Value::Null)]);
    case.convert(&options);
    case.compare(&case.model());
}

#[test]
fn the_packed_decoder_is_the_one_of_tensors() {
    let case = Case::new("rae-mae");
    case.convert(&options(&HEADS, None));
    let model = case.model();
    let tensors = read_file(&case.output().join("model.safetensors")).unwrap();
    let vb = candle_nn::VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
    let network = vqrae::Network::load(vb, model.config()).unwrap();
    for grid in [(3, 3), (2, 5)] {
        let tokens = noise("tokens", &[2, grid.0 * grid.1, 8]);
        let painted = network.paint(&tokens, grid, DType::F32).unwrap();
        assert_close("decoder", &model.decode(&tokens, grid).unwrap(), &painted, CLOSE);
        let alone = model.decode(&tokens.narrow(0, 1, 1).unwrap(), grid).unwrap();
        assert_same_bits("alone", &alone, &model.decode(&tokens, grid).unwrap().narrow(0, 1, 1).unwrap());
    }
}

#[test]
fn what_is_left_over_on_either_side_is_listed() {
    let case = Case::new("fork-siglip");
    let map = |name: &str, text: &str| {
        let path = case.folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        Options { map: Some(path.to_str().unwrap().to_string()), ..options(&HEADS, None) }
    };
    // Without the quantizer's lines.
    let error = case.refused(&Options { map: Some("rae-siglip".to_string()), ..options(&HEADS, None) });
    assert!(
        error.contains("7 tensors of the checkpoint that it has no line for: `quantizer.ema_cluster_size` [12]"),
        "{error}"
    );
    assert!(error.contains("add them to the map as [[tensors]] or drop"), "{error}");

    let error = case.refused(&map(
        "a.toml",
        "about = 'a'\nextends = ['fork-siglip']\n[[tensors]]\nfrom = 'nothing.{n}'\nto = 'decoder.x{n}'\n",
    ));
    assert!(error.contains("the checkpoint has not: `nothing.{n}`"), "{error}");

    let text = "about = 'b'\nextends = ['rae-siglip']\ndrop = ['quantizer.{rest..}']\n[config.quantizer]\ntype = 'fsq'\nlevels = [4, 4]\n";
    let error = case.refused(&map("b.toml", text));
    assert!(error.contains("tensors of the model that nothing becomes: `quantizer.linear_in.bias` [2]"), "{error}");
    assert!(error.contains("add them to the map as [[tensors]] or [[fill]]"), "{error}");

    let error = case.refused(&map(
        "c.toml",
        "about = 'c'\nextends = ['fork-siglip']\n[config.quantizer]\ntransform_bias = false\n",
    ));
    assert!(
        error.contains(
            "`quantizer.embedding_proj.bias`: becomes `quantizer.transform.bias` [8], which config.json has no use for"
        ),
        "{error}"
    );

    let error =
        case.refused(&Options { set: settings(&[("quantizer.codebook_size", json!(13))]), ..options(&HEADS, None) });
    assert!(error.contains("heads"), "{error}");
    let mut wrong = options(&HEADS, None);
    wrong.set.extend(settings(&[("quantizer.codebook_size", json!(13))]));
    let error = case.refused(&wrong);
    assert!(error.contains("becomes `quantizer.codebook` with shape [12, 8], expected: [13, 8]"), "{error}");

    let error = case.refused(&Options { map: Some("fork-sigilp".to_string()), ..Options::default() });
    assert!(
        error.contains("is neither a map's file nor one of the maps in the program") && error.contains("fork-siglip"),
        "{error}"
    );
}

#[test]
fn a_layout_that_no_map_fits_is_shown_as_a_map_would_name_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("unknown.safetensors");
    let tensors: Tensors = (0..12).map(|n| (format!("net.blocks.{n}.qkv.weight"), noise("x", &[6, 2]))).collect();
    vqrae::weights::write(&path, &tensors, Default::default()).unwrap();
    let error = convert(&path, &folder.path().join("model"), &Options::default()).unwrap_err().to_string();
    assert!(error.contains("no map of the program fits (diffusers-rae-dinov2, "), "{error}");
    assert!(error.contains("`net.blocks.{n}.qkv.weight` [6, 2] ×12"), "{error}");
}

#[test]
fn a_map_of_ones_own_takes_layers_apart() {
    let (_folder, base) = base();
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("own.safetensors");
    let codes = noise("codes", &[2, 3, 5]);
    let both = noise("both", &[10, 8]);
    let tensors = [("vq.tables", &codes), ("vq.io", &both)].map(|(name, tensor)| (name.to_string(), tensor.clone()));
    vqrae::weights::write(&checkpoint, &tensors.into(), Default::default()).unwrap();
    let map = folder.path().join("own.toml");
    let text = r#"
        about = "a test"
        prefixes = [["vq.", ""]]

        [config.quantizer]
        type = "residual"
        levels = 2
        level = { codebook_size = "= shape(tables, 1)", codebook_dim = "= shape(tables, 2)" }

        [[tensors]]
        from = "tables"
        to = ["quantizer.levels.0.codebook", "quantizer.levels.1.codebook"]
        steps = [{ reshape = [-1, 5] }]

        [[tensors]]
        from = "io"
        to = "quantizer.linear_in.weight"
        steps = [{ slice = { dim = 0, start = 0, end = 5 } }]

        [[tensors]]
        from = "io"
        to = "quantizer.linear_out.weight"
        steps = [{ slice = { dim = 0, start = 5 } }, { transpose = [0, 1] }]

        [[fill]]
        to = "quantizer.linear_in.bias"
        value = "zeros"

        [[fill]]
        to = "quantizer.linear_out.bias"
        value = "zeros"
    "#;
    std::fs::write(&map, text).unwrap();
    let output = folder.path().join("model");
    let options = Options { map: Some(map.to_str().unwrap().to_string()), base: Some(base), ..Options::default() };
    let report = convert(&checkpoint, &output, &options).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((report.converted, report.filled), (4, 2));
    let made = read_file(&output.join("model.safetensors")).unwrap();
    assert_same_bits("codes", &made["quantizer.levels.1.codebook"], &codes.get(1).unwrap());
    let out = both.narrow(0, 5, 5).unwrap().t().unwrap();
    assert_same_bits("linear_out", &made["quantizer.linear_out.weight"], &out.contiguous().unwrap());
}

#[test]
fn the_dict_of_a_training_checkpoint_can_be_chosen() {
    let path = fixture("convert/fork-siglip/checkpoint.pt");
    assert_eq!(TorchFile::open(&path, None).unwrap().key(), Some("ema"));
    let names = |key| TorchFile::open(&path, Some(key)).map(|file| file.names().cloned().collect::<Vec<_>>());
    assert_eq!(names("model").unwrap(), ["bias", "weight"]);
    assert_eq!(
        names("optimizer/state").unwrap_err().to_string().matches("choose one with --key: `model`, `ema`").count(),
        1
    );
    let error =
        Case::new("diffusers-rae-mae").refused(&Options { key: Some("ema".to_string()), ..options(&HEADS, None) });
    assert!(error.contains("a safetensors file has no dicts; leave out --key ema"), "{error}");
}

#[test]
fn a_pytorch_file_with_any_byte_changed_never_panics() {
    let whole = std::fs::read(fixture("convert/vqp-vq/checkpoint.pt")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.pt");
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as usize % n
    };
    let (mut opened, mut read) = (0, 0);
    for round in 0..1_000 {
        let mut bytes = whole.clone();
        match round % 3 {
            0 => bytes.truncate(random(whole.len())),
            _ => {
                for _ in 0..1 + random(4) {
                    let at = random(bytes.len());
                    bytes[at] = random(256) as u8;
                }
            }
        }
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(file) = TorchFile::open(&path, None) {
            opened += 1;
            read += file.names().filter(|name| file.tensor(name).is_ok()).count();
        }
    }
    say(&format!("{opened} of 1,000 changed files could be opened, {read} tensors be read"));
    assert!(opened > 100 && read > opened);
}
