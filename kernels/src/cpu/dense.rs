//! Products of matrices that change from step to step, as training's do: both sides are packed for one product alone.
//!
//! With instructions of its own (all but `portable`) an element is one chain of sums over the inner dimension, as in
//! [`super::product`]: no row changes another, and no thread changes a bit.

use std::cell::Cell;

use rayon::prelude::*;

use super::Isa;
use super::product::{Block, PANEL, f32_kernel};
use crate::matrix::{Into, View, multiply as gemm};

/// Rows and panels of a piece of work; its sums are 48 KiB.
const ROWS: usize = 96;
const PANELS: usize = 8;
/// Side of the squares in which a matrix is transposed.
const TILE: usize = 32;

thread_local! {
    /// Memory of the last product, for the next: fresh memory costs time.
    static SPARE: Cell<[Vec<f32>; 2]> = const { Cell::new([Vec::new(), Vec::new()]) };
}

/// `out (+)= a b` on all threads, where rows of `out` are `row_stride` apart.
///
/// # Panics
/// When a view reaches outside its slice or the shapes do not fit: a bug in the caller, not in the input.
pub fn multiply(out: &mut [f32], row_stride: usize, a: View, b: View, into: Into, isa: Isa) {
    let (m, k, n) = (a.rows(), a.columns(), b.columns());
    assert!(row_stride >= n && (m == 0 || (m - 1) * row_stride + n <= out.len()), "multiply: the shapes do not fit");
    if isa == Isa::PORTABLE || m == 0 || n == 0 || k == 0 {
        let pieces = out.par_chunks_mut((ROWS * row_stride).max(1)).enumerate().take(m.div_ceil(ROWS));
        pieces.for_each(|(i, out)| gemm(out, row_stride, a.part(i * ROWS, ROWS.min(m - i * ROWS)), b, 1.0, into));
        return;
    }
    assert!(k == b.rows() && a.is_whole() && b.is_whole(), "multiply: the shapes do not fit");
    let [mut right, mut left] = SPARE.take();
    let panels = n.div_ceil(PANEL);
    right.resize(panels * k * PANEL, 0.0);
    right.par_chunks_exact_mut(k * PANEL).enumerate().for_each(|(panel, out)| pack(out, b, panel * PANEL));
    let a = if a.column_stride() == 1 {
        a
    } else {
        left.resize(m * k, 0.0);
        left.par_chunks_mut(TILE * k).enumerate().for_each(|(i, out)| copy(out, a.part(i * TILE, out.len() / k)));
        View::new(&left, m, k, k)
    };
    let (kernel, right_side) = (f32_kernel(isa), &right);
    let (blocks, groups) = (m.div_ceil(ROWS), panels.div_ceil(PANELS));
    let shared = Shared(out.as_mut_ptr());
    let shared = &shared;
    // A group's packed columns meet all rows before the next group is read.
    (0..groups * blocks).into_par_iter().for_each_init(
        || vec![0f32; ROWS * PANELS * PANEL],
        |sums, piece| {
            let (group, block) = (piece / blocks, piece % blocks);
            let rows = block * ROWS..m.min((block + 1) * ROWS);
            let panels = group * PANELS..panels.min((group + 1) * PANELS);
            let width = panels.len() * PANEL;
            let product = Block {
                a: a.data()[rows.start * a.row_stride()..].as_ptr(),
                a_stride: a.row_stride(),
                rows: rows.len(),
                b: right_side[panels.start * k * PANEL..].as_ptr(),
                panel_stride: k * PANEL,
                panels: panels.len(),
                inner: k,
                c: sums.as_mut_ptr(),
                c_stride: width,
            };
            // SAFETY: `a`'s rows have k elements (its view was checked), the panels were just packed, `sums` has room for
            // whole panels, and an `Isa` proves that its instructions are here.
            unsafe { kernel(&product) };
            let columns = panels.start * PANEL..n.min(panels.end * PANEL);
            for (sums, row) in sums.chunks_exact(width).zip(rows) {
                // SAFETY: row and columns lie within `out`, as checked above, and belong to this piece alone.
                let out = unsafe {
                    std::slice::from_raw_parts_mut(shared.0.add(row * row_stride + columns.start), columns.len())
                };
                match into {
                    Into::Replace => out.copy_from_slice(&sums[..columns.len()]),
                    Into::Add => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += *sum),
                }
            }
        },
    );
    SPARE.set([right, left]);
}

/// The elements of a matrix, written from several threads at places that differ.
struct Shared(*mut f32);
// SAFETY: `multiply` writes every element from one piece of work alone.
unsafe impl Sync for Shared {}

/// 16 columns from `first` on, a row after the other; columns beyond the last are zero.
fn pack(out: &mut [f32], b: View, first: usize) {
    let width = PANEL.min(b.columns() - first);
    if width < PANEL {
        out.fill(0.0);
    }
    let (data, down, across) = (b.data(), b.row_stride(), b.column_stride());
    if across == 1 {
        for (i, out) in out.chunks_exact_mut(PANEL).enumerate() {
            out[..width].copy_from_slice(&data[i * down + first..][..width]);
        }
        return;
    }
    for (tile, out) in out.chunks_mut(TILE * PANEL).enumerate() {
        for column in 0..width {
            let start = (first + column) * across + tile * TILE * down;
            for (i, out) in out.chunks_exact_mut(PANEL).enumerate() {
                out[column] = data[start + i * down];
            }
        }
    }
}

/// Rows of a view, one after the other.
fn copy(out: &mut [f32], a: View) {
    let (k, data) = (a.columns(), a.data());
    for first in (0..k).step_by(TILE) {
        for (i, out) in out.chunks_exact_mut(k).enumerate() {
            let start = i * a.row_stride() + first * a.column_stride();
            for (j, out) in out[first..k.min(first + TILE)].iter_mut().enumerate() {
                *out = data[start + j * a.column_stride()];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn every_orientation_is_near_the_real_product_and_padding_is_left_alone() {
        for isa in Isa::tested() {
            for (m, k, n) in [(1, 1, 1), (7, 5, 3), (97, 33, 130), (200, 64, 16), (5, 300, 17)] {
                let (a, b) = (values(m * k, 1), values(k * n, 2));
                let (a_t, b_t) = (View::new(&a, k, m, m).t(), View::new(&b, n, k, k).t());
                for (a, b) in [
                    (View::new(&a, m, k, k), View::new(&b, k, n, n)),
                    (a_t, View::new(&b, k, n, n)),
                    (View::new(&a, m, k, k), b_t),
                    (a_t, b_t),
                ] {
                    let at = |view: View, i: usize, j: usize| {
                        f64::from(view.data()[i * view.row_stride() + j * view.column_stride()])
                    };
                    for into in [Into::Replace, Into::Add] {
                        let stride = n + 2;
                        let mut out = vec![7f32; m * stride];
                        multiply(&mut out, stride, a, b, into, isa);
                        for (i, row) in out.chunks_exact(stride).enumerate() {
                            assert_eq!(row[n..], [7., 7.], "{}", isa.name());
                            for (j, &got) in row[..n].iter().enumerate() {
                                let sum: f64 = (0..k).map(|l| at(a, i, l) * at(b, l, j)).sum();
                                let expected = sum + if into == Into::Add { 7.0 } else { 0.0 };
                                let off = (f64::from(got) - expected).abs();
                                assert!(off < 2e-5, "{} {m}×{k}×{n} at {i}, {j}: off by {off:e}", isa.name());
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn rows_do_not_know_of_each_other() {
        let (m, k, n) = (150, 40, 50);
        let (a, b) = (values(m * k, 3), values(k * n, 4));
        for isa in Isa::tested().into_iter().filter(|&isa| isa != Isa::PORTABLE) {
            let run = |rows: std::ops::Range<usize>| {
                let mut out = vec![0f32; rows.len() * n];
                let a = View::new(&a[rows.start * k..], rows.len(), k, k);
                multiply(&mut out, n, a, View::new(&b, k, n, n), Into::Replace, isa);
                out
            };
            let whole = run(0..m);
            for rows in [0..1, 3..10, 95..150] {
                assert_eq!(run(rows.clone()), whole[rows.start * n..rows.end * n], "{}", isa.name());
            }
        }
    }
}
