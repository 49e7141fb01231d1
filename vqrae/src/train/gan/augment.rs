//! Differentiable augmentation (Zhao et al., arXiv 2006.10738), the form of StyleGAN-T that RAE uses: what a discriminator
//! sees is shifted, coloured and cut, and the generator's gradient passes through it.

use std::ops::Range;

use candle_core::{Result, Tensor};
use rand::Rng;
use serde::{Deserialize, Serialize};

/// How much is changed, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Chance, a batch, of each of: translation, colour, cutout.
    pub probability: f64,
    /// Furthest translation, as a share of height and width.
    pub translation: f64,
    /// Side of the square that is cut out, as a share of height and width; 0 for none.
    pub cutout: f64,
}

/// As RAE trains.
impl Default for Config {
    fn default() -> Self {
        Self { probability: 1.0, translation: 0.125, cutout: 0.0 }
    }
}

impl Config {
    /// No augmentation.
    pub const NONE: Self = Self { probability: 0.0, translation: 0.125, cutout: 0.0 };

    /// Whether the shares make sense; the error names the field.
    pub fn check(&self) -> std::result::Result<(), String> {
        for (name, share, most) in [
            ("probability", self.probability, 1.0),
            ("translation", self.translation, 0.5),
            ("cutout", self.cutout, 1.0),
        ] {
            if !(0.0..=most).contains(&share) {
                return Err(format!("gan.augment.{name} is {share}, expected: 0 to {most}"));
            }
        }
        Ok(())
    }
}

/// What is drawn for one batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Draws {
    /// Whether to translate, to colour, to cut.
    pub which: [bool; 3],
    /// From [0, 1), an image each: vertical and horizontal translation, brightness, saturation, contrast, vertical and
    /// horizontal place of the cut.
    pub uniform: [Vec<f32>; 7],
}

impl Draws {
    /// For these images of a batch; what one of them draws does not depend on which others are asked for.
    pub fn new(config: &Config, images: Range<usize>, random: &mut impl Rng) -> Self {
        let which = std::array::from_fn(|_| random.random::<f64>() < config.probability);
        let mut uniform: [Vec<f32>; 7] = Default::default();
        for image in 0..images.end {
            for values in &mut uniform {
                let value: f32 = random.random();
                values.extend((image >= images.start).then_some(value));
            }
        }
        Self { which, uniform }
    }
}

impl Config {
    /// Augments a batch. `[B, 3, H, W]` to the same; as many draws as images.
    pub fn apply(&self, images: &Tensor, draws: &Draws) -> Result<Tensor> {
        let [translate, colour, cut] = draws.which;
        let mut images = images.clone();
        if translate {
            images = self.translate(&images, draws)?;
        }
        if colour {
            images = coloured(&images, draws)?;
        }
        if cut && self.cutout > 0.0 {
            images = images.broadcast_mul(&self.mask(&images, draws)?)?;
        }
        Ok(images)
    }

    fn translate(&self, images: &Tensor, draws: &Draws) -> Result<Tensor> {
        let (b, _, h, w) = images.dims4()?;
        let offset = |side: usize, uniform: f32| {
            let most = (side as f64 * self.translation).round_ties_even() as isize;
            (uniform * (2 * most + 1) as f32).floor() as isize - most
        };
        let moved = |i: usize| {
            let image = images.narrow(0, i, 1)?;
            let image = shifted(&image, 2, offset(h, draws.uniform[0][i]))?;
            shifted(&image, 3, offset(w, draws.uniform[1][i]))
        };
        Tensor::cat(&(0..b).map(moved).collect::<Result<Vec<_>>>()?, 0)
    }

    /// `[B, 1, H, W]`: zero where the image is cut.
    fn mask(&self, images: &Tensor, draws: &Draws) -> Result<Tensor> {
        let (b, _, h, w) = images.dims4()?;
        // The middle may lie anywhere; what would be beyond the edge falls on it.
        let range = |side: usize, uniform: f32| {
            let cut = (side as f64 * self.cutout).round_ties_even() as usize;
            let place = (uniform * (side + 1 - cut % 2) as f32).floor() as usize;
            let held = move |at: usize| (place + at).saturating_sub(cut / 2).min(side - 1);
            if cut == 0 { 0..0 } else { held(0)..held(cut - 1) + 1 }
        };
        let mut mask = vec![1f32; b * h * w];
        for (i, mask) in mask.chunks_exact_mut(h * w).enumerate() {
            let (rows, columns) = (range(h, draws.uniform[5][i]), range(w, draws.uniform[6][i]));
            for row in rows {
                mask[row * w..][columns.clone()].fill(0.0);
            }
        }
        Tensor::from_vec(mask, (b, 1, h, w), images.device())?.to_dtype(images.dtype())
    }
}

/// The value at i of the result is that at i + `offset`, or zero beyond the edge.
fn shifted(x: &Tensor, dim: usize, offset: isize) -> Result<Tensor> {
    let (n, by) = (x.dim(dim)?, offset.unsigned_abs().min(x.dim(dim)?));
    match offset {
        0 => Ok(x.clone()),
        1.. => x.narrow(dim, by, n - by)?.pad_with_zeros(dim, 0, by),
        _ => x.narrow(dim, 0, n - by)?.pad_with_zeros(dim, by, 0),
    }
}

/// Brightness ±½, saturation ×0 to 2, contrast ×½ to 1½.
fn coloured(images: &Tensor, draws: &Draws) -> Result<Tensor> {
    let b = images.dim(0)?;
    let of = |which: usize, scale: f64, shift: f64| {
        Tensor::from_slice(&draws.uniform[which], (b, 1, 1, 1), images.device())?.affine(scale, shift)
    };
    let x = images.broadcast_add(&of(2, 1.0, -0.5)?.to_dtype(images.dtype())?)?;
    let around = |x: &Tensor, mean: Tensor, factor: Tensor| {
        x.broadcast_sub(&mean)?.broadcast_mul(&factor.to_dtype(x.dtype())?)?.broadcast_add(&mean)
    };
    let x = around(&x, x.mean_keepdim(1)?, of(3, 2.0, 0.0)?)?;
    around(&x, x.mean_keepdim((1, 2, 3))?, of(4, 1.0, 0.5)?)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn parts_of_a_batch_draw_what_the_whole_one_does() {
        let draw = |images| Draws::new(&Config::default(), images, &mut rand_chacha::ChaCha8Rng::seed_from_u64(7));
        let (whole, part) = (draw(0..5), draw(3..5));
        assert_eq!(whole.which, part.which);
        assert!(whole.uniform.iter().zip(&part.uniform).all(|(whole, part)| whole[3..] == part[..]));
    }
}
