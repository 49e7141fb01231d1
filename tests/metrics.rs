//! Measures of reconstructions against skimage, pytorch-msssim, pytorch-fid and torch-fidelity; LPIPS is in `perceptual.rs`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::Value;
use vqrae::image::{Limits, Rgb, open};
use vqrae::metrics::{Statistics, fid, ms_ssim, psnr, ssim};
use vqrae::perceptual::{FidInput, Inception};
use vqrae::weights::{Tensors, read_file, write};
use vqrae::{Device, Tensor};

use crate::compare::{PARITY, assert_close, assert_same_bits, fixture, noise, say};

fn file(name: &str) -> PathBuf {
    fixture(&format!("metrics/{name}"))
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(file(name)).unwrap()).unwrap()
}

fn photo(name: &str) -> Rgb {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/photos").join(name);
    open(&path, &Limits::default()).unwrap()
}

/// What `make.py` calls so: each pixel the mean of itself and its neighbours to the left and above, in steps of levels.
fn coarse(image: &Rgb, step: u64) -> Rgb {
    let at = |y: usize, x: usize, c: usize| u64::from(image.data[3 * (y * image.width + x) + c]);
    let level = |i: usize| {
        let (y, x, c) = (i / 3 / image.width, i / 3 % image.width, i % 3);
        let (up, left) = (y.saturating_sub(1), x.saturating_sub(1));
        let mean = (at(y, x, c) + at(y, left, c) + at(up, x, c) + at(up, left, c) + 2) / 4;
        (mean / step * step + step / 2).min(255) as u8
    };
    Rgb { width: image.width, height: image.height, data: (0..image.data.len()).map(level).collect() }
}

#[test]
fn psnr_and_ssim_equal_skimage_and_ms_ssim_pytorch_msssim() {
    for (name, expected) in json("similarity.json").as_object().unwrap() {
        let a = photo(name);
        let b = coarse(&a, expected["step"].as_u64().unwrap());
        let measured = [("psnr", psnr(&a, &b)), ("ssim", ssim(&a, &b)), ("ms_ssim", ms_ssim(&a, &b))];
        for (metric, value) in measured {
            let (value, expected) = (value.unwrap(), expected[metric].as_f64().unwrap());
            // pytorch-msssim makes its window in f32.
            assert!((value - expected).abs() < 1e-5 * expected, "{metric} of {name}: {value}, expected: {expected}");
        }
        say(&format!("{name}: {measured:?}"));
    }
}

fn statistics(features: &Tensor, portion: usize) -> Statistics {
    let (n, d) = features.dims2().unwrap();
    let mut statistics = Statistics::new(d);
    for first in (0..n).step_by(portion) {
        statistics.add(&features.narrow(0, first, portion.min(n - first)).unwrap()).unwrap();
    }
    statistics
}

#[test]
fn fid_equals_pytorch_fid_and_torch_fidelity_with_many_and_with_few_features() {
    let features = read_file(&file("features.safetensors")).unwrap();
    for (names, expected) in json("fid.json").as_object().unwrap() {
        let (a, b) = names.split_once(' ').unwrap();
        let value = fid(&statistics(&features[a], 32), &statistics(&features[b], 7)).unwrap();
        for (by, expected) in expected.as_object().unwrap() {
            let expected = expected.as_f64().unwrap();
            assert!((value - expected).abs() < 1e-6, "{names}: {value}, {by}: {expected}");
        }
        say(&format!("FID of {names}: {value}, {expected}"));
    }
}

#[test]
fn fid_of_real_widths_takes_seconds() {
    // 300 and 400 of 2,048 numbers: both covariances are singular, as with a small set of photos.
    let d = 2048;
    let (a, b) = (noise("a", &[300, d]), (noise("b", &[400, d]) * 1.1).unwrap());
    let (a, b) = (statistics(&a, 16), statistics(&b, 16));
    let started = Instant::now();
    let few = fid(&a, &b).unwrap();
    let seconds = started.elapsed().as_secs_f64();
    assert!((few - fid(&b, &a).unwrap()).abs() < 1e-6 * few);
    assert!(fid(&a, &a).unwrap().abs() < 1e-3 * few);
    say(&format!("FID of 300 and 400 features of 2,048 numbers: {few:.3} in {seconds:.2} s"));
}

#[test]
fn inception_equals_pytorch_fid_and_its_input_torch_fidelity() {
    let inception = Inception::open(&file("inception.safetensors"), &Device::Cpu).unwrap();
    let reference = read_file(&file("inception_features.safetensors")).unwrap();
    let photos = [photo("chelsea.png"), photo("astronaut.png")];
    let photos: Vec<&Rgb> = photos.iter().collect();
    for (input, name) in [(FidInput::PyTorch, "pytorch"), (FidInput::TensorFlow, "tensorflow")] {
        let features = inception.features(&photos, input).unwrap();
        assert_eq!(features.dims(), [2, inception.width()]);
        let off = assert_close(name, &features, &reference[name], PARITY);
        say(&format!("Inception, {name}'s input: {off:.1e}"));
        let alone = inception.features(&photos[1..], input).unwrap();
        assert_same_bits(name, &alone, &features.narrow(0, 1, 1).unwrap());
    }
}

#[test]
fn wrong_weights_of_inception_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("inception.safetensors");
    let said = |path: &Path| Inception::open(path, &Device::Cpu).unwrap_err().to_string();
    assert!(said(&path).contains("weights/convert_inception.py"), "{}", said(&path));
    let changed = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = read_file(&file("inception.safetensors")).unwrap();
        change(&mut tensors);
        write(&path, &tensors, Default::default()).unwrap();
        Inception::open(&path, &Device::Cpu).map(|_| ()).map_err(|error| error.to_string())
    };
    let name = "Mixed_6c.branch7x7_2.conv.weight";
    let missing = changed(&|tensors| drop(tensors.remove(name))).unwrap_err();
    assert!(missing.contains("inception.safetensors") && missing.contains(name), "{missing}");
    let misshapen = changed(&|tensors| drop(tensors.insert(name.into(), noise("w", &[3, 2, 7, 7])))).unwrap_err();
    assert!(misshapen.contains("[3, 2, 7, 7]") && misshapen.contains(name), "{misshapen}");
    let extra = changed(&|tensors| drop(tensors.insert("AuxLogits.x".into(), noise("w", &[2])))).unwrap_err();
    assert!(extra.contains("`AuxLogits.x`"), "{extra}");
    // What pytorch-fid's own file holds beside the features is no error.
    let whole = changed(&|tensors| {
        tensors.insert("fc.weight".into(), noise("w", &[5, 14]));
        tensors.insert("Conv2d_1a_3x3.bn.num_batches_tracked".into(), noise("n", &[1]));
    });
    assert_eq!(whole, Ok(()));
}
