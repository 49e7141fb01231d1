//! `generate`: a generator of the tiny model's codes, trained for a few steps, draws images; what does not fit is refused by name.

use vqrae::ops::Precision;
use vqrae::{DType, Device, Vqrae};
use vqrae_generators::data::Sequences;
use vqrae_generators::train::{self, Recipe};
use vqrae_generators::{Config as Generator, Kind};

use super::*;

/// A bench with codes of photos of two classes, and a generator of each kind.
fn bench() -> Bench {
    let bench = Bench::new();
    for i in 0..12 {
        bench.make_photo(&format!("photos/{}/{i:04}.png", ["boots", "hats"][i % 2]), i);
    }
    let run = bench.run("tokenize photos --labels folders --model model --dtype f32 -o codes");
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let [sequences, apart] = Sequences::read(bench.path("codes"), 3).expect("codes");
    assert_eq!(sequences.classes, ["boots", "hats"]);
    let tokenizer = Vqrae::from_pretrained(bench.path("model"), &Device::Cpu, DType::F32).expect("the model");
    let codebook = tokenizer.codebook().expect("a codebook");
    for (name, kind) in [("masked", Kind::Masked), ("by-rows", Kind::Autoregressive)] {
        let small = Generator::small(kind, sequences.tokenizer.clone(), sequences.classes.clone());
        let config = Generator { width: 16, depth: 2, heads: 2, mlp_width: 32, code_width: 4, ..small };
        let recipe = Recipe { steps: 6, batch: 4, every: 6, precision: Precision::F32, ..Recipe::default() };
        let folder = bench.path(name);
        train::run(&folder, &config, &recipe, &codebook, [&sequences, &apart], |_| ()).expect("a training");
    }
    bench
}

#[test]
fn images_follow_from_seed_and_number_whatever_the_batch_and_a_stopped_run_goes_on() {
    let bench = bench();
    for generator in ["masked", "by-rows"] {
        let words = format!("generate {generator} --model model --dtype f32 -n 7 --seed 3 --guidance 1.5 --steps 4");
        let run = bench.run(&format!("{words} -o {generator}-whole --save-codes"));
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert_eq!(run.summary()["images"], 7);
        let image = |out: &str, number: usize| {
            let class = ["boots", "hats"][number % 2];
            bench.bytes(&format!("{generator}-{out}/images/{class}/{number:05}.png"))
        };
        assert!(bench.path(&format!("{generator}-whole/sheet.png")).exists());

        let run = bench.run(&format!("{words} -o {generator}-one --batch-size 1"));
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert!((0..7).all(|i| image("whole", i) == image("one", i)), "{generator}: batches change images");
        assert!((1..7).any(|i| image("whole", i) != image("whole", 0)), "{generator}: all images are alike");

        // What a stopped run lacks is drawn, the rest is kept.
        let lost = bench.path(&format!("{generator}-one/images/boots/00004.png"));
        std::fs::remove_file(&lost).expect("an image");
        let run = bench.run(&format!("{words} -o {generator}-one"));
        assert_eq!((run.summary()["images"].as_u64(), run.summary()["resumed"].as_u64()), (Some(1), Some(6)));
        assert_eq!(image("one", 4), image("whole", 4));

        let run = bench.run(&format!("generate {generator} --model model -o {generator}-one --seed 4 --dtype f32"));
        assert_eq!(run.code, Some(1));
        assert!(run.stderr.contains("other settings") && run.stderr.contains("seed"), "{}", run.stderr);

        // The codes are as those of tokenize: the model that they are for paints the same images of them.
        let run =
            bench.run(&format!("reconstruct {generator}-whole/codes -o {generator}-again --model model --dtype f32"));
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        let again = bench.bytes(&format!("{generator}-again/reconstructions/hats/00001.png"));
        assert_eq!(again, image("whole", 1), "{generator}: codes are not those of the image");
    }
}

#[test]
fn inspect_says_what_a_generator_is() {
    let run = bench().run("inspect by-rows --json");
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let facts: Value = serde_json::from_str(&run.stdout).expect("JSON");
    assert_eq!((&facts["kind"], &facts["classes"]), (&"autoregressive".into(), &serde_json::json!(["boots", "hats"])));
    assert!(facts["parameters"].as_u64() > Some(64), "{facts}");
}

#[test]
fn inpainting_keeps_the_codes_outside_the_mask() {
    let bench = bench();
    let mut mask = Rgb { width: SIDE, height: SIDE, data: vec![0; 3 * SIDE * SIDE] };
    // One pixel of the patch in the second row and third column.
    mask.data[3 * (9 * SIDE + 20)] = 255;
    save_png(&bench.path("mask.png"), &mask).expect("a mask");
    bench.make_photo("photo.png", 99);
    let photo = vqrae::image::open(&bench.path("photo.png"), &Default::default()).expect("the photo");
    let photo = Preprocessor::siglip(SIDE, Resample::Bicubic).prepare(&photo).expect("its square");
    save_png(&bench.path("photo.png"), &photo).expect("a photo");
    let run = bench.run("tokenize photo.png -o own --model model --dtype f32 --output-format safetensors");
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let own = Codes::read(bench.path("own/codes/photo.png.safetensors")).expect("codes").indices;
    let mut changed = 0;
    for generator in ["masked", "by-rows"] {
        let words =
            format!("generate {generator} --model model --dtype f32 -n 8 --class hats --image photo.png --save-codes");
        let run = bench.run(&format!("{words} --mask mask.png -o {generator}-out"));
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        for i in 0..8 {
            let path = bench.path(&format!("{generator}-out/codes/hats/{i:05}.safetensors"));
            let codes = Codes::read(path).expect("codes").indices;
            let differ: Vec<usize> = (0..16).filter(|&place| codes[place] != own[place]).collect();
            assert!(differ.iter().all(|&place| place == 6), "{generator}: {differ:?} differ");
            changed += differ.len();
        }
        for (mask, wanted) in [
            (
                Rgb { width: SIDE, height: SIDE - 1, data: vec![255; 3 * SIDE * (SIDE - 1)] },
                "the mask is 32×31, but photo.png is 32×32",
            ),
            (Rgb { width: SIDE, height: SIDE, data: vec![0; 3 * SIDE * SIDE] }, "no pixel of the mask is white"),
        ] {
            save_png(&bench.path("wrong.png"), &mask).expect("a mask");
            let run = bench.run(&format!("{words} --mask wrong.png -o {generator}-wrong"));
            assert_eq!(run.code, Some(1));
            assert!(run.stderr.contains(wanted), "{}", run.stderr);
            assert!(!bench.path(&format!("{generator}-wrong")).exists(), "nothing was drawn");
        }
    }
    assert!(changed > 0, "nothing was drawn anew");
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let bench = bench();
    bench.make_model("other", 2);
    let whole = bench.bytes("masked/model.safetensors");
    std::fs::create_dir_all(bench.path("cut")).expect("a folder");
    bench.write("cut/config.json", &bench.bytes("masked/config.json"));
    bench.write("cut/model.safetensors", &whole[..whole.len() - 9]);
    std::fs::create_dir_all(bench.path("empty")).expect("a folder");
    for (words, code, wanted) in [
        ("masked --model other", 1, "but the one at hand is"),
        ("masked", 1, "name that model with --model"),
        ("masked --model model --class boots,gloves", 1, "there is no class `gloves`; there are: 0 boots, 1 hats"),
        ("masked --model model --class 2", 1, "there is no class `2`"),
        ("cut --model model", 1, "cut/model.safetensors: not a whole safetensors file"),
        ("empty --model model", 1, "empty/config.json"),
        ("nowhere --model model", 1, "nowhere/config.json"),
        ("model --model model", 1, "model_type is `vqrae`, expected: `vqrae-generator`"),
        ("masked --model model --temperature=-1", 1, "temperature is -1"),
        ("masked --model model --top-p 0", 1, "top-p is 0"),
        ("masked --model model --noise NaN", 1, "noise is NaN"),
        ("masked --model model --count 0", 2, "--count"),
        ("masked --model model --image photos/hats/0001.png", 2, "--mask"),
        ("masked --model model --image nowhere.png --mask nowhere.png", 1, "nowhere.png"),
    ] {
        let run = bench.run(&format!("generate {words} -o out"));
        assert_eq!(run.code, Some(code), "{words}: {}", run.stderr);
        assert!(run.stderr.contains(wanted), "{words}: {}", run.stderr);
    }
}
