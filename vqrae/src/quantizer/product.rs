//! Product quantisation: the channels are cut into G groups, each with codebooks of its own, so that a token has G codes
//! (UniTok, arXiv 2502.20321: 8 groups of 4,096 codes × 8 dimensions). With more than one level a group is a
//! [residual quantizer](super::residual), and the whole is vector-quantize-pytorch's `GroupedResidualVQ`.
//!
//! ```text
//! h = norm(z Aᵀ + a)            features D → G · e            linear_in, norm
//! q = [q_1 … q_G]               each of e channels of h, by the group's quantizer
//! code g·L + l of a token       level l of group g
//! loss = Σ over groups
//! ```

use candle_core::{D, DType, Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::average::Shares;
use super::bottleneck::{self, Bottleneck, Settings};
use super::kmeans::Choose;
use super::residual::{Residual, ResidualConfig, below};
use super::vq::VqConfig;
use super::{Metric, Norm, Quantized, is_default, prefixed};
use crate::weights::Tensors;

/// The sizes and choices of a product quantizer; the default is UniTok's shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProductConfig {
    /// G: groups of channels.
    pub groups: usize,
    /// What each group has; where this section is given, what it leaves out is as in `"type": "residual"`.
    pub group: ResidualConfig,
    /// What brings features to a fixed scale after `linear_in`.
    #[serde(skip_serializing_if = "is_default")]
    pub norm: Norm,
}

impl Default for ProductConfig {
    fn default() -> Self {
        let level = VqConfig { codebook_size: 4_096, codebook_dim: 8, metric: Metric::Cosine, ..VqConfig::default() };
        let group = ResidualConfig { levels: 1, level, ..ResidualConfig::default() };
        Self { groups: 8, group, norm: Norm::default() }
    }
}

impl Settings for ProductConfig {
    fn codebook_size(&self) -> usize {
        self.group.codebook_size()
    }

    /// Of all groups together.
    fn width(&self) -> usize {
        self.groups * self.group.width()
    }

    fn codes_per_token(&self) -> usize {
        self.groups * self.group.levels
    }

    fn norm(&self) -> Norm {
        self.norm
    }

    fn check(&self) -> std::result::Result<(), String> {
        bottleneck::check_size("groups", self.groups, 1 << 10)?;
        if self.group.norm != Norm::None {
            return Err("quantizer: group.norm is of one group; set norm beside group instead".into());
        }
        self.group.check()
    }

    fn is_frozen(&self, name: &str) -> bool {
        below(name, "groups").is_some_and(|name| self.group.is_frozen(name))
    }

    fn is_average(&self, name: &str) -> bool {
        below(name, "groups").is_some_and(|name| self.group.is_average(name))
    }

    fn load(&self, vb: VarBuilder) -> Result<Box<dyn Bottleneck>> {
        let groups = (0..self.groups).map(|g| Residual::load(&vb.pp("groups").pp(g), &self.group));
        Ok(Box::new(Product { groups: groups.collect::<Result<_>>()?, config: self.clone() }))
    }
}

/// A product quantizer with its weights, `groups.0` ..
#[derive(Debug, Clone)]
pub(super) struct Product {
    groups: Vec<Residual>,
    config: ProductConfig,
}

impl Product {
    /// The groups' parts of `x` `[B, N, G · e]`.
    fn split(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let e = self.config.group.width();
        (0..self.groups.len()).map(|g| x.narrow(D::Minus1, g * e, e)?.contiguous()).collect()
    }

    /// The groups' parts of indices with G · L codes a token.
    fn split_indices(&self, indices: &Tensor) -> Result<Vec<Tensor>> {
        let levels = self.config.group.levels;
        let columns = bottleneck::columns(indices, self.groups.len() * levels)?;
        columns.chunks(levels).map(bottleneck::join).collect()
    }

    /// The groups' parts of what was quantised.
    fn parts(&self, quantized: &Quantized) -> Result<Vec<Quantized>> {
        let levels = self.config.group.levels;
        let projected = self.split(&quantized.projected)?;
        let indices = self.split_indices(&quantized.indices)?;
        let part = |(g, (projected, indices)): (usize, (Tensor, Tensor))| {
            let codes = quantized.codes.narrow(2, g * levels, levels)?;
            // `linear_out` has mixed the groups' tokens; a group's loss and averages ask for none.
            Ok(Quantized { tokens: projected.clone(), indices, projected, codes })
        };
        projected.into_iter().zip(indices).enumerate().map(part).collect()
    }
}

impl Bottleneck for Product {
    /// [`Quantized::codes`] is `[B, N, G · L, e]`; dropout leaves out the same levels in every group.
    fn quantize(&self, h: &Tensor, dropout: Option<u64>) -> Result<Quantized> {
        let (mut tokens, mut indices, mut codes) = (Vec::new(), Vec::new(), Vec::new());
        for (group, part) in self.groups.iter().zip(&self.split(h)?) {
            let quantized = group.quantize(part, dropout)?;
            indices.extend(bottleneck::columns(&quantized.indices, self.config.group.levels)?);
            tokens.push(quantized.tokens);
            codes.push(quantized.codes);
        }
        Ok(Quantized {
            tokens: Tensor::cat(&tokens, 2)?,
            indices: bottleneck::join(&indices)?,
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
        let zero = Tensor::zeros((), DType::F32, quantized.projected.device())?;
        let mut parts = self.groups.iter().zip(self.parts(quantized)?);
        parts.try_fold(zero, |loss, (group, part)| loss + group.loss(&part)?)
    }

    fn codebook(&self) -> Result<Tensor> {
        Tensor::cat(&self.groups.iter().map(Bottleneck::codebook).collect::<Result<Vec<_>>>()?, 0)
    }

    fn update(&self, quantized: &Quantized, shares: &dyn Shares, choose: Choose) -> Result<Tensors> {
        let mut all = Tensors::new();
        for (g, (group, part)) in self.groups.iter().zip(self.parts(quantized)?).enumerate() {
            all.extend(prefixed(&format!("groups.{g}."), group.update(&part, shares, choose)?));
        }
        Ok(all)
    }

    fn waits(&self) -> Result<bool> {
        self.groups.iter().try_fold(false, |waits, group| Ok(waits || group.waits()?))
    }

    fn first(&self, h: &Tensor, choose: Choose) -> Result<Tensors> {
        let mut all = Tensors::new();
        for (g, (group, part)) in self.groups.iter().zip(self.split(h)?).enumerate() {
            all.extend(prefixed(&format!("groups.{g}."), group.first(&part, choose)?));
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn each_group_has_its_own_codes() {
        let level = VqConfig { codebook_size: 2, codebook_dim: 1, ..VqConfig::default() };
        let group = ResidualConfig { levels: 1, level, ..ResidualConfig::default() };
        let config = ProductConfig { groups: 2, group, norm: Norm::None };
        let codebook = |codes: [[f32; 1]; 2]| Tensor::new(&codes, &Device::Cpu).unwrap();
        let codebooks = [("groups.0.levels.0.codebook", [[0.], [1.]]), ("groups.1.levels.0.codebook", [[0.], [100.]])];
        let tensors = codebooks.map(|(name, codes)| (name.to_string(), codebook(codes)));
        let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
        let product = config.load(vb).unwrap();
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
        assert_eq!((config.groups, config.codebook_size(), config.width()), (8, 4096, 64));
        assert_eq!(config.check(), Ok(()));
    }
}
