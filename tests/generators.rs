//! Generators of codes: the network against PyTorch, its packed form against the network, training and drawing.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::Var;
use candle_nn::VarBuilder;
use tempfile::TempDir;
use vqrae::codes::shard::{self, Layout, Tally, Writer};
use vqrae::codes::{Header, Manifest, Row};
use vqrae::ops::Precision;
use vqrae::weights::Tensors;
use vqrae::{DType, Device, Tensor, Vqrae};
use vqrae_generators::autoregressive::{Image, draw_uncached};
use vqrae_generators::data::Sequences;
use vqrae_generators::draw::{Wish, draw};
use vqrae_generators::masked::{Order, Plan};
use vqrae_generators::network::Network;
use vqrae_generators::objective::Schedule;
use vqrae_generators::sampling::Sampling;
use vqrae_generators::train::{self, Log, Recipe};
use vqrae_generators::{Config, Generator, Kind, generator, likelihood};

use crate::compare::{PARITY, Tolerance, assert_close, fixture, noise, say, tensors_of};

const KINDS: [&str; 2] = ["masked", "autoregressive"];

fn config(kind: &str) -> Config {
    let text = std::fs::read_to_string(fixture("generator/config.json")).unwrap();
    serde_json::from_value(serde_json::from_str::<serde_json::Value>(&text).unwrap()[kind].take()).unwrap()
}

fn case(kind: &str) -> HashMap<String, Tensor> {
    tensors_of(&fixture("generator/generator.safetensors"), kind)
}

fn weights(case: &HashMap<String, Tensor>) -> Tensors {
    case.iter().filter_map(|(name, x)| Some((name.strip_prefix("weight.")?.to_string(), x.clone()))).collect()
}

fn numbers(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<i64>().unwrap().into_iter().map(|x| u32::try_from(x).unwrap()).collect()
}

#[test]
fn a_generators_scores_loss_and_every_gradient_equal_pytorchs() {
    for kind in KINDS {
        let case = case(kind);
        let variables: BTreeMap<String, Var> =
            weights(&case).into_iter().map(|(name, x)| (name, Var::from_tensor(&x).unwrap())).collect();
        let tensors = variables.iter().map(|(name, x)| (name.clone(), x.as_tensor().clone())).collect();
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let network = Network::load(vb, &config(kind), &case["codebook"]).unwrap();
        let tokens = network.forward(&numbers(&case["inputs"]), &numbers(&case["classes"])).unwrap();
        let scores = network.scores(&tokens).unwrap();
        let mut worst = assert_close(&format!("{kind}: scores"), &scores, &case["scores"], PARITY);
        let counts = case["weights"].to_vec1::<f32>().unwrap();
        let loss = network.loss(&tokens, &numbers(&case["targets"]), &counts).unwrap();
        assert_close(&format!("{kind}: loss"), &loss, &case["loss"], PARITY);
        let gradients = loss.backward().unwrap();
        for (name, variable) in &variables {
            let gradient = gradients.get(variable).unwrap_or_else(|| panic!("{kind}: {name} has no gradient"));
            // What keys' biases add is the same for all scores of a query: their gradient is zero but for rounding.
            let tolerance = Tolerance { absolute: 1e-5, ..PARITY };
            let off = assert_close(&format!("{kind}: {name}"), gradient, &case[&format!("gradient.{name}")], tolerance);
            if !name.ends_with("k_proj.bias") {
                worst = worst.max(off);
            }
        }
        say(&format!("{kind} generator against PyTorch: {worst:.1e}"));
    }
}

fn packed(kind: &str, dtype: DType) -> Generator {
    let case = case(kind);
    Generator::new(config(kind), weights(&case), &case["codebook"], dtype).unwrap()
}

#[test]
fn packed_scores_are_the_networks() {
    for kind in KINDS {
        let case = case(kind);
        let n = config(kind).tokens();
        let (inputs, classes) = (numbers(&case["inputs"]), numbers(&case["classes"]));
        for (dtype, relative) in [(DType::F32, 1e-5), (DType::BF16, 5e-2)] {
            let generator = packed(kind, dtype);
            let places: Vec<usize> = (0..n).collect();
            let class = |class: u32| Some(class as usize).filter(|&class| class < 3);
            let images = inputs.chunks(n).zip(&classes);
            let scores: Vec<f32> =
                images.flat_map(|(inputs, &number)| generator.scores(inputs, class(number), &places)).collect();
            let scores = Tensor::from_vec(scores, case["scores"].shape(), &Device::Cpu).unwrap();
            let tolerance = Tolerance { relative, absolute: 0.0 };
            assert_close(&format!("{kind} in {dtype:?}"), &scores, &case["scores"], tolerance);
        }
    }
}

#[test]
fn drawn_codes_are_the_same_with_and_without_a_cache_alone_and_among_others() {
    for dtype in [DType::F32, DType::BF16] {
        let generator = packed("autoregressive", dtype);
        for sampling in [Sampling::default(), Sampling { guidance: 2.5, top_k: 9, top_p: 0.9, temperature: 0.8 }] {
            let plan = Plan { sampling, ..Plan::default() };
            let wish = |i: u64| Wish::new(&generator, Some(i as usize % 3), 5, i);
            let mut together: Vec<Wish> = (0..5).map(wish).collect();
            // What is known of an image stays.
            together[1].codes[3] = 16;
            draw(&generator, &mut together, &plan).unwrap();
            assert_eq!(together[1].codes[3], 16);
            for (i, drawn) in together.iter().enumerate() {
                let mut alone = vec![wish(i as u64)];
                let mut uncached = wish(i as u64);
                if i == 1 {
                    (alone[0].codes[3], uncached.codes[3]) = (16, 16);
                }
                draw(&generator, &mut alone, &plan).unwrap();
                assert_eq!(drawn.codes, alone[0].codes, "image {i}");
                let Wish { class, codes, random } = &mut uncached;
                draw_uncached(&generator, &mut Image { class: *class, codes, random }, &sampling);
                assert_eq!(drawn.codes, *codes, "image {i}, {dtype:?}");
            }
            assert!(together.iter().any(|wish| wish.codes != together[0].codes), "all images are alike");
        }
    }
}

#[test]
fn a_masked_generator_draws_the_same_codes_alone_and_among_others_and_keeps_what_is_known() {
    let generator = packed("masked", DType::F32);
    for order in [Order::Confidence { noise: 3.0 }, Order::Ancestral] {
        for steps in [1, 4, 30] {
            let plan = Plan { steps, order, sampling: Sampling { guidance: 1.5, ..Sampling::default() } };
            let wish = |i: u64| {
                let mut wish = Wish::new(&generator, None, 5, i);
                (wish.codes[0], wish.codes[7]) = (2, 3);
                wish
            };
            let mut together: Vec<Wish> = (0..6).map(wish).collect();
            draw(&generator, &mut together, &plan).unwrap();
            for (i, drawn) in together.iter().enumerate() {
                let mut alone = vec![wish(i as u64)];
                draw(&generator, &mut alone, &plan).unwrap();
                assert_eq!(drawn.codes, alone[0].codes, "image {i}");
                assert_eq!((drawn.codes[0], drawn.codes[7]), (2, 3));
                assert!(drawn.codes.iter().all(|&code| code < 17), "{order:?}, {steps} steps: {:?}", drawn.codes);
            }
        }
    }
}

#[test]
fn wishes_that_do_not_fit_are_refused() {
    let generator = packed("masked", DType::F32);
    let plan = Plan::default();
    let refusal = |change: &dyn Fn(&mut Wish)| {
        let mut wish = Wish::new(&generator, Some(0), 0, 0);
        change(&mut wish);
        draw(&generator, &mut [wish], &plan).unwrap_err()
    };
    assert_eq!(refusal(&|wish| wish.class = Some(3)), "the class 3 is not among 3");
    assert_eq!(refusal(&|wish| wish.codes[0] = 17), "the code 17 is not among 17");
    assert_eq!(refusal(&|wish| wish.codes.truncate(11)), "an image has 11 codes, expected: 12");
    assert!(config("masked").class("boot").unwrap_err().contains("0 hat, 1 shoe, 2 skirt"));
}

/// A set of codes in which all follows from the class: each row of the grid counts up from a number of the class.
fn code_set(folder: &Path) {
    let header = Header {
        model_id: "0f".into(),
        preprocessing: "squash".into(),
        dtype: "f32".into(),
        codebook_size: 17,
        codes_per_token: 1,
        grid: Some((3, 4)),
    };
    let mut manifest = Manifest::new("test", "0", header.clone(), Layout::Jsonl);
    manifest.classes = ["hat", "shoe", "skirt"].map(String::from).to_vec();
    manifest.write(folder).unwrap();
    let mut writer = Writer::new(Vec::new(), &header, Layout::Jsonl).unwrap();
    let mut tally = Tally::new(&header);
    for i in 0..60u32 {
        let class = i % 3;
        let codes = (0..12).map(|place| class * 5 + place % 4).collect();
        let class = Some(manifest.classes[class as usize].clone());
        let (key, path) = (format!("{i:05}"), format!("{i:04}.png"));
        let row =
            Row { key, path, codes: Some(codes), h: 3, w: 4, class, label: Some(i64::from(i % 3)), ..Row::default() };
        tally.add(&row);
        writer.write(&row).unwrap();
    }
    let bytes = writer.finish().unwrap();
    std::fs::write(shard::file(folder, "00000", Layout::Jsonl), &bytes).unwrap();
    let file = (bytes.len() as u64, "not looked at".to_string());
    tally.stats("00000", Layout::Jsonl, "inputs", Some(1), file).write(folder).unwrap();
}

#[test]
fn a_generator_learns_what_classes_look_like_and_a_stopped_training_goes_on_to_the_same_bits() {
    let folder = TempDir::new().unwrap();
    let codes = folder.path().join("codes");
    code_set(&codes);
    let [train, apart] = Sequences::read(&codes, 5).unwrap();
    assert_eq!((train.len(), apart.len(), train.classes.len()), (48, 12, 3));
    let codebook = noise("codebook", &[17, 5]);
    for kind in KINDS {
        let config = config(kind);
        let recipe = Recipe {
            steps: 240,
            batch: 8,
            rate: 1e-2,
            average: 0.9,
            precision: Precision::F32,
            schedule: Schedule::Elbo,
            every: 80,
            ..Recipe::default()
        };
        let run = |name: &str, recipe: &Recipe| {
            let mut logs = Vec::new();
            let output = folder.path().join(format!("{kind}-{name}"));
            train::run(&output, &config, recipe, &codebook, [&train, &apart], |log: &Log| logs.push(log.clone()))
                .map(|()| (std::fs::read(output.join("model.safetensors")).unwrap(), logs))
        };
        let (whole, logs) = run("whole", &recipe).unwrap();
        let last = logs.last().unwrap();
        // Of 17 codes, given the class, the rest is certain: two bits would be a guess among the class's four.
        assert!(last.validation < 0.7, "{kind}: {last:?}");
        let counted = likelihood::counted(&train, &apart);
        assert!(
            counted.per_position < counted.unigram && last.validation < counted.per_position,
            "{kind}: {counted:?}"
        );

        // Stopped at its last checkpoint: as it would be killed, but for when.
        let stopping = |log: &Log| assert!(log.step < 160, "stopped");
        let output = folder.path().join(format!("{kind}-stopped"));
        let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            train::run(&output, &config, &recipe, &codebook, [&train, &apart], stopping)
        }));
        assert!(stopped.is_err());
        let (resumed, logs) = run("stopped", &recipe).unwrap();
        assert_eq!(logs.len(), 1, "{kind}: went on from step 160");
        assert!(resumed == whole, "{kind}: a stopped training ends with other bits");
        for (wrong, wanted) in [
            (Recipe { batch: 0, ..recipe.clone() }, "at least 1"),
            (Recipe { class_dropout: 1.5, ..recipe.clone() }, "class_dropout is 1.5"),
            (Recipe { rate: f64::NAN, ..recipe.clone() }, "rate is NaN"),
        ] {
            let refused = run("refused", &wrong).unwrap_err().to_string();
            assert!(refused.contains(wanted), "{refused}");
        }
        let other = run("stopped", &Recipe { rate: 2e-2, ..recipe.clone() }).unwrap_err().to_string();
        assert!(other.contains("another recipe"), "{other}");

        // What it draws is what the classes look like.
        let (config, network) = generator::network(folder.path().join(format!("{kind}-whole")), &codebook).unwrap();
        let bits = likelihood::of_network(&network, config.kind, &apart, likelihood::WHOLE).unwrap();
        assert!(
            (bits - last.validation).abs() < 0.3,
            "{kind}: {bits} bits of the file, {} of the run",
            last.validation
        );
        let tensors = vqrae::weights::read(&folder.path().join(format!("{kind}-whole"))).unwrap();
        let generator = Generator::new(config, tensors, &codebook, DType::F32).unwrap();
        let mut wishes: Vec<Wish> = (0..30).map(|i| Wish::new(&generator, Some(i as usize % 3), 1, i)).collect();
        let plan = Plan { sampling: Sampling { temperature: 0.5, ..Sampling::default() }, ..Plan::default() };
        draw(&generator, &mut wishes, &plan).unwrap();
        let right = |(i, wish): (usize, &Wish)| {
            wish.codes.iter().enumerate().filter(|&(place, &code)| code as usize == i % 3 * 5 + place % 4).count()
        };
        let right: usize = wishes.iter().enumerate().map(right).sum();
        assert!(right > 30 * 12 * 9 / 10, "{kind}: {right} of 360 codes are the class's");
    }
}

#[test]
fn a_masked_generators_bound_is_near_what_it_is_of_codes_that_it_knows() {
    // A network that knows nothing but how often codes occur: its bound is the entropy, whatever is masked.
    let folder = TempDir::new().unwrap();
    code_set(folder.path());
    let [train, apart] = Sequences::read(folder.path(), 5).unwrap();
    let counts = train.counts();
    let all: u32 = counts.iter().sum();
    let case = case("masked");
    let mut tensors: Tensors = weights(&case).into_iter().map(|(name, x)| (name, x.zeros_like().unwrap())).collect();
    let bias: Vec<f32> = counts.iter().map(|&count| (count.max(1) as f32 / all as f32).ln()).collect();
    tensors.insert("bias".to_string(), Tensor::new(bias, &Device::Cpu).unwrap());
    let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
    let network = Network::load(vb, &config("masked"), &case["codebook"]).unwrap();
    let bits = likelihood::of_network(&network, Kind::Masked, &apart, likelihood::WHOLE).unwrap();
    // Twelve codes, alike often: log₂ 12.
    assert!((bits - 12f64.log2()).abs() < 0.2, "{bits}");
}

#[test]
fn the_generator_that_ships_is_the_shipped_tokenizers_and_draws_what_it_paints() {
    let tokenizer = Vqrae::shipped(&Device::Cpu, DType::F32).unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../weights/clothes");
    let generator = Generator::open(&folder, &tokenizer, DType::F32).unwrap();
    let sampling = Sampling { temperature: 0.9, guidance: 2.0, ..Sampling::default() };
    let mut wishes = [Wish::new(&generator, generator.config().class("pants").ok(), 1, 0)];
    draw(&generator, &mut wishes, &Plan { sampling, ..Plan::default() }).unwrap();
    let (h, w) = generator.config().tokenizer.grid;
    let codes = Tensor::new(&wishes[0].codes[..], &Device::Cpu).unwrap().reshape((1, h, w)).unwrap();
    assert_eq!(tokenizer.decode_from_indices(&codes).unwrap().dims(), [1, 3, 256, 256]);

    // It has learnt what photos look like: their own codes, in the order of the grid, are likelier than the same ones shuffled.
    let (config, network) = generator::network(&folder, &tokenizer.codebook().unwrap()).unwrap();
    let photo = vqrae::image::open(&fixture("../../examples/photos/coffee.png"), &Default::default()).unwrap();
    let preprocessor = tokenizer.preprocessor();
    let pixels = preprocessor.normalize(&preprocessor.prepare(&photo).unwrap());
    let pixels = Tensor::from_vec(pixels, (1, 3, 256, 256), &Device::Cpu).unwrap();
    let codes: Vec<u32> = tokenizer.encode_to_indices(&pixels).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let bits = |codes: &[u32]| {
        let inputs: Vec<u32> = std::iter::once(u32::MAX).chain(codes[..codes.len() - 1].iter().copied()).collect();
        let tokens = network.forward(&inputs, &[config.classes.len() as u32]).unwrap();
        let weights = vec![std::f32::consts::LOG2_E / codes.len() as f32; codes.len()];
        network.loss(&tokens, codes, &weights).unwrap().to_scalar::<f32>().unwrap()
    };
    let shuffled: Vec<u32> = (0..codes.len()).map(|i| codes[i * 97 % codes.len()]).collect();
    let (own, other) = (bits(&codes), bits(&shuffled));
    say(&format!("the generator that ships: {own:.2} bits a code of a photo of another kind, {other:.2} shuffled"));
    assert!(own < 13.0 && own + 1.0 < other, "{own} bits a code, {other} shuffled");
}

#[test]
fn folders_that_are_no_generators_are_refused_by_what_is_wrong() {
    let folder = TempDir::new().unwrap();
    let case = case("masked");
    let (config, tensors) = (config("masked"), weights(&case));
    let path = folder.path().join("generator");
    train::write_model(&path, &config, &tensors).unwrap();
    generator::network(&path, &case["codebook"]).unwrap();
    let refused = |wanted: &str| {
        let error = generator::network(&path, &case["codebook"]).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}, expected: {wanted}");
    };
    let (file, said) = (path.join("model.safetensors"), path.join("config.json"));
    let (whole, text) = (std::fs::read(&file).unwrap(), std::fs::read_to_string(&said).unwrap());
    for cut in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&file, &whole[..cut]).unwrap();
        refused("model.safetensors");
    }
    std::fs::remove_file(&file).unwrap();
    refused("model.safetensors");
    let mut without = tensors.clone();
    without.remove("head.bias");
    train::write_model(&path, &config, &without).unwrap();
    refused("head.bias");
    let mut more = tensors.clone();
    more.insert("more".to_string(), tensors["bias"].clone());
    train::write_model(&path, &config, &more).unwrap();
    refused("more");
    std::fs::write(&file, &whole).unwrap();
    for (from, to, wanted) in [
        ("vqrae-generator", "llama", "expected: `vqrae-generator`"),
        ("\"width\": 12", "\"width\": 13", "3 heads do not divide the width 13"),
        ("\"depth\": 2", "\"depth\": 3", "layers.2"),
        ("\"width\": 12", "\"width\": 99999999", "width is 99999999"),
        ("\"codebook_size\": 17", "\"codebook_size\": 18", "17 codes, the generator 18"),
        ("\"codebook_size\": 17", "\"codebook_size\": 0", "tokenizer.codebook_size is 0"),
        ("\"width\"", "\"wide\"", "wide"),
        ("{", "", "config.json"),
    ] {
        std::fs::write(&said, text.replacen(from, to, 1)).unwrap();
        refused(wanted);
    }
}
