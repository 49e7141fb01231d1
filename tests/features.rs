//! Which features the quantizer sees: every choice against transformers' hidden states, fusion against PyTorch, latent
//! statistics against numpy.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Var;
use candle_nn::VarBuilder;
use serde_json::{Value, json};
use tempfile::TempDir;
use vqrae::encoder::{By, Features, Fuse};
use vqrae::fusion::Fusion;
use vqrae::image::{Preprocessor, Resample};
use vqrae::latent::Statistics;
use vqrae::model::{fresh_tensors, save};
use vqrae::ops::composed;
use vqrae::weights::{self, Tensors};
use vqrae::{Config, DType, Device, Network, Tensor, Vqrae, init};

use crate::compare::{PARITY, Tolerance, assert_close, assert_same_bits, fixture, noise, say, tensors_of};

/// Eight bits of mantissa, two blocks.
const BF16: Tolerance = Tolerance { relative: 0.03, absolute: 0.0 };
/// Against a gradient's largest element.
const GRADIENT: Tolerance = Tolerance { relative: 2e-4, absolute: 1e-8 };

/// A pretrained encoder of two blocks, with states that transformers computed.
struct Pretrained {
    folder: &'static str,
    /// Tokens of its own.
    prefix: usize,
    cases: [&'static str; 2],
    norm: &'static str,
    eps: f64,
}

const SIGLIP: Pretrained = Pretrained {
    folder: "siglip/tiny",
    prefix: 0,
    cases: ["4x4", "6x8"],
    norm: "encoder.vision_model.post_layernorm",
    eps: 1e-6,
};
const DINOV2: Pretrained = Pretrained {
    folder: "encoders/dinov2-registers",
    prefix: 5,
    cases: ["4x4", "6x5"],
    norm: "encoder.post_layernorm",
    eps: 1e-6,
};

const MAE: Pretrained =
    Pretrained { folder: "encoders/mae", prefix: 1, cases: ["4x4", "6x5"], norm: "encoder.post_layernorm", eps: 1e-12 };
/// It has no final norm.
const INTERNVIT: Pretrained =
    Pretrained { folder: "encoders/internvit-300m", prefix: 1, cases: ["4x4", "6x5"], norm: "", eps: 0.0 };

impl Pretrained {
    fn tensors(&self) -> Tensors {
        weights::encoder(&fixture(self.folder)).unwrap().1
    }

    /// The encoder's folder with a preprocessor, in `place`.
    fn folder_in(&self, place: &Path) -> PathBuf {
        let folder = place.join("encoder");
        fs::create_dir_all(&folder).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(fixture(self.folder).join(name), folder.join(name)).unwrap();
        }
        let preprocessor = Preprocessor::siglip(32, Resample::Bicubic).to_json().to_string();
        fs::write(folder.join("preprocessor_config.json"), preprocessor).unwrap();
        folder
    }

    /// Makes a model of it in `place`.
    fn init(&self, place: &Path, wishes: &Value, statistics: Option<&Path>) -> vqrae::Result<PathBuf> {
        let file = place.join("wishes.json");
        fs::write(&file, wishes.to_string()).unwrap();
        init(&self.folder_in(place), &file, &[], statistics, &place.join("model"), 5).map(|report| report.folder)
    }
}

fn wishes(features: &Value) -> Value {
    json!({
        "encoder": { "features": features },
        "quantizer": { "type": "simvq", "codebook_size": 40, "codebook_dim": 8 },
    })
}

fn temporary() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn open(folder: &Path, dtype: DType) -> Vqrae {
    Vqrae::from_pretrained(folder, &Device::Cpu, dtype).unwrap_or_else(|error| panic!("{error}"))
}

/// The same model on tensor operations.
fn network(model: &Vqrae, tensors: &Tensors) -> Network {
    let tensors = tensors.clone().into_iter().collect();
    Network::load(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu), model.config()).unwrap()
}

/// What a choice of features is of transformers' states, in binary64.
fn expected(of: &Pretrained, features: Features, states: &dyn Fn(&str) -> Tensor, model: &Tensors) -> Tensor {
    let state = |name: &str| {
        let state = states(name).to_dtype(DType::F64).unwrap();
        state.narrow(1, of.prefix, state.dim(1).unwrap() - of.prefix).unwrap()
    };
    let hidden = |k: usize| state(&format!("hidden.{k}"));
    let normed = |x: Tensor| {
        let part = |part: &str| of.tensors()[&format!("{}.{part}", of.norm)].to_dtype(DType::F64).unwrap();
        composed::layer_norm(&x, &part("weight"), &part("bias"), of.eps).unwrap()
    };
    match features {
        Features::LastHiddenState => state("last_hidden_state"),
        Features::BeforeNorm => hidden(2),
        Features::SumLast(k) => (3 - k..3).map(hidden).reduce(|a, b| (a + b).unwrap()).unwrap(),
        Features::Layer(k) => hidden(k),
        Features::LayerNormed(k) => normed(hidden(k)),
        Features::Fuse(fuse) => {
            let deep = if fuse.norm { normed(hidden(fuse.deep)) } else { hidden(fuse.deep) };
            let states = Tensor::cat(&[&hidden(fuse.shallow), &deep], 2).unwrap();
            let tensors = model.clone().into_iter().collect();
            let vb = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu).pp("fusion");
            Fusion::load(vb, fuse, deep.dim(2).unwrap()).unwrap().forward(&states).unwrap()
        }
    }
}

#[test]
fn every_choice_equals_transformers_and_gives_the_same_codes_in_every_form() {
    let table = [
        json!("last_hidden_state"),
        json!("before_norm"),
        json!({"sum_last": 1}),
        json!({"sum_last": 2}),
        json!({"layer": 1}),
        json!({"layer": 2}),
        json!({"layer_normed": 1}),
        json!({"layer_normed": 2}),
        json!({"fuse": {"shallow": 1, "deep": 2, "by": "linear"}}),
        json!({"fuse": {"shallow": 1, "deep": 2, "by": "attention"}}),
        json!({"fuse": {"shallow": 1, "deep": 2, "by": "attention", "norm": false}}),
    ];
    let encoders = [SIGLIP, DINOV2, MAE, INTERNVIT];
    for (of, choice) in encoders.iter().flat_map(|of| table.iter().map(move |choice| (of, choice))) {
        let what = format!("{} {choice}", of.folder);
        let place = temporary();
        if of.norm.is_empty() && serde_json::from_value::<Features>(choice.clone()).unwrap().has_norm() {
            let error = of.init(place.path(), &wishes(choice), None).unwrap_err().to_string();
            assert!(error.contains("there is no final norm"), "{what}: {error}");
            continue;
        }
        let folder = of.init(place.path(), &wishes(choice), None).unwrap_or_else(|error| panic!("{what}: {error}"));
        let tensors = weights::read(&folder).unwrap();
        let (model, short) = (open(&folder, DType::F32), open(&folder, DType::BF16));
        let network = network(&model, &tensors);
        let features = model.config().encoder.features();
        assert_eq!(serde_json::to_value(features).unwrap(), *choice);
        let in_use = features.blocks(2);
        let has = |part: &str| tensors.keys().any(|name| name.starts_with("encoder.") && name.contains(part));
        assert!(has("layers.0.") && has("layers.1.") == (in_use == 2), "{what}: blocks");
        assert_eq!(has(".post_layernorm."), features.has_norm(), "{what}: norm");
        assert!(tensors.contains_key("decoder.layers.1.mlp.fc1.weight"), "{what}: the decoder mirrors both blocks");

        let mut worst = 0f64;
        for case in of.cases {
            let reference = tensors_of(&fixture(of.folder).join("reference.safetensors"), case);
            let pixels = &reference["pixel_values"];
            let expected = expected(of, features, &|name| reference[name].clone(), &tensors);
            for got in [model.encode(pixels).unwrap(), network.features(pixels).unwrap()] {
                worst = worst.max(assert_close(&what, &got, &expected, PARITY));
            }
            assert_close(&what, &short.encode(pixels).unwrap(), &expected, BF16);
            assert_eq!(model.hidden_states(pixels).unwrap().len(), in_use + 1);
            assert_eq!(network.encoder.hidden_states(pixels).unwrap().len(), in_use + 1);

            let codes = model.encode_to_indices(pixels).unwrap();
            let flat = codes.flatten_from(1).unwrap();
            assert_same_bits(&what, &network.quantize(pixels).unwrap().indices, &flat);
            let quantized = model.quantize(&model.encode(pixels).unwrap()).unwrap();
            assert_same_bits(&what, &quantized.indices, &flat);
            let alone = model.encode_to_indices(&pixels.narrow(0, 0, 1).unwrap()).unwrap();
            assert_same_bits(&what, &alone, &codes.narrow(0, 0, 1).unwrap());

            let again = place.path().join("again");
            save(&again, model.config(), model.preprocessor(), &weights::read(&folder).unwrap()).unwrap();
            let again = open(&again, DType::F32);
            assert_eq!(again.id(), model.id(), "{what}");
            assert_same_bits(&what, &again.encode_to_indices(pixels).unwrap(), &codes);
        }
        say(&format!("{what} ({features}): worst relative error {worst:.1e}"));
    }
}

/// A random model of four blocks.
fn four_blocks(features: &Value) -> (Config, Tensors) {
    let config = json!({
        "model_type": "vqrae", "format": 1,
        "encoder": {"model_type": "dinov2", "hidden_size": 48, "mlp_ratio": 2, "num_hidden_layers": 4, "image_size": 20,
                    "num_attention_heads": 2, "patch_size": 5, "features": features},
        "quantizer": {"type": "simvq", "codebook_size": 60, "codebook_dim": 12},
    });
    let config = Config::from_json(&config.to_string(), Path::new("four")).unwrap();
    let mut tensors = fresh_tensors(&config, Tensors::new(), 2).unwrap();
    for (name, tensor) in &mut tensors {
        *tensor = (&*tensor + (noise(name, tensor.dims()) * 0.1).unwrap()).unwrap();
    }
    (config, tensors)
}

fn packed(config: &Config, tensors: &Tensors, dtype: DType) -> vqrae::Result<Vqrae> {
    let preprocessor = Preprocessor::siglip(20, Resample::Bicubic);
    Vqrae::new(config.clone(), preprocessor, tensors.clone(), Path::new("four"), &Device::Cpu, dtype)
}

#[test]
fn blocks_that_no_feature_needs_are_no_part_of_the_model() {
    let of = |choice: Value| four_blocks(&choice);
    for (choice, blocks) in [
        (json!({"layer": 1}), 1),
        (json!({"layer_normed": 3}), 3),
        (json!({"fuse": {"shallow": 1, "deep": 3, "by": "linear"}}), 3),
        (json!({"fuse": {"shallow": 2, "deep": 3, "by": "attention"}}), 3),
    ] {
        let (config, tensors) = of(choice.clone());
        let has = |side: &str, i: usize| tensors.contains_key(&format!("{side}.layers.{i}.mlp.fc1.bias"));
        let count = |side: &str| (0..9).filter(|&i| has(side, i)).count();
        assert_eq!((count("encoder"), count("decoder")), (blocks, 4), "{choice}");
        let model = packed(&config, &tensors, DType::F32).unwrap();
        let network = network(&model, &tensors);
        for (h, w) in [(20, 20), (10, 35)] {
            let pixels = noise("pixels", &[2, 3, h, w]);
            let (got, expected) = (model.encode(&pixels).unwrap(), network.features(&pixels).unwrap());
            assert_close(&choice.to_string(), &got, &expected, PARITY);
            let codes = model.encode_to_indices(&pixels).unwrap();
            assert_same_bits("codes", &codes.flatten_from(1).unwrap(), &network.quantize(&pixels).unwrap().indices);
        }
        let short = packed(&config, &tensors, DType::BF16).unwrap();
        let pixels = noise("pixels", &[1, 3, 20, 20]);
        assert_close("bf16", &short.encode(&pixels).unwrap(), &network.features(&pixels).unwrap(), BF16);

        let mut more = tensors.clone();
        more.insert(format!("encoder.layers.{blocks}.mlp.fc1.bias"), noise("left over", &[96]));
        let error = packed(&config, &more, DType::F32).unwrap_err().to_string();
        assert!(error.contains("no use for") && error.contains(&format!("encoder.layers.{blocks}.mlp")), "{error}");
    }
    // An inner layer is the same whether the blocks after it are there or not.
    let (config, tensors) = of(json!("before_norm"));
    let pixels = noise("pixels", &[1, 3, 20, 20]);
    let states = packed(&config, &tensors, DType::F32).unwrap().hidden_states(&pixels).unwrap();
    let (inner, mut fewer) = (of(json!({"layer": 2})).0, tensors);
    fewer.retain(|name, _| !name.starts_with("encoder.layers.2.") && !name.starts_with("encoder.layers.3."));
    let got = packed(&inner, &fewer, DType::F32).unwrap().encode(&pixels).unwrap();
    assert_same_bits("hidden_states[2]", &got, &states[2].narrow(1, 1, 16).unwrap());
}

#[test]
fn choices_that_make_no_sense_are_refused_by_name() {
    let place = temporary();
    for (choice, says) in [
        (json!({"layer": 0}), "features.layer is 0, expected: 1 to the 2 blocks"),
        (json!({"layer": 3}), "features.layer is 3, expected: 1 to the 2 blocks"),
        (json!({"layer_normed": 3}), "features.layer_normed is 3"),
        (json!({"sum_last": 0}), "features.sum_last is 0"),
        (json!({"fuse": {"shallow": 0, "deep": 2, "by": "linear"}}), "features.fuse.shallow is 0"),
        (json!({"fuse": {"shallow": 1, "deep": 3, "by": "linear"}}), "features.fuse.deep is 3"),
        (
            json!({"fuse": {"shallow": 2, "deep": 2, "by": "linear"}}),
            "features.fuse.shallow is 2, expected: less than features.fuse.deep, 2",
        ),
        (json!({"fuse": {"shallow": 1, "deep": 2, "by": "sum"}}), "unknown variant `sum`"),
        (json!({"fuse": {"shallow": 1, "deep": 2, "by": "linear", "heads": 4}}), "unknown field `heads`"),
        (json!({"inner": 1}), "unknown variant `inner`"),
    ] {
        let error = SIGLIP.init(place.path(), &wishes(&choice), None).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("wishes.json"), "{choice}: {error}");
    }
    let odd = json!({"model_type": "siglip_vision_model", "hidden_size": 20, "num_attention_heads": 2,
                     "features": {"fuse": {"shallow": 1, "deep": 2, "by": "attention"}}});
    let odd: vqrae::encoder::Config = serde_json::from_value(odd).unwrap();
    let error = odd.check().unwrap_err();
    assert!(error.contains("8 heads do not divide the width 20") && error.contains("`linear`"), "{error}");
    let internvit = |norm: bool| {
        let features = json!({"fuse": {"shallow": 1, "deep": 2, "by": "linear", "norm": norm}});
        let config = json!({"model_type": "internvl_vision", "features": features});
        serde_json::from_value::<vqrae::encoder::Config>(config).unwrap().check()
    };
    assert!(internvit(true).unwrap_err().contains("fuse with norm = false") && internvit(false).is_ok());
}

/// What PyTorch gives in `features.safetensors`, and what this fusion makes of the same: the output, and gradients by name.
fn fused(case: &str, dtype: DType) -> (Tensor, BTreeMap<String, Tensor>) {
    let given = tensors_of(&fixture("features/features.safetensors"), case);
    let mut variables = BTreeMap::new();
    for (name, tensor) in &given {
        let name = name.strip_prefix("weight.").or(["shallow", "deep"].into_iter().find(|input| input == name));
        if let Some(name) = name {
            variables.insert(name.to_string(), Var::from_tensor(&tensor.to_dtype(dtype).unwrap()).unwrap());
        }
    }
    let tensors = variables.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let by = if case == "linear" { By::Linear } else { By::Attention };
    let fuse = Fuse { shallow: 1, deep: 2, by, norm: true };
    let fusion = Fusion::load(VarBuilder::from_tensors(tensors, dtype, &Device::Cpu), fuse, 24).unwrap();
    let states = Tensor::cat(&[variables["shallow"].as_tensor(), variables["deep"].as_tensor()], 2).unwrap();
    let out = fusion.forward(&states).unwrap();
    let loss = (&out * given["target"].to_dtype(dtype).unwrap()).unwrap().mean_all().unwrap();
    let gradients = loss.backward().unwrap();
    let of = |(name, var): (&String, &Var)| {
        let gradient = gradients.get(var).unwrap_or_else(|| panic!("{case}: `{name}` gets no gradient"));
        (name.clone(), gradient.clone())
    };
    (out, variables.iter().map(of).collect())
}

#[test]
fn fusion_and_all_its_gradients_equal_ideals_and_the_composed_ops() {
    for case in ["linear", "attention"] {
        let given = tensors_of(&fixture("features/features.safetensors"), case);
        let ((out, gradients), (composed, exact)) = (fused(case, DType::F32), fused(case, DType::F64));
        let mut worst = assert_close(&format!("{case}: PyTorch"), &out, &given["fused"], PARITY);
        assert_close(&format!("{case}: composed"), &out, &composed, PARITY);
        let theirs = given.keys().filter(|name| name.starts_with("gradient.")).count();
        assert_eq!(gradients.len(), theirs, "{case}: number of gradients");
        for (name, gradient) in &gradients {
            let off = assert_close(&format!("{case}: {name}"), gradient, &given[&format!("gradient.{name}")], GRADIENT);
            assert_close(&format!("{case}: {name}, composed"), gradient, &exact[name], GRADIENT);
            worst = if name == "attn.k_proj.bias" { worst } else { worst.max(off) };
        }
        say(&format!("fusion by {case}: worst relative error {worst:.1e}"));
    }
}

#[test]
fn statistics_equal_numpys_whatever_the_batch() {
    let given = tensors_of(&fixture("features/features.safetensors"), "statistics");
    let features = given["features"].to_vec3::<f32>().unwrap();
    let mut statistics = Statistics::new(24);
    features.iter().for_each(|image| statistics.add(&image.concat(), (2, 3)).unwrap());
    assert_eq!(statistics.images(), 5);
    let exact = Tolerance { relative: 1e-6, absolute: 0.0 };
    for (name, tensor) in statistics.tensors().unwrap() {
        assert_close(&name, &tensor, &given[&name], exact);
    }
}

/// A file of the statistics of `count` images of noise, and RAE's form of it.
fn statistics(model: &Vqrae, place: &Path, count: usize) -> [PathBuf; 2] {
    let mut statistics = Statistics::new(model.config().encoder.width());
    let (h, w) = model.config().encoder.grid();
    for image in 0..count {
        let features = model.encode(&noise(&format!("image {image}"), &[1, 3, 32, 32])).unwrap();
        statistics.add(&features.flatten_all().unwrap().to_vec1::<f32>().unwrap(), (h, w)).unwrap();
    }
    let [ours, raes] = ["statistics.safetensors", "rae.safetensors"].map(|name| place.join(name));
    statistics.write(&ours, &BTreeMap::new()).unwrap();
    let image = |name: &str| {
        let tensor = &statistics.tensors().unwrap()[&format!("position.{name}")];
        let image = tensor.t().unwrap().contiguous().unwrap().reshape((tensor.dim(1).unwrap(), h, w)).unwrap();
        (name.to_string(), image)
    };
    weights::write(&raes, &["mean", "var"].map(image).into_iter().collect(), Default::default()).unwrap();
    [ours, raes]
}

fn latent(normalize: &str, denormalize: bool) -> Value {
    let mut wishes = wishes(&json!({"fuse": {"shallow": 1, "deep": 2, "by": "attention"}}));
    wishes["latent"] = json!({"normalize": normalize, "denormalize": denormalize});
    wishes
}

#[test]
fn features_are_normalised_before_the_quantizer_and_back_before_the_decoder() {
    let place = temporary();
    let plain = wishes(&json!({"fuse": {"shallow": 1, "deep": 2, "by": "attention"}}));
    let plain = open(&DINOV2.init(place.path(), &plain, None).unwrap(), DType::F32);
    let [ours, raes] = statistics(&plain, place.path(), 6);
    for (normalize, denormalize) in [("channel", false), ("channel", true), ("position", true)] {
        let wishes = latent(normalize, denormalize);
        let folder = DINOV2.init(place.path(), &wishes, Some(&ours)).unwrap();
        let (model, tensors) = (open(&folder, DType::F32), weights::read(&folder).unwrap());
        let network = network(&model, &tensors);
        assert_ne!(model.id(), plain.id());

        let pixels =
            Tensor::cat(&[0, 1, 2, 3, 4, 5].map(|i| noise(&format!("image {i}"), &[1, 3, 32, 32])), 0).unwrap();
        let latents = network.latents(&pixels).unwrap();
        let mean = latents.mean((0, 1)).unwrap();
        assert_close("mean", &mean, &mean.zeros_like().unwrap(), Tolerance { relative: 0.0, absolute: 2e-5 });
        let squares = latents.sqr().unwrap().mean((0, 1)).unwrap();
        assert_close("variance", &squares, &squares.ones_like().unwrap(), Tolerance { relative: 2e-3, absolute: 0.0 });

        // The features that are handed on are the encoder's own.
        let features = model.encode(&pixels).unwrap();
        assert_same_bits("features", &features, &plain.encode(&pixels).unwrap());
        let codes = model.encode_to_indices(&pixels).unwrap();
        let (quantized, reference) = (model.quantize(&features).unwrap(), network.quantize(&pixels).unwrap());
        let flat = codes.flatten_from(1).unwrap();
        assert_same_bits("codes", &quantized.indices, &flat);
        assert_same_bits("codes of tensor operations", &reference.indices, &flat);
        assert_close("projected", &quantized.projected, &reference.projected, PARITY);
        let alone = model.encode_to_indices(&pixels.narrow(0, 4, 1).unwrap()).unwrap();
        assert_same_bits("alone", &alone, &codes.narrow(0, 4, 1).unwrap());

        let image = model.decode_from_indices(&codes).unwrap();
        assert_same_bits("decode", &model.decode(&quantized.tokens, (4, 4)).unwrap(), &image);
        let painted = network.paint(&reference.tokens, (4, 4), DType::F32).unwrap();
        assert_close("image", &image, &painted, PARITY);
        let tokens = network.latent.as_ref().unwrap().denormalize(&reference.tokens).unwrap();
        let tokens = if denormalize { tokens } else { reference.tokens.clone() };
        assert_same_bits("decoder", &network.decoder.forward(&tokens, (4, 4)).unwrap(), &painted);
        assert_close("bf16", &open(&folder, DType::BF16).encode(&pixels).unwrap(), &features, BF16);

        let other = noise("other", &[1, 3, 16, 24]);
        if normalize == "channel" {
            assert_eq!(model.encode_to_indices(&other).unwrap().dims(), [1, 2, 3]);
            continue;
        }
        for error in [
            model.encode_to_indices(&other).unwrap_err(),
            model.encode_to_indices(&noise("same number", &[1, 3, 16, 64])).unwrap_err(),
            model.quantize(&model.encode(&other).unwrap()).unwrap_err(),
            model.decode_from_indices(&Tensor::zeros((1, 2, 8), DType::U32, &Device::Cpu).unwrap()).unwrap_err(),
            network.quantize(&other).unwrap_err(),
        ] {
            assert!(error.to_string().contains("of the places of a grid of 4×4"), "{error}");
        }
        let folder = DINOV2.init(place.path(), &wishes, Some(&raes)).unwrap();
        assert_eq!(open(&folder, DType::F32).id(), model.id(), "RAE's layout of the same statistics");
    }
}

#[test]
fn raes_own_file_of_statistics_serves_the_places_of_another_grid() {
    let place = temporary();
    let file = fixture("features/stat.pt");
    let mut wishes = latent("position", false);
    let error = DINOV2.init(place.path(), &wishes, Some(&file)).unwrap_err().to_string();
    assert!(error.contains("`mean` [24, 2, 3]") && error.contains("set latent.grid = [h, w]"), "{error}");

    wishes["latent"]["grid"] = json!([2, 3]);
    let folder = DINOV2.init(place.path(), &wishes, Some(&file)).unwrap();
    let tensors = weights::read(&folder).unwrap();
    let given = tensors_of(&fixture("features/features.safetensors"), "statistics");
    for name in ["mean", "var"] {
        assert_same_bits(name, &tensors[&format!("latent.{name}")], &given[&format!("position.{name}")]);
    }
    let model = open(&folder, DType::F32);
    assert_eq!(model.encode_to_indices(&noise("fits", &[1, 3, 16, 24])).unwrap().dims(), [1, 2, 3]);
    let error = model.encode_to_indices(&noise("own", &[1, 3, 32, 32])).unwrap_err().to_string();
    assert!(error.contains("of the places of a grid of 2×3"), "{error}");

    let mut channels = latent("channel", false);
    channels["latent"]["grid"] = json!([2, 3]);
    let error = DINOV2.init(place.path(), &channels, Some(&file)).unwrap_err().to_string();
    assert!(error.contains("grid is for statistics by position"), "{error}");
}

#[test]
fn latents_without_fitting_statistics_are_refused() {
    let place = temporary();
    let plain = open(&DINOV2.init(place.path(), &wishes(&json!({"layer": 1})), None).unwrap(), DType::F32);
    let [ours, raes] = statistics(&plain, place.path(), 2);
    let refused =
        |wishes: &Value, file: Option<&Path>| DINOV2.init(place.path(), wishes, file).expect_err("refused").to_string();
    let error = refused(&latent("channel", false), None);
    assert!(error.contains("`latent` needs statistics") && error.contains("--latent-statistics"), "{error}");
    let error = refused(&wishes(&json!("before_norm")), Some(&ours));
    assert!(error.contains("no section `latent`"), "{error}");
    let error = refused(&latent("channel", false), Some(&raes));
    assert!(error.contains("latent.normalize = channel") && error.contains("`mean` [24, 4, 4]"), "{error}");
    assert!(refused(&latent("token", false), Some(&ours)).contains("unknown variant `token`"));
    let mut narrow = latent("channel", true);
    narrow["decoder"] = json!({"hidden_size": 16, "num_attention_heads": 2});
    assert!(refused(&narrow, Some(&ours)).contains("24 wide, but this one takes 16"));

    let mut tensors = weights::read_file(&ours).unwrap();
    tensors.insert("channel.var".into(), (&tensors["channel.var"] * -1.0).unwrap());
    weights::write(&ours, &tensors, Default::default()).unwrap();
    assert!(refused(&latent("channel", false), Some(&ours)).contains("variance is not finite, or below zero"));
}

#[test]
fn training_with_a_frozen_encoder_moves_the_fusion_and_leaves_the_statistics() {
    let place = temporary();
    let plain = wishes(&json!({"fuse": {"shallow": 1, "deep": 2, "by": "attention"}}));
    let plain = open(&DINOV2.init(place.path(), &plain, None).unwrap(), DType::F32);
    let [ours, _] = statistics(&plain, place.path(), 3);
    let folder = DINOV2.init(place.path(), &latent("position", true), Some(&ours)).unwrap();
    let text = format!(
        "[start]\nfrom = \"folder\"\npath = {folder:?}\n[train]\nsteps = 2\nbatch_size = 2\nwarmup_steps = 1\n\
         checkpoint_every = 1\nsave_dtype = \"f16\"\n[groups]\nencoder = {{ peak = 0, end = 0 }}\n\
         quantizer = {{ peak = 1e-3, end = 1e-4 }}\ndecoder = {{ peak = 1e-3, end = 1e-4 }}\n"
    );
    let file = place.path().join("train.toml");
    fs::write(&file, text).unwrap();
    let photos = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/photos");
    let run = |output: &Path, resume: bool| {
        let config = vqrae::train::Config::read(&file, &[])?;
        let mut tell = |_: vqrae::train::Event| std::ops::ControlFlow::Continue(());
        let files = vqrae::train::Files { train: vec![photos.clone()], output: output.into(), ..Default::default() };
        vqrae::train::run(&config, &files, resume, &mut tell)
    };
    let output = place.path().join("run");
    run(&output, false).unwrap();
    let before = weights::read(&folder).unwrap();
    let after = weights::read_file(&output.join("checkpoints/step-00000002/model.safetensors")).unwrap();
    assert!(before.keys().eq(after.keys()));
    let mut moved = 0;
    for (name, tensor) in &before {
        if name.starts_with("latent.") || name.starts_with("encoder.") {
            assert_same_bits(name, &after[name], tensor);
        } else if name.starts_with("fusion.") {
            let off = (tensor - &after[name]).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            // The softmax does not see the keys' bias.
            assert!(off > 1e-5 || name.ends_with("k_proj.bias"), "{name} moved by {off:e} only");
            moved += 1;
        }
    }
    assert_eq!(moved, 18, "tensors of the fusion");
    let exported = weights::read(&output.join("model")).unwrap();
    assert_same_bits("latent.var", &exported["latent.var"], &before["latent.var"]);
    assert_eq!(exported["fusion.ffn.fc1.weight"].dtype(), DType::F16);
    let codes = open(&output.join("model"), DType::F32).encode_to_indices(&noise("x", &[1, 3, 32, 32])).unwrap();
    assert_eq!(codes.dims(), [1, 4, 4]);

    // A killed run ends with the same bits.
    fs::remove_dir_all(output.join("checkpoints/step-00000002")).unwrap();
    run(&output, true).unwrap();
    let again = weights::read_file(&output.join("checkpoints/step-00000002/model.safetensors")).unwrap();
    after.iter().for_each(|(name, tensor)| assert_same_bits(name, &again[name], tensor));

    let random = "[start]\nfrom = \"random\"\n[train]\nsteps = 1\n[groups]\nencoder = { peak = 0, end = 0 }\n\
                  quantizer = { peak = 0, end = 0 }\ndecoder = { peak = 0, end = 0 }\n[model.encoder]\n\
                  model_type = \"dinov2\"\n[model.quantizer]\ntype = \"fsq\"\nlevels = [5, 5]\n[model.latent]\n\
                  normalize = \"channel\"\n";
    fs::write(&file, random).unwrap();
    let error = run(&place.path().join("random"), false).unwrap_err().to_string();
    assert!(error.contains("model.latent needs statistics"), "{error}");
}
