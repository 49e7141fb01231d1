//! What the tests share: fixtures, and how close is close enough.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use vqrae::weights::{Fresh, Tensors, read_file};
use vqrae::{DType, Device, Tensor};

/// What an element may be off by: `relative` × the reference's largest magnitude + `absolute`.
#[derive(Clone, Copy)]
pub(crate) struct Tolerance {
    pub(crate) relative: f64,
    pub(crate) absolute: f64,
}

/// Parity with another implementation in f32.
pub(crate) const PARITY: Tolerance = Tolerance { relative: 1e-4, absolute: 0.0 };

/// Panics with the worst element when one is further off than allowed; returns the worst difference over the
/// reference's largest magnitude.
#[track_caller]
pub(crate) fn assert_close(what: &str, got: &Tensor, expected: &Tensor, tolerance: Tolerance) -> f64 {
    assert_eq!(got.dims(), expected.dims(), "{what}: shape");
    let (got, expected) = (values(got), values(expected));
    let largest = expected.iter().fold(0f64, |largest, x| largest.max(x.abs()));
    let allowed = tolerance.relative * largest + tolerance.absolute;
    let off = |i: usize| {
        let difference = (got[i] - expected[i]).abs();
        if difference.is_nan() { f64::INFINITY } else { difference }
    };
    let Some(worst) = (0..got.len()).max_by(|&i, &j| off(i).total_cmp(&off(j))) else {
        return 0.0;
    };
    assert!(
        off(worst) <= allowed,
        "{what}: {} of {} elements are off; worst: element {worst}, expected: {:e}, got: {:e}, which is {:.1} times the \
         allowed {allowed:e}",
        (0..got.len()).filter(|&i| off(i) > allowed).count(),
        got.len(),
        expected[worst],
        got[worst],
        off(worst) / allowed,
    );
    if largest > 0.0 { off(worst) / largest } else { 0.0 }
}

/// Panics with the first element whose bits differ.
#[track_caller]
pub(crate) fn assert_same_bits(what: &str, got: &Tensor, expected: &Tensor) {
    assert_eq!(got.dims(), expected.dims(), "{what}: shape");
    assert_eq!(got.dtype(), expected.dtype(), "{what}: dtype");
    let (got, expected) = (values(got), values(expected));
    let differ = |i: &usize| got[*i].to_bits() != expected[*i].to_bits();
    let count = (0..got.len()).filter(differ).count();
    if let Some(i) = (0..got.len()).find(differ) {
        panic!(
            "{what}: the bits of {count} of {} elements differ; first: element {i}, expected: {:e}, got: {:e}",
            got.len(),
            expected[i],
            got[i]
        );
    }
}

fn values(x: &Tensor) -> Vec<f64> {
    x.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// A file or folder beside the script that made it.
pub(crate) fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// The tensors of a fixture that stand below `case.`, by the rest of their names.
pub(crate) fn tensors_of(path: &Path, case: &str) -> HashMap<String, Tensor> {
    let all = read_file(path).unwrap_or_else(|error| panic!("{error}"));
    let below =
        |(name, tensor): (String, Tensor)| Some((name.strip_prefix(case)?.strip_prefix('.')?.to_string(), tensor));
    all.into_iter().filter_map(below).collect()
}

/// Normally distributed numbers, the same for a name and shape on every run.
pub(crate) fn noise(name: &str, shape: &[usize]) -> Tensor {
    const SEED: u64 = 0;
    let normal = candle_nn::Init::Randn { mean: 0.0, stdev: 1.0 };
    let made = Fresh::new(SEED, Tensors::new()).make(|vb| vb.get_with_hints(shape, name, normal)).unwrap();
    made[name].clone()
}

/// Tells the one who runs the tests something; cargo shows it with `--nocapture`.
#[expect(clippy::print_stdout, reason = "libtest captures it")]
pub(crate) fn say(line: &str) {
    println!("{line}");
}

#[test]
#[should_panic(expected = "worst: element 1, expected: 2e0, got: NaN")]
fn a_nan_is_never_close() {
    let tensor = |x: f32| Tensor::new(&[4., x], &Device::Cpu).unwrap();
    assert_close("x", &tensor(f32::NAN), &tensor(2.), PARITY);
}

#[test]
#[should_panic(expected = "1 of 2 elements are off; worst: element 1, expected: 2e0, got: 2.5e0, which is 2.5 times")]
fn the_worst_element_is_named_with_the_share_of_its_allowance() {
    let tensor = |x: f32| Tensor::new(&[4., x], &Device::Cpu).unwrap();
    assert_close("x", &tensor(2.5), &tensor(2.), Tolerance { relative: 0.025, absolute: 0.1 });
}
