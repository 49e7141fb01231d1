//! What is done to a codebook once, before it is screened.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use rayon::prelude::*;

/// The distinct codes of a codebook, and what is taken off them.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// The code that each screened column stands for, ascending: the first of equal rows.
    pub(super) codes: Vec<u32>,
    /// Their mean m, (D).
    pub(super) center: Vec<f64>,
    /// The direction of the mean, (D), its norm near 1; zeros where the mean is.
    pub(super) axis: Vec<f32>,
    /// The mean bias β.
    pub(super) level: f64,
}

impl Layout {
    /// # Shapes
    /// `rows`: (K, D), `bias`: (K)
    pub(super) fn new(rows: &[f32], bias: &[f64], width: usize) -> Self {
        let codes = fold_duplicates(rows, width);
        let center = mean(rows, width, &codes);
        let norm = center.iter().map(|x| x * x).sum::<f64>().sqrt();
        let axis = center.iter().map(|x| if norm > 0.0 { (x / norm) as f32 } else { 0.0 }).collect();
        let level = codes.iter().map(|&k| bias[k as usize]).sum::<f64>() / codes.len() as f64;
        Self { codes, center, axis, level }
    }
}

/// The first index of each distinct row, ascending.
fn fold_duplicates(rows: &[f32], width: usize) -> Vec<u32> {
    // -0 and 0 score alike; adding 0 makes them one.
    let hash = |row: &[f32]| {
        let mut hasher = DefaultHasher::new();
        row.iter().for_each(|x| (x + 0.0).to_bits().hash(&mut hasher));
        hasher.finish()
    };
    let row = |k: u32| &rows[k as usize * width..][..width];
    let hashes = rows.par_chunks(width).map(hash).collect::<Vec<_>>();
    let mut first = HashMap::with_capacity(hashes.len());
    let is_first = |&(k, hash): &(u32, u64)| {
        let seen = *first.entry(hash).or_insert(k);
        // Different rows under one hash both stay: folding saves work, no answer needs it.
        seen == k || row(seen) != row(k)
    };
    (0..).zip(hashes).filter(is_first).map(|(k, _)| k).collect()
}

/// The mean of the given rows, in f64.
fn mean(rows: &[f32], width: usize, codes: &[u32]) -> Vec<f64> {
    let mut mean = vec![0.0; width];
    for &k in codes {
        for (sum, x) in mean.iter_mut().zip(&rows[k as usize * width..][..width]) {
            *sum += f64::from(*x);
        }
    }
    mean.iter_mut().for_each(|x| *x /= codes.len() as f64);
    mean
}
