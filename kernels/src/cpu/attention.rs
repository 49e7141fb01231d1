//! Multi-head attention a head and a block of queries at a time: the N×N weights never stand in memory. Where tokens come one
//! after the other, the keys and values of those before are kept ([`Cache`]).

use rayon::prelude::*;

use super::pieces::Shared;
use super::product::{PANEL, Packed};
use super::{Element, Isa, Matrix};
use crate::vector::{exp2, max};
use crate::vectorised;

/// Queries whose scores are held at a time.
const QUERIES: usize = 96;

/// Which tokens a token sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mask {
    /// All of them.
    #[default]
    None,
    /// Itself and those before it.
    Causal,
}

impl Mask {
    /// How many of `n` tokens token `i` sees: the first ones.
    pub fn seen(self, i: usize, n: usize) -> usize {
        match self {
            Self::None => n,
            Self::Causal => i + 1,
        }
    }
}

/// `softmax(q kᵀ / √d) v` for each of `heads` heads, over the tokens that the mask lets a token see.
///
/// # Shapes
/// - qkv: `[N, 3·D]`, the columns of q, then of k, then of v; head h in the columns `h·D/heads ..` of each
/// - out: `[N, D]`
///
/// # Panics
/// When the shapes do not fit: a bug in the caller, not in the input.
pub fn attention<T: Element>(qkv: &Matrix<T>, heads: usize, mask: Mask, isa: Isa, out: &mut Matrix<T>) {
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
                scratch.block(qkv, rows.clone(), first, width, mask);
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
    fn block(&mut self, qkv: &Matrix<T>, rows: std::ops::Range<usize>, first: usize, width: usize, mask: Mask) {
        let (n, count) = (self.n, rows.len());
        let panels = 0..mask.seen(rows.end - 1, n).div_ceil(PANEL);
        self.keys.multiply(&mut self.scores, self.n_padded, qkv, rows.clone(), first, panels);
        let temperature = temperature(width);
        let (scores, weights, scales) = (&self.scores, &mut self.weights, &mut self.scales);
        for (i, scores) in scores.chunks_exact(self.n_padded).take(count).enumerate() {
            let (weights, hidden) = weights.row_mut(i).split_at_mut(mask.seen(rows.start + i, n));
            scales[i] = 1.0 / soften(weights, &scores[..weights.len()], temperature);
            hidden.fill(T::default());
        }
        self.values.multiply(&mut self.sums, self.width_padded, &self.weights, 0..count, 0, 0..self.values.panels());
    }
}

/// What scores are multiplied by, as exponents of two.
fn temperature(width: usize) -> f32 {
    std::f32::consts::LOG2_E / (width as f32).sqrt()
}

/// The keys and values of a sequence's tokens so far, of one layer.
#[derive(Clone)]
pub struct Cache<T> {
    heads: Vec<(Packed<T>, Packed<T>)>,
    width: usize,
    tokens: usize,
    capacity: usize,
}

impl<T: Element> Cache<T> {
    /// Room for `capacity` tokens of `heads` heads, each `width` wide.
    pub fn new(heads: usize, width: usize, capacity: usize, isa: Isa) -> Self {
        let head = (Packed::zeros(width, capacity, isa), Packed::zeros(capacity, width, isa));
        Self { heads: vec![head; heads], width, tokens: 0, capacity }
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether there is none yet.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Takes in the next token and gives it what [`attention`] with [`Mask::Causal`] would give it among all of them, bit for bit.
    ///
    /// # Shapes
    /// - qkv: row `row` of `[B, 3·D]`, the columns of q, then of k, then of v
    /// - out: `[D]`
    ///
    /// # Panics
    /// When the shapes do not fit or the cache is full: a bug in the caller, not in the input.
    pub fn attend(&mut self, qkv: &Matrix<T>, row: usize, out: &mut [T]) {
        let (width, token) = (self.width, self.tokens);
        let d = self.heads.len() * width;
        assert!(token < self.capacity, "a cache of {token} tokens is full");
        assert_eq!((qkv.columns(), out.len()), (3 * d, d), "attend: the shapes do not fit");
        self.tokens += 1;
        let mut scores = vec![0f32; self.tokens.next_multiple_of(PANEL)];
        let mut weights = Matrix::new(1, self.capacity);
        let mut sums = vec![0f32; width.next_multiple_of(PANEL)];
        for (head, ((keys, values), out)) in self.heads.iter_mut().zip(out.chunks_exact_mut(width)).enumerate() {
            let first = head * width;
            let part = |i: usize| &qkv.row(row)[i * d + first..][..width];
            keys.set_column(token, part(1));
            values.set_row(token, part(2));
            let panels = 0..self.tokens.div_ceil(PANEL);
            keys.multiply(&mut scores, panels.len() * PANEL, qkv, row..row + 1, first, panels);
            let seen = &mut weights.row_mut(0)[..self.tokens];
            let scale = 1.0 / soften(seen, &scores[..self.tokens], temperature(width));
            values.multiply(&mut sums, width.next_multiple_of(PANEL), &weights, 0..1, 0, 0..values.panels());
            out.iter_mut().zip(&sums).for_each(|(out, sum)| *out = T::narrow(sum * scale));
        }
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
