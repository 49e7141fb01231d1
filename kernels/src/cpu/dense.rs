//! Products of matrices that change from step to step, as training's do: both sides are packed for one product alone, in
//! f32 or, half as wide and twice as fast where the processor has instructions for it, in bf16. Sums are f32 either way.
//!
//! With instructions of its own (all but `portable` in f32) an element is one chain of sums over the inner dimension, as in
//! [`super::product`]: no row changes another, and no thread changes a bit.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::matrix::{Buffer, Line};
use super::pieces::{self, SUMS, Shared};
use super::product::{Block, Kernel, PANEL};
use super::{Element, Isa};
use crate::matrix::{Into, View, multiply as gemm};
use crate::vectorised;

/// Side of the squares in which a matrix is transposed; whole groups.
const TILE: usize = 32;

thread_local! {
    /// Memory of the last product, for the next: fresh memory costs time.
    static SPARE: Cell<[Vec<Line>; 2]> = const { Cell::new([Vec::new(), Vec::new()]) };
}

/// `out (+)= a b` on all threads, where rows of `out` are `row_stride` apart and products read numbers of type `T`.
///
/// # Panics
/// When a view reaches outside its slice or the shapes do not fit: a bug in the caller, not in the input.
pub fn multiply<T: Element>(out: &mut [f32], row_stride: usize, a: View, b: View, into: Into, isa: Isa) {
    let (m, n) = (a.rows(), b.columns());
    check(out, row_stride, a, b);
    if is_left_to_gemm::<T>(a, b, isa) {
        let rows = pieces::ROWS;
        let pieces = out.par_chunks_mut((rows * row_stride).max(1)).enumerate().take(m.div_ceil(rows));
        pieces.for_each(|(i, out)| gemm(out, row_stride, a.part(i * rows, rows.min(m - i * rows)), b, 1.0, into));
        return;
    }
    let [left, right] = SPARE.take();
    let (mut left, mut right) = (Buffer::<T>::of(left), Buffer::<T>::of(right));
    let right_side = Right::new(&mut right, b);
    right_side.panels.par_chunks_exact_mut(right_side.panel_len).enumerate().for_each(|(i, panel)| pack(panel, b, i));
    let left_side = Left::new(&mut left, a, |rows, stride| {
        rows.par_chunks_mut(TILE * stride).enumerate().for_each(|(i, out)| copy(out, stride, a, i * TILE));
    });
    let product = Product { left: left_side, right: right_side.done(), kernel: T::kernel(isa) };
    let shared = Shared::new(out);
    pieces::each(m, n.div_ceil(PANEL), |sums, rows, panels| {
        product.piece(sums, rows.clone(), panels.clone());
        let columns = panels.start * PANEL..n.min(panels.end * PANEL);
        for (sums, row) in sums.chunks_exact(panels.len() * PANEL).zip(rows) {
            // SAFETY: these columns of this row belong to this piece alone.
            let out = unsafe { shared.slice(row * row_stride + columns.start, columns.len()) };
            finish(out, sums, 1.0, into);
        }
    });
    SPARE.set([left.into_lines(), right.into_lines()]);
}

/// Products on the calling thread alone, in memory that is used again: for work that is cut into pieces already.
#[derive(Default)]
pub struct Worker<T> {
    left: Buffer<T>,
    right: Buffer<T>,
    sums: Vec<f32>,
}

impl<T: Element> Worker<T> {
    /// `out (+)= scale · a b`, where rows of `out` are `row_stride` apart.
    ///
    /// # Panics
    /// As [`multiply`].
    #[allow(clippy::too_many_arguments, reason = "gemm's own")]
    pub fn multiply(&mut self, out: &mut [f32], row_stride: usize, a: View, b: View, scale: f32, into: Into, isa: Isa) {
        let (m, n) = (a.rows(), b.columns());
        check(out, row_stride, a, b);
        if is_left_to_gemm::<T>(a, b, isa) {
            gemm(out, row_stride, a, b, scale, into);
            return;
        }
        self.sums.resize(SUMS, 0.0);
        let right = Right::new(&mut self.right, b);
        right.panels.chunks_exact_mut(right.panel_len).enumerate().for_each(|(i, panel)| pack(panel, b, i));
        let left = Left::new(&mut self.left, a, |rows, stride| {
            rows.chunks_mut(TILE * stride).enumerate().for_each(|(i, out)| copy(out, stride, a, i * TILE));
        });
        let product = Product { left, right: right.done(), kernel: T::kernel(isa) };
        let panels = n.div_ceil(PANEL);
        for piece in 0..pieces::count(m, panels) {
            let (rows, panels) = pieces::extent(piece, m, panels);
            product.piece(&mut self.sums, rows.clone(), panels.clone());
            let columns = panels.start * PANEL..n.min(panels.end * PANEL);
            for (sums, row) in self.sums.chunks_exact(panels.len() * PANEL).zip(rows) {
                finish(&mut out[row * row_stride + columns.start..][..columns.len()], sums, scale, into);
            }
        }
    }
}

fn check(out: &[f32], row_stride: usize, a: View, b: View) {
    let (m, n) = (a.rows(), b.columns());
    let fits = row_stride >= n && (m == 0 || (m - 1) * row_stride + n <= out.len());
    assert!(fits && a.columns() == b.rows() && a.is_whole() && b.is_whole(), "multiply: the shapes do not fit");
}

/// Nothing to add up, or nothing better to do it with.
fn is_left_to_gemm<T: Element>(a: View, b: View, isa: Isa) -> bool {
    let portable = isa == Isa::PORTABLE && T::as_is(&[]).is_some();
    portable || a.rows() == 0 || a.columns() == 0 || b.columns() == 0
}

/// The left side: rows that products can read in whole steps.
struct Left<'a, T> {
    rows: &'a [T],
    stride: usize,
    inner: usize,
}

impl<'a, T: Element> Left<'a, T> {
    /// The view's own rows where they are such rows; else what `fill` makes of a buffer's, given their stride.
    fn new<'b: 'a>(buffer: &'a mut Buffer<T>, a: View<'b>, fill: impl FnOnce(&mut [T], usize)) -> Self {
        let inner = a.columns();
        if let (Some(rows), 1) = (T::as_is(a.data()), a.column_stride()) {
            return Self { rows, stride: a.row_stride(), inner };
        }
        let stride = Buffer::<T>::row_stride(inner);
        buffer.resize(a.rows() * stride);
        fill(buffer.as_mut_slice(), stride);
        Self { rows: buffer.as_slice(), stride, inner }
    }
}

/// The right side: panels of 16 columns.
struct Right<'a, T> {
    panels: &'a mut [T],
    panel_len: usize,
}

impl<'a, T: Element> Right<'a, T> {
    /// Room for them.
    fn new(buffer: &'a mut Buffer<T>, b: View) -> Self {
        let panel_len = b.rows().next_multiple_of(T::STEP) * PANEL;
        buffer.resize(b.columns().div_ceil(PANEL) * panel_len);
        Self { panels: buffer.as_mut_slice(), panel_len }
    }

    fn done(self) -> Packed<'a, T> {
        Packed { panels: self.panels, panel_len: self.panel_len }
    }
}

struct Packed<'a, T> {
    panels: &'a [T],
    panel_len: usize,
}

struct Product<'a, T> {
    left: Left<'a, T>,
    right: Packed<'a, T>,
    kernel: Kernel<T>,
}

impl<T: Element> Product<'_, T> {
    fn piece(&self, sums: &mut [f32], rows: Range<usize>, panels: Range<usize>) {
        let (left, right) = (&self.left, &self.right);
        let width = panels.len() * PANEL;
        let readable = if left.stride == left.inner { left.inner } else { left.inner.next_multiple_of(T::STEP) };
        assert!((rows.end - 1) * left.stride + readable <= left.rows.len() && rows.len() * width <= sums.len());
        assert!(panels.end * right.panel_len <= right.panels.len());
        let block = Block {
            a: left.rows[rows.start * left.stride..].as_ptr(),
            a_stride: left.stride,
            rows: rows.len(),
            b: right.panels[panels.start * right.panel_len..].as_ptr(),
            panel_stride: right.panel_len,
            panels: panels.len(),
            inner: left.inner,
            c: sums.as_mut_ptr(),
            c_stride: width,
        };
        // SAFETY: the extents were just checked, rows of a buffer are padded to whole steps (and f32 has none), and an
        // `Isa` proves that its instructions are here.
        unsafe { (self.kernel)(&block) };
    }
}

/// Columns `panel · 16 ..`, a group of the inner dimension after the other; what is beyond either is zero.
fn pack<T: Element>(out: &mut [T], b: View, panel: usize) {
    let first = panel * PANEL;
    let (inner, width) = (b.rows(), PANEL.min(b.columns() - first));
    if width < PANEL || !inner.is_multiple_of(T::STEP) {
        out.fill(T::default());
    }
    let (data, down, across) = (b.data(), b.row_stride(), b.column_stride());
    if across == 1 {
        for (group, out) in out.chunks_exact_mut(PANEL * T::GROUP).enumerate().take(inner.div_ceil(T::GROUP)) {
            let row = |i: usize| if i < inner { &data[i * down + first..][..width] } else { &[] };
            pack_rows(out, row(group * T::GROUP), row(group * T::GROUP + T::GROUP - 1));
        }
        return;
    }
    for (tile, out) in out.chunks_mut(TILE * PANEL).enumerate().take(inner.div_ceil(TILE)) {
        let rows = TILE.min(inner - tile * TILE);
        for column in 0..width {
            let start = (first + column) * across + tile * TILE * down;
            for i in 0..rows {
                out[(i / T::GROUP * PANEL + column) * T::GROUP + i % T::GROUP] = T::narrow(data[start + i * down]);
            }
        }
    }
}

/// Rows `from ..` of a view, `stride` apart; what is beyond a row's end is zero.
fn copy<T: Element>(out: &mut [T], stride: usize, a: View, from: usize) {
    let (inner, data, down, across) = (a.columns(), a.data(), a.row_stride(), a.column_stride());
    let rows = out.len() / stride;
    for (i, out) in out.chunks_exact_mut(stride).enumerate() {
        out[inner..].fill(T::default());
        if across == 1 {
            narrow(&mut out[..inner], &data[(from + i) * down..][..inner]);
        }
    }
    if across == 1 {
        return;
    }
    // By way of a square that stands together: columns far apart push each other out of the cache.
    let mut square = [[T::default(); TILE]; TILE];
    for first in (0..inner).step_by(TILE) {
        let width = TILE.min(inner - first);
        for (j, square) in square.iter_mut().enumerate().take(width) {
            let start = from * down + (first + j) * across;
            if down == 1 {
                narrow(&mut square[..rows], &data[start..][..rows]);
            } else {
                square.iter_mut().take(rows).enumerate().for_each(|(i, x)| *x = T::narrow(data[start + i * down]));
            }
        }
        for (i, out) in out.chunks_exact_mut(stride).take(rows).enumerate() {
            out[first..first + width].iter_mut().zip(&square).for_each(|(out, column)| *out = column[i]);
        }
    }
}

vectorised! {
    /// One group: the columns of a row, or of two rows side by side.
    fn pack_rows[T: Element](out: &mut [T], first: &[f32], last: &[f32]) {
        if T::GROUP == 1 {
            out.iter_mut().zip(first).for_each(|(out, &x)| *out = T::narrow(x));
        } else if last.len() == first.len() {
            let (groups, _) = out.as_chunks_mut::<2>();
            for ((out, &x), &y) in groups.iter_mut().zip(first).zip(last) {
                *out = [T::narrow(x), T::narrow(y)];
            }
        } else {
            let (groups, _) = out.as_chunks_mut::<2>();
            groups.iter_mut().zip(first).for_each(|(out, &x)| out[0] = T::narrow(x));
        }
    }

    fn narrow[T: Element](out: &mut [T], values: &[f32]) {
        out.iter_mut().zip(values).for_each(|(out, &x)| *out = T::narrow(x));
    }

    fn finish(out: &mut [f32], sums: &[f32], scale: f32, into: Into) {
        match into {
            Into::Replace => out.iter_mut().zip(sums).for_each(|(out, sum)| *out = scale * sum),
            Into::Add => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += scale * sum),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{rounded, values};
    use super::*;
    use crate::cpu::Bf16;

    fn at(view: View, i: usize, j: usize) -> f32 {
        view.data()[i * view.row_stride() + j * view.column_stride()]
    }

    fn every_orientation<T: Element>() {
        for isa in Isa::tested() {
            let mut worker = Worker::<T>::default();
            for (m, k, n) in [(1, 1, 1), (7, 5, 3), (97, 33, 130), (200, 64, 16), (5, 300, 17)] {
                let (a, b) = (values(m * k, 1), values(k * n, 2));
                let (a_t, b_t) = (View::new(&a, k, m, m).t(), View::new(&b, n, k, k).t());
                for (a, b) in [
                    (View::new(&a, m, k, k), View::new(&b, k, n, n)),
                    (a_t, View::new(&b, k, n, n)),
                    (View::new(&a, m, k, k), b_t),
                    (a_t, b_t),
                ] {
                    for (into, here) in
                        [(Into::Replace, false), (Into::Add, false), (Into::Replace, true), (Into::Add, true)]
                    {
                        let (stride, scale) = (n + 2, if here { 0.5 } else { 1.0 });
                        let mut out = vec![7f32; m * stride];
                        match here {
                            true => worker.multiply(&mut out, stride, a, b, scale, into, isa),
                            false => multiply::<T>(&mut out, stride, a, b, into, isa),
                        }
                        for (i, row) in out.chunks_exact(stride).enumerate() {
                            assert_eq!(row[n..], [7., 7.], "{}", isa.name());
                            for (j, &got) in row[..n].iter().enumerate() {
                                let sum: f64 =
                                    (0..k).map(|l| rounded::<T>(at(a, i, l)) * rounded::<T>(at(b, l, j))).sum();
                                let expected = sum * f64::from(scale) + if into == Into::Add { 7.0 } else { 0.0 };
                                let off = (f64::from(got) - expected).abs();
                                assert!(off < 3e-5, "{} {m}×{k}×{n} at {i}, {j}: off by {off:e}", isa.name());
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_orientation_is_near_the_real_product_and_padding_is_left_alone() {
        every_orientation::<f32>();
        every_orientation::<Bf16>();
    }

    fn rows_alone<T: Element>() {
        let (m, k, n) = (150, 40, 50);
        let (a, b) = (values(m * k, 3), values(k * n, 4));
        for isa in Isa::tested().into_iter().filter(|&isa| isa != Isa::PORTABLE) {
            let run = |rows: Range<usize>| {
                let mut out = vec![0f32; rows.len() * n];
                let a = View::new(&a[rows.start * k..], rows.len(), k, k);
                multiply::<T>(&mut out, n, a, View::new(&b, k, n, n), Into::Replace, isa);
                out
            };
            let whole = run(0..m);
            for rows in [0..1, 3..10, 95..150] {
                assert_eq!(run(rows.clone()), whole[rows.start * n..rows.end * n], "{}", isa.name());
            }
        }
    }

    #[test]
    fn rows_do_not_know_of_each_other() {
        rows_alone::<f32>();
        rows_alone::<Bf16>();
    }
}
