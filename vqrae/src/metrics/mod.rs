//! How good a reconstruction is, and how much of a codebook is in use.
//!
//! | measure | of | as |
//! |---|---|---|
//! | [`psnr`] | two images | skimage's `peak_signal_noise_ratio` of 8-bit images |
//! | [`ssim`] | two images | skimage's `structural_similarity` with a Gaussian window |
//! | [`ms_ssim`] | two images | PyPI `pytorch-msssim`'s `ms_ssim` |
//! | [`fid`] | features of two sets of images ([`Statistics`]) | pytorch-fid, torch-fidelity |
//! | [`CodeCounts`] | codes | |
//!
//! LPIPS and the network whose features the FID compares stand in [`perceptual`](crate::perceptual).

mod codes;
mod eigenvalues;
mod fid;
mod ssim;

pub use codes::CodeCounts;
pub use fid::{Statistics, fid};
pub use ssim::{ms_ssim, ssim, ssim_and_ms_ssim};

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
}
