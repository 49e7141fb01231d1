//! `x wᵀ + b`, and what follows it while the sums are at hand.

use rayon::prelude::*;

use super::pieces::{self, Shared};
use super::product::{PANEL, Packed};
use super::{Element, Matrix};
use crate::vector::{gelu, gelu_erf, sigmoid};
use crate::vectorised;

/// What becomes of the sums, bias added.
pub enum End<'a, T> {
    /// They replace the contents of a matrix.
    Store(&'a mut Matrix<T>),
    /// Their GELU (tanh form) replaces the contents of a matrix.
    Gelu(&'a mut Matrix<T>),
    /// Their GELU as it is replaces the contents of a matrix.
    GeluErf(&'a mut Matrix<T>),
    /// They replace the contents of a matrix of f32.
    Wide(&'a mut Matrix<f32>),
    /// They are added to a residual.
    Add(&'a mut Matrix<f32>),
}

/// `x wᵀ + b`.
///
/// # Shapes
/// - x: `[N, D]`
/// - weight: packed `[E, D]`
/// - bias: `[E]`
/// - end: `[N, E]`
///
/// # Panics
/// When the shapes do not fit: a bug in the caller, not in the input.
pub fn linear<T: Element>(x: &Matrix<T>, weight: &Packed<T>, bias: &[f32], end: End<T>) {
    match end {
        End::Store(out) => each(x, weight, bias, out, Store),
        End::Gelu(out) => each(x, weight, bias, out, Gelu),
        End::GeluErf(out) => each(x, weight, bias, out, GeluErf),
        End::Wide(out) => each(x, weight, bias, out, Store),
        End::Add(out) => each(x, weight, bias, out, Add),
    }
}

/// What an [`End`] does with one sum. A trait rather than a closure, since only `inline(always)` reaches the vector loop.
trait Finish<O>: Copy + Sync {
    fn finish(self, out: &mut O, sum: f32);
}

#[derive(Clone, Copy)]
struct Store;

impl<O: Element> Finish<O> for Store {
    #[inline(always)]
    fn finish(self, out: &mut O, sum: f32) {
        *out = O::narrow(sum);
    }
}

#[derive(Clone, Copy)]
struct Gelu;

impl<O: Element> Finish<O> for Gelu {
    #[inline(always)]
    fn finish(self, out: &mut O, sum: f32) {
        *out = O::narrow(gelu(sum));
    }
}

#[derive(Clone, Copy)]
struct GeluErf;

impl<O: Element> Finish<O> for GeluErf {
    #[inline(always)]
    fn finish(self, out: &mut O, sum: f32) {
        *out = O::narrow(gelu_erf(sum));
    }
}

#[derive(Clone, Copy)]
struct Add;

impl Finish<f32> for Add {
    #[inline(always)]
    fn finish(self, out: &mut f32, sum: f32) {
        *out += sum;
    }
}

vectorised! {
    /// Finishes one row's columns of a piece.
    fn finish_row[O: Element, F: Finish<O>](out: &mut [O], sums: &[f32], bias: &[f32], finish: F) {
        for ((out, &sum), &bias) in out.iter_mut().zip(sums).zip(bias) {
            finish.finish(out, sum + bias);
        }
    }
}

fn each<T: Element, O: Element, F: Finish<O>>(
    x: &Matrix<T>,
    weight: &Packed<T>,
    bias: &[f32],
    out: &mut Matrix<O>,
    finish: F,
) {
    let (n, d, e) = (x.rows(), weight.inner(), weight.columns());
    assert_eq!((x.columns(), bias.len(), out.rows(), out.columns()), (d, e, n, e), "linear: the shapes do not fit");
    let stride = out.stride();
    let shared = Shared::new(out.padded_mut());
    pieces::each(n, weight.panels(), |sums, rows, panels| {
        let width = panels.len() * PANEL;
        weight.multiply(sums, width, x, rows.clone(), 0, panels.clone());
        let columns = panels.start * PANEL..e.min(panels.end * PANEL);
        for (sums, row) in sums.chunks_exact(width).zip(rows) {
            // SAFETY: these columns of this row belong to this piece alone.
            let out = unsafe { shared.slice(row * stride + columns.start, columns.len()) };
            finish_row(out, sums, &bias[columns.clone()], finish);
        }
    });
}

/// `silu(a) · b`, a and b the halves of every row.
///
/// # Shapes
/// - halves: `[N, 2·H]`
/// - out: `[N, H]`
///
/// # Panics
/// When the shapes do not fit: a bug in the caller, not in the input.
pub fn swiglu<T: Element>(halves: &Matrix<T>, out: &mut Matrix<T>) {
    let (n, h) = (out.rows(), out.columns());
    assert_eq!((halves.rows(), halves.columns()), (n, 2 * h), "swiglu: the shapes do not fit");
    let (halves_stride, stride) = (halves.stride(), out.stride());
    let rows = out.padded_mut().par_chunks_mut(stride).zip(halves.padded().par_chunks(halves_stride));
    rows.for_each(|(out, halves)| swiglu_row(&mut out[..h], &halves[..h], &halves[h..2 * h]));
}

vectorised! {
    fn swiglu_row[T: Element](out: &mut [T], a: &[T], b: &[T]) {
        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
            let a = a.widen();
            *out = T::narrow(a * sigmoid(a) * b.widen());
        }
    }
}
