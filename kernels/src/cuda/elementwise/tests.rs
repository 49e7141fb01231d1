use half::{bf16, f16};

use super::*;
use crate::cuda::reference::{Rounded, assert_near, down, gelu64, up, values};
use crate::cuda::test_gpu;

/// What rounding to T and f32's powers may change of y at x.
fn allowed<T: Rounded>(x: f64, y: f64) -> f64 {
    let of_powers = (8.0 + x * x + x.abs().powi(3)) / f64::from(1 << 22);
    (T::HALF + of_powers) * y.abs() + T::TINY + 1e-12
}

fn every_form<T: Rounded>() {
    let Some(gpu) = test_gpu() else { return };
    for (rows, d) in [(3, 64), (5, 17), (1, 1), (700, 24)] {
        let (x, bias): (Vec<T>, Vec<T>) = (values(d as u64, rows * d, 1.5), values(2, d, 0.5));
        let (scale, residual): (Vec<T>, Vec<T>) = (values(3, d, 1.0), values(4, rows * d, 1.0));
        let [x_up, bias_up, scale_up, residual_up] = [&x, &bias, &scale, &residual].map(|values| up(&gpu, values));
        let what = format!("{:?}, {rows} rows of {d}", T::KIND);
        for (form, with_bias) in [(Gelu::Erf, false), (Gelu::Erf, true), (Gelu::Tanh, false), (Gelu::Tanh, true)] {
            let expected: Vec<_> = (0..rows * d)
                .map(|i| {
                    let x = x[i].wide() + if with_bias { bias[i % d].wide() } else { 0.0 };
                    let y = gelu64(x, form);
                    (y, allowed::<T>(x, y) + f64::from(f32::EPSILON) * x.abs())
                })
                .collect();
            let bias = with_bias.then(|| bias_up.as_view());
            let out = gelu(&gpu, &x_up.as_view(), bias.as_ref(), form).unwrap();
            assert_near(&format!("{what}, {form:?}"), &down(&gpu, &out), &expected);
            let mut own = up(&gpu, &x);
            gelu_in_place(&gpu, &mut own, bias.as_ref(), form).unwrap();
            assert!(down(&gpu, &own) == down(&gpu, &out), "{what}, {form:?} in place");
        }
        for parts in 0..8 {
            let has = |part: usize| parts >> part & 1 == 1;
            let expected: Vec<_> = (0..rows * d)
                .map(|i| {
                    let biased = x[i].wide() + if has(0) { bias[i % d].wide() } else { 0.0 };
                    let scaled = biased * if has(1) { scale[i % d].wide() } else { 1.0 };
                    let base = if has(2) { residual[i].wide() } else { 0.0 };
                    let sizes = (x[i].wide().abs() + 1.0) * (1.0 + scale[i % d].wide().abs()) + base.abs();
                    let y = scaled + base;
                    (y, T::HALF * y.abs() + T::TINY + 4.0 * sizes / f64::from(1 << 24))
                })
                .collect();
            let (bias, scale) = (has(0).then(|| bias_up.as_view()), has(1).then(|| scale_up.as_view()));
            let residual = has(2).then(|| residual_up.as_view());
            let out = add(&gpu, &x_up.as_view(), bias.as_ref(), scale.as_ref(), residual.as_ref()).unwrap();
            assert_near(&format!("{what}, add {parts:03b}"), &down(&gpu, &out), &expected);
        }
        let gated: Vec<T> = values(5, rows * 2 * d, 2.0);
        let expected: Vec<_> = (0..rows * d)
            .map(|i| {
                let (a, b) = (gated[i / d * 2 * d + i % d].wide(), gated[i / d * 2 * d + d + i % d].wide());
                let y = a / (1.0 + (-a).exp()) * b;
                (y, allowed::<T>(a, y))
            })
            .collect();
        let out = gate_silu(&gpu, &up(&gpu, &gated).as_view(), d).unwrap();
        assert_near(&format!("{what}, gate"), &down(&gpu, &out), &expected);
    }
}

#[test]
fn f32_is_near_binary64() {
    every_form::<f32>();
}

#[test]
fn f16_is_as_near_binary64_as_its_roundings_allow() {
    every_form::<f16>();
}

#[test]
fn bf16_is_as_near_binary64_as_its_roundings_allow() {
    every_form::<bf16>();
}

#[test]
fn ends_of_the_range_stay_what_they_are() {
    let Some(gpu) = test_gpu() else { return };
    let x = up(&gpu, &[f32::MAX, 1e20, -1e20, -f32::MAX, 0.0]);
    for form in [Gelu::Erf, Gelu::Tanh] {
        assert_eq!(down(&gpu, &gelu(&gpu, &x.as_view(), None, form).unwrap()), [f32::MAX, 1e20, 0.0, 0.0, 0.0]);
    }
}

#[test]
fn what_does_not_fit_is_refused_with_its_numbers() {
    let Some(gpu) = test_gpu() else { return };
    let (x, bias) = (up(&gpu, &[0.0_f32; 20]), up(&gpu, &[1.0_f32; 8]));
    let (x, bias) = (x.as_view(), bias.as_view());
    assert!(gelu(&gpu, &x, Some(&bias), Gelu::Erf).unwrap_err().to_string().contains("rows of 8, got: 20"));
    assert!(gate_silu(&gpu, &x, 3).unwrap_err().to_string().contains("twice 3, got: 20"));
    assert!(gate_silu(&gpu, &x, 0).is_err() && gate_silu(&gpu, &x, usize::MAX).is_err());
    assert!(add(&gpu, &x, None, None, Some(&bias)).unwrap_err().to_string().contains("Some(8)"));
    assert!(
        add(&gpu, &x.slice(..16), Some(&bias), Some(&bias.slice(..4)), None)
            .unwrap_err()
            .to_string()
            .contains("Some(4)")
    );
    assert!(gelu(&gpu, &x.slice(..0), None, Gelu::Erf).unwrap_err().to_string().contains("Some(0)"));
}
