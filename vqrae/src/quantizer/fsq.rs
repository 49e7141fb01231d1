//! Finite scalar quantisation (Mentzer et al., arXiv 2309.15505): every dimension is rounded to one of a few levels, and
//! the code is the number whose digits these are. No codebook, nothing to collapse, no loss.
//!
//! ```text
//! h = z Aᵀ + a                              features D → e = number of levels          linear_in
//! b = tanh(h + s) (L − 1)(1 + ε) / 2 − o    o = ½ for even L, else 0; s: b = 0 at h = 0
//! digit = round(b) + ⌊L/2⌋                  code = round(b) / ⌊L/2⌋, straight-through
//! index = Σ_i digit_i · L_0 ⋯ L_(i−1)       the first dimension is the lowest digit
//! ```
//!
//! With `preserve_symmetry` (Parker et al., arXiv 2411.19842, §3.2) `digit = ⌊(L − 1)(tanh h + 1)/2 + ½⌋` and
//! `code = 2 digit / (L − 1) − 1`, which spreads from −1 to 1 for even L too. Values, indices and gradients are those of
//! vector-quantize-pytorch's `FSQ`.

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::bottleneck::{self, Bottleneck, Settings};
use super::{Norm, Quantized, is_default};

/// ε: keeps the outermost levels within the reach of tanh.
const MARGIN: f32 = 1e-3;

/// The sizes and choices of an FSQ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FsqConfig {
    /// The number of levels of each dimension; the paper has 8, 8, 8, 6, 5 for about 2^14 codes.
    pub levels: Vec<usize>,
    /// Whether levels lie symmetrically around 0 for even numbers too.
    pub preserve_symmetry: bool,
    /// What brings features to a fixed scale after `linear_in`.
    #[serde(skip_serializing_if = "is_default")]
    pub norm: Norm,
}

impl Default for FsqConfig {
    fn default() -> Self {
        Self { levels: vec![8, 8, 8, 6, 5], preserve_symmetry: false, norm: Norm::default() }
    }
}

impl Settings for FsqConfig {
    /// The product of the levels.
    fn codebook_size(&self) -> usize {
        self.levels.iter().product()
    }

    fn width(&self) -> usize {
        self.levels.len()
    }

    fn norm(&self) -> Norm {
        self.norm
    }

    fn check(&self) -> std::result::Result<(), String> {
        bottleneck::check_size("the number of levels", self.levels.len(), 64)?;
        for (i, &levels) in self.levels.iter().enumerate() {
            if levels < 2 {
                return Err(format!("quantizer: levels[{i}] is {levels}, expected: 2 or more"));
            }
            if levels == 2 && !self.preserve_symmetry {
                return Err(format!(
                    "quantizer: levels[{i}] is 2, which needs preserve_symmetry = true; set it, or take 3 or more"
                ));
            }
        }
        bottleneck::implicit_size(self.levels.iter().copied(), "take fewer or smaller levels").map(|_| ())
    }

    fn load(&self, _: VarBuilder) -> Result<Box<dyn Bottleneck>> {
        Ok(Box::new(Fsq::new(self)))
    }
}

/// An FSQ. It has no weights of its own.
#[derive(Debug, Clone)]
pub(super) struct Fsq {
    dimensions: Vec<Dimension>,
    size: usize,
    preserve_symmetry: bool,
}

/// One dimension's levels, in f32 as PyTorch computes them.
#[derive(Debug, Clone)]
struct Dimension {
    levels: usize,
    /// What is added before tanh.
    shift: f32,
    /// What tanh is multiplied by, and what is added after: that is b, or what ⌊ ⌋ is taken of.
    scale: f32,
    offset: f32,
    /// A digit's code is (digit − origin) · step.
    step: f32,
}

impl Dimension {
    fn new(levels: usize, preserve_symmetry: bool) -> Self {
        let last = (levels - 1) as f32;
        if preserve_symmetry {
            return Self { levels, shift: 0.0, scale: last / 2.0, offset: last / 2.0 + 0.5, step: 2.0 / last };
        }
        let scale = last * (1.0 + MARGIN) / 2.0;
        let offset = if levels.is_multiple_of(2) { 0.5 } else { 0.0 };
        Self { levels, shift: (offset / scale).atanh(), scale, offset: -offset, step: 1.0 / (levels / 2) as f32 }
    }

    fn digit(&self, b: f32, preserve_symmetry: bool) -> u32 {
        let digit = if preserve_symmetry { b.floor() } else { b.round_ties_even() + (self.levels / 2) as f32 };
        digit.clamp(0.0, (self.levels - 1) as f32) as u32
    }

    fn code(&self, digit: u32, preserve_symmetry: bool) -> f32 {
        let digit = digit as f32;
        if preserve_symmetry {
            return digit * self.step - 1.0;
        }
        let half = (self.levels / 2) as f32;
        (digit - half) / half
    }
}

impl Fsq {
    /// Of a checked config.
    pub(super) fn new(config: &FsqConfig) -> Self {
        let preserve_symmetry = config.preserve_symmetry;
        let dimensions = config.levels.iter().map(|&levels| Dimension::new(levels, preserve_symmetry)).collect();
        Self { dimensions, size: config.codebook_size(), preserve_symmetry }
    }

    /// One value of every dimension, `[e]`.
    fn row(&self, h: &Tensor, value: impl Fn(&Dimension) -> f32) -> Result<Tensor> {
        let values: Vec<f32> = self.dimensions.iter().map(value).collect();
        Tensor::from_vec(values, self.dimensions.len(), h.device())
    }

    /// What is rounded, `[B, N, e]`.
    fn bounded(&self, h: &Tensor) -> Result<Tensor> {
        h.broadcast_add(&self.row(h, |d| d.shift)?)?
            .tanh()?
            .broadcast_mul(&self.row(h, |d| d.scale)?)?
            .broadcast_add(&self.row(h, |d| d.offset)?)
    }

    fn index(&self, bounded: &[f32]) -> u32 {
        let digits = self.dimensions.iter().zip(bounded).rev();
        digits.fold(0, |index, (d, &b)| index * d.levels as u32 + d.digit(b, self.preserve_symmetry))
    }

    fn code(&self, mut index: u32) -> impl Iterator<Item = f32> {
        self.dimensions.iter().map(move |d| {
            let digit = index % d.levels as u32;
            index /= d.levels as u32;
            d.code(digit, self.preserve_symmetry)
        })
    }
}

impl Bottleneck for Fsq {
    fn quantize(&self, h: &Tensor, _: Option<u64>) -> Result<Quantized> {
        let (b, n, e) = h.dims3()?;
        bottleneck::finite(h)?;
        let bounded = self.bounded(h)?;
        let values = bounded.flatten_all()?.to_vec1::<f32>()?;
        let indices: Vec<u32> = values.chunks_exact(e).map(|row| self.index(row)).collect();
        let indices = Tensor::from_vec(indices, (b, n), h.device())?;
        let codes = self.lookup(&indices)?;
        let steps = bounded.broadcast_mul(&self.row(h, |d| d.step)?)?;
        let tokens = bottleneck::straight_through(&steps, &codes)?;
        Ok(Quantized { tokens, indices, projected: h.clone(), codes })
    }

    fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        let indices = bottleneck::columns(indices, 1)?.swap_remove(0);
        let (b, n) = indices.dims2()?;
        let flat = indices.flatten_all()?.to_vec1::<u32>()?;
        bottleneck::check_range(flat.iter().copied(), self.size)?;
        let codes: Vec<f32> = flat.into_iter().flat_map(|index| self.code(index)).collect();
        Tensor::from_vec(codes, (b, n, self.dimensions.len()), indices.device())
    }

    /// Zero: there is no codebook that could be far from the features.
    fn loss(&self, quantized: &Quantized) -> Result<Tensor> {
        Tensor::zeros((), DType::F32, quantized.tokens.device())
    }

    fn codebook(&self) -> Result<Tensor> {
        bottleneck::check_listing(self.size, self.dimensions.len())?;
        self.lookup(&bottleneck::every(self.size)?)?.squeeze(0)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn fsq(levels: &[usize], preserve_symmetry: bool) -> Fsq {
        let config = FsqConfig { levels: levels.to_vec(), preserve_symmetry, ..FsqConfig::default() };
        config.check().unwrap();
        Fsq::new(&config)
    }

    #[test]
    fn digits_by_hand() {
        // Levels 3 and 4: zero is the middle digit 1 of 3 and digit 2 of 4, so 1 + 3·2; the far ends are 0 and 3·4 − 1.
        let h = Tensor::new(&[[[0f32, 0.], [-9., -9.], [9., 9.], [9., -9.]]], &Device::Cpu).unwrap();
        let quantized = fsq(&[3, 4], false).quantize(&h, None).unwrap();
        assert_eq!(quantized.indices.to_vec2::<u32>().unwrap(), [[7, 0, 11, 2]]);
        let codes = quantized.codes.to_vec3::<f32>().unwrap();
        assert_eq!(codes, [[[0., 0.], [-1., -1.], [1., 0.5], [1., -1.]]]);
    }

    #[test]
    fn symmetric_levels_reach_from_one_end_to_the_other() {
        let codebook = fsq(&[2, 4], true).codebook().unwrap().to_vec2::<f32>().unwrap();
        let seconds: Vec<f32> = codebook.iter().step_by(2).map(|code| code[1]).collect();
        assert_eq!((codebook[0][0], codebook[1][0]), (-1., 1.));
        for (got, expected) in seconds.iter().zip([-1., -1. / 3., 1. / 3., 1.]) {
            assert!((got - expected).abs() < 1e-6, "{seconds:?}");
        }
    }

    #[test]
    fn every_code_is_its_own_nearest() {
        for (levels, symmetric) in [(vec![8, 5, 5], false), (vec![2, 4, 3], true)] {
            let fsq = fsq(&levels, symmetric);
            let digits = (0..fsq.size as u32).map(|index| {
                let mut rest = index;
                let middle = |d: &Dimension| {
                    let digit = rest % d.levels as u32;
                    rest /= d.levels as u32;
                    // b in the middle of what rounds to the digit.
                    if symmetric { digit as f32 + 0.5 } else { digit as f32 - (d.levels / 2) as f32 }
                };
                fsq.index(&fsq.dimensions.iter().map(middle).collect::<Vec<_>>())
            });
            assert!(digits.eq(0..fsq.size as u32), "{levels:?}");
        }
    }

    #[test]
    fn levels_that_cannot_be_are_refused() {
        let refused = |levels: &[usize]| {
            FsqConfig { levels: levels.to_vec(), ..FsqConfig::default() }.check().expect_err("should be refused")
        };
        assert!(refused(&[]).contains("number of levels"));
        assert!(refused(&[5, 1]).contains("levels[1] is 1"));
        assert!(refused(&[2]).contains("preserve_symmetry"));
        assert!(refused(&[1 << 16, 1 << 15, 3]).contains("take fewer or smaller levels"));
        assert_eq!(FsqConfig { levels: vec![1 << 16, 1 << 15], ..FsqConfig::default() }.check(), Ok(()));
    }
}
