//! What the tests of the launchers share: values, their ways to the GPU and back, and how far from binary64 they may be.

use cudarc::driver::{CudaSlice, DeviceRepr};
use half::{bf16, f16};

use super::elementwise::Gelu;
use super::{Gpu, Real};

/// A type's roundings.
pub(super) trait Rounded: Real + std::fmt::Debug + PartialEq {
    /// Half of the last place of 1.
    const HALF: f64;
    /// Half of the least number, rounded up.
    const TINY: f64;
    fn round(x: f64) -> Self;
    fn wide(self) -> f64;
}

impl Rounded for f32 {
    const HALF: f64 = 1.0 / (1_u64 << 24) as f64;
    const TINY: f64 = 1e-39;
    fn round(x: f64) -> Self {
        x as f32
    }
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Rounded for f16 {
    const HALF: f64 = 1.0 / (1_u64 << 11) as f64;
    const TINY: f64 = 1.0 / (1_u64 << 25) as f64;
    fn round(x: f64) -> Self {
        Self::from_f64(x)
    }
    fn wide(self) -> f64 {
        self.to_f64()
    }
}

impl Rounded for bf16 {
    const HALF: f64 = 1.0 / (1_u64 << 8) as f64;
    const TINY: f64 = 1e-39;
    fn round(x: f64) -> Self {
        Self::from_f64(x)
    }
    fn wide(self) -> f64 {
        self.to_f64()
    }
}

/// Numbers of mean zero and about the size of `scale`, the same for the same seed.
pub(super) fn values<T: Rounded>(seed: u64, len: usize, scale: f64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1_u64 << 53) as f64 - 0.5
    };
    (0..len).map(|_| T::round((next() + next() + next()) * 2.0 * scale)).collect()
}

pub(super) fn up<T: DeviceRepr>(gpu: &Gpu, values: &[T]) -> CudaSlice<T> {
    gpu.stream().clone_htod(values).unwrap()
}

pub(super) fn down<T: DeviceRepr>(gpu: &Gpu, values: &CudaSlice<T>) -> Vec<T> {
    let host = gpu.stream().clone_dtoh(values).unwrap();
    gpu.stream().synchronize().unwrap();
    host
}

/// Every value is within its allowance of binary64's; the worst one is named.
pub(super) fn assert_near<T: Rounded>(what: &str, got: &[T], expected: &[(f64, f64)]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let share = |i: usize| {
        let share = (got[i].wide() - expected[i].0).abs() / expected[i].1;
        if share.is_nan() { f64::INFINITY } else { share }
    };
    let worst = (0..got.len()).max_by(|a, b| share(*a).total_cmp(&share(*b))).unwrap();
    let (value, allowed) = expected[worst];
    assert!(
        share(worst) <= 1.0,
        "{what}: value {worst}, expected: {value} within {allowed:e}, got: {:?} ({:.2} of what is allowed)",
        got[worst],
        share(worst)
    );
}

/// The normal distribution by its series, whose terms are all of one sign.
fn normal(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..400 {
        term *= x * x / f64::from(2 * n + 1);
        sum += term;
    }
    0.5 + sum * (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// GELU in binary64.
pub(super) fn gelu64(x: f64, form: Gelu) -> f64 {
    match form {
        Gelu::Erf => x * normal(x),
        Gelu::Tanh => 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh()),
    }
}
