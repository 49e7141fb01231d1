//! How much of a codebook is in use.

use std::collections::BTreeMap;

/// How often each code of one or several codebooks was chosen. Memory grows with the codes in use, not with K.
#[derive(Debug, Clone)]
pub struct CodeCounts {
    k: usize,
    /// Of each codebook, those of its codes that were chosen.
    codebooks: Vec<BTreeMap<u32, u64>>,
}

impl CodeCounts {
    /// Nothing counted yet, of `codebooks` codes a token, each one of `k`.
    pub fn new(k: usize, codebooks: usize) -> Self {
        Self { k, codebooks: vec![BTreeMap::new(); codebooks.max(1)] }
    }

    /// Codes a token.
    pub fn codebooks(&self) -> usize {
        self.codebooks.len()
    }

    /// Counts codes, those of a token side by side; those outside the codebook, as the ones that quantize dropout left
    /// out, are not counted.
    pub fn add(&mut self, indices: &[u32]) {
        for token in indices.chunks(self.codebooks.len()) {
            for (counts, &index) in
                self.codebooks.iter_mut().zip(token).filter(|(_, index)| (**index as usize) < self.k)
            {
                *counts.entry(index).or_default() += 1;
            }
        }
    }

    /// How often each code of the first codebook was chosen, K counts.
    pub fn counts(&self) -> Vec<u64> {
        (0..self.k as u32).map(|code| self.codebooks[0].get(&code).copied().unwrap_or_default()).collect()
    }

    /// Share of the codes that were chosen at least once, over all codebooks.
    pub fn usage(&self) -> f64 {
        let chosen: usize = self.codebooks.iter().map(BTreeMap::len).sum();
        chosen as f64 / (self.k * self.codebooks.len()).max(1) as f64
    }

    /// Entropy of a code in bits: what an ideal entropy coder that knows the counts spends on one; of several codebooks the
    /// mean.
    pub fn bits(&self) -> f64 {
        self.perplexity().log2()
    }

    /// `exp` of the entropy of the codes: K when all are chosen equally often, 1 when it is always the same; of several
    /// codebooks the geometric mean.
    pub fn perplexity(&self) -> f64 {
        (self.codebooks.iter().map(entropy).sum::<f64>() / self.codebooks.len() as f64).exp()
    }
}

fn entropy(counts: &BTreeMap<u32, u64>) -> f64 {
    let total = counts.values().sum::<u64>().max(1) as f64;
    counts.values().map(|&count| count as f64 / total).map(|share| -share * share.ln()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_and_perplexity_by_hand() {
        let mut counts = CodeCounts::new(4, 1);
        counts.add(&[0, 0, 1, 1, 9]);
        assert_eq!(counts.usage(), 0.5);
        assert!((counts.perplexity() - 2.0).abs() < 1e-12);
        assert!((counts.bits() - 1.0).abs() < 1e-12);
        assert_eq!(CodeCounts::new(4, 1).perplexity(), 1.0);
    }

    #[test]
    fn codebooks_are_counted_apart() {
        // The first codebook has 0 and 1, the second only 1: 3 of 8 codes, and √(2 · 1) on average.
        let mut counts = CodeCounts::new(4, 2);
        counts.add(&[0, 1, 1, 1, 0, u32::MAX, 1, 1]);
        assert_eq!(counts.usage(), 3.0 / 8.0);
        assert!((counts.perplexity() - 2f64.sqrt()).abs() < 1e-12);
    }
}
