//! NaFlex (Tschannen et al., arXiv 2502.14786, §2.4): the aspect ratio is kept, and a budget of patches is filled.

use serde::{Deserialize, Serialize};

/// A budget of patches. Fields carry the names of their Hugging Face keys; the defaults are Hugging Face's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Naflex {
    /// Side of a patch in pixels; both sides of the result are multiples of it.
    pub patch_size: usize,
    /// Most patches of an image.
    pub max_num_patches: usize,
}

impl Default for Naflex {
    fn default() -> Self {
        Self { patch_size: 16, max_num_patches: 256 }
    }
}

impl Naflex {
    /// As many patches as an image of `size` (height, width) holds, one at least.
    pub fn of(size: (usize, usize), patch_size: usize) -> Self {
        let along = |side: usize| (side / patch_size.max(1)).max(1);
        Self { patch_size, max_num_patches: along(size.0) * along(size.1) }
    }

    /// Height and width that an image of `height` × `width` pixels is brought to: transformers'
    /// `get_image_size_for_max_num_patches`, its bisection step by step.
    pub fn size_of(&self, height: usize, width: usize) -> (usize, usize) {
        const EPS: f64 = 1e-5;
        let p = self.patch_size as f64;
        let patches = |scale: f64, side: usize| (side as f64 * scale / p).ceil().max(1.0);
        let (mut least, mut most) = (EPS / 10.0, 100.0);
        while most - least >= EPS {
            let scale = (least + most) / 2.0;
            if patches(scale, height) * patches(scale, width) <= self.max_num_patches as f64 {
                least = scale;
            } else {
                most = scale;
            }
        }
        let side = |side: usize| patches(least, side) as usize * self.patch_size;
        (side(height), side(width))
    }

    /// Height and width of the largest square within the budget.
    pub fn square(&self) -> (usize, usize) {
        let side = self.max_num_patches.isqrt() * self.patch_size;
        (side, side)
    }
}
