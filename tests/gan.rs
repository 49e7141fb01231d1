//! The adversarial part of training beside its authors' code: values, every gradient, ten steps of model and discriminator.

use std::collections::{BTreeMap, HashMap};

use candle_core::Var;
use candle_nn::VarBuilder;
use vqrae::train::gan::{self, Gan, Kind, LastLayer, augment, dino, loss, nlayer};
use vqrae::train::optimizer::{self, AdamW, Gradients};
use vqrae::train::schedule::Rate;
use vqrae::weights::{self, Tensors};
use vqrae::{DType, Device, Result, Tensor};

use crate::compare::{PARITY, Tolerance, assert_close, fixture, say, tensors_of};

const GRADIENT: Tolerance = Tolerance { relative: 1e-4, absolute: 5e-6 };
/// Of a bias before a norm, which takes the mean away: its gradient is zero, or, where a blur lies between, what the edges
/// leave of a sum that cancels. An absolute allowance judges the one, a wider relative one the other.
const CANCELS: Tolerance = Tolerance { relative: 1e-3, absolute: 5e-6 };
const CONTRACTION: u32 = 900;

/// The numbers of make.py's `noise`.
fn noise(shape: &[usize], seed: u32, scale: f64, shift: f64) -> Tensor {
    let number = |i: usize| {
        let mut x = (i as u32).wrapping_mul(0x9E37_79B1).wrapping_add(seed.wrapping_mul(0x85EB_CA77));
        x = (x ^ (x >> 15)).wrapping_mul(0x2C1B_3C6D);
        x = (x ^ (x >> 12)).wrapping_mul(0x297A_2D39);
        x ^= x >> 15;
        (shift + scale * (f64::from(x) / 2f64.powi(31) - 1.0)) as f32
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(number).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn weight(name: &str, shape: &[usize], seed: u32) -> Tensor {
    if name.ends_with("weight_u") || name.ends_with("weight_v") {
        let x = noise(shape, seed, 1.0, 0.0);
        return x.broadcast_div(&x.sqr().unwrap().sum_all().unwrap().sqrt().unwrap()).unwrap();
    }
    if shape.len() == 1 {
        return noise(shape, seed, 0.2, if name.ends_with("weight") { 1.0 } else { 0.0 });
    }
    if name == "cls_token" || name == "pos_embed" {
        return noise(shape, seed, 0.5, 0.0);
    }
    noise(shape, seed, (3.0 / shape[1..].iter().product::<usize>() as f64).sqrt(), 0.0)
}

/// The tensors that names.json lists for a module.
pub(crate) fn filled(module: &str) -> Tensors {
    let text = std::fs::read_to_string(fixture("gan/names.json")).unwrap();
    // As text, since the order is that of the seeds, which a map would lose.
    let at = text.find(&format!("\"{module}\":")).unwrap();
    let list = &text[at + module.len() + 4..];
    let list = &list[..list.find('}').unwrap()];
    let entries = list.split("],").enumerate().map(|(seed, entry)| {
        let (name, shape) = entry.split_once(':').unwrap();
        let name = name.trim_matches(['"', '{']);
        let shape: Vec<usize> = shape.trim_matches(['[', ']']).split(',').map(|n| n.parse().unwrap()).collect();
        (name.to_string(), weight(name, &shape, seed as u32))
    });
    entries.collect()
}

fn contracted(x: &Tensor) -> Tensor {
    if x.rank() < 3 {
        return x.clone();
    }
    let (first, n, rest) = (x.dims()[0], x.dims()[1], x.dims()[2..].to_vec());
    let flat = x.reshape((first, n, ())).unwrap().broadcast_mul(&noise(&[1, n, 1], CONTRACTION, 1.0, 0.0));
    flat.unwrap().sum(1).unwrap().reshape([vec![first], rest].concat()).unwrap()
}

fn variables(tensors: Tensors) -> BTreeMap<String, Var> {
    tensors.into_iter().map(|(name, x)| (name, Var::from_tensor(&x).unwrap())).collect()
}

fn builder(variables: &BTreeMap<String, Var>) -> VarBuilder<'static> {
    let all: HashMap<String, Tensor> =
        variables.iter().map(|(name, x)| (name.clone(), x.as_tensor().clone())).collect();
    VarBuilder::from_tensors(all, DType::F32, &Device::Cpu)
}

fn reference(case: &str) -> HashMap<String, Tensor> {
    tensors_of(&fixture("gan/reference.safetensors"), case)
}

/// Compares all gradients that the reference has; as many must be ours.
fn compare_gradients(
    case: &str,
    expected: &HashMap<String, Tensor>,
    parameters: &BTreeMap<String, Var>,
    gradients: &candle_core::backprop::GradStore,
    prefix: &str,
) -> f64 {
    let mut worst = 0f64;
    let mut count = 0;
    for (name, var) in parameters {
        let Some(expected) = expected.get(&format!("gradient.{}", name.trim_start_matches(prefix))) else { continue };
        let got = gradients.get(var.as_tensor()).unwrap_or_else(|| panic!("{case}: `{name}` has no gradient"));
        let cancels = name.ends_with(".0.bias") && (name.contains("blocks.") || name.contains("heads."));
        let tolerance = if cancels { CANCELS } else { GRADIENT };
        let off = assert_close(&format!("{case}: gradient of {name}"), &contracted(got), expected, tolerance);
        worst = if cancels { worst } else { worst.max(off) };
        count += 1;
    }
    assert_eq!(count, expected.keys().filter(|name| name.starts_with("gradient.")).count(), "{case}");
    worst
}

#[test]
fn titoks_discriminator_has_its_values_and_every_gradient() {
    for (case, stages, shape) in [("nlayer_1_40x35", 1, [2, 3, 40, 35]), ("nlayer_3_136x24", 3, [1, 3, 136, 24])] {
        let parameters = variables(filled(&format!("nlayer_{stages}")));
        let nlayer = gan::NLayer::load(builder(&parameters), &nlayer::Config { width: 32, stages }).unwrap();
        let pixels = Var::from_tensor(&noise(&shape, 100, 0.5, 0.5)).unwrap();
        let logits = nlayer.forward(pixels.as_tensor()).unwrap();
        let expected = reference(case);
        let mut worst = assert_close(case, &logits, &expected["logits"], PARITY);
        let loss = (&logits * noise(logits.dims(), 101, 1.0, 0.0)).unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        let of_pixels = contracted(gradients.get(pixels.as_tensor()).unwrap());
        worst = worst.max(assert_close(&format!("{case}: pixels"), &of_pixels, &expected["pixels"], GRADIENT));
        worst = worst.max(compare_gradients(case, &expected, &parameters, &gradients, ""));
        say(&format!("{case}, candle and PyTorch: {worst:.1e}"));
    }
}

const TAPS: [usize; 3] = [0, 2, 5];

fn dino_config() -> dino::Config {
    dino::Config { taps: TAPS.to_vec(), kernel_size: 9, heads: 3 }
}

/// The backbone of the fixture as a file under its authors' names, and what the heads are filled with.
fn dino_file() -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".safetensors").tempfile().unwrap();
    weights::write(file.path(), &filled("backbone"), HashMap::new()).unwrap();
    file
}

#[test]
fn raes_discriminator_has_its_values_and_every_gradient() {
    let file = dino_file();
    let backbone = dino::Backbone::read(file.path(), &dino_config(), &Device::Cpu).unwrap();
    let parameters = variables(filled("heads"));
    let dino = gan::Dino::load(builder(&parameters), backbone, &dino_config()).unwrap();
    let expected = reference("dino_eval");
    let pixels = Var::from_tensor(&noise(&[2, 3, 24, 32], 102, 1.0, 0.0)).unwrap();
    let logits = dino.forward(pixels.as_tensor()).unwrap();
    let mut worst = assert_close("logits", &logits, &expected["logits"], PARITY);
    let loss = (&logits * noise(logits.dims(), 103, 1.0, 0.0)).unwrap().sum_all().unwrap();
    let gradients = loss.backward().unwrap();
    let of_pixels = contracted(gradients.get(pixels.as_tensor()).unwrap());
    worst = worst.max(assert_close("pixels", &of_pixels, &expected["pixels"], GRADIENT));
    worst = worst.max(compare_gradients("dino_eval", &expected, &parameters, &gradients, ""));
    let shrunk = dino.forward(&noise(&[1, 3, 240, 260], 104, 1.0, 0.0)).unwrap();
    worst = worst.max(assert_close("shrunk", &shrunk, &reference("dino_shrunk")["logits"], PARITY));
    say(&format!("RAE's discriminator, candle and PyTorch: {worst:.1e}"));
}

fn settings(optimizer: optimizer::Config, rate: f64) -> gan::Settings {
    let rate = Rate { peak: rate, end: rate, ..Rate::FROZEN };
    gan::Settings { steps: 10, warmup_steps: 0, rate, optimizer, seed: 3, mean: [0.5; 3], std: [0.5; 3] }
}

/// A GAN that begins with the weights of the fixture.
fn filled_gan(config: &gan::Config, settings: gan::Settings, module: &str) -> Gan {
    let mut gan = Gan::new(config, settings).unwrap();
    let mut state = gan.state().unwrap();
    for (name, tensor) in filled(module) {
        let old = state.insert(format!("discriminator.{name}"), tensor);
        assert!(old.is_some(), "`{name}` is no tensor of ours");
    }
    gan.load_state(state).unwrap();
    gan
}

fn dino_gan(file: &tempfile::NamedTempFile) -> gan::Config {
    gan::Config {
        weights: Some(file.path().to_path_buf()),
        augment: Some(augment::Config::NONE),
        dino: dino_config(),
        lecam: 0.0,
        ..gan::Config::new(Kind::Dino)
    }
}

#[test]
fn a_step_of_raes_discriminator_follows_its_spectral_norms() {
    let file = dino_file();
    let config = dino_gan(&file);
    let mut gan = filled_gan(&config, settings(optimizer::Config::default(), 0.0), "heads");
    let images = |seed| noise(&[2, 3, 24, 32], seed, 1.0, 0.0);
    // The fixture's fakes are not in steps of 8 bits: logits only are close, and norms follow exactly.
    let log = gan.discriminator_step(&images(106), &images(105), 0).unwrap().unwrap();
    let expected = reference("dino_train");
    let mean = |name: &str| f64::from(expected[name].mean_all().unwrap().to_scalar::<f32>().unwrap());
    assert!((log.logits_real - mean("real")).abs() < 1e-5, "{log:?}, expected: {}", mean("real"));
    assert!((log.logits_fake - mean("fake")).abs() < 1e-3, "{log:?}, expected: {}", mean("fake"));
    let state = gan.state().unwrap();
    let vectors: Vec<&String> =
        expected.keys().filter(|n| n.contains("weight_") && !n.starts_with("gradient.")).collect();
    assert_eq!(vectors.len(), 3 * 3 * 2);
    for name in vectors {
        assert_close(name, &state[&format!("discriminator.{name}")], &expected[name], PARITY);
    }
}

#[test]
fn gradients_through_spectral_norms_in_training_are_pytorchs() {
    let file = dino_file();
    let backbone = dino::Backbone::read(file.path(), &dino_config(), &Device::Cpu).unwrap();
    let expected = reference("dino_train");
    // One power iteration for the painted images, one more for the real ones, by hand.
    let parameters = variables(filled("heads"));
    let iterate = || {
        for (name, left) in parameters.iter().filter(|(name, _)| name.ends_with("weight_u")) {
            let of = |end: &str| &parameters[&name.replace("weight_u", end)];
            let weight = of("weight_orig").as_detached_tensor().flatten_from(1).unwrap();
            let unit = |x: Tensor| x.broadcast_div(&x.sqr().unwrap().sum_all().unwrap().sqrt().unwrap()).unwrap();
            let product = |a: &Tensor, x: &Tensor| a.matmul(&x.unsqueeze(1).unwrap()).unwrap().squeeze(1).unwrap();
            let v = unit(product(&weight.t().unwrap(), &left.as_detached_tensor()));
            left.set(&unit(product(&weight, &v))).unwrap();
            of("weight_v").set(&v).unwrap();
        }
    };
    let dino = gan::Dino::load(builder(&parameters), backbone, &dino_config()).unwrap();
    let logits = |seed| {
        iterate();
        dino.forward(&noise(&[2, 3, 24, 32], seed, 1.0, 0.0)).unwrap()
    };
    let (fake, real) = (logits(105), logits(106));
    assert_close("fake", &fake, &expected["fake"], PARITY);
    assert_close("real", &real, &expected["real"], PARITY);
    let loss = gan::Loss::Hinge.discriminator(&real, &fake).unwrap();
    assert_close("loss", &loss, &expected["loss"], PARITY);
    let worst = compare_gradients("dino_train", &expected, &parameters, &loss.backward().unwrap(), "");
    say(&format!("RAE's discriminator in training, candle and PyTorch: {worst:.1e}"));
}

#[test]
fn losses_and_their_gradients_are_pytorchs() {
    use gan::Loss::{Hinge, Vanilla};
    let expected = reference("loss");
    let of = |seed| Var::from_tensor(&noise(&[3, 7], seed, 2.5, 0.0)).unwrap();
    let (real, fake) = (of(110), of(111));
    let (r, f) = (real.as_tensor(), fake.as_tensor());
    let average = |x: f32| Tensor::new(x, &Device::Cpu).unwrap();
    let means = (r.mean_all().unwrap(), f.mean_all().unwrap());
    for (name, loss) in [
        ("hinge", Hinge.discriminator(r, f)),
        ("vanilla", Vanilla.discriminator(r, f)),
        ("hinge_generator", Hinge.generator(f)),
        ("vanilla_generator", Vanilla.generator(f)),
        ("lecam", loss::lecam(&means.0, &means.1, &average(0.3), &average(-0.4))),
    ] {
        let loss = loss.unwrap();
        assert_close(name, &loss, &expected[name], PARITY);
        let gradients = loss.backward().unwrap();
        for (of, var) in [("real", &real), ("fake", &fake)] {
            match (gradients.get(var.as_tensor()), expected.get(&format!("{name}.{of}"))) {
                (Some(got), Some(expected)) => assert_close(&format!("{name}: {of}"), got, expected, PARITY),
                (None, None) => 0.0,
                _ => panic!("{name}: {of} has a gradient in only one of the two"),
            };
        }
    }
}

#[test]
fn augmentation_with_given_numbers_is_the_authors() {
    let uniform = noise(&[7, 2], 120, 0.5, 0.5).to_vec2::<f32>().unwrap();
    let draws = |which| augment::Draws { which, uniform: uniform.clone().try_into().unwrap() };
    for (case, cutout, which) in [("all", 0.3, [true, true, true]), ("colour", 0.0, [false, true, false])] {
        let config = augment::Config { cutout, ..augment::Config::default() };
        let images = Var::from_tensor(&noise(&[2, 3, 20, 24], 121, 1.0, 0.0)).unwrap();
        let augmented = config.apply(images.as_tensor(), &draws(which)).unwrap();
        let expected = reference(&format!("augment_{case}"));
        assert_close(case, &augmented, &expected["images"], PARITY);
        let loss = (augmented * noise(&[2, 3, 20, 24], 122, 1.0, 0.0)).unwrap().sum_all().unwrap();
        let gradient = contracted(loss.backward().unwrap().get(images.as_tensor()).unwrap());
        assert_close(&format!("{case}: gradient"), &gradient, &expected["pixels"], PARITY);
    }
}

/// The model of make.py's `toy`: two layers that see one pixel each.
struct Toy {
    w: BTreeMap<String, Var>,
}

impl Toy {
    fn new() -> Self {
        let of = |name: &str, shape: &[usize], seed| (name.to_string(), noise(shape, seed, 0.7, 0.0));
        let tensors = [of("w1", &[4, 3], 130), of("w2", &[3, 4], 131), of("b2", &[3], 132)];
        Self { w: variables(tensors.into_iter().collect()) }
    }

    fn hidden(&self, images: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = images.dims4()?;
        let pixels = images.permute((0, 2, 3, 1))?.reshape((b * h * w, c))?;
        Ok(pixels.matmul(&self.w["w1"].t()?)?.tanh()?)
    }

    fn paint(&self, hidden: &Tensor, images: &Tensor) -> Result<Tensor> {
        let (b, c, h, w) = images.dims4()?;
        let pixels = hidden.matmul(&self.w["w2"].t()?)?.broadcast_add(self.w["b2"].as_tensor())?;
        Ok(pixels.reshape((b, h, w, c))?.permute((0, 3, 1, 2))?.contiguous()?)
    }
}

/// Ten steps in turns; the differences are relative to each column's largest value.
fn ten_steps(case: &str, mut gan: Gan) -> Result<()> {
    let toy = Toy::new();
    let mut optimizer = AdamW::new(optimizer::Config::default(), &toy.w).unwrap();
    let error = |painted: &Tensor, images: &Tensor| Ok::<_, vqrae::Error>((painted - images)?.sqr()?.mean_all()?);
    let mut rows = Vec::new();
    for step in 0..10 {
        let images = noise(&[2, 3, 32, 32], 140 + step as u32, 1.0, 0.0);
        let hidden = toy.hidden(&images)?;
        let painted = toy.paint(&hidden, &images)?;
        let reconstruction = error(&painted, &images)?;
        let last_layer = || {
            let painted = toy.paint(&hidden.detach(), &images)?;
            let reconstruction = error(&painted, &images)?;
            Ok(LastLayer { weight: &toy.w["w2"], painted, reconstruction })
        };
        let term = gan.generator_term(&painted, step, 0, last_layer)?.expect("a term");
        let total = (&reconstruction + &term.term)?;
        let weighted = f64::from(term.term.to_scalar::<f32>()?);
        assert!((weighted - term.weight * term.loss).abs() < 1e-4 * (1.0 + weighted.abs()));
        optimizer.step(&toy.w, &Gradients::of(&toy.w, total.backward()?)?, step, |_| 1e-2)?;
        let log = gan.discriminator_step(&images, &painted, step)?.expect("a step");
        rows.extend(
            [
                f64::from(reconstruction.to_scalar::<f32>()?),
                term.loss,
                term.weight,
                log.loss,
                log.lecam,
                log.gradient_norm,
            ]
            .map(|x| x as f32),
        );
    }
    let got = Tensor::from_vec(rows, (10, 6), &Device::Cpu)?;
    let expected = &reference(case)["rows"];
    let names = ["reconstruction", "generator", "weight", "discriminator", "lecam", "gradient norm"];
    let mut worst = 0f64;
    for (column, name) in names.into_iter().enumerate() {
        let (got, expected) = (got.narrow(1, column, 1)?, expected.narrow(1, column, 1)?);
        let tolerance = Tolerance { relative: 1e-3, absolute: 0.0 };
        worst = worst.max(assert_close(&format!("{case}: {name}"), &got, &expected, tolerance));
    }
    say(&format!("{case}: ten steps, candle and PyTorch: {worst:.1e}"));
    Ok(())
}

#[test]
fn ten_steps_in_turns_are_pytorchs() {
    let nlayer = gan::Config { nlayer: nlayer::Config { width: 32, stages: 1 }, ..gan::Config::new(Kind::NLayer) };
    let settings = settings(optimizer::Config::default(), 2e-3);
    ten_steps("steps_nlayer", filled_gan(&nlayer, settings, "nlayer_1")).unwrap();
    let file = dino_file();
    let dino = gan::Config { weight: 0.75, adaptive: true, lecam: 0.001, ..dino_gan(&file) };
    ten_steps("steps_dino", filled_gan(&dino, settings, "heads")).unwrap();
}

#[test]
fn a_state_that_does_not_fit_is_refused_and_one_that_does_goes_on_to_the_same_bits() {
    let file = dino_file();
    let config = gan::Config { augment: None, lecam: 0.001, ..dino_gan(&file) };
    let settings = settings(optimizer::Config::default(), 1e-3);
    let images = |seed| noise(&[2, 3, 24, 32], seed, 1.0, 0.0);
    let mut whole = Gan::new(&config, settings).unwrap();
    whole.discriminator_step(&images(1), &images(2), 0).unwrap();
    let mut resumed = Gan::new(&config, gan::Settings { seed: 4, ..settings }).unwrap();
    resumed.load_state(whole.state().unwrap()).unwrap();
    let mut resumed = {
        let state = resumed.state().unwrap();
        let mut gan = Gan::new(&config, settings).unwrap();
        gan.load_state(state).unwrap();
        gan
    };
    for gan in [&mut whole, &mut resumed] {
        gan.discriminator_step(&images(3), &images(4), 1).unwrap();
    }
    let (a, b) = (whole.state().unwrap(), resumed.state().unwrap());
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, x) in &a {
        crate::compare::assert_same_bits(name, x, &b[name]);
    }
    let without = |name: &str| a.clone().into_iter().filter(|(n, _)| n != name).collect::<Tensors>();
    for name in ["lecam.real", "discriminator.heads.0.0.0.weight_u", "first.discriminator.heads.0.2.bias"] {
        let said = resumed.load_state(without(name)).unwrap_err().to_string();
        assert!(said.contains(name) && said.contains("missing"), "{said}");
    }
    let more = a.clone().into_iter().chain([("other".to_string(), images(1))]).collect();
    assert!(resumed.load_state(more).unwrap_err().to_string().contains("`other`"));
}

#[test]
fn a_file_that_is_no_dino_is_refused_by_name() {
    let file = tempfile::Builder::new().suffix(".safetensors").tempfile().unwrap();
    let read = |tensors: &Tensors| {
        weights::write(file.path(), tensors, HashMap::new()).unwrap();
        dino::Backbone::read(file.path(), &dino_config(), &Device::Cpu).unwrap_err().to_string()
    };
    let path = file.path().display().to_string();
    let whole = filled("backbone");
    let without = |part: &str| whole.clone().into_iter().filter(|(name, _)| !name.contains(part)).collect::<Tensors>();
    for (tensors, word) in [
        (without("patch_embed"), "patch embedding"),
        (without("pos_embed"), "0 positions"),
        (without("blocks.1.mlp.fc2"), "layers.1.mlp.fc2"),
        (without("blocks"), "layers"),
        (
            whole.clone().into_iter().chain([("fc.weight".to_string(), noise(&[2, 2], 0, 1.0, 0.0))]).collect(),
            "fc.weight",
        ),
    ] {
        let said = read(&tensors);
        assert!(said.contains(word) && said.contains(&path), "`{word}` is not in: {said}");
    }
}
