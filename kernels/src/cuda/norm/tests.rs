use half::{bf16, f16};

use super::*;
use crate::cuda::reference::{Rounded, assert_near, down, up, values};
use crate::cuda::test_gpu;

const EPS: f32 = 1e-5;

/// The formula in binary64, and what f32 sums and a rounding to T may change.
fn expected<T: Rounded>(x: &[T], weight: &[T], bias: Option<&[T]>, centre: Centre) -> Vec<(f64, f64)> {
    let d = weight.len();
    let row = |row: &[T]| {
        let mean_of = |f: &dyn Fn(f64) -> f64| row.iter().map(|x| f(x.wide())).sum::<f64>() / d as f64;
        let mean = if centre == Centre::Mean { mean_of(&|x| x) } else { 0.0 };
        let scale = 1.0 / (mean_of(&|x| (x - mean) * (x - mean)) + f64::from(EPS)).sqrt();
        // A lane's sum has d / 32 addends.
        let of_sums = (d as f64 / 32.0 + 16.0) / f64::from(1 << 23);
        let of_mean = of_sums * mean_of(&f64::abs);
        let value = |i: usize| {
            let (x, weight, bias) = (row[i].wide(), weight[i].wide(), bias.map_or(0.0, |bias| bias[i].wide()));
            let normed = (x - mean) * scale * weight;
            let value = normed + bias;
            let allowed =
                T::HALF * value.abs() + of_sums * (normed.abs() + bias.abs()) + of_mean * scale * weight.abs();
            (value, allowed + T::TINY)
        };
        (0..d).map(value).collect::<Vec<_>>()
    };
    x.chunks(d).flat_map(row).collect()
}

fn every_width<T: Rounded>() {
    let Some(gpu) = test_gpu() else { return };
    for (rows, d, offset) in
        [(5, 64, 0.0), (3, 1152, 3.0), (1, 4096, -1.0), (9, 17, 0.0), (2, 1, 0.0), (2, 5000, 0.5), (4, 1001, 0.0)]
    {
        for (centre, with_bias) in
            [(Centre::Mean, true), (Centre::Mean, false), (Centre::Zero, true), (Centre::Zero, false)]
        {
            let x: Vec<T> = values::<T>(d as u64, rows * d, 1.5).iter().map(|x| T::round(x.wide() + offset)).collect();
            let (weight, bias): (Vec<T>, Vec<T>) = (values(2, d, 1.0), values(3, d, 1.0));
            let bias = with_bias.then_some(bias);
            let (weight_up, bias_up) = (up(&gpu, &weight), bias.as_ref().map(|bias| up(&gpu, bias)));
            let norm =
                Norm { centre, weight: weight_up.as_view(), bias: bias_up.as_ref().map(|b| b.as_view()), eps: EPS };
            let what = format!("{:?}, {rows} rows of {d}, {centre:?}, bias {with_bias}", T::KIND);
            let x_up = up(&gpu, &x);
            let out = down(&gpu, &norm.of(&gpu, &x_up.as_view()).unwrap());
            assert_near(&what, &out, &expected(&x, &weight, bias.as_deref(), centre));

            let residual: Vec<T> = values(4, rows * d, 2.0);
            let (sum, out) = norm.of_sum(&gpu, &x_up.as_view(), &up(&gpu, &residual).as_view()).unwrap();
            let sum = down(&gpu, &sum);
            let added = |(a, b): (&T, &T)| T::round(f64::from(a.wide() as f32 + b.wide() as f32));
            assert_eq!(sum, x.iter().zip(&residual).map(added).collect::<Vec<_>>(), "{what}");
            assert_near(&what, &down(&gpu, &out), &expected(&sum, &weight, bias.as_deref(), centre));
        }
    }
}

#[test]
fn f32_is_as_near_binary64_as_its_sums_allow() {
    every_width::<f32>();
}

#[test]
fn f16_is_as_near_binary64_as_its_roundings_allow() {
    every_width::<f16>();
}

#[test]
fn bf16_is_as_near_binary64_as_its_roundings_allow() {
    every_width::<bf16>();
}

#[test]
fn rows_off_a_16_byte_boundary_have_the_values_of_rows_on_one() {
    let Some(gpu) = test_gpu() else { return };
    let (rows, d) = (3, 64);
    let x: Vec<bf16> = values(8, rows * d + 1, 1.0);
    let weight = up(&gpu, &values::<bf16>(9, d, 1.0));
    let norm = Norm { centre: Centre::Mean, weight: weight.as_view(), bias: None, eps: EPS };
    let off = down(&gpu, &norm.of(&gpu, &up(&gpu, &x).slice(1..)).unwrap());
    let on = down(&gpu, &norm.of(&gpu, &up(&gpu, &x[1..]).as_view()).unwrap());
    assert!(off == on);
}

#[test]
fn what_does_not_fit_is_refused_with_its_numbers() {
    let Some(gpu) = test_gpu() else { return };
    let (x, weight) = (up(&gpu, &[0.0_f32; 20]), up(&gpu, &[1.0_f32; 8]));
    let norm = Norm { centre: Centre::Mean, weight: weight.as_view(), bias: None, eps: EPS };
    assert!(norm.of(&gpu, &x.as_view()).unwrap_err().to_string().contains("got: 20"));
    let error = norm.of_sum(&gpu, &x.slice(..16), &x.slice(..8)).unwrap_err().to_string();
    assert!(error.contains("expected: 16, got: 8"), "{error}");
    let norm = Norm { bias: Some(x.slice(..4)), ..norm };
    assert!(norm.of(&gpu, &x.slice(..16)).unwrap_err().to_string().contains("Some(4)"));
    let wide = up(&gpu, &vec![1.0_f32; 30_000]);
    let norm = Norm { centre: Centre::Zero, weight: wide.as_view(), bias: None, eps: EPS };
    assert!(norm.of(&gpu, &wide.as_view()).unwrap_err().to_string().contains("got: 30000"));
}
