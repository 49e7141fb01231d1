use half::{bf16, f16};

use super::*;
use crate::cuda::reference::{Rounded, assert_near, down, gelu64, up, values};
use crate::cuda::test_gpu;

fn every_end<T: Rounded>() {
    let Some(gpu) = test_gpu() else { return };
    for (rows, inputs, outputs) in [(5, 64, 48), (1, 8, 8), (33, 72, 40), (7, 5, 3)] {
        let shape = Shape { rows, inputs, outputs };
        let x: Vec<T> = values(1, rows * inputs, 1.0);
        let weight: Vec<T> = values(2, outputs * inputs, 1.0 / (inputs as f64).sqrt());
        let (bias, residual): (Vec<T>, Vec<T>) = (values(3, outputs, 1.0), values(4, rows * outputs, 1.0));
        let [x_up, weight_up, bias_up, residual_up] = [&x, &weight, &bias, &residual].map(|values| up(&gpu, values));
        let residual_view = residual_up.as_view();
        for case in 0..12 {
            let (ending, with_bias, fused) = (case / 4, case & 1 == 1, case & 2 == 2);
            let expected: Vec<_> = (0..rows * outputs)
                .map(|i| {
                    let (row, column) =
                        (&x[i / outputs * inputs..][..inputs], &weight[i % outputs * inputs..][..inputs]);
                    let products = || row.iter().zip(column).map(|(x, w)| x.wide() * w.wide());
                    let (sum, sizes): (f64, f64) = (products().sum(), products().map(f64::abs).sum());
                    let biased = sum + if with_bias { bias[i % outputs].wide() } else { 0.0 };
                    let y = match ending {
                        0 => biased,
                        1 => gelu64(biased, Gelu::Tanh),
                        _ => biased + residual[i].wide(),
                    };
                    // Where our kernel follows, the product is rounded before it; GELU's slope is at most 1.13.
                    let between = if fused { 0.0 } else { 1.13 * T::HALF * sum.abs() };
                    let of_sums = (inputs as f64 + 32.0) / f64::from(1 << 22) * (sizes + 4.0);
                    (y, T::HALF * y.abs() + between + 1.13 * of_sums + 2.0 * T::TINY)
                })
                .collect();
            let bias = with_bias.then(|| bias_up.as_view());
            let end = match ending {
                0 => End::Plain,
                1 => End::Gelu,
                _ => End::Residual(&residual_view),
            };
            let what = format!("{:?}, {shape:?}, {end:?}, bias {with_bias}, fused {fused}", T::KIND);
            let (x, weight) = (x_up.as_view(), weight_up.as_view());
            let out = linear_by(&gpu, &x, &weight, bias.as_ref(), shape, end, fused).unwrap();
            assert_near(&what, &down(&gpu, &out), &expected);
        }
    }
}

#[test]
fn f32_is_as_near_binary64_as_its_sums_allow() {
    every_end::<f32>();
}

#[test]
fn f16_is_as_near_binary64_as_its_roundings_allow() {
    every_end::<f16>();
}

#[test]
fn bf16_is_as_near_binary64_as_its_roundings_allow() {
    every_end::<bf16>();
}

#[test]
fn a_product_is_planned_once_and_its_bias_may_lie_elsewhere_each_time() {
    let Some(gpu) = test_gpu() else { return };
    let shape = Shape { rows: 2, inputs: 24, outputs: 8 };
    let (x, weight) = (up(&gpu, &[0.0_f32; 48]), up(&gpu, &[0.0_f32; 192]));
    let planned = || gpu.products().unwrap().plans.lock().unwrap().keys().filter(|key| key.shape == shape).count();
    for value in [1.0_f32, 2.0, 3.0] {
        let bias = up(&gpu, &[value; 8]);
        let out = linear(&gpu, &x.as_view(), &weight.as_view(), Some(&bias.as_view()), shape, End::Plain).unwrap();
        assert_eq!(down(&gpu, &out), [value; 16]);
        assert_eq!(planned(), 1);
    }
    linear(&gpu, &x.as_view(), &weight.as_view(), None, shape, End::Plain).unwrap();
    assert_eq!(planned(), 2);
}

#[test]
fn what_does_not_fit_is_refused_with_its_numbers() {
    let Some(gpu) = test_gpu() else { return };
    let array = up(&gpu, &[0.0_f32; 64]);
    let (all, short) = (array.as_view(), array.slice(..7));
    let shape = Shape { rows: 8, inputs: 8, outputs: 8 };
    let message = |x, weight, bias, shape, end| linear(&gpu, x, weight, bias, shape, end).unwrap_err().to_string();
    assert!(
        message(&short, &all, None, shape, End::Plain)
            .contains("values of x, expected: 8 · 8, at least 1, got: Some(7)")
    );
    assert!(message(&all, &short, None, shape, End::Plain).contains("values of weight"));
    assert!(message(&all, &all, Some(&short), shape, End::Gelu).contains("values of bias"));
    assert!(message(&all, &all, None, shape, End::Residual(&short)).contains("values of residual"));
    let huge = Shape { rows: usize::MAX, inputs: 8, outputs: 8 };
    assert!(message(&all, &all, None, huge, End::Plain).contains("values of x"));
    let none = array.slice(..0);
    assert!(message(&none, &all, None, Shape { rows: 0, ..shape }, End::Plain).contains("0 · 8"));
}
