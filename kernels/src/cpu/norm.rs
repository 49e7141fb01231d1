//! Layer normalisation (Ba et al., arXiv 1607.06450).

use rayon::prelude::*;

use super::{Element, Matrix};
use crate::vector::moments;
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

vectorised! {
    fn norm_row[T: Element](out: &mut [T], x: &[f32], weight: &[f32], bias: &[f32], eps: f32) {
        let (mean, scale) = moments(x, eps);
        for (((out, &x), &weight), &bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *out = T::narrow((x - mean) * scale * weight + bias);
        }
    }
}
