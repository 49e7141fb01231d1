//! Roots of covariances.

use rayon::prelude::*;
use vqrae_kernels::vectorised;

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

/// A root R `[n, r]`, row by row, with `R Rᵀ = A`, of a symmetric A `[n, n]` without negative eigenvalues, and its rank r:
/// Cholesky's with pivots, which ends where what is left of A is no more than rounding.
pub(crate) fn semidefinite_root(a: Vec<f64>, n: usize) -> (Vec<f64>, usize) {
    let mut left: Vec<f64> = (0..n).map(|i| a[i * n + i]).collect();
    let least = n as f64 * f64::EPSILON * left.iter().copied().fold(0.0, f64::max);
    let mut root = vec![0.0; n * n];
    let mut open: Vec<bool> = vec![true; n];
    for k in 0..n {
        let widest = (0..n).filter(|&i| open[i]).max_by(|&i, &j| left[i].total_cmp(&left[j]));
        let Some(pivot) = widest.filter(|&pivot| left[pivot] > least) else {
            return (first_columns(&root, n, k), k);
        };
        open[pivot] = false;
        let scale = left[pivot].sqrt();
        let of_pivot = root[pivot * n..][..k].to_vec();
        let of_a = &a[pivot * n..][..n];
        let rows = root.par_chunks_exact_mut(n).zip(left.par_iter_mut()).zip(&open).enumerate().with_min_len(64);
        rows.filter(|(i, (_, open))| **open || *i == pivot).for_each(|(i, ((row, left), _))| {
            row[k] = if i == pivot { scale } else { (of_a[i] - dot(&row[..k], &of_pivot)) / scale };
            *left -= row[k] * row[k];
        });
    }
    (root, n)
}

/// The first r columns of rows of n.
fn first_columns(rows: &[f64], n: usize, r: usize) -> Vec<f64> {
    rows.chunks_exact(n.max(1)).flat_map(|row| &row[..r]).copied().collect()
}

vectorised! {
    fn dot(x: &[f64], y: &[f64]) -> f64 {
        const LANES: usize = 16;
        let mut lanes = [0.0; LANES];
        let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
        for (x, y) in xs.iter().zip(ys) {
            for l in 0..LANES {
                lanes[l] += x[l] * y[l];
            }
        }
        let rest: f64 = x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum();
        lanes.iter().sum::<f64>() + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_of_half_the_rank() {
        // A = B Bᵀ of a B [4, 2]: rank 2, and R Rᵀ gives A again.
        let b = [[1.0, 2.0], [3.0, -1.0], [0.0, 0.5], [-2.0, 4.0]];
        let a: Vec<f64> = (0..16).map(|k| b[k / 4][0] * b[k % 4][0] + b[k / 4][1] * b[k % 4][1]).collect();
        let (root, rank) = semidefinite_root(a.clone(), 4);
        assert_eq!((rank, root.len()), (2, 8));
        for (k, a) in a.iter().enumerate() {
            let product: f64 = (0..2).map(|r| root[k / 4 * 2 + r] * root[k % 4 * 2 + r]).sum();
            assert!((product - a).abs() < 1e-12, "{k}: {product}, expected: {a}");
        }
        assert_eq!(semidefinite_root(vec![0.0; 9], 3), (vec![], 0));
        assert_eq!(semidefinite_root(vec![4.0], 1), (vec![2.0], 1));
        assert_eq!(semidefinite_root(vec![], 0), (vec![], 0));
    }

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
