//! Loops over f32 that the compiler turns into the vector instructions of the processor at hand.
//!
//! No fused multiply-add and a fixed number of partial sums: the result is the same bit for bit whatever the instructions.

/// How wide the vectors of this processor are.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    Baseline,
    Avx2,
    Avx512,
}

/// The widest vectors of this processor.
#[doc(hidden)]
#[inline]
pub fn width() -> Width {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            return Width::Avx512;
        }
        if is_x86_feature_detected!("avx2") {
            return Width::Avx2;
        }
    }
    Width::Baseline
}

/// Defines functions whose loops are compiled for the widest vectors of the processor at hand, chosen at every call.
///
/// Type parameters stand in brackets. What the body calls must be `#[inline(always)]`, or it is compiled for the baseline.
///
/// ```
/// vqrae_kernels::vectorised! {
///     /// Doubles every element.
///     fn double(x: &mut [f32]) {
///         x.iter_mut().for_each(|x| *x *= 2.0);
///     }
/// }
/// let mut x = [1.0, 2.0];
/// double(&mut x);
/// assert_eq!(x, [2.0, 4.0]);
/// ```
#[macro_export]
macro_rules! vectorised {
    ($(
        $(#[$meta:meta])*
        $visibility:vis fn $name:ident $([$($generics:tt)*])? ($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? $body:block
    )*) => {$(
        $(#[$meta])*
        $visibility fn $name $(<$($generics)*>)? ($($arg: $type),*) $(-> $out)? {
            #[inline(always)]
            fn body $(<$($generics)*>)? ($($arg: $type),*) $(-> $out)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512 $(<$($generics)*>)? ($($arg: $type),*) $(-> $out)? {
                body($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2 $(<$($generics)*>)? ($($arg: $type),*) $(-> $out)? {
                body($($arg),*)
            }
            match $crate::vector::width() {
                // SAFETY: `width` answers so only where it detected these instructions.
                #[cfg(target_arch = "x86_64")]
                $crate::vector::Width::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::vector::Width::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    )*};
}

/// Partial sums that run side by side.
const LANES: usize = 16;

/// Σ f(i, xᵢ), in [`LANES`] partial sums.
#[inline(always)]
pub fn sum(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    let (y_chunks, y_rest) = y.as_chunks::<LANES>();
    for (a, b) in x_chunks.iter().zip(y_chunks) {
        for l in 0..LANES {
            lanes[l] += f(a[l], b[l]);
        }
    }
    let rest: f32 = x_rest.iter().zip(y_rest).map(|(&a, &b)| f(a, b)).sum();
    lanes.iter().sum::<f32>() + rest
}

/// The largest element.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for a in chunks {
        for l in 0..LANES {
            lanes[l] = if a[l] > lanes[l] { a[l] } else { lanes[l] };
        }
    }
    rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
}

/// 2ˣ to 2 ulp on [−126, 126], clamped outside: x less its nearest integer goes through a polynomial, the integer is added
/// to the exponent. The coefficients minimise the largest relative error with the first one held at 1.
#[inline(always)]
pub fn exp2(x: f32) -> f32 {
    /// 1.5·2²³: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    #[expect(clippy::approx_constant, reason = "fitted, and not quite ln 2")]
    const COEFFICIENTS: [f32; 5] = [0.693_147, 0.240_222_42, 0.055_507_336, 0.009_671_513, 0.001_326_472_6];
    let x = x.clamp(-126.0, 126.0);
    let shifted = x + ROUND;
    let r = x - (shifted - ROUND);
    let [c1, c2, c3, c4, c5] = COEFFICIENTS;
    let p = ((((c5 * r + c4) * r + c3) * r + c2) * r + c1) * r + 1.0;
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// eˣ, relative error at most 2 ulp and |x| · 2⁻²³.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    exp2(x * std::f32::consts::LOG2_E)
}

/// 1 / (1 + e⁻ˣ).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// 2 √(2/π): the tanh form of GELU (`gelu_pytorch_tanh`) is `x · sigmoid(2 √(2/π) (x + 0.044715 x³))`.
pub const GELU_LINEAR: f32 = 1.595_769_2;
/// 0.044715, as above.
pub const GELU_CUBIC: f32 = 0.044_715;

/// GELU in the tanh form.
#[inline(always)]
pub fn gelu(x: f32) -> f32 {
    const LINEAR: f32 = -GELU_LINEAR * std::f32::consts::LOG2_E;
    const CUBIC: f32 = LINEAR * GELU_CUBIC;
    x / (1.0 + exp2(x * (x * x * CUBIC + LINEAR)))
}

/// GELU as it is, `x/2 · (1 + erf(x/√2))`, to 2e-7·|x|: Abramowitz and Stegun's formula 7.1.26.
#[inline(always)]
pub fn gelu_erf(x: f32) -> f32 {
    0.5 * x * normal(x).0
}

/// The derivative of [`gelu_erf`]: `Φ(x) + x φ(x)`.
#[inline(always)]
pub fn gelu_erf_gradient(x: f32) -> f32 {
    const DENSITY: f32 = 0.398_942_3; // 1/√(2π)
    let (twice_below, exp) = normal(x);
    0.5 * twice_below + x * exp * DENSITY
}

/// Of the normal distribution: 2 Φ(x), and exp(−x²/2).
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    const P: f32 = 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2;
    const A: [f32; 5] = [0.254_829_6, -0.284_496_74, 1.421_413_7, -1.453_152, 1.061_405_4];
    let size = x.abs();
    let t = 1.0 / (1.0 + P * size);
    let p = ((((A[4] * t + A[3]) * t + A[2]) * t + A[1]) * t + A[0]) * t;
    let exp = exp2(x * x * (-0.5 * std::f32::consts::LOG2_E));
    // 1 − erf(|x|/√2)
    let rest = p * exp;
    (if x < 0.0 { rest } else { 2.0 - rest }, exp)
}

/// Mean and 1/√(variance + ε), variance biased, of a row.
#[inline(always)]
pub fn moments(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum(x, x, |x, _| x) / n;
    let variance = sum(x, x, |x, _| (x - mean) * (x - mean)) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_as_near_as_they_say() {
        for i in -1_260_000..=1_260_000 {
            let x = i as f32 * 1e-4;
            let (ours, real) = (exp2(x), (x as f64).exp2());
            assert!(((ours as f64 - real) / real).abs() < 2.4e-7, "2^{x} = {ours}, not {real}");
        }
        for i in -870_000..=870_000 {
            let x = i as f32 * 1e-4;
            let (ours, real) = (exp(x), (x as f64).exp());
            let bound = 2.4e-7 + f64::from(x.abs()) * 2f64.powi(-23);
            assert!(((ours as f64 - real) / real).abs() < bound, "exp({x}) = {ours}, not {real}");
        }
        assert_eq!((exp2(f32::NEG_INFINITY), exp2(0.0), exp2(3.0)), (2f32.powi(-126), 1.0, 8.0));
    }

    #[test]
    fn gelu_is_near_the_real_one() {
        for i in -200_000..=200_000 {
            let x = f64::from(i) * 1e-4;
            let real = x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
            let ours = f64::from(gelu(x as f32));
            assert!((ours - real).abs() < 3e-7 * x.abs().max(1.0), "gelu({x}) = {ours}, not {real}");
        }
    }

    #[test]
    fn gelu_erf_is_near_the_real_one() {
        // By the error function's own integral, summed in small steps.
        let (mut erf, step) = (0f64, 1e-4);
        for i in 0..100_000 {
            let (x, middle) = (f64::from(i) * step, (f64::from(i) + 0.5) * step);
            for (x, sign) in [(x, 1.0), (-x, -1.0)] {
                let real = x / 2.0 * (1.0 + sign * erf);
                let ours = f64::from(gelu_erf(x as f32));
                assert!((ours - real).abs() < 3e-7 * x.abs().max(1.0), "gelu({x}) = {ours}, not {real}");
            }
            erf += (2.0 / std::f64::consts::PI).sqrt() * (-middle * middle / 2.0).exp() * step;
        }
    }

    #[test]
    fn sums_and_maxima_include_the_tail() {
        let x: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(sum(&x, &x, |a, _| a), 666.0);
        assert_eq!(max(&x), 36.0);
    }
}
