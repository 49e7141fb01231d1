//! Product quantisation: the channels are cut into G groups, each with codebooks of its own, so that a token has G codes
//! (UniTok, arXiv 2502.20321: 8 groups of 4,096 codes × 8 dimensions). With more than one level a group is a
//! [residual quantizer](super::residual), and the whole is vector-quantize-pytorch's `GroupedResidualVQ`.
//!
//! ```text
//! h = z Aᵀ + a                  features D → G · e            linear_in
//! q = [q_1 … q_G]               each of e channels of h, by the group's quantizer
//! code g·L + l of a token       level l of group g
//! loss = Σ over groups
//! ```

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::residual::{Residual, ResidualConfig};
use super::shared::{self, Bottleneck};
use super::{Metric, Quantized};

/// The sizes and choices of a product quantizer; the default is UniTok's shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProductConfig {
    /// G: groups of channels.
    pub groups: usize,
    /// What each group has; where this section is given, what it leaves out is as in `"type": "residual"`.
    pub group: ResidualConfig,
}

impl Default for ProductConfig {
    fn default() -> Self {
        let group = ResidualConfig {
            levels: 1,
            codebook_size: 4_096,
            codebook_dim: 8,
            metric: Metric::Cosine,
            ..ResidualConfig::default()
        };
        Self { groups: 8, group }
    }
}

impl ProductConfig {
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        shared::check_size("groups", self.groups, 1 << 10)?;
        self.group.check()
    }

    /// Width of all groups together.
    pub(super) fn width(&self) -> usize {
        self.groups * self.group.codebook_dim
    }
}

/// A product quantizer between its projections.
#[derive(Debug, Clone)]
pub struct Product {
    groups: Vec<Residual>,
    config: ProductConfig,
}

impl Product {
    /// Loads `codebook` `[G · (1 or L), K, e]`.
    pub fn load(vb: &VarBuilder, config: &ProductConfig) -> Result<Self> {
        Self::new(&config.group.load_codebook(vb, config.groups * config.group.tables())?, config)
    }

    /// Of codebooks `[G · (1 or L), K, e]`, group by group, and a checked config.
    pub(super) fn new(codebook: &Tensor, config: &ProductConfig) -> Result<Self> {
        let tables = config.group.tables();
        let group = |g| Residual::new(&codebook.narrow(0, g * tables, tables)?, &config.group);
        Ok(Self { groups: (0..config.groups).map(group).collect::<Result<_>>()?, config: config.clone() })
    }

    /// The groups' parts of `x` `[B, N, G · width]`.
    fn split(&self, x: &Tensor, width: usize) -> Result<Vec<Tensor>> {
        (0..self.groups.len()).map(|g| x.narrow(D::Minus1, g * width, width)?.contiguous()).collect()
    }

    /// The groups' parts of indices with G · L codes a token.
    fn split_indices(&self, indices: &Tensor) -> Result<Vec<Tensor>> {
        let levels = self.config.group.levels;
        let columns = shared::columns(indices, self.groups.len() * levels)?;
        columns.chunks(levels).map(shared::join).collect()
    }
}

impl Bottleneck for Product {
    /// [`Quantized::codes`] is `[B, N, G · L, e]`; dropout leaves out the same levels in every group.
    fn quantize(&self, h: &Tensor, dropout: Option<u64>) -> Result<Quantized> {
        let parts = self.split(h, self.config.group.codebook_dim)?;
        let (mut tokens, mut indices, mut codes) = (Vec::new(), Vec::new(), Vec::new());
        for (group, part) in self.groups.iter().zip(&parts) {
            let quantized = group.quantize(part, dropout)?;
            indices.extend(shared::columns(&quantized.indices, self.config.group.levels)?);
            tokens.push(quantized.tokens);
            codes.push(quantized.codes);
        }
        Ok(Quantized {
            tokens: Tensor::cat(&tokens, 2)?,
            indices: shared::join(&indices)?,
            projected: h.clone(),
            codes: Tensor::cat(&codes, 2)?,
        })
    }

    fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        let parts = self.split_indices(indices)?;
        let parts = self.groups.iter().zip(&parts).map(|(group, indices)| group.lookup(indices));
        Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 2)
    }

    fn loss(&self, quantized: &Quantized) -> Result<Tensor> {
        let projected = self.split(&quantized.projected, self.config.group.codebook_dim)?;
        let indices = self.split_indices(&quantized.indices)?;
        let levels = self.config.group.levels;
        let mut loss = Tensor::zeros((), DType::F32, quantized.projected.device())?;
        for (g, ((group, projected), indices)) in self.groups.iter().zip(projected).zip(indices).enumerate() {
            let codes = quantized.codes.narrow(2, g * levels, levels)?;
            let part = Quantized { tokens: quantized.tokens.clone(), indices, projected, codes };
            loss = (loss + group.loss(&part)?)?;
        }
        Ok(loss)
    }

    fn codebook(&self) -> Result<Tensor> {
        Tensor::cat(&self.groups.iter().map(Bottleneck::codebook).collect::<Result<Vec<_>>>()?, 0)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn each_group_has_its_own_codes() {
        let group = ResidualConfig { levels: 1, codebook_size: 2, codebook_dim: 1, ..ResidualConfig::default() };
        let config = ProductConfig { groups: 2, group };
        let codebook = Tensor::new(&[[[0f32], [1.]], [[0.], [100.]]], &Device::Cpu).unwrap();
        let product = Product::new(&codebook, &config).unwrap();
        let h = Tensor::new(&[[[2f32, 2.], [0., 98.]]], &Device::Cpu).unwrap();
        let quantized = product.quantize(&h, None).unwrap();
        assert_eq!(quantized.indices.to_vec3::<u32>().unwrap(), [[[1, 0], [0, 1]]]);
        assert_eq!(product.lookup(&quantized.indices).unwrap().to_vec3::<f32>().unwrap(), [[[1., 0.], [0., 100.]]]);
        // Group 0: (1² + 0²) / 2, group 1: (2² + 2²) / 2, times 1 + β.
        let loss = product.loss(&quantized).unwrap().to_scalar::<f32>().unwrap();
        assert!((loss - 1.25 * 4.5).abs() < 1e-6, "{loss}");
    }

    #[test]
    fn the_default_is_the_shape_of_unitok() {
        let config = ProductConfig::default();
        assert_eq!((config.groups, config.group.codebook_size, config.width()), (8, 4096, 64));
        assert_eq!(config.check(), Ok(()));
    }
}
