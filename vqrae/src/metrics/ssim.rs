//! Structural similarity (Wang et al. 2004), and the same on several scales (Wang et al. 2003), of 8-bit images.

use vqrae_kernels::vectorised;

use crate::image::Rgb;

/// Side of the Gaussian window.
const SIDE: usize = 11;

/// Its standard deviation in pixels.
const SIGMA: f64 = 1.5;

/// (0.01 · 255)² and (0.03 · 255)², which keep the quotients finite.
const C1: f64 = 6.5025;
const C2: f64 = 58.5225;

/// How much each scale weighs, from the finest to the coarsest.
const SCALES: [f64; 5] = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333];

/// The mean structural similarity of two 8-bit images of the same size, 1 when they are equal: an 11×11 Gaussian window of
/// σ = 1.5 where it lies inside the image, population covariance, the mean over pixels and channels. That is skimage's
/// `structural_similarity(channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`.
///
/// `None` when the sizes differ or a side is under 11 pixels.
pub fn ssim(a: &Rgb, b: &Rgb) -> Option<f64> {
    mean_of_channels(&scales(a, b, 1), |scales| Some(scales.first()?.whole))
}

/// The same over five scales, each half as large as the one before: the contrast and structure of the first four and all of
/// the last, each to a power of its own, multiplied. Negative factors count as zero, and an odd side is halved with a row or
/// column of zeros before it, as in PyPI `pytorch-msssim`'s `ms_ssim(data_range=255)`.
///
/// `None` when the sizes differ or a side is under 161 pixels, where the window would not fit the coarsest scale.
pub fn ms_ssim(a: &Rgb, b: &Rgb) -> Option<f64> {
    mean_of_channels(&scales(a, b, SCALES.len()), product)
}

/// [`ssim`] and [`ms_ssim`] in little more than the time of the latter, whose finest scale has the former.
pub fn ssim_and_ms_ssim(a: &Rgb, b: &Rgb) -> (Option<f64>, Option<f64>) {
    let scales = scales(a, b, SCALES.len());
    (mean_of_channels(&scales, |scales| Some(scales.first()?.whole)), mean_of_channels(&scales, product))
}

/// The similarities of each channel on `count` scales, from the finest on: as many as the window fits.
fn scales(a: &Rgb, b: &Rgb, count: usize) -> [Vec<Similarity>; 3] {
    let window = window();
    [0, 1, 2].map(|c| {
        let mut scales = Vec::with_capacity(count);
        if !same_size(a, b) {
            return scales;
        }
        let (mut a, mut b) = (Plane::of(a, c), Plane::of(b, c));
        while let Some(similarity) = similarity(&a, &b, &window) {
            scales.push(similarity);
            if scales.len() == count {
                break;
            }
            (a, b) = (a.halved(), b.halved());
        }
        scales
    })
}

/// MS-SSIM of the scales of one channel, if all are there.
fn product(scales: &[Similarity]) -> Option<f64> {
    let (last, finer) = scales.split_last().filter(|_| scales.len() == SCALES.len())?;
    let factors = finer.iter().map(|scale| scale.contrast).chain([last.whole]);
    Some(factors.zip(SCALES).map(|(factor, weight)| factor.max(0.0).powf(weight)).product())
}

fn same_size(a: &Rgb, b: &Rgb) -> bool {
    (a.width, a.height, a.data.len()) == (b.width, b.height, b.data.len()) && a.data.len() == 3 * a.width * a.height
}

fn mean_of_channels(channels: &[Vec<Similarity>; 3], of: impl Fn(&[Similarity]) -> Option<f64>) -> Option<f64> {
    let [red, green, blue] = channels;
    Some((of(red)? + of(green)? + of(blue)?) / 3.0)
}

/// Weights of the window along one side; their sum is 1.
fn window() -> [f64; SIDE] {
    let weight = |i: usize| (-0.5 * ((i as f64 - (SIDE / 2) as f64) / SIGMA).powi(2)).exp();
    let sum: f64 = (0..SIDE).map(weight).sum();
    std::array::from_fn(|i| weight(i) / sum)
}

/// One channel of an image, from 0 to 255.
struct Plane {
    width: usize,
    height: usize,
    data: Vec<f64>,
}

impl Plane {
    fn of(image: &Rgb, channel: usize) -> Self {
        let data = image.data.iter().skip(channel).step_by(3).map(|&x| f64::from(x)).collect();
        Self { width: image.width, height: image.height, data }
    }

    /// Means of two by two pixels; before an odd side stands a zero.
    fn halved(&self) -> Self {
        let (before, above) = (self.width % 2, self.height % 2);
        let (width, height) = (self.width.div_ceil(2), self.height.div_ceil(2));
        let at = |y: usize, x: usize| match (y.checked_sub(above), x.checked_sub(before)) {
            (Some(y), Some(x)) => self.data[y * self.width + x],
            _ => 0.0,
        };
        let mean = |y: usize, x: usize| {
            0.25 * (at(2 * y, 2 * x) + at(2 * y, 2 * x + 1) + at(2 * y + 1, 2 * x) + at(2 * y + 1, 2 * x + 1))
        };
        let data = (0..height).flat_map(|y| (0..width).map(move |x| mean(y, x))).collect();
        Self { width, height, data }
    }
}

/// Means over the places of the window: of luminance × contrast × structure, and of the latter two alone.
struct Similarity {
    whole: f64,
    contrast: f64,
}

fn similarity(a: &Plane, b: &Plane, window: &[f64; SIDE]) -> Option<Similarity> {
    if a.width.min(a.height) < SIDE {
        return None;
    }
    let places = ((a.width - SIDE + 1) * (a.height - SIDE + 1)) as f64;
    let mut sums = (0.0, 0.0);
    let mut rows = vec![0.0; 8 * a.width];
    for y in 0..=a.height - SIDE {
        let row = add_row(&a.data[y * a.width..], &b.data[y * a.width..], a.width, window, &mut rows);
        sums = (sums.0 + row.0, sums.1 + row.1);
    }
    Some(Similarity { whole: sums.0 / places, contrast: sums.1 / places })
}

vectorised! {
    /// The two sums of [`Similarity`] over one row of places, whose windows begin where `a` and `b` do. `rows` is room for
    /// the moments a, b, a² + b² and ab, summed down the window and then also along it.
    fn add_row(a: &[f64], b: &[f64], width: usize, window: &[f64; SIDE], rows: &mut [f64]) -> (f64, f64) {
        rows.fill(0.0);
        let (down, along) = rows.split_at_mut(4 * width);
        {
            let (first, second) = down.split_at_mut(2 * width);
            let ((of_a, of_b), (squares, product)) = (first.split_at_mut(width), second.split_at_mut(width));
            for (t, &weight) in window.iter().enumerate() {
                let (a, b) = (&a[t * width..][..width], &b[t * width..][..width]);
                for j in 0..width {
                    of_a[j] += weight * a[j];
                    of_b[j] += weight * b[j];
                    squares[j] += weight * (a[j] * a[j] + b[j] * b[j]);
                    product[j] += weight * (a[j] * b[j]);
                }
            }
        }
        let places = width + 1 - SIDE;
        for (down, along) in down.chunks_exact(width).zip(along.chunks_exact_mut(width)) {
            let along = &mut along[..places];
            for (t, &weight) in window.iter().enumerate() {
                let down = &down[t..][..places];
                for j in 0..places {
                    along[j] += weight * down[j];
                }
            }
        }
        let (first, second) = along.split_at(2 * width);
        let ((of_a, of_b), (squares, product)) = (first.split_at(width), second.split_at(width));
        let mut sums = (0.0, 0.0);
        for j in 0..places {
            let (a, b) = (of_a[j], of_b[j]);
            let (both, ab) = (a * a + b * b, a * b);
            let contrast = (2.0 * (product[j] - ab) + C2) / (squares[j] - both + C2);
            sums.0 += contrast * ((2.0 * ab + C1) / (both + C1));
            sums.1 += contrast;
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(width: usize, height: usize, level: impl Fn(usize) -> u8) -> Rgb {
        Rgb { width, height, data: (0..3 * width * height).map(level).collect() }
    }

    #[test]
    fn plain_images_differ_in_luminance_alone() {
        // Without variance what is left is (2ab + C1) / (a² + b² + C1).
        let (a, b) = (image(12, 11, |_| 100), image(12, 11, |_| 120));
        let expected = (2.0 * 100.0 * 120.0 + C1) / (100.0f64.powi(2) + 120.0f64.powi(2) + C1);
        assert!((ssim(&a, &b).unwrap() - expected).abs() < 1e-12);
    }

    #[test]
    fn equal_images_are_at_one_and_small_or_unlike_ones_at_none() {
        let noise = |i: usize| (i * 7919 % 251) as u8;
        let large = image(161, 170, noise);
        assert_eq!(ssim(&large, &large), Some(1.0));
        assert_eq!(ssim_and_ms_ssim(&large, &large), (Some(1.0), ms_ssim(&large, &large)));
        assert!((ms_ssim(&large, &large).unwrap() - 1.0).abs() < 1e-12);
        assert_eq!(ms_ssim(&image(160, 170, noise), &image(160, 170, noise)), None);
        assert_eq!(ssim(&image(10, 40, noise), &image(10, 40, noise)), None);
        assert!(ssim(&image(11, 11, noise), &image(11, 11, noise)).is_some());
        assert_eq!(ssim(&image(12, 20, noise), &image(20, 12, noise)), None);
        assert_eq!(ssim(&image(0, 0, noise), &image(0, 0, noise)), None);
    }

    #[test]
    fn an_odd_side_is_halved_with_zeros_before_it() {
        // torch.nn.functional.avg_pool2d([[4., 8, 12]], 2, padding=(1, 1)) → [[1., 5.]]
        let plane = Plane { width: 3, height: 1, data: vec![4.0, 8.0, 12.0] };
        assert_eq!(plane.halved().data, [1.0, 5.0]);
        let plane = Plane { width: 2, height: 2, data: vec![1.0, 2.0, 3.0, 6.0] };
        assert_eq!(plane.halved().data, [3.0]);
    }
}
