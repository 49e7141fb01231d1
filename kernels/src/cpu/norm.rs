//! Layer normalisation (Ba et al., arXiv 1607.06450) and root-mean-square normalisation (Zhang & Sennrich, arXiv 1910.07467).

use rayon::prelude::*;

use super::{Element, Matrix};
use crate::vector::{moments, sum};
use crate::vectorised;

/// Rows of a piece of work.
const ROWS: usize = 64;

/// `(x − mean) / √(variance + ε) · weight + bias` of every row.
///
/// # Shapes
/// - x and out: `[N, D]`
/// - weight, bias: `[D]`
///
/// # Panics
/// When the shapes do not fit: a bug in the caller, not in the input.
pub fn layer_norm<T: Element>(x: &Matrix<f32>, weight: &[f32], bias: &[f32], eps: f32, out: &mut Matrix<T>) {
    let (n, d) = (x.rows(), x.columns());
    assert_eq!(
        (out.rows(), out.columns(), weight.len(), bias.len()),
        (n, d, d, d),
        "layer_norm: the shapes do not fit"
    );
    let (x_stride, stride) = (x.stride(), out.stride());
    let pieces = out.padded_mut().par_chunks_mut(ROWS * stride).zip(x.padded().par_chunks(ROWS * x_stride));
    pieces.for_each(|(out, x)| {
        for (out, x) in out.chunks_exact_mut(stride).zip(x.chunks_exact(x_stride)) {
            norm_row(&mut out[..d], &x[..d], weight, bias, eps);
        }
    });
}

/// `x / √(mean x² + ε) · weight` of every row.
///
/// # Shapes
/// - x and out: `[N, D]`
/// - weight: `[D]`
///
/// # Panics
/// When the shapes do not fit: a bug in the caller, not in the input.
pub fn rms_norm<T: Element>(x: &Matrix<f32>, weight: &[f32], eps: f32, out: &mut Matrix<T>) {
    let (n, d) = (x.rows(), x.columns());
    assert_eq!((out.rows(), out.columns(), weight.len()), (n, d, d), "rms_norm: the shapes do not fit");
    let (x_stride, stride) = (x.stride(), out.stride());
    let pieces = out.padded_mut().par_chunks_mut(ROWS * stride).zip(x.padded().par_chunks(ROWS * x_stride));
    pieces.for_each(|(out, x)| {
        for (out, x) in out.chunks_exact_mut(stride).zip(x.chunks_exact(x_stride)) {
            rms_norm_row(&mut out[..d], &x[..d], weight, eps);
        }
    });
}

/// [`rms_norm`] of the columns `first .. first + D` of every row, in place.
///
/// # Shapes
/// - x: `[N, ≥ first + D]`
/// - weight: `[D]`
///
/// # Panics
/// As [`rms_norm`].
pub fn rms_norm_columns<T: Element>(x: &mut Matrix<T>, first: usize, weight: &[f32], eps: f32) {
    assert!(first + weight.len() <= x.columns(), "rms_norm_columns: the shapes do not fit");
    let stride = x.stride();
    x.padded_mut().par_chunks_mut(ROWS * stride).for_each_init(
        || vec![0f32; weight.len()],
        |wide, rows| {
            for row in rows.chunks_exact_mut(stride) {
                let row = &mut row[first..first + weight.len()];
                wide.iter_mut().zip(row.iter()).for_each(|(wide, x)| *wide = x.widen());
                rms_norm_row(row, wide, weight, eps);
            }
        },
    );
}

vectorised! {
    fn norm_row[T: Element](out: &mut [T], x: &[f32], weight: &[f32], bias: &[f32], eps: f32) {
        let (mean, scale) = moments(x, eps);
        for (((out, &x), &weight), &bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *out = T::narrow((x - mean) * scale * weight + bias);
        }
    }

    fn rms_norm_row[T: Element](out: &mut [T], x: &[f32], weight: &[f32], eps: f32) {
        let scale = 1.0 / (sum(x, x, |x, _| x * x) / x.len() as f32 + eps).sqrt();
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = T::narrow(x * scale * weight);
        }
    }
}
