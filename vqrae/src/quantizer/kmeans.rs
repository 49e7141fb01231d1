//! k-means (Lloyd, 1982) of features, for codebooks that start from data.

use vqrae_kernels::{Codebook, Error, Metric};

/// Draws the second number of different indices below the first.
pub type Choose<'a> = &'a mut dyn FnMut(usize, usize) -> Vec<usize>;

/// What one Lloyd step found.
#[derive(Debug)]
pub struct Found {
    /// Points that were nearest to each centre, K numbers.
    pub sizes: Vec<usize>,
    /// Mean squared error per value before the step.
    pub error: f64,
}

/// Moves every centre to the mean of the points nearest to it, for [`Metric::Cosine`] brought to length one. A centre
/// without points stays.
///
/// # Shapes
/// - centres: `[K, e]`
/// - points: `[M, e]`, of length one for [`Metric::Cosine`]
///
/// # Errors
/// If a value is not finite.
pub fn step(centres: &mut [f32], points: &[f32], e: usize, metric: Metric) -> Result<Found, Error> {
    let nearest = Codebook::new(centres.to_vec(), e, metric)?.nearest(points)?;
    let mut sums = vec![0f64; centres.len()];
    let mut sizes = vec![0usize; centres.len() / e];
    let mut error = 0f64;
    for (point, &k) in points.chunks_exact(e).zip(&nearest) {
        let k = k as usize;
        sizes[k] += 1;
        for ((sum, &x), &c) in sums[k * e..][..e].iter_mut().zip(point).zip(&centres[k * e..][..e]) {
            *sum += f64::from(x);
            error += f64::from(x - c).powi(2);
        }
    }
    for ((centre, sum), &size) in centres.chunks_exact_mut(e).zip(sums.chunks_exact(e)).zip(&sizes) {
        if size > 0 {
            centre.iter_mut().zip(sum).for_each(|(c, sum)| *c = (sum / size as f64) as f32);
            if metric == Metric::Cosine {
                unit(centre);
            }
        }
    }
    Ok(Found { sizes, error: error / points.len() as f64 })
}

/// K centres of `points` and how many points the last step gave each, from points that `choose` draws; without
/// `iterations` these points themselves, each of size one. As vector-quantize-pytorch's `kmeans`, whose points are drawn
/// again where there are fewer than centres.
///
/// # Shapes
/// - points: `[M, e]`
/// - output: `[K, e]`, `[K]`
///
/// # Errors
/// As [`step`]; also if there is no point.
pub fn run(
    points: &[f32],
    e: usize,
    k: usize,
    iterations: usize,
    metric: Metric,
    choose: Choose,
) -> Result<(Vec<f32>, Vec<usize>), Error> {
    let m = points.len() / e;
    let mut drawn = choose(m, k.min(m));
    drawn.extend((drawn.len()..k).map(|i| i % m.max(1)));
    let mut centres: Vec<f32> = drawn.iter().flat_map(|&i| points[i * e..][..e].iter().copied()).collect();
    let mut sizes = vec![1; k];
    for _ in 0..iterations {
        sizes = step(&mut centres, points, e, metric)?.sizes;
    }
    Ok((centres, sizes))
}

/// What a shorter row is divided by: vector-quantize-pytorch's.
pub(super) const SHORTEST: f64 = 1e-6;

/// Brings a row to length one; a row of zeros stays.
pub(super) fn unit(row: &mut [f32]) {
    let length = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt().max(SHORTEST);
    row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_moves_centres_to_their_means() {
        let points = [0., 2., 10., 14.];
        let mut centres = [1.5, 9.0, 100.0];
        let found = step(&mut centres, &points, 1, Metric::Euclidean).unwrap();
        assert_eq!((centres, found.sizes), ([1.0, 12.0, 100.0], vec![2, 2, 0]));
        assert_eq!(found.error, (1.5 * 1.5 + 0.25 + 1.0 + 25.0) / 4.0);
    }

    #[test]
    fn centres_by_angle_have_length_one() {
        let points = [1., 0., 0., 1., -1., 0.];
        let mut centres = [2., 1.9, -1., 0.];
        step(&mut centres, &points, 2, Metric::Cosine).unwrap();
        let half = 0.5f32.sqrt();
        assert_eq!(centres, [half, half, -1., 0.]);
    }

    #[test]
    fn more_centres_than_points_repeat_points() {
        let mut first = |_, amount| (0..amount).collect();
        let (centres, sizes) = run(&[3., 4.], 1, 5, 0, Metric::Euclidean, &mut first).unwrap();
        assert_eq!((centres, sizes), (vec![3., 4., 3., 4., 3.], vec![1; 5]));
    }
}
