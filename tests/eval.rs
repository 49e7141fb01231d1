//! `eval`: figures of a model and of two folders, against the library and against what others measured.

use vqrae::metrics::{Statistics, fid, psnr, ssim};
use vqrae::perceptual::{FidInput, Inception};
use vqrae::weights::read_file;

use super::*;

fn beside(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

fn json(bench: &Bench, name: &str) -> Value {
    serde_json::from_slice(&bench.bytes(name)).expect("JSON")
}

fn text(bench: &Bench, name: &str) -> String {
    String::from_utf8(bench.bytes(name)).expect("UTF-8")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// The images and others of the fixture of LPIPS, as PNGs of the same names in `a` and `b`.
fn pairs(bench: &Bench) -> Vec<(Rgb, Rgb)> {
    let tensors = read_file(&beside("perceptual/reference.safetensors")).expect("a fixture");
    let image = |name: &str, i: usize| {
        let planes = tensors[name].get(i).expect("an image");
        let (_, height, width) = planes.dims3().expect("planes");
        let data = planes.permute((1, 2, 0)).and_then(|x| x.flatten_all()?.to_vec1::<u8>()).expect("levels");
        Rgb { width, height, data }
    };
    let mut pairs = Vec::new();
    for i in 0..2 {
        let pair = (image("images", i), image("others", i));
        for (folder, image) in [("a", &pair.0), ("b", &pair.1)] {
            let name = format!("{folder}/{i}.png");
            bench.write(&name, b"");
            save_png(&bench.path(&name), image).expect("a PNG");
        }
        pairs.push(pair);
    }
    pairs
}

#[test]
fn a_model_is_measured_and_its_figures_written_three_ways() {
    let bench = Bench::with_photos(7);
    let run = bench.run("eval photos --model model -o figures --batch-size 3 --dtype f32").exits(0);
    let summary = run.summary();
    assert_eq!((&summary["images"], &summary["skipped"]), (&7.into(), &0.into()));
    assert_eq!(summary["protocol"], "native");
    let run = run.says(&[
        "protocol native: 7 images",
        "32x32-squash-bicubic",
        "PSNR, dB",
        "MS-SSIM",
        "7 images are too small",
    ]);
    let run = run.says(&["left out: rFID", "weights/convert_inception.py", "weights/convert_lpips.py"]);
    drop(run);

    let figures = json(&bench, "figures/eval.json");
    assert_eq!(figures["images"], 7);
    assert_eq!(figures["model"]["id"], bench.id("model").as_str());
    assert_eq!((&figures["protocol"]["rounding"], &figures["protocol"]["data_range"]), (&"round".into(), &255.into()));
    // 16 codes of 6 bits for 32×32 pixels.
    assert_eq!(number(&figures["codes"]["bits_per_pixel"]), 96.0 / 1024.0);
    assert!(number(&figures["codes"]["entropy_bits_per_pixel"]) <= 96.0 / 1024.0);
    let images = figures["per_image"].as_array().expect("images");
    let psnr: Vec<f64> = images.iter().map(|image| number(&image["psnr"])).collect();
    assert!(psnr.is_sorted(), "the worst come first: {psnr:?}");
    let mean = psnr.iter().sum::<f64>() / 7.0;
    assert!(
        (mean - number(&summary["psnr"])).abs() < 1e-5
            && (mean - number(&figures["metrics"]["psnr"]["mean"])).abs() < 1e-5
    );
    let reconstructed = bench.run("reconstruct photos --model model -o out --dtype f32").exits(0).summary();
    assert!((number(&reconstructed["psnr"]) - mean).abs() < 1e-3, "reconstruct tells the same PSNR");

    let page = text(&bench, "figures/report.html");
    assert_eq!(page.matches("<tr><td>").count(), 7);
    // All seven among the worst, and seven in the sample, each as three pictures.
    assert_eq!(page.matches("src=\"data:image/jpeg;base64,").count(), 2 * 7 * 3);
    let outside = page.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    assert!(!outside.contains("http") && !outside.contains("url("), "the page needs another one");
    let worst = image::load_from_memory(&bench.bytes("figures/worst.png")).expect("a PNG");
    assert!(worst.width() > 3 * 32 && worst.height() > 32);
    assert!(!bench.path("figures/errors").exists() && !bench.path("figures/errors.jsonl").exists());
}

#[test]
fn batches_and_threads_change_no_figure() {
    let bench = Bench::with_photos(9);
    bench.run("eval photos --model model -o one --batch-size 1 --num-workers 1").exits(0);
    bench.run("eval photos --model model -o all --batch-size 5 --num-workers 3").exits(0);
    assert_eq!(bench.tree("one"), bench.tree("all"));
}

#[test]
fn two_folders_give_what_the_model_gave() {
    let bench = Bench::with_photos(6);
    let psnr = |run: Run| number(&run.exits(0).summary()["psnr"]);
    let reconstructed = psnr(bench.run("reconstruct photos --model model -o out"));
    // `reconstruct` adds .png to the whole name.
    let words = "--resolution 32 --resize-mode squash --error-maps -o figures";
    let folders = psnr(bench.run(&format!("eval --reference photos --images out/reconstructions {words}")));
    assert!((reconstructed - folders).abs() < 1e-3, "{reconstructed}, {folders}");
    let figures = json(&bench, "figures/eval.json");
    assert!(figures["protocol"]["resize"].as_str().expect("words").contains("32x32-squash-bicubic"));
    assert!(figures.get("model").is_none() && figures.get("codes").is_none());
    assert_eq!(bench.tree("figures/errors").len(), 6);
    assert!(bench.path("figures/errors/cats/tom/0002.png.png.png").exists());
}

#[test]
fn figures_of_two_folders_equal_the_references() {
    let bench = Bench::new();
    let pairs = pairs(&bench);
    let [vgg, alex, inception] =
        ["perceptual/vgg16", "perceptual/alex", "metrics/inception"].map(|name| beside(&format!("{name}.safetensors")));
    let (vgg, alex, network) = (vgg.display(), alex.display(), inception.display());
    let words = format!("--lpips-vgg {vgg} --lpips-alex {alex} --inception {network} --worst-by lpips-alex");
    let run = bench.run(&format!("eval --reference a --images b -o figures {words}")).exits(0);
    let figures = json(&bench, "figures/eval.json");
    let reference = read_file(&beside("perceptual/reference.safetensors")).expect("a fixture");
    let images = figures["per_image"].as_array().expect("images");
    for image in images {
        let i: usize = image["path"].as_str().expect("a path")[..1].parse().expect("a number");
        for (key, name) in [("lpips_vgg", "vgg16.distance"), ("lpips_alex", "alex.distance")] {
            let expected = f64::from(reference[name].to_vec1::<f32>().expect("distances")[i]);
            assert!(
                (number(&image[key]) - expected).abs() < 1e-5,
                "{key} of {i}: {}, expected: {expected}",
                image[key]
            );
        }
        assert!((number(&image["psnr"]) - psnr(&pairs[i].0, &pairs[i].1).expect("a PSNR")).abs() < 1e-5);
        assert!((number(&image["ssim"]) - ssim(&pairs[i].0, &pairs[i].1).expect("an SSIM")).abs() < 1e-5);
        assert_eq!(image["ms_ssim"], Value::Null);
    }
    assert!(number(&images[0]["lpips_alex"]) >= number(&images[1]["lpips_alex"]), "the worst come first");

    let network = Inception::open(&inception, &vqrae::Device::Cpu).expect("a network");
    let expected = |input: FidInput| {
        let statistics = |of: fn(&(Rgb, Rgb)) -> &Rgb| {
            let images: Vec<&Rgb> = pairs.iter().map(of).collect();
            let mut statistics = Statistics::new(network.width());
            statistics.add(&network.features(&images, input).expect("features")).expect("statistics");
            statistics
        };
        fid(&statistics(|pair| &pair.0), &statistics(|pair| &pair.1)).expect("a distance")
    };
    let close = |got: &Value, expected: f64| (number(got) - expected).abs() < 1e-6 * expected.max(1.0);
    assert!(close(&figures["rfid"], expected(FidInput::TensorFlow)), "{}", figures["rfid"]);
    assert!(close(&run.summary()["rfid"], expected(FidInput::TensorFlow)));
    run.says(&["rFID", "of 2 images: with fewer images the FID is higher"]);
    let words = format!("{words} --fid-input pytorch");
    let run = bench.run(&format!("eval --reference a --images b -o again {words}")).exits(0);
    assert!(close(&run.summary()["rfid"], expected(FidInput::PyTorch)));
    run.says(&["pytorch-fid"]);
}

#[test]
fn images_without_a_partner_are_named_and_counted() {
    let bench = Bench::new();
    pairs(&bench);
    bench.make_photo("a/only-here.png", 1);
    bench.make_photo("b/cats/only-there.jpg", 2);
    let run = bench.run("eval --reference a --images b -o figures").exits(3);
    assert_eq!((&run.summary()["images"], &run.summary()["skipped"]), (&2.into(), &2.into()));
    run.says(&["a/only-here.png: has no image", "only-there.jpg: has no original"]);
    let errors = text(&bench, "figures/errors.jsonl");
    assert!(errors.contains("only-here.png") && errors.contains("cats/only-there.jpg"), "{errors}");
    bench.run("eval --reference a --images b -o strict --strict").exits(1).says(&["giving up"]);
    bench.run("eval --reference model --images b -o none").exits(1).says(&["no images found under"]);
}

#[test]
fn images_of_unlike_sizes_want_a_protocol() {
    let bench = Bench::with_photos(2);
    pairs(&bench);
    bench.make_photo("b/2.png", 5);
    save_png(&bench.path("a/2.png"), &Rgb { width: 300, height: 280, data: vec![7; 3 * 300 * 280] }).expect("a PNG");
    bench.run("eval --reference a --images b -o figures").exits(3).says(&[
        "b/2.png: is",
        "its original 300x280",
        "--protocol",
    ]);
    let run = bench.run("eval --reference a --images b -o figures --protocol titok").exits(0);
    assert_eq!(run.summary()["images"], 3);
    assert!(number(&run.summary()["ms_ssim"]) > 0.0, "256 pixels are enough");
}

#[test]
fn equal_images_have_no_psnr_to_take_the_mean_of() {
    let bench = Bench::new();
    pairs(&bench);
    let run = bench.run("eval --reference a --images a -o figures").exits(0);
    assert_eq!((&run.summary()["psnr"], &run.summary()["ssim"]), (&Value::Null, &1.0.into()));
    run.says(&["2 equal images left out"]);
    let figures = json(&bench, "figures/eval.json");
    assert_eq!(figures["metrics"]["psnr"]["equal_images"], 2);
    assert!(text(&bench, "figures/report.html").contains("∞"));
}

#[test]
fn presets_say_what_they_do_and_what_is_open() {
    let bench = Bench::with_photos(3);
    bench.run("eval photos --model model -o t --protocol titok").exits(0).says(&[
        "short side to 256",
        "256x256-center-crop-bicubic",
        "for the model",
    ]);
    bench
        .run("eval photos --model model -o r --protocol rae")
        .exits(0)
        .says(&["256x256-adm-crop", "to the level below"]);
    let (titok, rae) = (json(&bench, "t/eval.json"), json(&bench, "r/eval.json"));
    assert_eq!((&titok["protocol"]["name"], &rae["protocol"]["name"]), (&"titok".into(), &"rae".into()));
    assert_eq!(rae["protocol"]["rounding"], "truncate");
    for figures in [&titok, &rae] {
        assert!(figures["protocol"]["fid"].as_str().expect("words").contains("torch-fidelity"));
        assert!(!figures["protocol"]["open"].as_array().expect("open questions").is_empty());
        // 16 codes of 6 bits, but for 256×256 pixels.
        assert_eq!(number(&figures["codes"]["bits_per_pixel"]), 96.0 / 65_536.0);
        assert!(number(&figures["metrics"]["ms_ssim"]["mean"]) > 0.0);
    }
}

#[test]
fn words_that_contradict_each_other_are_refused() {
    let bench = Bench::with_photos(2);
    let refused =
        |words: &str, code: i32, says: &str| drop(bench.run(&format!("eval {words}")).exits(code).says(&[says]));
    refused("photos --model model --protocol titok --resolution 32", 1, "leave out --resolution");
    refused("photos --model model --protocol rae --fid-input pytorch", 1, "leave --fid-input out");
    refused("photos --model model --resolution 32,64", 1, "one --resolution at a time");
    refused("photos --model model --worst-by lpips-vgg", 1, "pass --lpips-vgg FILE");
    refused("--reference photos --images photos --resample bilinear", 1, "one --resolution is wanted");
    refused("--reference photos", 2, "--images");
    refused("photos --reference photos --images photos", 2, "cannot be used with");
    refused("--reference photos --images photos --model model", 2, "cannot be used with");
    refused("", 2, "INPUT");
    refused("photos --model model --inception nowhere.safetensors", 1, "weights/convert_inception.py");
}

#[test]
fn a_file_that_is_no_image_is_skipped_and_the_rest_measured() {
    let bench = Bench::with_photos(4);
    bench.write("photos/broken.png", b"no image at all");
    let run = bench.run("eval photos --model model").exits(3);
    assert_eq!((&run.summary()["images"], &run.summary()["skipped"]), (&4.into(), &1.into()));
    run.says(&["broken.png"]);
    assert!(text(&bench, "eval/errors.jsonl").contains("broken.png"), "the default folder is `eval`");
    bench.run("eval photos/broken.png --model model").exits(1).says(&["not one image could be measured"]);
}
