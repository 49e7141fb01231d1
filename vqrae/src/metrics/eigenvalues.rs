//! Eigenvalues of a symmetric matrix, without the vectors.

use rayon::prelude::*;
use vqrae_kernels::vectorised;

/// Stripes of rows that are worked on side by side: a fixed number, so that sums do not depend on how many threads there are.
const STRIPES: usize = 8;

/// Up to this side a matrix is worked on by one thread.
const SMALL: usize = 192;

/// Sweeps that an eigenvalue is given; a few are usual.
const SWEEPS: usize = 100;

/// The eigenvalues of a symmetric `[n, n]` matrix, of which the lower triangle is read, in no order: Householder's reduction
/// to three diagonals, then QL with implicit shifts. Each is right to about ε times the largest. `None` if they do not
/// converge, which takes values that are not finite.
pub(super) fn eigenvalues(mut a: Vec<f64>, n: usize) -> Option<Vec<f64>> {
    let (diagonal, beside) = reduce(&mut a, n);
    drop(a);
    diagonalise(diagonal, beside)
}

/// A reflection I − u uᵀ / h, and what it takes from the rows before: A − u qᵀ − q uᵀ.
struct Reflection {
    u: Vec<f64>,
    q: Vec<f64>,
}

/// The diagonal, and beside it the element between i − 1 and i at i, of a matrix with the same eigenvalues.
///
/// From the last row upwards, row i is reflected so that only its last two elements stay. The change that this makes to the
/// rows above is made when they are read for the next reflection: one pass over half the matrix a row.
fn reduce(a: &mut [f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut diagonal, mut beside) = (vec![0.0; n], vec![0.0; n]);
    let mut last: Option<Reflection> = None;
    for i in (0..n).rev() {
        let (above, row) = a.split_at_mut(i * n);
        let row = &mut row[..=i];
        if let Some(last) = &last {
            change(row, i, last);
        }
        diagonal[i] = row[i];
        let mut u = row[..i].to_vec();
        let Some(&end) = u.last() else { break };
        let rest: f64 = u[..i - 1].iter().map(|x| x * x).sum();
        // Nothing to reflect, or so little that its square is no number of full precision.
        let small = rest <= f64::MIN_POSITIVE;
        let length = if small { end } else { -(rest + end * end).sqrt().copysign(end) };
        beside[i] = length;
        let h = if small { 0.0 } else { length * (length - end) };
        u[i - 1] = end - length;
        // Where there is no reflection the last one's change is made all the same.
        let mut q = product(above, n, &u, last.as_ref());
        last = (h > 0.0).then(|| {
            let half = dot(&u, &q) / (2.0 * h * h);
            q.iter_mut().zip(&u).for_each(|(q, u)| *q = *q / h - half * u);
            Reflection { u, q }
        });
    }
    (diagonal, beside)
}

/// Makes the last reflection's change to the rows of `a`, as many as `u` has elements, and multiplies them by `u`.
fn product(a: &mut [f64], n: usize, u: &[f64], last: Option<&Reflection>) -> Vec<f64> {
    let rows = u.len();
    // Rows get longer downwards: stripes of as many elements each.
    let bound = |stripe: usize| (rows as f64 * (stripe as f64 / STRIPES as f64).sqrt()) as usize;
    let bounds: Vec<usize> = if rows <= SMALL { vec![0, rows] } else { (0..=STRIPES).map(bound).collect() };
    let mut stripes = Vec::with_capacity(bounds.len());
    let mut left = a;
    for pair in bounds.windows(2) {
        let (stripe, rest) = left.split_at_mut((pair[1] - pair[0]) * n);
        stripes.push((pair[0], stripe));
        left = rest;
    }
    let of_stripe = |(first, stripe): (usize, &mut [f64])| {
        let mut sums = vec![0.0; rows];
        for (i, row) in stripe.chunks_exact_mut(n).enumerate() {
            let i = first + i;
            if let Some(last) = last {
                change(&mut row[..=i], i, last);
            }
            multiply_row(&row[..=i], u, &mut sums);
        }
        sums
    };
    let mut parts: Vec<Vec<f64>> = match stripes.len() {
        1 => stripes.into_iter().map(of_stripe).collect(),
        _ => stripes.into_par_iter().map(of_stripe).collect(),
    };
    let mut sums = parts.swap_remove(0);
    // swap_remove put the last part first; the order is the same each time.
    parts.iter().for_each(|part| sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part));
    sums
}

fn change(row: &mut [f64], i: usize, last: &Reflection) {
    let length = row.len();
    subtract(row, &last.u[..length], &last.q[..length], last.u[i], last.q[i]);
}

vectorised! {
    fn subtract(row: &mut [f64], u: &[f64], q: &[f64], u_i: f64, q_i: f64) {
        for ((x, u), q) in row.iter_mut().zip(u).zip(q) {
            *x -= u_i * q + q_i * u;
        }
    }

    /// Adds what the lower triangle's row (its last element is the diagonal's) and the column that mirrors it give to A u.
    fn multiply_row(row: &[f64], u: &[f64], sums: &mut [f64]) {
        const LANES: usize = 16;
        let i = row.len() - 1;
        let (row, diagonal, u_i) = (&row[..i], row[i], u[i]);
        let mut lanes = [0.0; LANES];
        let (rows, rest) = row.as_chunks::<LANES>();
        let (us, u_rest) = u[..i].as_chunks::<LANES>();
        let (sums, after) = sums.split_at_mut(i);
        let (sum_chunks, sum_rest) = sums.as_chunks_mut::<LANES>();
        for ((x, u), sum) in rows.iter().zip(us).zip(sum_chunks) {
            for l in 0..LANES {
                lanes[l] += x[l] * u[l];
                sum[l] += x[l] * u_i;
            }
        }
        let mut dot = 0.0;
        for ((x, u), sum) in rest.iter().zip(u_rest).zip(sum_rest) {
            dot += x * u;
            *sum += x * u_i;
        }
        after[0] += dot + lanes.iter().sum::<f64>() + diagonal * u_i;
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Eigenvalues of a matrix of three diagonals by QL with implicit shifts; `beside[i]` stands between i − 1 and i.
fn diagonalise(mut d: Vec<f64>, mut e: Vec<f64>) -> Option<Vec<f64>> {
    let n = d.len();
    e.rotate_left(1.min(n));
    for l in 0..n {
        for sweep in 0.. {
            let negligible = |m: &usize| e[*m].abs() <= f64::EPSILON * (d[*m].abs() + d[*m + 1].abs());
            let m = (l..n - 1).find(negligible).unwrap_or(n - 1);
            if m == l {
                break;
            }
            if sweep == SWEEPS {
                return None;
            }
            sweep_down(&mut d[l..=m], &mut e[l..=m]);
        }
    }
    d.iter().all(|x| x.is_finite()).then_some(d)
}

/// One sweep from the end of a block that falls apart nowhere to its start, shifted to bring out the first eigenvalue.
fn sweep_down(d: &mut [f64], e: &mut [f64]) {
    let m = d.len() - 1;
    let slope = (d[1] - d[0]) / (2.0 * e[0]);
    let mut g = d[m] - d[0] + e[0] / (slope + slope.hypot(1.0).copysign(slope));
    let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
    for i in (0..m).rev() {
        let (f, b) = (s * e[i], c * e[i]);
        let r = f.hypot(g);
        e[i + 1] = r;
        if r == 0.0 {
            // It falls apart after all.
            d[i + 1] -= p;
            e[m] = 0.0;
            return;
        }
        (s, c) = (f / r, g / r);
        g = d[i + 1] - p;
        let t = (d[i] - g) * s + 2.0 * c * b;
        p = s * t;
        d[i + 1] = g + p;
        g = c * t - b;
    }
    d[0] -= p;
    e[0] = g;
    e[m] = 0.0;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(a: Vec<f64>, n: usize) -> Vec<f64> {
        let mut values = eigenvalues(a, n).unwrap();
        values.sort_by(f64::total_cmp);
        values
    }

    #[test]
    fn eigenvalues_by_hand() {
        assert_eq!(sorted(vec![], 0), [0.0; 0]);
        assert_eq!(sorted(vec![7.0], 1), [7.0]);
        // [[2, 1], [1, 2]] has 1 and 3.
        let two = sorted(vec![2.0, 1.0, 1.0, 2.0], 2);
        assert!((two[0] - 1.0).abs() < 1e-14 && (two[1] - 3.0).abs() < 1e-14, "{two:?}");
        assert_eq!(sorted(vec![0.0; 9], 3), [0.0; 3]);
        assert!(eigenvalues(vec![f64::NAN; 9], 3).is_none());
    }

    #[test]
    fn the_second_difference_has_its_known_eigenvalues_however_it_is_turned() {
        for n in [3, 50, 300] {
            let expected: Vec<f64> =
                (1..=n).map(|k| 2.0 - 2.0 * (std::f64::consts::PI * k as f64 / (n + 1) as f64).cos()).collect();
            // H T H for the reflection H = I − 2 v vᵀ / n, v of ones, fills the whole matrix.
            let t = |i: usize, j: usize| [2.0, -1.0].get(i.abs_diff(j)).copied().unwrap_or(0.0);
            let sum = |i: usize| (0..n).map(|j| t(i, j)).sum::<f64>();
            let all: f64 = (0..n).map(sum).sum();
            let share = 2.0 / n as f64;
            let turned = |at: usize| {
                let (i, j) = (at / n, at % n);
                t(i, j) - share * (sum(i) + sum(j)) + share * share * all
            };
            let values = sorted((0..n * n).map(turned).collect(), n);
            let off = values.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(off < 1e-12, "n = {n}: {off:e}");
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let n = 250;
        let a: Vec<f64> = (0..n * n).map(|at| ((at / n * 31) ^ (at % n * 31)) as f64 % 97.0).collect();
        let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let values = |threads| pool(threads).install(|| eigenvalues(a.clone(), n).unwrap());
        assert_eq!(values(1), values(3));
    }
}
