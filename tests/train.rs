//! Training through the binary: what it writes, that it learns, and that a killed run ends like one that was not.
//!
//! The public PyTorch port of VQRAE has thirteen known defects. What would have caught each:
//!
//! | | defect | test |
//! |---|---|---|
//! | 1 | the quantizer is outside the optimizer | here, `a_frozen_encoder_keeps_its_bits_and_the_rest_learns` |
//! | 2 | the encoder runs without a graph in the "unfrozen" stage | stages, `joint_training_moves_every_tensor_of_the_encoder` |
//! | 3 | no teacher, distillation never called | stages, `distillation_holds_the_features_to_those_of_the_original_encoder` |
//! | 4 | β weighs the wrong term | simvq, `beta_weighs_the_commitment_term_alone` |
//! | 5 | the magnitude of codes is lost | vq, `hsq_keeps_lengths_and_does_not_route_by_them`; model, defect 6's |
//! | 6 | indices decode to nothing (SimVQ) or to something else (FSQ) | model, `decoding_the_indices_gives_the_bits_of_decoding_the_quantised_features`; quantizers, `looking_codes_up_gives_the_tokens_of_quantising_bit_for_bit` |
//! | 7 | usage is always 0 | here, `a_run_logs_validates_and_leaves_a_model_that_tokenizes` |
//! | 8 | gradients are not synchronised over ranks | ranks, `ranks_take_the_step_of_one_with_the_whole_batch`, and every other test there |
//! | 9 | a scale parameter without a gradient | gradients, `every_trainable_parameter_gets_a_gradient_and_the_frozen_codebook_none`; here, `a_codebook_learns_by_every_gradient_under_every_metric`. A parameter without one ends a run |
//! | 10 | moving averages are not synchronised and start at sizes of 0 | vq, `averages_of_zero_stand_for_a_size_of_one_and_the_code_itself`; ranks, `moving_averages_are_those_of_the_whole_batch` |
//! | 11 | FSQ's projections are not trained | here, `the_projections_of_every_quantizer_learn` |
//! | 12 | grids are taken for square | gradients, all of its cases `3x5`; optimisation, `everything_together_goes_on_to_the_same_bits` has `16x48` |
//! | 13 | positions are interpolated in silence | stages, `positions_that_are_interpolated_are_told` |

#[path = "train/gan.rs"]
mod gan;
#[path = "train/optimisation.rs"]
mod optimisation;
#[path = "train/places.rs"]
mod places;
#[path = "train/ranks.rs"]
mod ranks;
#[path = "train/recipes.rs"]
mod recipes;
#[path = "train/stages.rs"]
mod stages;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_vqrae-cli");

/// Where runs compute that name no device: the CPU, whose bits do not depend on the machine, or what `VQRAE_TEST_DEVICE` says.
fn test_device() -> String {
    std::env::var("VQRAE_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_string())
}

const CONFIG: &str = r#"
[start]
from = "principal-components"
patches = 600
lloyd_steps = 2

[train]
steps = 12
batch_size = 3
warmup_steps = 2
seed = 5
log_every = 2
validate_every = 4
checkpoint_every = 1

[groups]
encoder = { peak = 1e-3, end = 1e-4 }
quantizer = { peak = 1e-3, end = 1e-4 }
decoder = { peak = 1e-3, end = 1e-4 }

[model.encoder]
model_type = "siglip_vision_model"
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 1
num_attention_heads = 2
image_size = 32
patch_size = 8
features = "before_norm"

[model.quantizer]
type = "simvq"
codebook_size = 64
codebook_dim = 8
transform_init = "identity"

[model.decoder]
final_norm = false
"#;

/// A temporary folder with photos and a config.
struct Bench {
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        std::fs::create_dir_all(bench.path("photos/more")).expect("a folder");
        for i in 0..5u32 {
            let wave = |x: u32, y: u32, c: u32| (127.0 + 120.0 * (f64::from(x * (c + 1) + y * i) / 9.0).sin()) as u8;
            let photo = image::RgbImage::from_fn(40 + i, 36, |x, y| image::Rgb([0, 1, 2].map(|c| wave(x, y, c))));
            photo.save(bench.path(&format!("photos/{}{i}.png", ["", "more/"][i as usize % 2]))).expect("a photo");
        }
        std::fs::write(bench.path("config.toml"), CONFIG).expect("a config");
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Begins a run and sends it SIGINT once it has logged; it leaves one checkpoint.
    #[cfg(unix)]
    fn interrupt(&self, run: &str, more: &[&str]) {
        let mut child = self.command(run, more).stderr(Stdio::null()).spawn().expect("the binary");
        let (log, begin) = (self.path(run).join("log.jsonl"), Instant::now());
        let lines = || std::fs::read_to_string(&log).unwrap_or_default().lines().count();
        while lines() < 3 && begin.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(2));
        }
        let signal = Command::new("kill").arg("-INT").arg(child.id().to_string()).status().expect("kill");
        assert!(signal.success());
        assert_eq!(child.wait().expect("its end").code(), Some(130));
        assert_eq!(std::fs::read_dir(self.path(run).join("checkpoints")).expect("checkpoints").count(), 1);
    }

    fn command(&self, run: &str, more: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.env("VQRAE_DEVICE", test_device());
        command.arg("train").arg("--config").arg(self.path("config.toml")).arg("--data").arg(self.path("photos"));
        command.arg("--val").arg(self.path("photos")).arg("--output-dir").arg(self.path(run)).args(more);
        command.stdin(Stdio::null());
        command
    }

    fn train(&self, run: &str, more: &[&str]) -> Output {
        self.command(run, more).output().expect("the binary")
    }

    /// The newest checkpoint's files, which hold every bit of a run.
    fn checkpoint(&self, run: &str, step: usize) -> [Vec<u8>; 2] {
        let folder = self.path(run).join(format!("checkpoints/step-{step:08}"));
        ["model.safetensors", "optimizer.safetensors"].map(|f| std::fs::read(folder.join(f)).expect("a checkpoint"))
    }

    fn log(&self, run: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(run).join("log.jsonl")).expect("a log");
        text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}", stderr(output));
}

#[track_caller]
fn fails_with(output: &Output, words: &[&str]) {
    let said = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    for word in words {
        assert!(said.contains(word), "`{word}` is not in: {said}");
    }
}

fn validation(log: &[Value]) -> Vec<f64> {
    log.iter().filter_map(|line| line["validation_psnr"].as_f64()).collect()
}

#[test]
fn a_run_logs_validates_and_leaves_a_model_that_tokenizes() {
    let bench = Bench::new();
    succeeds(&bench.train("run", &[]));
    let log = bench.log("run");
    let steps: Vec<u64> = log.iter().filter(|line| line["loss"].is_f64()).filter_map(|l| l["step"].as_u64()).collect();
    assert_eq!(steps, [2, 4, 6, 8, 10, 12]);
    assert_eq!(validation(&log).len(), 4, "before the first step and three times after");
    assert!(log.iter().all(|line| line["usage"].as_f64().is_none_or(|usage| usage > 0.0 && usage <= 1.0)));
    let terms = |line: &Value| {
        Some((line["loss"].as_f64()?, line["terms"]["reconstruction"].as_f64()? + line["terms"]["quantizer"].as_f64()?))
    };
    assert_eq!(log.iter().filter_map(terms).filter(|(loss, sum)| (loss - sum).abs() < 1e-6).count(), 6, "{log:?}");
    let numbers = ["waiting", "skipped_steps", "skipped_photos", "images_per_second"];
    assert!(
        log.iter().filter(|line| line["loss"].is_f64()).all(|line| numbers.iter().all(|key| line[key].is_number()))
    );
    assert!(bench.path("run/config.toml").exists());

    let (model, out) = (bench.path("run/model"), bench.path("out"));
    let mut tokenize = Command::new(BINARY);
    tokenize.env("VQRAE_DEVICE", test_device());
    tokenize
        .args(["tokenize", "--output-format", "safetensors"])
        .arg(bench.path("photos"))
        .arg("-o")
        .arg(&out)
        .arg("--model")
        .arg(&model);
    succeeds(&tokenize.output().expect("the binary"));
    assert!(out.join("codes/more/1.png.safetensors").exists());
}

#[test]
fn the_start_from_principal_components_beats_a_random_one_and_training_improves_on_random() {
    let bench = Bench::new();
    succeeds(&bench.train("linear", &["--set", "train.steps=1"]));
    let random = ["--set", "start={from=\"random\"}", "--set", "train.steps=60", "--set", "train.validate_every=60"];
    succeeds(&bench.train("random", &random));
    let (linear, random) = (validation(&bench.log("linear")), validation(&bench.log("random")));
    assert!(linear[0] > random[0] + 3.0, "linear {linear:?}, random {random:?}");
    assert!(random[1] > random[0] + 1.0, "random {random:?}");
}

#[test]
fn a_start_that_looks_at_neighbours_beats_one_that_does_not() {
    let bench = Bench::new();
    let sizes = ["model.encoder.hidden_size=64", "model.encoder.num_attention_heads=8", "train.steps=1"];
    let sizes: Vec<_> = sizes.iter().flat_map(|set| ["--set", set]).collect();
    succeeds(&bench.train("alone", &sizes));
    let together = [&sizes[..], &["--set", "start.neighbours=true"]].concat();
    succeeds(&bench.train("together", &together));
    let (alone, together) = (validation(&bench.log("alone")), validation(&bench.log("together")));
    assert!(together[0] > alone[0] + 0.3, "with neighbours {together:?}, without {alone:?}");
    fails_with(&bench.train("few heads", &["--set", "start.neighbours=true"]), &["start.neighbours", "8 heads"]);
}

#[test]
fn a_run_that_was_killed_ends_with_the_same_bits() {
    let bench = Bench::new();
    succeeds(&bench.train("whole", &[]));

    let mut child = bench.command("killed", &[]).stderr(Stdio::null()).spawn().expect("the binary");
    let third = bench.path("killed/checkpoints/step-00000003");
    let begin = Instant::now();
    while !third.exists() && begin.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().expect("a kill");
    child.wait().expect("its end");
    succeeds(&bench.train("killed", &[]));
    assert!(bench.checkpoint("whole", 12) == bench.checkpoint("killed", 12), "the weights differ");
    assert_eq!(validation(&bench.log("whole")), validation(&bench.log("killed")));
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_writes_a_checkpoint_and_goes_on_to_the_same_bits() {
    let bench = Bench::new();
    let long = ["--set", "train.steps=300", "--set", "train.checkpoint_every=0", "--set", "train.validate_every=0"];
    succeeds(&bench.train("whole", &long));

    bench.interrupt("cut", &long);
    succeeds(&bench.train("cut", &long));
    assert!(bench.checkpoint("whole", 300) == bench.checkpoint("cut", 300), "the weights differ");
}

/// A random start with a VQ of these keys.
fn vq(keys: &str) -> Vec<String> {
    let quantizer = format!("model.quantizer={{type=\"vq\", codebook_size=64, codebook_dim=8{keys}}}");
    ["start={from=\"random\"}", &quantizer, "train.keep_checkpoints=99", "train.validate_every=0"]
        .iter()
        .flat_map(|wish| ["--set".to_string(), (*wish).to_string()])
        .collect()
}

fn values(tensor: &vqrae::Tensor) -> Vec<f32> {
    tensor.flatten_all().and_then(|t| t.to_vec1()).expect("values")
}

#[test]
fn moving_averages_move_are_saved_and_go_on_to_the_same_bits() {
    let bench = Bench::new();
    let wishes = vq(", ema={threshold_ema_dead_code=0.6}, init=\"kmeans\", gradient=\"rotation\", norm=\"layer_norm\"");
    let wishes: Vec<&str> = wishes.iter().map(String::as_str).collect();
    succeeds(&bench.train("whole", &wishes));
    let read = |step: usize, file: &str| {
        let folder = bench.path("whole").join(format!("checkpoints/step-{step:08}"));
        vqrae::weights::read_file(&folder.join(file)).expect("a checkpoint")
    };
    let (first, last) = (read(1, "model.safetensors"), read(12, "model.safetensors"));
    for name in ["quantizer.codebook", "quantizer.cluster_size", "quantizer.embed_avg"] {
        let (first, last) = (values(&first[name]), values(&last[name]));
        assert!(first != last && first.iter().any(|&x| x != 0.0), "{name} did not move");
        assert!(last.iter().all(|x| x.is_finite()), "{name}");
    }
    let moments = read(12, "optimizer.safetensors");
    assert!(!moments.contains_key("first.quantizer.codebook"), "AdamW has moments of an average");
    assert!(moments.contains_key("first.quantizer.norm.weight"), "{:?}", moments.keys());

    // The same run, as a kill after the fifth step leaves it.
    let (from, to) = (bench.path("whole"), bench.path("cut"));
    assert!(Command::new("cp").arg("-r").arg(&from).arg(&to).status().expect("cp").success());
    for step in 6..=12 {
        std::fs::remove_dir_all(to.join(format!("checkpoints/step-{step:08}"))).expect("a checkpoint");
    }
    succeeds(&bench.train("cut", &wishes));
    assert!(bench.checkpoint("whole", 12) == bench.checkpoint("cut", 12), "the weights differ");
}

#[test]
fn a_codebook_learns_by_every_gradient_under_every_metric() {
    let bench = Bench::new();
    for (metric, norm) in [("euclidean", "scale"), ("cosine", "layer_norm"), ("hsq", "scale")] {
        for gradient in ["straight_through", "rotation", "dynamic_ste", "ibq"] {
            let run = format!("{metric}-{gradient}");
            let mut wishes =
                vq(&format!(", init=\"data\", metric=\"{metric}\", gradient=\"{gradient}\", norm=\"{norm}\""));
            wishes.extend(["--set".to_string(), "train.steps=3".to_string()]);
            succeeds(&bench.train(&run, &wishes.iter().map(String::as_str).collect::<Vec<_>>()));
            let read = |step: usize| {
                let path = bench.path(&run).join(format!("checkpoints/step-{step:08}/model.safetensors"));
                vqrae::weights::read_file(&path).expect("a checkpoint")
            };
            let (first, last) = (read(1), read(3));
            for name in ["quantizer.codebook", "quantizer.norm.weight"] {
                assert!(values(&first[name]) != values(&last[name]), "{run}: {name} did not move");
            }
        }
    }
}

#[test]
fn principal_components_name_what_they_need_of_a_quantizer() {
    let bench = Bench::new();
    let vq = "model.quantizer={type=\"vq\", codebook_size=64, codebook_dim=8}";
    fails_with(&bench.train("run", &["--set", vq]), &["principal-components", "simvq"]);
    let normed = "model.quantizer.norm=\"layer_norm\"";
    fails_with(&bench.train("run", &["--set", normed]), &["principal-components", "norm"]);
}

#[test]
fn a_codebook_that_starts_from_features_cannot_be_frozen() {
    let bench = Bench::new();
    let mut wishes = vq(", init=\"data\"");
    wishes.extend(["--set", "groups.quantizer={peak=0, end=0}"].map(String::from));
    let output = bench.train("run", &wishes.iter().map(String::as_str).collect::<Vec<_>>());
    fails_with(&output, &["quantizer.codebook", "groups.quantizer.peak"]);
}

#[test]
fn every_quantizer_trains_and_goes_on_from_a_checkpoint_to_the_same_bits() {
    for (i, quantizer) in [
        r#"{type="fsq",levels=[5,5,4]}"#,
        r#"{type="lfq",codebook_dim=12,commitment_cost=0.25}"#,
        r#"{type="lfq",codebook_dim=6,spherical=true}"#,
        r#"{type="residual",levels=4,level={codebook_size=16,codebook_dim=6},quantize_dropout=true}"#,
        r#"{type="residual",levels=2,level={codebook_size=16,codebook_dim=6,ema={threshold_ema_dead_code=0.5},init="kmeans"}}"#,
        r#"{type="product",groups=2,group={levels=2,level={codebook_size=16,codebook_dim=4,metric="cosine"},quantize_dropout=true}}"#,
    ]
    .into_iter()
    .enumerate()
    {
        let bench = Bench::new();
        let quantizer = format!("model.quantizer={quantizer}");
        let set = ["--set", "start={from=\"random\"}", "--set", "train.keep_checkpoints=99", "--set", &quantizer];
        succeeds(&bench.train("whole", &set));
        let log = bench.log("whole");
        let finite = |keys: &str| log.iter().filter_map(|line| line.pointer(keys)).all(Value::is_number);
        assert!(finite("/loss") && finite("/terms/quantizer") && finite("/perplexity"), "{quantizer}");
        assert!(log.iter().any(|line| line.pointer("/terms/quantizer").is_some()), "{quantizer}");

        let (from, to) = (bench.path("whole/checkpoints/step-00000005"), bench.path("on/checkpoints/step-00000005"));
        std::fs::create_dir_all(&to).expect("a folder");
        for file in from.read_dir().expect("a checkpoint").map(|file| file.expect("a file")) {
            std::fs::copy(file.path(), to.join(file.file_name())).expect("copying");
        }
        succeeds(&bench.train("on", &set));
        assert!(bench.checkpoint("whole", 12) == bench.checkpoint("on", 12), "{quantizer}: the weights differ");

        if i == 0 {
            let linear = bench.train("linear", &["--set", &quantizer]);
            fails_with(&linear, &["principal-components", "model.quantizer.type = \"simvq\""]);
        }
    }
}

#[test]
fn the_projections_of_every_quantizer_learn() {
    for quantizer in [
        r#"{type="simvq",codebook_size=32,codebook_dim=8}"#,
        r#"{type="vq",codebook_size=32,codebook_dim=8,ema={}}"#,
        r#"{type="fsq",levels=[5,5,4]}"#,
        r#"{type="lfq",codebook_dim=12}"#,
        r#"{type="residual",levels=2,level={codebook_size=16,codebook_dim=6}}"#,
        r#"{type="product",groups=2,group={levels=1,level={codebook_size=16,codebook_dim=4}}}"#,
    ] {
        let bench = Bench::new();
        let quantizer = format!("model.quantizer={quantizer}");
        let set = ["--set", "start={from=\"random\"}", "--set", "train.keep_checkpoints=99", "--set", &quantizer];
        succeeds(
            &bench.train("run", &[&set[..], &["--set", "train.steps=3", "--set", "train.validate_every=0"]].concat()),
        );
        let read = |step: usize| {
            let path = bench.path("run").join(format!("checkpoints/step-{step:08}/model.safetensors"));
            vqrae::weights::read_file(&path).expect("a checkpoint")
        };
        let (first, last) = (read(1), read(3));
        for name in ["linear_in.weight", "linear_in.bias", "linear_out.weight", "linear_out.bias"] {
            let name = format!("quantizer.{name}");
            assert!(values(&first[&name]) != values(&last[&name]), "{quantizer}: {name} did not move");
        }
    }
}

#[test]
fn a_half_written_checkpoint_is_not_one() {
    let bench = Bench::new();
    let short = ["--set", "train.steps=4"];
    succeeds(&bench.train("a", &short));
    // A half-written checkpoint, as a kill leaves it, is not one.
    let torn = bench.path("a/checkpoints/.partial-xyz");
    std::fs::create_dir_all(&torn).expect("a folder");
    let unfinished = bench.path("a/checkpoints/step-00000099");
    std::fs::create_dir_all(&unfinished).expect("a folder");
    succeeds(&bench.train("a", &short));
    succeeds(&bench.train("b", &short));
    assert!(bench.checkpoint("a", 4) == bench.checkpoint("b", 4));
}

/// A full disk is played by a limit on the size of files: the write fails, with another word from the system.
#[cfg(unix)]
#[test]
fn on_a_full_disk_a_run_names_the_file_and_goes_on_once_there_is_room() {
    let bench = Bench::new();
    let all = ["--set", "train.keep_checkpoints=99"];
    succeeds(&bench.train("whole", &all));
    // Room for the config and the log (blocks of 512 bytes or of 1,024), not for weights.
    let limited = |run: &str| {
        let command = bench.command(run, &all);
        let words: Vec<_> = command.get_args().map(|word| format!("'{}'", word.to_str().expect("a word"))).collect();
        let script = format!("trap '' XFSZ; ulimit -f 20; exec '{BINARY}' {}", words.join(" "));
        Command::new("sh").args(["-c", &script]).env("VQRAE_DEVICE", test_device()).output().expect("a shell")
    };
    fails_with(&limited("fresh"), &["model.safetensors"]);
    assert!(!bench.path("fresh/checkpoints/step-00000001").exists(), "a checkpoint without room");
    bench.cut("whole", "cut", 5);
    fails_with(&limited("cut"), &["cut"]);
    let checkpoints = |step: usize| bench.path(&format!("cut/checkpoints/step-{step:08}")).exists();
    assert!(checkpoints(5) && !checkpoints(6), "what was there is lost, or more than there was room for");
    succeeds(&bench.train("cut", &all));
    assert!(bench.checkpoint("whole", 12) == bench.checkpoint("cut", 12), "the weights differ");
}

#[test]
fn a_frozen_encoder_keeps_its_bits_and_the_rest_learns() {
    let bench = Bench::new();
    succeeds(&bench.train("run", &["--set", "groups.encoder={peak=0, end=0}", "--set", "train.keep_checkpoints=99"]));
    let read = |step: usize| {
        let path = bench.path("run").join(format!("checkpoints/step-{step:08}/model.safetensors"));
        vqrae::weights::read_file(&path).expect("a checkpoint")
    };
    let bits = |t: &vqrae::Tensor| t.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("values");
    let (first, last) = (read(1), read(12));
    for (name, tensor) in &first {
        let same = bits(tensor) == bits(&last[name]);
        let frozen = name.starts_with("encoder.") || name == "quantizer.codebook";
        assert_eq!(same, frozen, "{name}");
    }
}

#[test]
fn a_run_may_start_from_a_model_folder_and_take_its_config() {
    let bench = Bench::new();
    succeeds(&bench.train("first", &["--set", "train.steps=2"]));
    let rest = &CONFIG[CONFIG.find("[train]").expect("train")..CONFIG.find("[model.encoder]").expect("model")];
    let start = format!("[start]\nfrom = \"folder\"\npath = {:?}\n{rest}", bench.path("first/model"));
    std::fs::write(bench.path("config.toml"), start).expect("a config");
    succeeds(&bench.train("second", &["--set", "train.steps=2", "--set", "groups.encoder={peak=0, end=0}"]));
    let (first, second) = (validation(&bench.log("first")), validation(&bench.log("second")));
    assert_eq!(first.last(), second.first(), "the second starts where the first ended");
    let other = bench.train("third", &["--set", "start.path=nowhere"]);
    fails_with(&other, &["nowhere", "config.json"]);
}

/// A folder of a fixture's encoder, with a preprocessor where it has none.
fn encoder(bench: &Bench, fixture: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let folder = bench.path("encoder");
    std::fs::create_dir_all(&folder).expect("a folder");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixtures.join(fixture).join(file), folder.join(file)).expect("copying");
    }
    let preprocessor = "preprocessor_config.json";
    std::fs::copy(fixtures.join("siglip/tiny").join(preprocessor), folder.join(preprocessor)).expect("copying");
    folder
}

fn cli(arguments: &[&str]) -> Output {
    Command::new(BINARY)
        .env("VQRAE_DEVICE", test_device())
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("the program")
}

#[test]
fn the_four_models_of_the_starting_document_begin_train_ten_steps_and_tokenize() {
    const SMALL_VQ: [&str; 2] = ["model.quantizer.codebook_size=24", "model.quantizer.codebook_dim=24"];
    const SMALL_VIT: [&str; 4] = [
        "model.decoder.hidden_size=24",
        "model.decoder.num_hidden_layers=1",
        "model.decoder.num_attention_heads=3",
        "model.decoder.intermediate_size=32",
    ];
    let bench = Bench::new();
    let recipe = |name: &str| format!("{}/../weights/recipes/{name}.toml", env!("CARGO_MANIFEST_DIR"));
    let tokenizes = |run: &str, side: usize| {
        let (model, out) = (bench.path(&format!("{run}/model")), bench.path(&format!("{run}/codes")));
        let (model, out) = (model.to_str().expect("a path"), out.to_str().expect("a path"));
        let photos = bench.path("photos");
        let photos = photos.to_str().expect("a path");
        succeeds(&cli(&["tokenize", "--output-format", "safetensors", photos, "-o", out, "--model", model]));
        let codes = vqrae::codes::Codes::read(Path::new(out).join("codes/0.png.safetensors")).expect("codes");
        assert_eq!((codes.h, codes.w), (side, side));
    };
    let trains = |run: &str, name: &str, start: &Path, more: &[&str]| {
        let start = format!("start.path={:?}", start.to_str().expect("a path"));
        let mut command = Command::new(BINARY);
        command.env("VQRAE_DEVICE", test_device());
        command.args(["train", "--config", &recipe(name), "--data"]).arg(bench.path("photos"));
        command.arg("--val").arg(bench.path("photos")).arg("--output-dir").arg(bench.path(run));
        let steps = ["train.steps=10", "train.batch_size=3", "train.warmup_steps=2", "train.log_every=5"];
        steps.iter().chain(more).chain([&start.as_str()]).for_each(|set| {
            command.args(["--set", set]);
        });
        let output = command.stdin(Stdio::null()).output().expect("the program");
        succeeds(&output);
        let log = bench.log(run);
        assert_eq!(log.last().and_then(|line| line["step"].as_u64()), Some(10), "{name}");
        assert!(log.iter().filter_map(|line| line["loss"].as_f64()).all(f64::is_finite), "{name}");
    };
    let begins = |name: &str, encoder: &Path, sets: &[&str]| {
        let folder = bench.path(&format!("{name}-start"));
        let mut arguments = vec!["init", "--encoder", encoder.to_str().expect("a path")];
        let recipe = recipe(name);
        arguments.extend(["--config", &recipe, "-o", folder.to_str().expect("a path")]);
        sets.iter().for_each(|set| arguments.extend(["--set", set]));
        succeeds(&cli(&arguments));
        folder
    };

    let dinov2 = encoder(&bench, "encoders/dinov2-registers");
    let small: Vec<&str> = SMALL_VQ.into_iter().chain(SMALL_VIT).collect();
    for name in ["seed-dinov2-b-pretrained", "seed-dinov2-b"] {
        let folder = begins(name, &dinov2, &small);
        trains(name, name, &folder, &small);
        tokenizes(name, 4);
        // 4×4 patches of 16 pixels, from an encoder of 8.
        let (model, out) = (bench.path(&format!("{name}/model")), bench.path(&format!("{name}/painted")));
        let (codes, photo) = (bench.path(&format!("{name}/codes/codes")), out.join("reconstructions/0.png.png"));
        let words = [codes, "-o".into(), out, "--model".into(), model].map(|word| word.display().to_string());
        succeeds(&cli(&["reconstruct", &words[0], &words[1], &words[2], &words[3], &words[4]]));
        let painted = image::open(&photo).unwrap_or_else(|error| panic!("{}: {error}", photo.display()));
        assert_eq!((painted.width(), painted.height()), (64, 64));
    }

    let siglip = encoder(&bench, "siglip/tiny");
    let (stage1, stage2) = ("seed-siglip-l-stage1", "seed-siglip-l-stage2");
    let folder = begins(stage1, &siglip, &SMALL_VQ);
    trains(stage1, stage1, &folder, &SMALL_VQ);
    tokenizes(stage1, 4);
    trains(stage2, stage2, &bench.path(&format!("{stage1}/model")), &SMALL_VQ);
    tokenizes(stage2, 4);
    let encoder = |run: &str| {
        let tensors = vqrae::weights::read(&bench.path(&format!("{run}/model"))).expect("a model");
        values(&tensors["encoder.vision_model.encoder.layers.0.mlp.fc1.weight"])
    };
    let original = vqrae::weights::read(&folder).expect("a model");
    let original = values(&original["encoder.vision_model.encoder.layers.0.mlp.fc1.weight"]);
    assert!(encoder(stage1) == original, "stage 1 freezes the encoder");

    // A folder that was made with another quantizer is not what the recipe says.
    let start = format!("start.path={:?}", folder.to_str().expect("a path"));
    let mut arguments = vec!["train".to_string(), "--config".into(), recipe(stage1), "--data".into()];
    arguments.extend(
        [bench.path("photos"), "--output-dir".into(), bench.path("x")].map(|x: PathBuf| x.display().to_string()),
    );
    arguments.extend(["--set".into(), start]);
    let refused = cli(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    fails_with(&refused, &["`quantizer`", "vqrae-cli init --config"]);
}

#[test]
fn a_config_with_an_unknown_key_is_refused_by_its_name() {
    let bench = Bench::new();
    fails_with(&bench.train("run", &["--set", "train.stepz=3"]), &["stepz", "config.toml"]);
    fails_with(&bench.train("run", &["--set", "model.encoder.num_attention_heads=3"]), &["3 heads"]);
}

#[test]
fn a_checkpoint_of_another_config_is_refused_and_the_key_named() {
    let bench = Bench::new();
    succeeds(&bench.train("run", &["--set", "train.steps=2"]));
    let other = bench.train("run", &["--set", "train.steps=2", "--set", "train.seed=6"]);
    fails_with(&other, &["train.seed", "--output-dir"]);
}

#[test]
fn a_broken_checkpoint_is_an_error_that_names_it() {
    let bench = Bench::new();
    let short = ["--set", "train.steps=2"];
    succeeds(&bench.train("run", &short));
    let path = bench.path("run/checkpoints/step-00000002/model.safetensors");
    let bytes = std::fs::read(&path).expect("a checkpoint");
    std::fs::write(&path, &bytes[..bytes.len() / 2]).expect("a write");
    fails_with(&bench.train("run", &short), &["step-00000002", "model.safetensors"]);
}

#[test]
fn a_bad_photo_is_named_and_replaced() {
    let bench = Bench::new();
    std::fs::write(bench.path("photos/bad.jpg"), "no photo").expect("a file");
    let output = bench.train("run", &["--set", "train.steps=4"]);
    succeeds(&output);
    assert!(stderr(&output).contains("bad.jpg"), "{}", stderr(&output));
}

#[test]
fn a_folder_without_photos_is_an_error() {
    let bench = Bench::new();
    let empty = bench.path("empty");
    std::fs::create_dir_all(&empty).expect("a folder");
    let mut command = Command::new(BINARY);
    command.env("VQRAE_DEVICE", test_device());
    command.arg("train").arg("--config").arg(bench.path("config.toml")).arg("--data").arg(&empty);
    let output = command.arg("--output-dir").arg(bench.path("run")).output().expect("the binary");
    fails_with(&output, &["no photos", &empty.display().to_string()]);
}

#[test]
fn a_tar_trains_like_its_folder() {
    let bench = Bench::new();
    let tar = bench.path("photos.tar");
    make_tar(&bench.path("photos"), &tar);
    succeeds(&bench.train("folder", &["--set", "train.steps=3"]));
    let mut command = Command::new(BINARY);
    command.env("VQRAE_DEVICE", test_device());
    command.arg("train").arg("--config").arg(bench.path("config.toml")).arg("--data").arg(&tar);
    command.arg("--output-dir").arg(bench.path("tar")).args(["--set", "train.steps=3"]);
    succeeds(&command.output().expect("the binary"));
    assert!(bench.checkpoint("folder", 3) == bench.checkpoint("tar", 3));
}

fn make_tar(folder: &Path, tar: &Path) {
    let mut command = Command::new("tar");
    command.arg("cf").arg(tar).arg("-C").arg(folder).args(["0.png", "2.png", "4.png", "more"]);
    assert!(command.status().expect("tar").success());
}

/// The networks of a few channels that stand beside tests/perceptual.rs.
fn network(name: &str) -> String {
    format!("{}/../tests/fixtures/perceptual/{name}.safetensors", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn a_run_with_perceptual_terms_logs_them_by_name() {
    let bench = Bench::new();
    let terms = [
        "loss.l1=0.5".to_string(),
        format!("loss.perceptual={{ weight = 0.5, network = \"alex\", weights = '{}' }}", network("alex")),
        format!("loss.convnext={{ weight = 0.1, weights = '{}' }}", network("convnext")),
        "train.steps=4".to_string(),
    ];
    let set: Vec<&str> = terms.iter().flat_map(|term| ["--set", term]).collect();
    let output = bench.train("run", &set);
    succeeds(&output);
    let said = stderr(&output);
    assert!(["convnext ", "l1 ", "perceptual "].iter().all(|name| said.contains(name)), "{said}");
    let log = bench.log("run");
    let last = log.iter().rev().find(|line| line["loss"].is_f64()).expect("a step");
    let term = |name: &str| last["terms"][name].as_f64().unwrap_or_else(|| panic!("{name}: {last}"));
    let sum =
        term("reconstruction") + term("quantizer") + 0.5 * (term("l1") + term("perceptual")) + 0.1 * term("convnext");
    assert!((sum - last["loss"].as_f64().expect("a loss")).abs() < 1e-4 * sum, "{last}");
    assert!(term("perceptual") > 0.0);
}

#[test]
fn a_loss_without_its_weights_names_the_file_and_the_script() {
    let bench = Bench::new();
    let train = |term: &str| bench.train("run", &["--set", term]);
    let nowhere = train("loss.perceptual={ weight = 1.0, weights = 'nowhere/vgg.safetensors' }");
    fails_with(&nowhere, &["nowhere/vgg.safetensors", "weights/convert_lpips.py"]);
    let nowhere = train("loss.convnext={ weight = 1.0, weights = 'nowhere/small.safetensors' }");
    fails_with(&nowhere, &["nowhere/small.safetensors", "weights/convert_convnext.py"]);
    fails_with(&train("loss.l1=-1.0"), &["loss.l1 is -1", "0 or more"]);
    fails_with(&train("loss.perceptual={ weight = 1.0, weights = 'x', network = 'squeeze' }"), &["squeeze", "vgg16"]);
}
