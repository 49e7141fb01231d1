//! `PIL.Image.resize` on 8-bit RGB, bit for bit: the rounding of ADM's crop, which torchvision's differs from.
//!
//! Two passes, 8 bits in between, weights in fixed point of 22 bits. Pillow 13 changed the order of the passes for tall
//! images (python-pillow/Pillow#9549): results for those differ from Pillow 12's.

use super::Rgb;

const PRECISION_BITS: u32 = 32 - 8 - 2;

#[derive(Clone, Copy)]
pub(super) enum Filter {
    Box,
    Bicubic,
}

impl Filter {
    fn support(self) -> f64 {
        match self {
            Self::Box => 0.5,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        const A: f64 = -0.5;
        match self {
            Self::Box => f64::from(x > -0.5 && x <= 0.5),
            Self::Bicubic => match x.abs() {
                x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
                x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
                _ => 0.0,
            },
        }
    }
}

/// The source pixels of one target pixel, from `first` on, and their fixed-point weights.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

pub(super) fn resize(image: &Rgb, width: usize, height: usize, filter: Filter) -> Rgb {
    if height_first(image, width, height) {
        return resize_width(&resize_height(image, height, filter), width, filter);
    }
    resize_height(&resize_width(image, width, filter), height, filter)
}

/// Pillow 13's rule, found by trying sizes: the height loses more than twice as many pixels as the width.
fn height_first(image: &Rgb, width: usize, height: usize) -> bool {
    height < image.height && image.height + 2 * width > height + 2 * image.width
}

fn resize_width(image: &Rgb, width: usize, filter: Filter) -> Rgb {
    if width == image.width {
        return image.clone();
    }
    let windows = windows(image.width, width, filter);
    let mut data = Vec::with_capacity(3 * width * image.height);
    for row in image.data.chunks_exact(3 * image.width) {
        let (pixels, _) = row.as_chunks::<3>();
        for window in &windows {
            let mut sums = [1 << (PRECISION_BITS - 1); 3];
            for (pixel, &weight) in pixels[window.first..].iter().zip(&window.weights) {
                for (sum, &value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(value) * weight;
                }
            }
            data.extend(sums.map(to_8_bits));
        }
    }
    Rgb { width, height: image.height, data }
}

fn resize_height(image: &Rgb, height: usize, filter: Filter) -> Rgb {
    if height == image.height {
        return image.clone();
    }
    let stride = 3 * image.width;
    let mut data = Vec::with_capacity(stride * height);
    let mut sums = vec![0i32; stride];
    for window in windows(image.height, height, filter) {
        sums.fill(1 << (PRECISION_BITS - 1));
        let rows = image.data[window.first * stride..].chunks_exact(stride);
        for (row, &weight) in rows.zip(&window.weights) {
            for (sum, &value) in sums.iter_mut().zip(row) {
                *sum += i32::from(value) * weight;
            }
        }
        data.extend(sums.iter().map(|&sum| to_8_bits(sum)));
    }
    Rgb { width: image.width, height, data }
}

fn to_8_bits(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

fn windows(source: usize, target: usize, filter: Filter) -> Vec<Window> {
    let scale = source as f64 / target as f64;
    let filter_scale = scale.max(1.0);
    let support = filter.support() * filter_scale;
    let window = |index: usize| {
        let centre = (index as f64 + 0.5) * scale;
        let first = (centre - support + 0.5).max(0.0) as usize;
        let end = ((centre + support + 0.5) as usize).min(source);
        let weight = |pixel: usize| filter.weight((pixel as f64 - centre + 0.5) * (1.0 / filter_scale));
        let weights: Vec<f64> = (first..end).map(weight).collect();
        let total: f64 = weights.iter().sum();
        let fixed = |weight: f64| (weight / total * f64::from(1 << PRECISION_BITS)).round() as i32;
        Window { first, weights: weights.into_iter().map(fixed).collect() }
    };
    (0..target).map(window).collect()
}
