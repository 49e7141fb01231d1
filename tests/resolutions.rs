//! Images of many sizes: models that keep the aspect ratio, several resolutions at once, and decoders whose patch is not
//! the encoder's.

use vqrae::image::{Limits, Naflex, ResizeMode, open};
use vqrae::metrics;

use super::*;

/// Photos of these (width, height), alike ones apart.
const SHAPES: [(u32, u32); 7] = [(60, 45), (33, 33), (100, 20), (64, 48), (20, 100), (45, 60), (40, 40)];

/// What the processor of the fixture says.
const BUDGET: Naflex = Naflex { patch_size: 8, max_num_patches: 20 };

/// Photos of [`SHAPES`], and a model that `init` makes of a tiny Siglip2Model in the hub's layout.
fn naflex() -> Bench {
    let bench = Bench::new();
    for name in ["config.json", "model.safetensors", "preprocessor_config.json"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/encoders/naflex").join(name);
        bench.write(&format!("siglip2/{name}"), &std::fs::read(path).expect(name));
    }
    let quantizer = serde_json::json!({ "type": "simvq", "codebook_size": 64, "codebook_dim": 8 });
    bench.write("config.json", serde_json::json!({ "quantizer": quantizer }).to_string().as_bytes());
    bench.run("init --encoder siglip2 --config config.json -o naflex").exits(0);
    for (i, (width, height)) in SHAPES.into_iter().enumerate() {
        photo(&bench, &format!("photos/{i}.png"), (width, height));
    }
    bench
}

fn photo(bench: &Bench, name: &str, (width, height): (u32, u32)) {
    bench.write(name, b"");
    let level = |x: u32, y: u32, c: u32| (x * (3 + c) + y * (7 - c) + width) as u8;
    let pixels = image::RgbImage::from_fn(width, height, |x, y| image::Rgb([0, 1, 2].map(|c| level(x, y, c))));
    pixels.save(bench.path(name)).expect("a photo");
}

fn json(run: Run) -> Value {
    serde_json::from_str(&run.exits(0).stdout).expect("JSON")
}

#[test]
fn photos_of_several_aspect_ratios_go_to_codes_of_several_grids_and_back() {
    let bench = naflex();
    let out = "tokenize photos --model naflex --reconstruct --output-format";
    bench.run(&format!("{out} npy -o one --batch-size 1")).exits(0);
    bench.run(&format!("{out} npy -o all --batch-size 5 --num-workers 3 --sheet sheet.png")).exits(0).says(&["7 of 7"]);
    assert!(bench.tree("one") == bench.tree("all"), "batches change the codes or their order");

    let mut grids = std::collections::BTreeSet::new();
    for (i, (width, height)) in SHAPES.into_iter().enumerate() {
        let codes = Codes::read(bench.path(&format!("all/codes/{i}.png.npy"))).expect("codes");
        let (h, w) = BUDGET.size_of(height as usize, width as usize);
        assert_eq!((codes.h, codes.w), (h / 8, w / 8), "{width}x{height}");
        let picture = image::load_from_memory(&bench.bytes(&format!("all/reconstructions/{i}.png.png")));
        let picture = picture.expect("a PNG").into_rgb8();
        assert_eq!(picture.dimensions(), (w as u32, h as u32));
        grids.insert((codes.h, codes.w));
    }
    assert!(grids.len() >= 5, "{grids:?}");

    let run = bench.run("reconstruct photos -o from-images --model naflex --batch-size 4 --sheet again.png").exits(0);
    assert!(run.summary()["psnr"].as_f64().expect("a number") > 0.0);
    bench.run("reconstruct all/codes -o from-codes --model naflex --batch-size 3").exits(0);
    for folder in ["from-images", "from-codes"] {
        assert!(bench.tree(&format!("{folder}/reconstructions")) == bench.tree("all/reconstructions"), "{folder}");
    }
    assert!(bench.bytes("sheet.png") == bench.bytes("again.png"), "reconstruct draws another sheet");

    std::fs::remove_file(bench.path("all/codes/2.png.npy")).expect("removing");
    let summary = bench.run(&format!("{out} npy -o all")).exits(0).summary();
    assert_eq!((&summary["images"], &summary["resumed"]), (&1.into(), &6.into()));
    assert!(bench.tree("one") == bench.tree("all"));
    let facts = json(bench.run("codebook all/codes -o book --model naflex --json"));
    assert_eq!(facts["usage"]["files"], 7);
}

#[test]
fn a_model_of_many_grids_is_trained_on_square_crops() {
    let bench = naflex();
    let config = r#"
        start = { from = "folder", path = "naflex" }
        train = { steps = 2, batch_size = 2, warmup_steps = 1 }
        [groups]
        encoder = { peak = 0.0, end = 0.0 }
        quantizer = { peak = 4e-4, end = 1e-4 }
        decoder = { peak = 4e-4, end = 1e-4 }
    "#;
    bench.write("train.toml", config.as_bytes());
    bench.run("train --config train.toml --data photos --val photos --output-dir run").exits(0);
    assert!(bench.bytes("run/model/preprocessor_config.json") == bench.bytes("naflex/preprocessor_config.json"));
    bench.run("tokenize --output-format safetensors photos -o out --model run/model").exits(0);
    let codes = Codes::read(bench.path("out/codes/2.png.safetensors")).expect("codes");
    assert!(codes.w > 2 * codes.h, "{}x{}", codes.h, codes.w);
}

#[test]
fn a_model_of_many_grids_says_so() {
    let bench = naflex();
    let written: Value = serde_json::from_slice(&bench.bytes("naflex/preprocessor_config.json")).expect("JSON");
    let given: Value = serde_json::from_slice(&bench.bytes("siglip2/preprocessor_config.json")).expect("JSON");
    for (key, value) in given.as_object().expect("an object") {
        assert_eq!(value, &written[key], "{key}");
    }
    let told = json(bench.run("inspect naflex --json"));
    assert_eq!(told["max_num_patches"], 20);
    assert!(told["preprocessing"].as_str().is_some_and(|tag| tag.contains("naflex-20-of-8-bilinear")), "{told}");

    bench.run("features photos -o out --model naflex --batch-size 4").exits(0);
    for (i, (width, height)) in SHAPES.into_iter().enumerate() {
        let (h, w) = BUDGET.size_of(height as usize, width as usize);
        let bytes = bench.bytes(&format!("out/features/{i}.png.safetensors"));
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("a header");
        let record = header.metadata().clone().expect("a record");
        assert_eq!((record["h"].as_str(), record["w"].as_str()), (&*(h / 8).to_string(), &*(w / 8).to_string()));
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
        assert_eq!(file.tensor("features").expect("the tensor").shape(), [h / 8 * (w / 8), 24]);
    }
    let manifest: Value = serde_json::from_slice(&bench.bytes("out/manifest.json")).expect("JSON");
    assert!(manifest.get("grid").is_none() && manifest.get("image_size").is_none(), "{manifest}");

    // A smaller budget, and one size for all after all.
    bench.run("tokenize --output-format safetensors photos/0.png -o small --model naflex --resolution 16x24").exits(0);
    let codes = Codes::read(bench.path("small/codes/0.png.safetensors")).expect("codes");
    let (h, w) = Naflex { max_num_patches: 6, ..BUDGET }.size_of(45, 60);
    assert_eq!((codes.h, codes.w), (h / 8, w / 8));
    bench.run("tokenize --output-format safetensors photos/0.png -o square --model naflex --resize-mode squash --resolution 24").exits(0);
    assert_eq!(Codes::read(bench.path("square/codes/0.png.safetensors")).expect("codes").h, 3);
    // And the other way round: another encoder's images keep their aspect ratio.
    bench.run("tokenize --output-format safetensors photos -o wide --model model --resize-mode naflex").exits(0);
    let codes = Codes::read(bench.path("wide/codes/2.png.safetensors")).expect("codes");
    assert!(codes.w >= 4 * codes.h && codes.h * codes.w <= 16, "{}x{}", codes.h, codes.w);
}

#[test]
fn one_run_makes_codes_at_several_resolutions() {
    let bench = Bench::with_photos(5);
    let several = "tokenize --output-format safetensors photos --model model --resolution 32,64x32 --reconstruct --batch-size 3 -o";
    let summary = bench.run(&format!("{several} out")).exits(0).summary();
    assert_eq!(summary["images"], 5);
    assert_eq!(bench.tree("out/codes").len(), 10);
    let manifest: Value = serde_json::from_slice(&bench.bytes("out/manifest.json")).expect("JSON");
    assert_eq!(manifest["grid"], serde_json::json!([[4, 4], [8, 4]]));
    for (resolution, marked, grid) in [("32", "32x32", (4, 4)), ("64x32", "64x32", (8, 4))] {
        let line = format!(
            "tokenize --output-format safetensors photos --model model -o alone-{resolution} --resolution {resolution}"
        );
        bench.run(&line).exits(0);
        for name in ["0000.png", "cats/0001.jpg"] {
            let alone = bench.bytes(&format!("alone-{resolution}/codes/{name}.safetensors"));
            assert!(alone == bench.bytes(&format!("out/codes/{name}@{marked}.safetensors")), "{name} at {resolution}");
            let codes = Codes::read(bench.path(&format!("out/codes/{name}@{marked}.safetensors"))).expect("codes");
            assert_eq!(((codes.h, codes.w), codes.source.as_str()), (grid, name));
        }
    }

    let expected = bench.tree("out");
    std::fs::remove_file(bench.path("out/codes/cats/0001.jpg@64x32.safetensors")).expect("removing");
    let summary = bench.run(&format!("{several} out")).exits(0).summary();
    assert_eq!((&summary["images"], &summary["resumed"]), (&1.into(), &4.into()));
    assert!(bench.tree("out") == expected);
    bench.run("tokenize --output-format safetensors photos --model model -o out").exits(1).says(&[
        "32x32-squash",
        "64x32-squash",
        "another --output",
    ]);

    bench.run("reconstruct out/codes -o from-codes --model model").exits(0);
    let run = bench.run("reconstruct photos -o from-images --model model --resolution 32,64x32").exits(0);
    for folder in ["from-codes", "from-images"] {
        assert!(bench.tree(&format!("{folder}/reconstructions")) == bench.tree("out/reconstructions"), "{folder}");
    }
    let summary = run.summary();
    let psnr = |key: &str| summary["psnr_by_resolution"][key].as_f64().expect("a number");
    let mean = (psnr("32x32") + psnr("64x32")) / 2.0;
    assert!((summary["psnr"].as_f64().expect("a number") - mean).abs() < 2e-3, "{summary}");
    bench.run("features photos -o features --model model --resolution 32,64x32").exits(0);
    assert_eq!(bench.tree("features/features").len(), 10);
}

#[test]
fn a_size_in_no_whole_patches_is_told_the_nearest_ones() {
    let bench = Bench::with_photos(1);
    bench
        .run("tokenize --output-format safetensors photos -o out --model model --resolution 30x64")
        .exits(1)
        .says(&["images of 30x64 do not suit this model", "24×64, 32×64"]);
    bench.run("features photos -o out --model model --resolution 4").exits(1).says(&["that do: 8×8"]);
    bench
        .run("tokenize --output-format safetensors photos -o out --model model --resolution 32,32x32")
        .exits(1)
        .says(&["32x32 twice"]);
    bench
        .run("tokenize --output-format safetensors photos -o out --model model --resolution 32,big")
        .exits(2)
        .says(&["HxW"]);
    assert!(!bench.path("out").exists());
}

#[test]
fn a_decoder_of_another_patch_is_compared_at_the_size_that_it_paints() {
    let bench = Bench::with_photos(3);
    let mut config: Value = serde_json::from_slice(&bench.bytes("model/config.json")).expect("JSON");
    config["encoder"]["patch_size"] = 14.into();
    config["encoder"]["image_size"] = 28.into();
    config["decoder"]["patch_size"] = 16.into();
    let config = Config::from_json(&config.to_string(), Path::new("config.json")).expect("a config");
    let tensors = fresh_tensors(&config, BTreeMap::new(), 1).expect("tensors");
    let preprocessor = Preprocessor::siglip(28, Resample::Bicubic);
    save(&bench.path("larger"), &config, &preprocessor, &tensors).expect("a model folder");

    for mode in [ResizeMode::Squash, ResizeMode::CenterCrop, ResizeMode::Pad, ResizeMode::Naflex] {
        let out = format!("out-{mode}");
        let line = format!("photos -o {out} --model larger --resize-mode {mode}");
        let summary = bench.run(&format!("reconstruct {line} --sheet {out}/sheet.png")).exits(0).summary();
        let mut preprocessor = Preprocessor { resize_mode: mode, ..preprocessor.clone() };
        preprocessor.naflex = Some(Naflex { patch_size: 14, max_num_patches: 4 });
        let mut sum = 0.0;
        for name in ["0000.png", "cats/0001.jpg", "cats/tom/0002.png"] {
            let picture = open(&bench.path(&format!("{out}/reconstructions/{name}.png")), &Limits::default());
            let picture = picture.expect("a picture");
            let photo = open(&bench.path(&format!("photos/{name}")), &Limits::default()).expect("a photo");
            let seen = preprocessor.prepare(&photo).expect("a view");
            assert_eq!((picture.height, picture.width), (seen.height / 14 * 16, seen.width / 14 * 16), "{mode}");
            let original = preprocessor.prepare_at(&photo, (picture.height, picture.width)).expect("a view");
            sum += metrics::psnr(&original, &picture).expect("one size");
        }
        let told = summary["psnr"].as_f64().expect("a number");
        assert!((told - sum / 3.0).abs() < 1e-3, "{mode}: expected: {}, got: {told}", sum / 3.0);

        let line = format!("photos -o {out}-codes --model larger --resize-mode {mode}");
        bench
            .run(&format!("tokenize --output-format safetensors {line} --reconstruct --sheet {out}/tokens.png"))
            .exits(0);
        assert!(bench.tree(&format!("{out}-codes/reconstructions")) == bench.tree(&format!("{out}/reconstructions")));
        assert!(bench.bytes(&format!("{out}/tokens.png")) == bench.bytes(&format!("{out}/sheet.png")), "{mode}");
    }
}
