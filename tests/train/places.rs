//! Where photos come from, and how they are cut.

use std::path::Path;
use std::process::{Command, Stdio};

use vqrae::image::{Preprocessor, Resample};
use vqrae::train::data::{Crops, Photos, Sizes};

use super::{BINARY, Bench, fails_with, stderr, succeeds, test_device};

/// A run on these places.
fn train(bench: &Bench, run: &str, places: &[&str], more: &[&str]) -> std::process::Output {
    let mut command = Command::new(BINARY);
    command.env("VQRAE_DEVICE", test_device());
    command.arg("train").arg("--config").arg(bench.path("config.toml")).arg("--data").args(places);
    command.arg("--output-dir").arg(bench.path(run)).args(["--set", "train.steps=3"]).args(more);
    command.current_dir(bench.path("")).stdin(Stdio::null()).output().expect("the binary")
}

fn tar(bench: &Bench, name: &str, photos: &[&str]) {
    let status =
        Command::new("tar").arg("-cf").arg(bench.path(name)).args(photos).current_dir(bench.path("photos")).status();
    assert!(status.expect("tar").success());
}

#[test]
fn folders_lists_tars_and_patterns_of_the_same_photos_make_the_same_model() {
    let bench = Bench::new();
    // Bytes' order: 0, 2, 4 and then those in more/.
    let photos = ["0.png", "2.png", "4.png", "more/1.png", "more/3.png"];
    let list: String = photos.iter().map(|photo| format!("photos/{photo}\n\n")).collect();
    std::fs::write(bench.path("list.txt"), list).expect("a list");
    tar(&bench, "all.tar", &photos);
    tar(&bench, "shard-000.tar", &photos[..2]);
    tar(&bench, "shard-001.tar", &photos[2..]);
    std::fs::write(bench.path("shards.txt"), "shard-000.tar\nshard-001.tar\n").expect("a list");
    succeeds(&train(&bench, "folder", &["photos"], &[]));
    let places: [&[&str]; 6] = [
        &["list.txt"],
        &["all.tar"],
        &["shard-000.tar", "shard-001.tar"],
        &["shard-*.tar"],
        &["shard-{000..001}.tar"],
        &["shards.txt"],
    ];
    for (i, places) in places.into_iter().enumerate() {
        let run = format!("run{i}");
        succeeds(&train(&bench, &run, places, &[]));
        assert!(bench.checkpoint("folder", 3) == bench.checkpoint(&run, 3), "{places:?}");
    }
    fails_with(&train(&bench, "x", &["shard-9*.tar"], &[]), &["nothing is called shard-9*.tar"]);
    fails_with(&train(&bench, "x", &["nowhere"], &[]), &["nowhere"]);
}

#[test]
fn a_photo_that_a_list_has_and_the_disk_has_not_is_skipped_and_counted() {
    let bench = Bench::new();
    std::fs::write(bench.path("list.txt"), "photos/0.png\nphotos/gone.png\nphotos/2.png\n").expect("a list");
    let output = train(&bench, "run", &["list.txt"], &["--set", "train.log_every=1"]);
    succeeds(&output);
    assert!(stderr(&output).contains("gone.png"), "{}", stderr(&output));
    let log = bench.log("run");
    assert!(log.last().and_then(|line| line["skipped_photos"].as_u64()) >= Some(2), "{log:?}");
}

#[test]
fn a_batch_says_which_photos_its_crops_are_of() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for i in 0..5u8 {
        let photo = image::RgbImage::from_pixel(20, 24, image::Rgb([40 * i; 3]));
        photo.save(folder.path().join(format!("{i}.png"))).expect("a photo");
    }
    std::fs::write(folder.path().join("3.png"), "no photo").expect("a file");
    let photos = Photos::list(&[folder.path().to_path_buf()]).expect("photos");
    let preprocessor = Preprocessor::siglip(16, Resample::Bicubic);
    let sizes = Sizes { input: (16, 16), target: (16, 16) };
    let batch = Crops::new(&photos, &preprocessor, None, 7).batch(0, 10, sizes).expect("a batch");
    assert_eq!((batch.photos.len(), batch.skipped.len()), (10, 2), "two epochs, a photo of which cannot be used");
    for (crop, &photo) in batch.inputs.chunks(3 * 16 * 16).zip(&batch.photos) {
        assert!(photos.path(photo).ends_with(format!("{photo}.png")));
        assert!(((crop[0] + 1.0) * 127.5 - 40.0 * photo as f32).abs() < 1e-3, "photo {photo}: {}", crop[0]);
    }
}

#[test]
fn random_resized_crops_are_other_photos_and_what_makes_no_sense_is_refused() {
    let bench = Bench::new();
    succeeds(&train(&bench, "plain", &["photos"], &[]));
    succeeds(&train(&bench, "resized", &["photos"], &["--set", "train.crop={scale=[0.2, 0.5]}"]));
    assert!(bench.checkpoint("plain", 3) != bench.checkpoint("resized", 3));
    for (wish, words) in [
        ("train.crop={scale=[0.5, 0.2]}", ["train.crop.scale", "smaller first"]),
        ("train.crop={ratio=[0, 1]}", ["train.crop.ratio", "above 0"]),
        ("train.sizes=[\"32\"]", ["train.sizes", "HEIGHTxWIDTH"]),
        ("train.sizes=[\"30x32\"]", ["30×32", "patches"]),
        ("train.ema_decay=1.0", ["train.ema_decay", "less than 1"]),
    ] {
        fails_with(&train(&bench, "x", &["photos"], &["--set", wish]), &words);
    }
}

#[test]
fn a_run_leaves_curves_and_files_for_tensorboard() {
    let bench = Bench::new();
    succeeds(&bench.train("run", &["--set", "train.steps=4"]));
    let curves = std::fs::read_to_string(bench.path("run/curves.svg")).expect("curves");
    assert_eq!(curves.matches("<polyline").count(), 6);
    let events = |folder: &Path| std::fs::read_dir(folder).map_or(0, Iterator::count);
    assert_eq!(events(&bench.path("run/tensorboard")), 1);
    succeeds(&bench.train("quiet", &["--set", "train.steps=1", "--set", "train.tensorboard=false"]));
    assert!(!bench.path("quiet/tensorboard").exists());
}
