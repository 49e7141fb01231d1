//! How good a reconstruction is, and how much of a codebook is in use.

use crate::image::Rgb;

/// Peak signal-to-noise ratio in dB of two 8-bit images of the same size: `10 log10(255² / MSE)` over all pixels and
/// channels; infinite when they are equal, `None` when their sizes differ.
pub fn psnr(a: &Rgb, b: &Rgb) -> Option<f64> {
    if (a.width, a.height) != (b.width, b.height) || a.data.is_empty() {
        return None;
    }
    let squared = |(&x, &y): (&u8, &u8)| u64::from(x.abs_diff(y)).pow(2);
    let sum: u64 = a.data.iter().zip(&b.data).map(squared).sum();
    Some(10.0 * (255.0f64.powi(2) * a.data.len() as f64 / sum as f64).log10())
}

/// How often each code of a codebook was chosen.
#[derive(Debug, Clone)]
pub struct CodeCounts {
    counts: Vec<u64>,
}

impl CodeCounts {
    /// Nothing counted yet, of `k` codes.
    pub fn new(k: usize) -> Self {
        Self { counts: vec![0; k] }
    }

    /// Counts codes; those outside the codebook are not counted.
    pub fn add(&mut self, indices: &[u32]) {
        for &index in indices {
            if let Some(count) = self.counts.get_mut(index as usize) {
                *count += 1;
            }
        }
    }

    /// How often each code was chosen, K counts.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Share of the codebook that was chosen at least once.
    pub fn usage(&self) -> f64 {
        self.counts.iter().filter(|&&count| count > 0).count() as f64 / self.counts.len().max(1) as f64
    }

    /// `exp` of the entropy of the codes: K when all are chosen equally often, 1 when it is always the same.
    pub fn perplexity(&self) -> f64 {
        let total = self.counts.iter().sum::<u64>().max(1) as f64;
        let entropy = |&count: &u64| match count as f64 / total {
            0.0 => 0.0,
            share => -share * share.ln(),
        };
        self.counts.iter().map(entropy).sum::<f64>().exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grey(values: [u8; 4]) -> Rgb {
        Rgb { width: 2, height: 2, data: values.iter().flat_map(|&v| [v; 3]).collect() }
    }

    #[test]
    fn psnr_by_hand() {
        // skimage.metrics.peak_signal_noise_ratio: MSE = (0 + 9 + 16 + 0) / 4 = 6.25
        let psnr = psnr(&grey([10, 20, 30, 40]), &grey([10, 23, 26, 40])).unwrap();
        assert!((psnr - 40.1721).abs() < 1e-4, "{psnr}");
        assert_eq!(super::psnr(&grey([1; 4]), &grey([1; 4])), Some(f64::INFINITY));
    }

    #[test]
    fn usage_and_perplexity_by_hand() {
        let mut counts = CodeCounts::new(4);
        counts.add(&[0, 0, 1, 1, 9]);
        assert_eq!(counts.usage(), 0.5);
        assert!((counts.perplexity() - 2.0).abs() < 1e-12);
        assert_eq!(CodeCounts::new(4).perplexity(), 1.0);
    }
}
