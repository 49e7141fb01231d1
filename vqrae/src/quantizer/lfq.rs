//! Lookup-free quantisation (Yu et al., arXiv 2310.05737): every dimension becomes its sign, and the code is the number
//! whose bits these are. `spherical` makes it binary spherical quantisation, BSQ (Zhao et al., arXiv 2406.07548).
//!
//! ```text
//! h = z Aᵀ + a          features D → e bits                          linear_in
//! h ← s h/‖h‖           spherical alone
//! q = ±s, by the sign of h (0 is negative); spherical: ±s/√e        straight-through
//! index = Σ_i [h_i > 0] · 2^(e−1−i)          the first dimension is the highest bit
//! p(n) = softmax_k(2 h_n · c_k / τ)          c_k: all 2^e codes
//! loss = w (mean_n H(p(n)) − γ H(mean_n p(n))) + β mean‖h − sg(q)‖²
//! ```
//!
//! The entropies make every token sure of its code, and all codes equally likely. Values, indices, loss and gradients are
//! those of vector-quantize-pytorch's `LFQ`; beyond `entropy_bits` the entropies are sums over groups of bits, as BSQ's
//! authors take them, since p over 2^18 codes would not fit the memory.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::bottleneck::{self, Bottleneck, Settings};
use super::entropy::entropies;
use super::table::unit;
use super::{Norm, Quantized, is_default};

/// The most bits whose 2^bits probabilities of every token are held at once.
const MOST_ENTROPY_BITS: usize = 16;

/// The sizes and choices of an LFQ or BSQ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LfqConfig {
    /// e: bits of a code, of which there are 2^e; MAGVIT-v2 has 18.
    pub codebook_dim: usize,
    /// Whether features and codes lie on a sphere: BSQ.
    pub spherical: bool,
    /// s: what the signs, or the sphere's radius, are multiplied by.
    pub scale: f64,
    /// w, the weight of the entropies.
    pub entropy_weight: f64,
    /// γ, the weight of the entropy of the mean, which keeps all codes in use.
    pub diversity_gamma: f64,
    /// 1/τ.
    pub inverse_temperature: f64,
    /// The bits that make one group of the entropies; a code of no more bits has the exact entropies.
    pub entropy_bits: usize,
    /// β, the weight of the commitment term.
    pub commitment_cost: f64,
    /// What brings features to a fixed scale after `linear_in`.
    #[serde(skip_serializing_if = "is_default")]
    pub norm: Norm,
}

impl Default for LfqConfig {
    fn default() -> Self {
        Self {
            codebook_dim: 18,
            spherical: false,
            scale: 1.0,
            entropy_weight: 0.1,
            diversity_gamma: 1.0,
            inverse_temperature: 100.0,
            entropy_bits: 10,
            commitment_cost: 0.0,
            norm: Norm::default(),
        }
    }
}

impl Settings for LfqConfig {
    /// 2^e.
    fn codebook_size(&self) -> usize {
        1 << self.codebook_dim
    }

    fn width(&self) -> usize {
        self.codebook_dim
    }

    fn norm(&self) -> Norm {
        self.norm
    }

    fn check(&self) -> std::result::Result<(), String> {
        bottleneck::check_size("codebook_dim", self.codebook_dim, 1 << 10)?;
        bottleneck::implicit_size((0..self.codebook_dim).map(|_| 2), "set codebook_dim to 31 or less")?;
        bottleneck::check_size("entropy_bits", self.entropy_bits, MOST_ENTROPY_BITS)?;
        if !self.scale.is_finite() || self.scale <= 0.0 {
            return Err(format!("quantizer: scale is {}, expected: more than 0", self.scale));
        }
        bottleneck::check_cost("entropy_weight", self.entropy_weight)?;
        bottleneck::check_cost("diversity_gamma", self.diversity_gamma)?;
        bottleneck::check_cost("inverse_temperature", self.inverse_temperature)?;
        bottleneck::check_cost("commitment_cost", self.commitment_cost)?;
        bottleneck::check_scale(self.norm, self.spherical, "spherical = true")
    }

    fn load(&self, _: VarBuilder) -> Result<Box<dyn Bottleneck>> {
        Ok(Box::new(Lfq::new(self)))
    }
}

/// An LFQ or BSQ. It has no weights of its own.
#[derive(Debug, Clone)]
pub(super) struct Lfq {
    config: LfqConfig,
    /// The magnitude of a code's elements.
    magnitude: f32,
}

impl Lfq {
    /// Of a checked config.
    pub(super) fn new(config: &LfqConfig) -> Self {
        let shrink = if config.spherical { (config.codebook_dim as f64).sqrt() } else { 1.0 };
        Self { config: config.clone(), magnitude: (config.scale / shrink) as f32 }
    }

    /// ±magnitude for each of the `bits` lowest bits of an index, the highest first.
    fn code(&self, index: u32, bits: usize) -> impl Iterator<Item = f32> {
        (0..bits).rev().map(move |bit| if (index >> bit) & 1 == 1 { self.magnitude } else { -self.magnitude })
    }

    /// Σ over groups of bits of mean_n H(p(n)) − γ H(mean_n p(n)), for h `[M, e]`.
    fn entropy(&self, h: &Tensor) -> Result<Tensor> {
        let e = self.config.codebook_dim;
        let mut total = Tensor::zeros((), DType::F32, h.device())?;
        for first in (0..e).step_by(self.config.entropy_bits) {
            let bits = self.config.entropy_bits.min(e - first);
            let h = h.narrow(1, first, bits)?.contiguous()?;
            let codes: Vec<f32> = (0..1u32 << bits).flat_map(|index| self.code(index, bits)).collect();
            let codes = Tensor::from_vec(codes, (1 << bits, bits), &Device::Cpu)?.to_device(h.device())?;
            let logits = (h.matmul(&codes.t()?)? * (2.0 * self.config.inverse_temperature))?; // [M, 2^bits]
            total = (total + entropies(&logits, self.config.diversity_gamma)?)?;
        }
        Ok(total)
    }
}

impl Bottleneck for Lfq {
    fn quantize(&self, h: &Tensor, _: Option<u64>) -> Result<Quantized> {
        let (b, n, e) = h.dims3()?;
        let projected = if self.config.spherical { (unit(h)? * self.config.scale)? } else { h.clone() };
        let index = |row: &[f32]| row.iter().fold(0u32, |index, &x| (index << 1) | u32::from(x > 0.0));
        let indices: Vec<u32> = bottleneck::finite(&projected)?.chunks_exact(e).map(index).collect();
        let indices = Tensor::from_vec(indices, (b, n), h.device())?;
        let codes = self.lookup(&indices)?;
        let tokens = bottleneck::straight_through(&projected, &codes)?;
        Ok(Quantized { tokens, indices, projected, codes })
    }

    fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        let indices = bottleneck::columns(indices, 1)?.swap_remove(0);
        let (b, n) = indices.dims2()?;
        let flat = indices.flatten_all()?.to_vec1::<u32>()?;
        bottleneck::check_range(flat.iter().copied(), self.config.codebook_size())?;
        let e = self.config.codebook_dim;
        let codes: Vec<f32> = flat.into_iter().flat_map(|index| self.code(index, e)).collect();
        Tensor::from_vec(codes, (b, n, e), indices.device())
    }

    fn loss(&self, quantized: &Quantized) -> Result<Tensor> {
        let (h, q) = (&quantized.projected, &quantized.codes);
        let mut loss = Tensor::zeros((), DType::F32, h.device())?;
        if self.config.entropy_weight > 0.0 {
            loss = (loss + (self.entropy(&h.flatten_to(1)?)? * self.config.entropy_weight)?)?;
        }
        if self.config.commitment_cost > 0.0 {
            loss = (loss + ((h - q.detach())?.sqr()?.mean_all()? * self.config.commitment_cost)?)?;
        }
        Ok(loss)
    }

    fn codebook(&self) -> Result<Tensor> {
        let k = self.config.codebook_size();
        bottleneck::check_listing(k, self.config.codebook_dim)?;
        self.lookup(&bottleneck::every(k)?)?.squeeze(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lfq(codebook_dim: usize, spherical: bool) -> Lfq {
        let config = LfqConfig { codebook_dim, spherical, ..LfqConfig::default() };
        config.check().unwrap();
        Lfq::new(&config)
    }

    #[test]
    fn signs_are_bits_the_highest_first() {
        let h = Tensor::new(&[[[3f32, -1., 0.5, 0.1], [-1., -1., -1., 2.], [0., 0., 0., 0.]]], &Device::Cpu).unwrap();
        for (spherical, magnitude) in [(false, 1.0), (true, 0.5)] {
            let quantized = lfq(4, spherical).quantize(&h, None).unwrap();
            assert_eq!(quantized.indices.to_vec2::<u32>().unwrap(), [[0b1011, 0b0001, 0]]);
            let first = quantized.codes.to_vec3::<f32>().unwrap()[0][0].clone();
            assert_eq!(first, [1., -1., 1., 1.].map(|sign: f32| sign * magnitude));
        }
    }

    #[test]
    fn entropies_by_hand() {
        // One bit, h = 0: p = (½, ½) for every token and in the mean, so ln 2 − γ ln 2 with γ = 1.
        let quantized = |values: &[f32]| {
            let h = Tensor::from_slice(values, (1, values.len(), 1), &Device::Cpu).unwrap();
            lfq(1, false).quantize(&h, None).unwrap()
        };
        let loss = |values: &[f32]| lfq(1, false).loss(&quantized(values)).unwrap().to_scalar::<f32>().unwrap();
        assert!(loss(&[0., 0.]).abs() < 1e-6);
        // Sure tokens, half of them each way: 0 − ln 2, weighted by 0.1; all the same way: 0 − 0.
        assert!((loss(&[5., -5.]) + 0.1 * 2f32.ln()).abs() < 1e-6);
        assert!(loss(&[5., 5.]).abs() < 1e-6);
    }

    #[test]
    fn groups_of_bits_add_up_where_bits_are_independent() {
        // All four corners equally often: the mean's entropy is ln 4 whole, and ln 2 + ln 2 by groups of one bit.
        let h = Tensor::new(&[[[5f32, 5.], [5., -5.], [-5., 5.], [-5., -5.]]], &Device::Cpu).unwrap();
        let loss = |entropy_bits| {
            let config = LfqConfig { codebook_dim: 2, entropy_bits, ..LfqConfig::default() };
            let lfq = Lfq::new(&config);
            lfq.loss(&lfq.quantize(&h, None).unwrap()).unwrap().to_scalar::<f32>().unwrap()
        };
        assert!((loss(2) + 0.1 * 4f32.ln()).abs() < 1e-6);
        assert!((loss(1) - loss(2)).abs() < 1e-6);
    }

    #[test]
    fn codes_that_fit_no_file_are_refused() {
        let check = |codebook_dim| LfqConfig { codebook_dim, ..LfqConfig::default() }.check();
        assert_eq!(check(31), Ok(()));
        assert!(check(32).expect_err("2^32 codes").contains("set codebook_dim to 31 or less"));
    }
}
