//! Fréchet inception distance (Heusel et al., arXiv 1706.08500): how far apart two sets of images are, by the mean and the
//! covariance of their features.

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;
use vqrae_kernels::vectorised;

use super::eigenvalues::eigenvalues;
use crate::cholesky::semidefinite_root;

/// Mean and covariance of features, in f64, of as many images as one likes: features are added and forgotten.
///
/// The same features in the same portions give the same bits.
#[derive(Debug, Clone)]
pub struct Statistics {
    width: usize,
    count: u64,
    mean: Vec<f64>,
    /// Σ (x − mean)(x − mean)ᵀ, `[D, D]`, of which the upper triangle is kept.
    scatter: Vec<f64>,
}

impl Statistics {
    /// Of no features yet, each of `width` numbers.
    pub fn new(width: usize) -> Self {
        Self { width, count: 0, mean: vec![0.0; width], scatter: vec![0.0; width * width] }
    }

    /// Numbers of a feature, D.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Features added so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their mean, `[D]`.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// Their covariance `[D, D]` with N − 1 in the denominator, as numpy's; zeros of fewer than two.
    pub fn covariance(&self) -> Vec<f64> {
        let d = self.width;
        let scale = 1.0 / (self.count.max(2) - 1) as f64;
        let at = |i: usize, j: usize| self.scatter[i.min(j) * d + i.max(j)] * scale;
        (0..d * d).into_par_iter().map(|k| at(k / d, k % d)).collect()
    }

    /// Adds the rows of f32 `[B, D]`, wherever they are.
    ///
    /// # Errors
    /// If the width is another, or a number is not finite.
    pub fn add(&mut self, features: &Tensor) -> Result<()> {
        let (b, d) = features.dims2()?;
        if d != self.width {
            candle_core::bail!("features of {d} numbers, expected: {}", self.width);
        }
        let rows: Vec<f64> = features.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).collect();
        if !rows.iter().all(|x| x.is_finite()) {
            candle_core::bail!("a feature that is no finite number");
        }
        if b == 0 || d == 0 {
            return Ok(());
        }
        let mut mean = vec![0.0; d];
        for row in rows.chunks_exact(d) {
            mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += x / b as f64);
        }
        let mut centred = rows;
        for row in centred.chunks_exact_mut(d) {
            row.iter_mut().zip(&mean).for_each(|(x, mean)| *x -= mean);
        }
        centred.extend(self.move_mean(&mean, b as u64));
        self.scatter.par_chunks_exact_mut(d).enumerate().for_each(|(i, sums)| {
            centred.chunks_exact(d).for_each(|row| add_scaled(&mut sums[i..], &row[i..], row[i]));
        });
        Ok(())
    }

    /// Adds what another one has seen.
    ///
    /// # Errors
    /// If the width is another.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if other.width != self.width {
            candle_core::bail!("features of {} numbers, expected: {}", other.width, self.width);
        }
        if other.count == 0 || self.width == 0 {
            return Ok(());
        }
        let apart = self.move_mean(&other.mean, other.count);
        let rows = self.scatter.par_chunks_exact_mut(self.width).zip(other.scatter.par_chunks_exact(self.width));
        rows.enumerate().for_each(|(i, (sums, others))| {
            add_scaled(&mut sums[i..], &others[i..], 1.0);
            add_scaled(&mut sums[i..], &apart[i..], apart[i]);
        });
        Ok(())
    }

    /// Takes `count` features of mean `mean` into the mean; returns the vector whose square they add to the scatter beside
    /// their own.
    fn move_mean(&mut self, mean: &[f64], count: u64) -> Vec<f64> {
        let (n, b) = (self.count as f64, count as f64);
        self.count += count;
        let (step, apart) = (b / (n + b), (n * b / (n + b)).sqrt());
        let mut moved = Vec::with_capacity(self.width);
        for (ours, theirs) in self.mean.iter_mut().zip(mean) {
            let difference = theirs - *ours;
            *ours += difference * step;
            moved.push(difference * apart);
        }
        moved
    }
}

vectorised! {
    fn add_scaled(sums: &mut [f64], x: &[f64], scale: f64) {
        for (sum, x) in sums.iter_mut().zip(x) {
            *sum += scale * x;
        }
    }
}

/// The Fréchet distance of two normal distributions with these means and covariances,
/// `|μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr √(Σ₁ Σ₂)`, in f64: pytorch-fid's and torch-fidelity's FID where the features are
/// Inception's.
///
/// The last trace is the sum of the roots of the eigenvalues of Rᵀ Σ₂ R, where Σ₁ = R Rᵀ; both may be singular, as they are
/// where there are fewer images than numbers in a feature. FID falls with the number of images, whatever they show: compare
/// values of one number of images, and take under some thousands for what they are.
///
/// # Errors
/// If the widths differ, or one has fewer than two features.
pub fn fid(a: &Statistics, b: &Statistics) -> Result<f64> {
    if a.width != b.width {
        candle_core::bail!("FID of features of {} and of {} numbers", a.width, b.width);
    }
    if a.count.min(b.count) < 2 {
        candle_core::bail!("FID wants at least two images on either side, got: {} and {}", a.count, b.count);
    }
    let means: f64 = a.mean.iter().zip(&b.mean).map(|(a, b)| (a - b).powi(2)).sum();
    let d = a.width;
    let trace = |covariance: &[f64]| (0..d).map(|i| covariance[i * (d + 1)]).sum::<f64>();
    // The root of fewer images has fewer columns.
    let (rooted, other) = if a.count <= b.count { (a, b) } else { (b, a) };
    let (first, second) = (rooted.covariance(), other.covariance());
    let traces = trace(&first) + trace(&second);
    Ok(means + traces - 2.0 * trace_of_root(first, second, d)?)
}

/// `tr √(Σ₁ Σ₂)`.
fn trace_of_root(first: Vec<f64>, second: Vec<f64>, d: usize) -> Result<f64> {
    let (root, rank) = semidefinite_root(first, d);
    if rank == 0 {
        return Ok(0.0);
    }
    let root = Tensor::from_vec(root, (d, rank), &Device::Cpu)?;
    let product = Tensor::from_vec(second, (d, d), &Device::Cpu)?.matmul(&root)?; // [D, r]
    let product = root.t()?.matmul(&product)?.flatten_all()?.to_vec1()?; // [r, r]
    let Some(values) = eigenvalues(product, rank) else {
        candle_core::bail!("the eigenvalues of the covariances' product do not converge");
    };
    Ok(values.into_iter().map(|value| value.max(0.0).sqrt()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statistics(rows: &[[f32; 2]], portion: usize) -> Statistics {
        let mut statistics = Statistics::new(2);
        for rows in rows.chunks(portion) {
            let rows = Tensor::from_vec(rows.concat(), (rows.len(), 2), &Device::Cpu).unwrap();
            statistics.add(&rows).unwrap();
        }
        statistics
    }

    const ROWS: [[f32; 2]; 5] = [[1.0, 2.0], [3.0, -1.0], [0.5, 0.0], [2.0, 2.0], [-4.0, 7.0]];

    fn close(a: &[f64], b: &[f64]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12)
    }

    #[test]
    fn portions_and_merging_give_mean_and_covariance() {
        // numpy: mean [0.5, 2.0], cov(rowvar=False) [[7.25, -7.5], [-7.5, 9.5]]
        for portion in 1..=5 {
            let whole = statistics(&ROWS, portion);
            assert!(close(whole.mean(), &[0.5, 2.0]), "{:?}", whole.mean());
            assert!(close(&whole.covariance(), &[7.25, -7.5, -7.5, 9.5]), "{:?}", whole.covariance());
            let (mut first, second) = (statistics(&ROWS[..portion], 2), statistics(&ROWS[portion..], 2));
            first.merge(&second).unwrap();
            assert_eq!(first.count(), 5);
            assert!(close(first.mean(), whole.mean()) && close(&first.covariance(), &whole.covariance()));
        }
    }

    #[test]
    fn fid_by_hand() {
        // Along one axis: (μ₁ − μ₂)² + (σ₁ − σ₂)². σ² of 0, 2 is 2, of 0, 6 is 18; means 1 and 3.
        let (a, b) = (statistics(&[[0.0, 5.0], [2.0, 5.0]], 2), statistics(&[[0.0, 5.0], [6.0, 5.0]], 2));
        let expected = 4.0 + (18f64.sqrt() - 2f64.sqrt()).powi(2);
        assert!((fid(&a, &b).unwrap() - expected).abs() < 1e-12);
        assert!((fid(&b, &a).unwrap() - expected).abs() < 1e-12);
        assert!(fid(&a, &a).unwrap().abs() < 1e-12);
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let a = statistics(&ROWS, 2);
        let said = |result: Result<f64>| result.unwrap_err().to_string();
        assert!(said(fid(&a, &Statistics::new(3))).contains("2 and of 3 numbers"));
        assert!(said(fid(&a, &statistics(&ROWS[..1], 1))).contains("at least two images"));
        let mut a = a;
        let rows = |values: [[f32; 1]; 1]| Tensor::new(&values, &Device::Cpu).unwrap();
        assert!(a.add(&rows([[1.0]])).unwrap_err().to_string().contains("expected: 2"));
        let mut one = Statistics::new(1);
        assert!(one.add(&rows([[f32::NAN]])).unwrap_err().to_string().contains("no finite number"));
    }
}
