//! Multi-head attention a head and a block of queries at a time: the N×N weights never stand in memory.

use rayon::prelude::*;

use super::pieces::Shared;
use super::product::{PANEL, Packed};
use super::{Element, Isa, Matrix};
use crate::vector::{exp2, max};
use crate::vectorised;

/// Queries whose scores are held at a time.
const QUERIES: usize = 96;

/// `softmax(q kᵀ / √d) v` for each of `heads` heads, every token seeing every token.
///
/// # Shapes
/// - qkv: `[N, 3·D]`, the columns of q, then of k, then of v; head h in the columns `h·D/heads ..` of each
/// - out: `[N, D]`
///
/// # Panics
/// When the shapes do not fit: a bug in the caller, not in the input.
pub fn attention<T: Element>(qkv: &Matrix<T>, heads: usize, isa: Isa, out: &mut Matrix<T>) {
    let (n, d) = (out.rows(), out.columns());
    assert_eq!((qkv.rows(), qkv.columns(), d % heads), (n, 3 * d, 0), "attention: the shapes do not fit");
    let width = d / heads;
    let stride = out.stride();
    let shared = Shared::new(out.padded_mut());
    (0..heads).into_par_iter().for_each_init(
        || Scratch::new(n, width, isa),
        |scratch, head| {
            let first = head * width;
            scratch.keys.fill_transposed(&qkv.padded()[d + first..], qkv.stride());
            scratch.values.fill(&qkv.padded()[2 * d + first..], qkv.stride());
            for start in (0..n).step_by(QUERIES) {
                let rows = start..n.min(start + QUERIES);
                scratch.block(qkv, rows.clone(), first, width);
                for (i, row) in rows.enumerate() {
                    // SAFETY: this head's columns of one row, which no other piece of work writes.
                    let out = unsafe { shared.slice(row * stride + first, width) };
                    let sums = &scratch.sums[i * scratch.width_padded..][..width];
                    let scale = scratch.scales[i];
                    out.iter_mut().zip(sums).for_each(|(out, sum)| *out = T::narrow(sum * scale));
                }
            }
        },
    );
}

/// One head's keys and values, packed, and one block of queries at work.
struct Scratch<T> {
    keys: Packed<T>,
    values: Packed<T>,
    scores: Vec<f32>,
    weights: Matrix<T>,
    sums: Vec<f32>,
    /// What makes the weights of a query sum to one.
    scales: Vec<f32>,
    n: usize,
    n_padded: usize,
    width_padded: usize,
}

impl<T: Element> Scratch<T> {
    fn new(n: usize, width: usize, isa: Isa) -> Self {
        let (n_padded, width_padded) = (n.next_multiple_of(PANEL), width.next_multiple_of(PANEL));
        let rows = QUERIES.min(n);
        Self {
            keys: Packed::zeros(width, n, isa),
            values: Packed::zeros(n, width, isa),
            scores: vec![0.0; rows * n_padded],
            weights: Matrix::new(rows, n),
            sums: vec![0.0; rows * width_padded],
            scales: vec![0.0; rows],
            n,
            n_padded,
            width_padded,
        }
    }

    /// The sums `Σ exp(score − largest) v` of a block of queries, and their scales.
    fn block(&mut self, qkv: &Matrix<T>, rows: std::ops::Range<usize>, first: usize, width: usize) {
        let (n, count) = (self.n, rows.len());
        self.keys.multiply(&mut self.scores, self.n_padded, qkv, rows, first, 0..self.keys.panels());
        // In powers of two.
        let temperature = std::f32::consts::LOG2_E / (width as f32).sqrt();
        let (scores, weights, scales) = (&self.scores, &mut self.weights, &mut self.scales);
        for (i, scores) in scores.chunks_exact(self.n_padded).take(count).enumerate() {
            scales[i] = 1.0 / soften(weights.row_mut(i), &scores[..n], temperature);
        }
        self.values.multiply(&mut self.sums, self.width_padded, &self.weights, 0..count, 0, 0..self.values.panels());
    }
}

vectorised! {
    /// `2^((score − largest) · temperature)`, and the sum of what is written.
    fn soften[T: Element](weights: &mut [T], scores: &[f32], temperature: f32) -> f32 {
        const LANES: usize = 16;
        let largest = max(scores);
        let mut lanes = [0f32; LANES];
        let (chunks, rest) = weights.as_chunks_mut::<LANES>();
        let (score_chunks, score_rest) = scores.as_chunks::<LANES>();
        for (weights, scores) in chunks.iter_mut().zip(score_chunks) {
            for l in 0..LANES {
                weights[l] = T::narrow(exp2((scores[l] - largest) * temperature));
                lanes[l] += weights[l].widen();
            }
        }
        let mut sum = lanes.iter().sum::<f32>();
        for (out, &score) in rest.iter_mut().zip(score_rest) {
            *out = T::narrow(exp2((score - largest) * temperature));
            sum += out.widen();
        }
        sum
    }
}
