//! Roots of covariances.

/// The lower triangle L with `L Lᵀ = A`, row by row, for a symmetric A `[n, n]` without negative eigenvalues, whose diagonal is raised by
/// `least` times its mean: what A leaves undetermined gets that much.
pub(crate) fn cholesky(mut a: Vec<f64>, n: usize, least: f64) -> Vec<f64> {
    let least = least * (0..n).map(|i| a[i * n + i]).sum::<f64>() / n as f64;
    for i in 0..n {
        let (above, row) = a.split_at_mut(i * n);
        for j in 0..i {
            let other = &above[j * n..];
            let dot: f64 = row[..j].iter().zip(other).map(|(x, y)| x * y).sum();
            row[j] = (row[j] - dot) / other[j];
        }
        let square: f64 = row[..i].iter().map(|x| x * x).sum();
        row[i] = (row[i] + least - square).max(least).max(f64::MIN_POSITIVE).sqrt();
        row[i + 1..n].fill(0.0);
    }
    a
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_by_hand_and_one_of_what_has_no_full_rank() {
        const LEAST: f64 = 1e-4;
        // [[4, 2], [2, 5]] = L Lᵀ with L = [[2, 0], [1, 2]], but for the least that is added.
        let root = cholesky(vec![4., 2., 2., 5.], 2, LEAST);
        assert!(root.iter().zip([2., 0., 1., 2.]).all(|(x, y)| (x - y).abs() < 1e-3), "{root:?}");
        let root = cholesky(vec![1., 1., 1., 1.], 2, LEAST);
        assert!((root[2] - 1.0).abs() < 1e-3 && (0.005..0.03).contains(&root[3]), "{root:?}");
        assert!(cholesky(vec![0.; 4], 2, LEAST).iter().all(|x| x.is_finite()));
    }
}
