//! The binary on temporary folders: what it writes, what it says, and how it ends.

mod devices;
mod eval;
#[cfg(feature = "parquet")]
mod export;
mod generate;
mod resolutions;
#[cfg(feature = "parquet")]
mod shards;
#[cfg(feature = "parquet")]
mod vocab;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use vqrae::Config;
use vqrae::codes::Codes;
use vqrae::image::{Preprocessor, Resample, Rgb, save_png};
use vqrae::model::{fresh_tensors, save};

const BINARY: &str = env!("CARGO_BIN_EXE_vqrae-cli");

/// Side of the tiny model's images.
const SIDE: usize = 32;

/// A temporary folder with a tiny untrained model in `model`.
struct Bench {
    folder: TempDir,
}

/// How a run of the binary ended.
struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Bench {
    /// Without the model.
    fn empty() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    fn new() -> Self {
        let bench = Self::empty();
        bench.make_model("model", 1);
        bench
    }

    /// With `count` photos below `photos`, some of them in sub-folders.
    fn with_photos(count: usize) -> Self {
        let bench = Self::new();
        for i in 0..count {
            let folder = ["photos", "photos/cats", "photos/cats/tom"][i % 3];
            bench.make_photo(&format!("{folder}/{i:04}.{}", ["png", "jpg"][i % 2]), i);
        }
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The tiny model's encoder as a folder of its own, as the hub lays it out.
    fn pretrained(&self, name: &str) {
        let weights = self.bytes("model/model.safetensors");
        let tensors = safetensors::SafeTensors::deserialize(&weights).expect("a safetensors file").tensors();
        let below =
            |(name, tensor): &(String, _)| Some((name.strip_prefix("encoder.")?.to_string(), Clone::clone(tensor)));
        let encoder: Vec<(String, safetensors::tensor::TensorView)> = tensors.iter().filter_map(below).collect();
        self.write(&format!("{name}/model.safetensors"), &safetensors::serialize(encoder, None).expect("bytes"));
        let config: Value = serde_json::from_slice(&self.bytes("model/config.json")).expect("JSON");
        self.write(&format!("{name}/config.json"), config["encoder"].to_string().as_bytes());
        self.write(&format!("{name}/preprocessor_config.json"), &self.bytes("model/preprocessor_config.json"));
    }

    fn make_model(&self, name: &str, seed: u64) {
        let config = serde_json::json!({
            "model_type": "vqrae",
            "format": 1,
            "encoder": {
                "model_type": "siglip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": SIDE,
                "patch_size": 8,
            },
            "quantizer": { "type": "simvq", "codebook_size": 64, "codebook_dim": 8 },
        });
        let config = Config::from_json(&config.to_string(), Path::new("config.json")).expect("a config");
        let tensors = fresh_tensors(&config, BTreeMap::new(), seed).expect("tensors");
        let preprocessor = Preprocessor::siglip(SIDE, Resample::Bicubic);
        save(&self.path(name), &config, &preprocessor, &tensors).expect("a model folder");
    }

    /// A picture of waves that no two `seed`s share.
    fn make_photo(&self, name: &str, seed: usize) {
        self.write(name, b"");
        let wave = |x: u32, y: u32, c: u32| {
            let phase = f64::from(x * (c + 1)) / 17.0 + f64::from(y) / (5.0 + c as f64) + seed as f64;
            (127.0 + 120.0 * phase.sin()) as u8
        };
        let pixels =
            image::RgbImage::from_fn(60 + seed as u32 % 7, 45, |x, y| image::Rgb([0, 1, 2].map(|c| wave(x, y, c))));
        pixels.save(self.path(name)).expect("a photo");
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        std::fs::write(path, bytes).expect("a file");
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).expect(name)
    }

    /// A command with the words of `line`, run in the temporary folder, on the CPU unless it names another device: there,
    /// bits do not depend on the batch.
    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(BINARY);
        command.env("VQRAE_DEVICE", "cpu");
        command.args(line.split_whitespace()).current_dir(self.folder.path()).env_remove("RUST_BACKTRACE");
        command
    }

    #[track_caller]
    fn run(&self, line: &str) -> Run {
        finish(self.command(line))
    }

    /// The bytes of every file below a folder, by relative path.
    fn tree(&self, name: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.path(name)];
        while let Some(folder) = folders.pop() {
            for entry in folder.read_dir().expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let relative = path.strip_prefix(self.path(name)).expect("below").to_path_buf();
                    files.insert(relative, std::fs::read(path).expect("a file"));
                }
            }
        }
        files
    }

    /// The model's id, as `inspect` tells it.
    fn id(&self, model: &str) -> String {
        let facts: Value =
            serde_json::from_str(&self.run(&format!("inspect {model} --json")).exits(0).stdout).expect("JSON");
        facts["id"].as_str().expect("an id").to_string()
    }
}

#[track_caller]
fn finish(mut command: Command) -> Run {
    let output = command.stdin(Stdio::null()).output().expect("the binary");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    let run = Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    run
}

impl Run {
    #[track_caller]
    fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    #[track_caller]
    fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "expected {part:?} in stderr: {}", self.stderr);
        }
        self
    }

    /// The summary, which is all that stdout holds.
    #[track_caller]
    fn summary(&self) -> Value {
        assert_eq!(self.stdout.lines().count(), 1, "{}", self.stdout);
        serde_json::from_str(&self.stdout).expect("JSON")
    }
}

fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/image").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn a_folder_becomes_code_files_a_manifest_and_a_summary() {
    let bench = Bench::with_photos(7);
    let run = bench
        .run("tokenize --output-format safetensors photos -o out --model model --batch_size 3 --dtype fp32")
        .exits(0);
    let summary = run.summary();
    assert_eq!((&summary["images"], &summary["skipped"], &summary["resumed"]), (&7.into(), &0.into(), &0.into()));
    assert!(summary["seconds"].is_number() && summary["images_per_second"].is_number());

    let codes = Codes::read(bench.path("out/codes/cats/0001.jpg.safetensors")).expect("codes");
    assert_eq!((codes.h, codes.w, codes.codebook_size), (4, 4, 64));
    assert_eq!((codes.source.as_str(), codes.dtype.as_str()), ("cats/0001.jpg", "f32"));
    assert_eq!(codes.model_id, bench.id("model"));
    let manifest: Value = serde_json::from_slice(&bench.bytes("out/manifest.json")).expect("JSON");
    assert_eq!(manifest["model_id"], codes.model_id.as_str());
    assert_eq!(manifest["preprocessing"], codes.preprocessing.as_str());
    assert_eq!(manifest["grid"], serde_json::json!([4, 4]));
    assert_eq!(bench.tree("out").len(), 8);
}

#[test]
fn npy_files_hold_the_same_codes() {
    let bench = Bench::with_photos(3);
    bench.run("tokenize --output-format safetensors photos -o a --model model").exits(0);
    bench.run("tokenize photos -o b --model model --output_format npy").exits(0);
    assert_eq!(
        Codes::read(bench.path("a/codes/0000.png.safetensors")).expect("codes"),
        Codes::read(bench.path("b/codes/0000.png.npy")).expect("codes")
    );
}

#[test]
fn batch_size_and_threads_do_not_change_the_codes() {
    let bench = Bench::with_photos(20);
    bench.run("tokenize --output-format safetensors photos -o out --model model --batch-size 1").exits(0);
    let expected = bench.tree("out");
    for (batch_size, workers, threads) in [(3, 1, "1"), (16, 3, "2"), (16, 2, "1"), (1, 4, "2")] {
        let output = format!("out-{batch_size}-{workers}-{threads}");
        let line = format!(
            "tokenize --output-format safetensors photos -o {output} --model model --batch-size {batch_size} --num-workers {workers}"
        );
        let mut command = bench.command(&line);
        command.env("RAYON_NUM_THREADS", threads);
        finish(command).exits(0);
        assert!(bench.tree(&output) == expected, "{output} differs");
    }
}

#[test]
fn codes_and_images_are_reconstructed_to_the_same_bytes() {
    let bench = Bench::with_photos(5);
    bench.run("tokenize --output-format safetensors photos -o out --model model --reconstruct --batch-size 2").exits(0);
    let expected = bench.tree("out/reconstructions");
    assert_eq!(expected.len(), 5);
    let from_images = bench.run("reconstruct photos -o from-images --model model").exits(0);
    assert!(from_images.summary()["psnr"].as_f64().expect("a number") > 0.0);
    let from_codes = bench.run("reconstruct out/codes -o from-codes --model model").exits(0);
    assert!(from_codes.summary().get("psnr").is_none());
    assert!(bench.tree("from-images/reconstructions") == expected);
    assert!(bench.tree("from-codes/reconstructions") == expected);
}

#[test]
fn a_sheet_shows_every_image_thrice() {
    let bench = Bench::with_photos(3);
    for line in [
        "tokenize --output-format safetensors photos -o out --model model --sheet out/sheet.png",
        "tokenize --output-format safetensors photos -o out --model model --sheet out/again.png",
        "reconstruct photos -o out2 --model model --sheet sheets/sheet.png",
    ] {
        bench.run(line).exits(0).says(&["3 of 3 images"]);
    }
    let sheet = bench.bytes("out/sheet.png");
    assert!(sheet == bench.bytes("out/again.png"), "a resumed run draws another sheet");
    assert!(sheet == bench.bytes("sheets/sheet.png"), "reconstruct draws another sheet");
    let size = image::load_from_memory(&sheet).expect("a PNG").into_rgb8();
    assert!(size.width() >= 3 * SIDE as u32 && size.height() >= 3 * SIDE as u32);
    bench.run("reconstruct out/codes -o out3 --model model --sheet s.png").exits(1).says(&["leave it out"]);
}

#[test]
fn features_are_one_row_a_token() {
    let bench = Bench::with_photos(2);
    bench.run("features photos -o out --model model").exits(0);
    let bytes = bench.bytes("out/features/0000.png.safetensors");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    assert_eq!(file.tensor("features").expect("the tensor").shape(), [16, 16]);
    assert_eq!(bench.run("features photos -o out --model model").exits(0).summary()["resumed"], 2);
}

#[test]
fn statistics_of_features_make_a_model_that_normalises_them() {
    let bench = Bench::with_photos(5);
    bench.write("photos/broken.png", b"no image");
    bench.run("features photos --statistics a/b.safetensors --model model --batch-size 1 --num-workers 1").exits(3);
    bench.run("features photos --statistics c.safetensors --model model --batch-size 4 --num-workers 3").exits(3);
    assert!(bench.bytes("a/b.safetensors") == bench.bytes("c.safetensors"), "the batch changes the statistics");
    assert!(String::from_utf8_lossy(&bench.bytes("c.safetensors.errors.jsonl")).contains("broken.png"));

    bench.run("features photos -o out --model model").exits(3);
    let mut values: Vec<f64> = Vec::new();
    for (_, bytes) in bench.tree("out/features") {
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let data = file.tensor("features").expect("the tensor").data();
        values.extend(data.as_chunks::<4>().0.iter().map(|&x| f64::from(f32::from_le_bytes(x))));
    }
    assert_eq!(values.len(), 5 * 16 * 16);
    let bytes = bench.bytes("c.safetensors");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let column = |name: &str, i: usize| {
        let tensor = file.tensor(name).expect("the tensor");
        assert_eq!(tensor.shape(), if name.starts_with("channel") { &[16][..] } else { &[16, 16] });
        f64::from(f32::from_le_bytes(tensor.data().as_chunks::<4>().0[i]))
    };
    let check = |kind: &str, i: usize, values: Vec<f64>| {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let var = values.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / values.len() as f64;
        assert!((column(&format!("{kind}.mean"), i) - mean).abs() <= 1e-6 * mean.abs().max(1e-3), "{kind} {i}");
        assert!((column(&format!("{kind}.var"), i) - var).abs() <= 1e-6 * var, "{kind} {i}");
    };
    (0..16).for_each(|i| check("channel", i, values.iter().skip(i).step_by(16).copied().collect()));
    (0..256).for_each(|i| check("position", i, values.iter().skip(i).step_by(256).copied().collect()));

    bench.pretrained("siglip");
    let config: Value = serde_json::from_slice(&bench.bytes("model/config.json")).expect("JSON");
    let wishes = serde_json::json!({
        "encoder": { "features": { "layer": 1 } },
        "quantizer": config["quantizer"],
        "latent": { "normalize": "position", "denormalize": true },
    });
    bench.write("config.json", wishes.to_string().as_bytes());
    let command = "init --encoder siglip --config config.json -o new";
    bench.run(command).exits(1).says(&["config.json", "--latent-statistics"]);
    bench.run(&format!("{command} --latent-statistics c.safetensors")).exits(0);
    let told = bench.run("inspect new").exits(0).stdout;
    for line in ["features", "hidden_states[1]", "config.latent.normalize", "position"] {
        assert!(told.contains(line), "{line}: {told}");
    }
    bench.run("tokenize --output-format safetensors photos/0000.png -o out2 --model new").exits(0);
    bench
        .run("tokenize --output-format safetensors photos/0000.png -o out3 --model new --image-size 64")
        .exits(1)
        .says(&["a grid of 4×4"]);
    let book = bench.run("codebook -o book --model new --json").exits(0).stdout;
    let book: Value = serde_json::from_str(&book).expect("JSON");
    assert_eq!(book["codebook_size"].as_u64(), Some(64));
    assert!(bench.path("book/atlas.png").exists());
}

#[test]
fn files_globs_and_folders_may_be_mixed() {
    let bench = Bench::with_photos(6);
    bench.make_photo("other/dog.png", 1);
    std::fs::rename(bench.path("other/dog.png"), bench.path("other/dog.dat")).expect("renaming");
    bench.run("tokenize --output-format safetensors photos/cats/**/*.jpg other/dog.dat -o out --model model").exits(0);
    let names: Vec<_> = bench.tree("out/codes").into_keys().collect();
    assert_eq!(names, ["0001.jpg.safetensors", "dog.dat.safetensors", "tom/0005.jpg.safetensors"].map(PathBuf::from));
    bench
        .run("tokenize --output-format safetensors photos/0000.png photos/../photos/0000.png -o out2 --model model")
        .exits(1)
        .says(&["would both be written as 0000.png"]);
}

#[test]
fn an_empty_folder_and_a_missing_one_are_errors() {
    let bench = Bench::new();
    bench.write("empty/notes.txt", b"no image");
    bench
        .run("tokenize --output-format safetensors empty -o out --model model")
        .exits(1)
        .says(&["error: no images found under empty"]);
    bench.run("tokenize nowhere -o out --model model").exits(1).says(&["nowhere: no such file or folder"]);
    assert!(!bench.path("out").exists());
}

#[test]
fn words_that_make_no_sense_exit_with_2() {
    let bench = Bench::new();
    for line in [
        "tokenize",
        "tokenize --output-format safetensors photos",
        "tokenize --output-format safetensors photos -o out --batch-size 0",
        "tokenize --output-format safetensors photos -o out --image-size wide",
        "tokenize --output-format safetensors photos -o out --resize-mode stretch",
        "tokenize --output-format safetensors photos -o out --strict --max-errors 3",
        "features photos",
        "features photos -o out --statistics out.safetensors",
        "features photos --statistics out.safetensors --if-exists overwrite",
        "juggle photos",
    ] {
        assert!(bench.run(line).exits(2).stdout.is_empty());
    }
    for command in ["tokenize", "reconstruct", "features", "inspect", "codebook", "init", "bench"] {
        assert!(bench.run(&format!("{command} --help")).exits(0).stdout.contains("Examples:"), "{command}");
    }
}

#[test]
fn unusual_images_are_tokenized() {
    let bench = Bench::new();
    for name in ["animated.gif", "exif6.jpg", "cmyk.jpg", "rgb_16.png", "grey_alpha.png", "palette_trns.png"] {
        bench.write(&format!("photos/{name}"), &fixture(&format!("decode/{name}")));
        bench.write(&format!("expected/{name}"), &fixture(&format!("decode/{name}.rgb.png")));
    }
    for (name, width, height) in [("tall", 1, 4000), ("wide", 4000, 1)] {
        let image = Rgb::new(width, height, vec![99; 3 * width * height]).expect("an image");
        save_png(&bench.path(&format!("photos/{name}.png")), &image).expect("a PNG");
        save_png(&bench.path(&format!("expected/{name}.png")), &image).expect("a PNG");
    }
    assert_eq!(
        bench.run("tokenize --output-format safetensors photos -o out --model model").exits(0).summary()["images"],
        8
    );
    bench.run("tokenize --output-format safetensors expected -o expected-out --model model").exits(0);
    assert!(bench.tree("out") == bench.tree("expected-out"), "decoded otherwise than Pillow does");
}

/// Files that no image can be made of, and a part of the reason to be given.
fn bad_files(bench: &Bench) -> Vec<(String, &'static str)> {
    bench.make_photo("whole.jpg", 1);
    bench.make_photo("whole.png", 1);
    let mut files = vec![
        ("empty.png".to_string(), Vec::new(), "the file is empty"),
        ("text.jpg".to_string(), b"this is not a photo".to_vec(), "not a JPEG"),
    ];
    for name in ["whole.jpg", "whole.png"] {
        let bytes = bench.bytes(name);
        files.push((format!("cut-{name}"), bytes[..bytes.len() / 2].to_vec(), "truncated"));
    }
    for extension in ["bmp", "gif", "jpg", "png", "tiff"] {
        files.push((format!("zero.{extension}"), fixture(&format!("bad/zero.{extension}")), ""));
        files.push((format!("huge.{extension}"), fixture(&format!("bad/huge.{extension}")), "too many pixels"));
    }
    let write = |(name, bytes, reason): (String, Vec<u8>, &'static str)| {
        bench.write(&format!("photos/bad/{name}"), &bytes);
        (name, reason)
    };
    files.into_iter().map(write).collect()
}

#[test]
fn bad_images_are_skipped_named_and_recorded() {
    let bench = Bench::with_photos(3);
    let bad = bad_files(&bench);
    let run = bench
        .run("tokenize --output-format safetensors photos -o out --model model --batch-size 2 --sheet out/sheet.png")
        .exits(3);
    let summary = run.summary();
    assert_eq!((&summary["images"], &summary["skipped"]), (&3.into(), &bad.len().into()));
    let errors = String::from_utf8(bench.bytes("out/errors.jsonl")).expect("UTF-8");
    for (name, reason) in &bad {
        let line = run.stderr.lines().find(|line| line.starts_with(&format!("skipped photos/bad/{name}: ")));
        let line = line.unwrap_or_else(|| panic!("{name} is not named in: {}", run.stderr));
        assert!(line.contains(reason), "expected {reason:?} in: {line}");
        let record = errors.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        let record = record.into_iter().find(|record| record["path"] == format!("bad/{name}")).expect("a record");
        assert!(line.ends_with(record["reason"].as_str().expect("a reason")));
    }
    let again = bench.run("tokenize --output-format safetensors photos -o out --model model").exits(3).summary();
    assert_eq!((&again["resumed"], &again["skipped"]), (&3.into(), &bad.len().into()));
    std::fs::remove_dir_all(bench.path("photos/bad")).expect("removing");
    bench.run("tokenize --output-format safetensors photos -o out --model model").exits(0);
    assert!(!bench.path("out/errors.jsonl").exists(), "errors of an earlier run are still recorded");
}

#[test]
fn a_run_gives_up_when_told_to() {
    let bench = Bench::with_photos(3);
    let bad = bad_files(&bench).len();
    bench
        .run("tokenize --output-format safetensors photos -o a --model model --strict")
        .exits(1)
        .says(&["giving up: 1 file could not be read"]);
    bench
        .run("tokenize --output-format safetensors photos -o b --model model --max-errors 2")
        .exits(1)
        .says(&["giving up: 3 files", "allowed: 2"]);
    bench.run(&format!("tokenize --output-format safetensors photos -o c --model model --max-errors {bad}")).exits(3);
    bench
        .run("tokenize --output-format safetensors photos -o d --model model --max-pixels 10")
        .exits(3)
        .says(&["limit: 10"]);
}

#[test]
fn an_image_that_may_not_be_read_is_skipped() {
    let bench = Bench::with_photos(2);
    let secret = bench.path("photos/0000.png");
    let mut permissions = std::fs::metadata(&secret).expect("metadata").permissions();
    set_private(&mut permissions);
    std::fs::set_permissions(&secret, permissions).expect("permissions");
    if std::fs::File::open(&secret).is_ok() {
        // Root may read everything: there is nothing to test.
        return;
    }
    bench
        .run("tokenize --output-format safetensors photos -o out --model model")
        .exits(3)
        .says(&["skipped photos/0000.png: cannot be read"]);
}

#[cfg(unix)]
fn set_private(permissions: &mut std::fs::Permissions) {
    std::os::unix::fs::PermissionsExt::set_mode(permissions, 0);
}

#[cfg(not(unix))]
fn set_private(_: &mut std::fs::Permissions) {}

#[test]
fn an_earlier_run_is_kept_mended_or_done_again() {
    let bench = Bench::with_photos(4);
    bench.run("tokenize --output-format safetensors photos -o out --model model").exits(0);
    let expected = bench.tree("out");
    let damaged = "out/codes/0000.png.safetensors";
    bench.write(damaged, &bench.bytes(damaged)[..40]);
    let summary = bench
        .run("tokenize --output-format safetensors photos -o out --model model")
        .exits(0)
        .says(&["3 of 4 images"])
        .summary();
    assert_eq!((&summary["images"], &summary["resumed"]), (&1.into(), &3.into()));
    assert!(bench.tree("out") == expected);
    assert_eq!(
        bench
            .run("tokenize --output-format safetensors photos -o out --model model --if-exists overwrite")
            .exits(0)
            .summary()["images"],
        4
    );
    bench
        .run("tokenize --output-format safetensors photos -o out --model model --if_exists error")
        .exits(1)
        .says(&["--if-exists skip"]);
    assert!(bench.tree("out") == expected);
}

#[test]
fn an_output_folder_of_another_model_is_refused() {
    let bench = Bench::with_photos(2);
    bench.make_model("other", 2);
    let ids = [bench.id("model"), bench.id("other")];
    bench.run("tokenize --output-format safetensors photos -o out --model model").exits(0);
    let expected = bench.tree("out");
    let run = bench.run("tokenize --output-format safetensors photos -o out --model other").exits(1);
    run.says(&[&ids[0], &ids[1], "manifest.json", "choose another --output", "--if-exists overwrite"]);
    bench
        .run("tokenize --output-format safetensors photos -o out --model model --resize-mode pad")
        .exits(1)
        .says(&["32x32-pad"]);
    bench
        .run("tokenize --output-format safetensors photos -o out --model model --image-size 64")
        .exits(1)
        .says(&["64x64-squash"]);
    assert!(bench.tree("out") == expected, "a refused run has changed the folder");

    std::fs::remove_file(bench.path("out/manifest.json")).expect("removing");
    let run = bench.run("tokenize --output-format safetensors photos -o out --model other").exits(1);
    run.says(&[&ids[0], &ids[1], "0000.png.safetensors", "--if-exists overwrite"]);
    bench.run("tokenize --output-format safetensors photos -o out --model other --if-exists overwrite").exits(0);
    let codes = Codes::read(bench.path("out/codes/0000.png.safetensors")).expect("codes");
    assert_eq!(codes.model_id, ids[1]);
}

#[test]
fn codes_of_another_model_are_not_reconstructed() {
    let bench = Bench::with_photos(1);
    bench.make_model("other", 2);
    bench.run("tokenize --output-format safetensors photos -o out --model model").exits(0);
    let run = bench.run("reconstruct out/codes -o again --model other").exits(1);
    run.says(&["0000.png.safetensors", &bench.id("model"), &bench.id("other")]);
    assert!(!bench.path("again/reconstructions").exists());
}

#[test]
fn damaged_code_files_are_skipped() {
    let bench = Bench::with_photos(2);
    bench.run("tokenize --output-format safetensors photos -o out --model model").exits(0);
    let damaged = "out/codes/0000.png.safetensors";
    bench.write(damaged, &bench.bytes(damaged)[..99]);
    bench.run("reconstruct out/codes -o again --model model").exits(3).says(&["not a whole safetensors file"]);
    assert_eq!(bench.tree("again/reconstructions").len(), 1);
}

#[test]
fn broken_models_are_refused_by_name() {
    let bench = Bench::with_photos(1);
    let weights = bench.bytes("model/model.safetensors");
    let config = String::from_utf8(bench.bytes("model/config.json")).expect("UTF-8");
    let tokenize = || bench.run("tokenize --output-format safetensors photos -o out --model model").exits(1);

    bench.write("model/model.safetensors", &weights[..weights.len() / 2]);
    tokenize().says(&["model.safetensors", "not a whole safetensors file"]);
    bench.write("model/model.safetensors", &[&u64::MAX.to_le_bytes(), &weights[8..]].concat());
    tokenize().says(&["model.safetensors", "not a whole safetensors file"]);
    bench.write("model/model.safetensors", &weights);
    bench.write("model/config.json", config.replace("\"hidden_size\": 16", "\"hidden_size\": 24").as_bytes());
    tokenize().says(&["model.safetensors", "16", "24"]);
    bench.write("model/config.json", &config.as_bytes()[..99]);
    tokenize().says(&["config.json"]);
    std::fs::remove_file(bench.path("model/config.json")).expect("removing");
    tokenize().says(&["config.json", "No such file"]);
    std::fs::remove_dir_all(bench.path("model")).expect("removing");
    tokenize().says(&["model: no such folder", "OWNER/NAME"]);
    assert!(!bench.path("out").exists());
}

#[test]
fn inspect_tells_about_models_and_code_files() {
    let bench = Bench::with_photos(1);
    bench.run("tokenize --output-format safetensors photos -o out --model model").exits(0);
    let model = bench.run("inspect model").exits(0).stdout;
    for part in ["config.encoder.hidden_size", "codebook_size", "parameters", "4 x 4"] {
        assert!(model.contains(part), "{part} in: {model}");
    }
    let codes = bench.run("inspect out/codes/0000.png.safetensors").exits(0).stdout;
    for part in ["distinct_codes", "0000.png", bench.id("model").as_str()] {
        assert!(codes.contains(part), "{part} in: {codes}");
    }
    let folder = bench.run("inspect out/codes --json").exits(0).stdout;
    let folder: Value = serde_json::from_str(&folder).expect("JSON");
    assert_eq!((folder["files"].as_u64(), folder["codebook_size"].as_u64()), (Some(1), Some(64)));
    assert!(folder["codes_in_use"].as_f64().is_some_and(|share| share > 0.0 && share <= 16.0 / 64.0));
    bench.run("inspect photos").exits(1).says(&["neither a model folder", "nor a folder of code files"]);
    bench.run("inspect photos/0000.png").exits(1).says(&["neither a model folder nor a code file"]);
}

#[test]
fn a_codebook_and_its_use_become_figures_and_pictures() {
    let bench = Bench::new();
    for name in ["chelsea.png", "coffee.png"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/photos").join(name);
        bench.write(&format!("photos/{name}"), &std::fs::read(path).expect(name));
    }
    bench.run("tokenize --output-format safetensors photos -o out").exits(0);
    let facts = bench.run("codebook out/codes out/codes/coffee.png.safetensors -o out/book --json").exits(0).stdout;
    let facts: Value = serde_json::from_str(&facts).expect("JSON");
    let mut counts = vec![0u64; 16_384];
    for name in ["chelsea", "coffee"] {
        let codes = Codes::read(bench.path(&format!("out/codes/{name}.png.safetensors"))).expect("codes");
        codes.indices.iter().for_each(|&index| counts[index as usize] += 1);
    }
    let used = counts.iter().filter(|&&count| count > 0).count();
    let usage = &facts["usage"];
    assert_eq!((&usage["tokens"], &usage["files"], &usage["used"]), (&512.into(), &2.into(), &used.into()));
    assert_eq!(facts["duplicates"]["identical"], 0);

    let book: Value = serde_json::from_slice(&bench.bytes("out/book/codebook.json")).expect("JSON");
    assert_eq!(book["codes"]["count"], serde_json::json!(counts));
    for column in ["norm", "nearest", "distance", "angle"] {
        assert_eq!(book["codes"][column].as_array().map(Vec::len), Some(16_384), "{column}");
    }
    let cells: Vec<_> = book["codes"]["atlas_cell"].as_array().expect("cells").iter().collect();
    assert!(cells.iter().zip(&counts).all(|(cell, &count)| cell.is_u64() == (count > 0)));
    let side = |key: &str| book["atlas"][key].as_u64().expect(key) as u32;
    let atlas = image::load_from_memory(&bench.bytes("out/book/atlas.png")).expect("a PNG");
    assert_eq!(atlas.width(), side("columns") * side("patch") + 2 * side("margin"));
    image::load_from_memory(&bench.bytes("out/book/atlas-in-context.png")).expect("a PNG");
    for name in ["usage.svg", "geometry.svg"] {
        let svg = String::from_utf8(bench.bytes(&format!("out/book/{name}"))).expect("UTF-8");
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && !svg.contains("NaN"), "{name}");
    }
}

#[test]
fn a_codebook_alone_is_described_without_codes() {
    let bench = Bench::new();
    let table = bench.run("codebook -o book --model model").exits(0).stdout;
    for part in ["codebook_size", "64", "norm.median", "nearest.angle.min", "duplicates.identical"] {
        assert!(table.contains(part), "{part} in: {table}");
    }
    let names: Vec<_> = bench.tree("book").into_keys().collect();
    assert_eq!(names, ["atlas.png", "codebook.json", "geometry.svg"].map(PathBuf::from));
    bench.run("codebook -o again --model model").exits(0);
    assert!(bench.tree("book") == bench.tree("again"), "a second run writes something else");
}

#[test]
fn codebook_refuses_other_models_and_goes_on_without_damaged_files() {
    let bench = Bench::with_photos(3);
    bench.make_model("other", 2);
    bench.run("tokenize photos -o out --model model --output-format npy").exits(0);
    let run = bench.run("codebook out/codes -o refused --model other").exits(1);
    run.says(&["out/codes/", &bench.id("model"), &bench.id("other")]);
    assert!(bench.tree("refused").is_empty());

    let damaged = "out/codes/0000.png.npy";
    bench.write(damaged, &bench.bytes(damaged)[..99]);
    bench.write("out/codes/weights.safetensors", &bench.bytes("model/model.safetensors"));
    let run = bench.run("codebook out/codes -o book --model model --json").exits(3);
    let facts: Value = serde_json::from_str(&run.stdout).expect("JSON");
    assert_eq!((&facts["usage"]["files"], &facts["usage"]["tokens"]), (&2.into(), &32.into()));
    run.says(&[
        "skipped out/codes/0000.png.npy: ",
        "skipped out/codes/weights.safetensors: ",
        "2 files could not be read",
    ]);
    assert!(bench.path("book/codebook.json").exists() && bench.path("book/errors.jsonl").exists());

    bench
        .run(&format!("codebook {damaged} -o none --model model"))
        .exits(1)
        .says(&["none of 1 code file", "none/errors.jsonl"]);
    bench.run("codebook photos -o none --model model").exits(1).says(&["no code files found under photos", "npy"]);
    bench.run("codebook nowhere -o none --model model").exits(1).says(&["nowhere: no such file or folder"]);
    bench.run("codebook out/codes -o book --near 2").exits(2);
    bench.run("codebook out/codes").exits(2);
}

#[test]
fn several_codes_a_token_go_from_photos_to_files_and_back() {
    let bench = Bench::with_photos(2);
    let mut config: Value = serde_json::from_slice(&bench.bytes("model/config.json")).expect("JSON");
    let group = serde_json::json!({ "levels": 2, "level": { "codebook_size": 32, "codebook_dim": 4 } });
    config["quantizer"] = serde_json::json!({ "type": "product", "groups": 2, "group": group });
    let config = Config::from_json(&config.to_string(), Path::new("config.json")).expect("a config");
    let tensors = fresh_tensors(&config, BTreeMap::new(), 1).expect("tensors");
    let preprocessor = Preprocessor::siglip(SIDE, Resample::Bicubic);
    save(&bench.path("product"), &config, &preprocessor, &tensors).expect("a model folder");

    for format in ["npy", "safetensors"] {
        bench
            .run(&format!("tokenize photos -o out-{format} --model product --output-format {format} --reconstruct"))
            .exits(0);
        let file = format!("out-{format}/codes/0000.png.{format}");
        let codes = Codes::read(bench.path(&file)).expect("codes");
        assert_eq!((codes.h, codes.w, codes.c, codes.codebook_size), (4, 4, 4, 32));
        bench.run(&format!("reconstruct out-{format}/codes -o back-{format} --model product")).exits(0);
        let picture = |folder: &str| bench.bytes(&format!("{folder}-{format}/reconstructions/0000.png.png"));
        assert_eq!(picture("out"), picture("back"));
        let told = bench.run(&format!("inspect {file} --json")).exits(0).stdout;
        let told: Value = serde_json::from_str(&told).expect("JSON");
        assert_eq!((told["codes_per_token"].as_u64(), told["codebook_size"].as_u64()), (Some(4), Some(32)));
    }
    let told = bench.run("inspect out-npy/codes --json").exits(0).stdout;
    let told: Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(told["codes_per_token"].as_u64(), Some(4));
    assert!(told["codes_in_use"].as_f64().is_some_and(|share| share > 0.0 && share <= 1.0));

    // Made up: codes that bear the model's id, but have another shape.
    let file = bench.path("out-npy/codes/0000.png.npy");
    let codes = Codes::read(&file).expect("codes");
    Codes { w: 8, c: 2, ..codes }.write(&file).expect("writing");
    let refused = bench.run("reconstruct out-npy/codes -o refused --model product").exits(1);
    refused.says(&["0000.png.npy", "2 codes a token", "tokenize the image again"]);
}

#[test]
fn init_makes_a_model_that_tokenizes() {
    let bench = Bench::with_photos(1);
    bench.pretrained("siglip");
    let config: Value = serde_json::from_slice(&bench.bytes("model/config.json")).expect("JSON");
    bench.write("config.json", serde_json::json!({ "quantizer": config["quantizer"] }).to_string().as_bytes());

    let run = bench.run("init --encoder siglip --config config.json -o new --seed 3").exits(0);
    assert!(run.stdout.contains(&bench.id("new")), "{}", run.stdout);
    bench.run("tokenize --output-format safetensors photos -o out --model new").exits(0);
    bench
        .run("init --encoder nowhere --config config.json -o new")
        .exits(1)
        .says(&["nowhere: no such folder", "OWNER/NAME"]);
}

#[test]
fn bench_measures_a_model_in_f32_and_in_what_suits_the_machine() {
    let bench = Bench::new();
    let run = bench.run("bench --shapes shipped --rounds 1 --batch 1 --json").exits(0);
    let rows: Vec<Value> = run.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(rows.len() == 1 || rows.len() == 2, "{}", run.stdout);
    for row in &rows {
        for number in ["/tokenize/best", "/tokenize/median", "/reconstruct/best", "/gflops", "/ready_seconds"] {
            assert!(row.pointer(number).and_then(Value::as_f64).is_some_and(|x| x > 0.0), "{number} in {row}");
        }
    }
    assert_eq!((rows[0]["shape"].as_str(), rows[0]["dtype"].as_str()), (Some("shipped"), Some("f32")));
    let table = bench.run("bench --model model --rounds 2 --batch 2,1 --dtype f32").exits(0).stdout;
    let batches: Vec<_> = table.lines().filter_map(|line| line.strip_prefix("| model | f32")).collect();
    assert!(matches!(batches[..], [one, two] if one.contains("| 1 ") && two.contains("| 2 ")), "{table}");
}

#[test]
fn bench_writes_the_same_random_model_every_time() {
    let bench = Bench::new();
    bench.run("bench --shapes tiny --export a").exits(0);
    bench.run("bench --shapes tiny --export b").exits(0);
    assert_eq!(bench.id("a"), bench.id("b"));
    assert_eq!(bench.tree("a").len(), 3);
    bench.run("bench --shapes shipped --export c").exits(1).says(&["shipped is not random", "weights/vqrae-small"]);
    bench.run("bench --export c").exits(2).says(&["--shapes"]);
    bench.run("bench --shapes tiny,so400m --export c").exits(1).says(&["name one shape"]);
    assert!(!bench.path("c").exists());
}

#[test]
fn bench_knows_its_shapes() {
    let bench = Bench::new();
    let names = ["huge", "shipped", "siglip-base", "siglip-large", "so400m", "nearest"];
    bench.run("bench --shapes shipped,huge").exits(2).says(&names);
}

#[test]
fn two_runs_do_not_share_an_output_folder() {
    let bench = Bench::with_photos(1);
    std::fs::create_dir(bench.path("out")).expect("a folder");
    let Ok(folder) = std::fs::File::open(bench.path("out")) else { return };
    if folder.try_lock().is_ok() {
        bench
            .run("tokenize --output-format safetensors photos -o out --model model")
            .exits(1)
            .says(&["another run is writing to this folder"]);
    }
}

#[test]
fn an_output_that_is_a_file_is_refused() {
    let bench = Bench::with_photos(1);
    bench.write("out", b"in the way");
    bench.run("tokenize --output-format safetensors photos -o out --model model").exits(1).says(&["error: out: "]);
    bench
        .run("tokenize --output-format safetensors photos -o out/deeper --model model")
        .exits(1)
        .says(&["error: out/deeper: "]);
}

/// A full disk is played by a limit on the size of files: the write fails, with another word from the system.
#[cfg(unix)]
#[test]
fn a_full_disk_is_an_error_that_names_the_file() {
    let bench = Bench::with_photos(2);
    let mut command = Command::new("sh");
    let script = format!(
        "trap '' XFSZ; ulimit -f 0; exec '{BINARY}' tokenize --output-format safetensors photos -o out --model model"
    );
    command.args(["-c", &script]).current_dir(bench.folder.path());
    finish(command).exits(1).says(&["error: out/manifest.json: "]);
    assert!(bench.tree("out").is_empty());
}

#[cfg(unix)]
mod signals {
    use std::time::Duration;

    use super::*;

    const PHOTOS: usize = 120;

    /// Larger images than the model's own make a run that is long enough to be stopped.
    const TOKENIZE: &str =
        "tokenize --output-format safetensors photos --model model --image-size 192 --batch-size 2 --reconstruct -o";

    /// Starts a run, and sends it a signal once it has written some files; then waits for its end.
    fn stopped_by(signal: &str, bench: &Bench, device: &str) -> Run {
        let mut command = bench.command(&format!("{TOKENIZE} out --device {device}"));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary");
        let codes = bench.path("out/codes/cats");
        while codes.read_dir().map_or(0, Iterator::count) < 3 {
            assert!(child.try_wait().expect("a child").is_none(), "the run ended before it could be stopped");
            std::thread::sleep(Duration::from_millis(1));
        }
        let id = child.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().expect("kill").success());
        let output = child.wait_with_output().expect("the end");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        let run = Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
        assert!(bench.tree("out/codes").len() < PHOTOS, "the run ended before it could be stopped");
        run
    }

    #[test]
    fn a_killed_run_goes_on_to_the_same_bytes() {
        let bench = Bench::with_photos(PHOTOS);
        bench.run(&format!("{TOKENIZE} whole")).exits(0);
        stopped_by("-KILL", &bench, "cpu");
        bench.write("out/codes/.tmpA1b2C3", b"half a file");
        let summary = bench.run(&format!("{TOKENIZE} out")).exits(0).summary();
        assert!(summary["resumed"].as_u64() > Some(0), "{summary}");
        assert!(bench.tree("out") == bench.tree("whole"));
    }

    #[test]
    fn an_interrupted_run_leaves_whole_files_and_says_how_to_go_on() {
        for (signal, device) in [("-INT", "cpu"), ("-TERM", "cpu"), ("-INT", "cpu,cpu,cpu")] {
            let bench = Bench::with_photos(PHOTOS);
            let run =
                stopped_by(signal, &bench, device).exits(130).says(&["interrupted", "run the same command again"]);
            let codes = bench.tree("out/codes");
            assert_eq!(run.summary()["images"], codes.len());
            for name in codes.keys() {
                Codes::read(bench.path("out/codes").join(name)).expect("a whole file");
            }
            for (name, bytes) in bench.tree("out/reconstructions") {
                image::load_from_memory(&bytes).unwrap_or_else(|error| panic!("{}: {error}", name.display()));
            }
        }
    }
}

#[test]
fn a_converted_checkpoint_tokenizes_and_reconstructs() {
    let bench = Bench::with_photos(2);
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/convert");
    std::fs::copy(fixtures.join("fork-siglip/checkpoint.pt"), bench.path("ep.pt")).expect("a checkpoint");
    std::fs::copy(fixtures.join("vqp-fsq/checkpoint.pt"), bench.path("fsq.pt")).expect("a checkpoint");
    let heads = "--set encoder.num_attention_heads=2 --set decoder.num_attention_heads=3";
    let run = bench.run(&format!("convert ep.pt -o converted {heads}")).exits(0);
    assert!(run.stdout.contains("fork-siglip") && run.stdout.contains("ema"), "{}", run.stdout);
    bench
        .run("tokenize --output-format safetensors photos -o out --model converted --reconstruct --dtype f32")
        .exits(0);
    assert!(bench.path("out/reconstructions/0000.png.png").exists());
    bench.run("convert fsq.pt --set quantizer.levels=[5,4,3] --base converted -o another").exits(0);
    bench.run("tokenize --output-format safetensors photos -o fsq --model another --dtype f32").exits(0);
    assert_eq!(Codes::read(bench.path("fsq/codes/0000.png.safetensors")).expect("codes").codebook_size, 60);

    let run = bench.run("convert ep.pt -o other --set a").exits(2);
    assert!(run.stderr.contains("`a` is not KEY=VALUE"), "{}", run.stderr);
    let run = bench.run("convert none.pt -o other").exits(1);
    assert!(run.stderr.contains("no such file or folder"), "{}", run.stderr);
    assert!(!bench.path("other").exists());
}
