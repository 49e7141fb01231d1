//! AdamW (Loshchilov & Hutter, arXiv 1711.05101) whose moments can be saved: candle's keeps its own private.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::weights::Tensors;

/// The constants of AdamW.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay of matrices; vectors, positions and codebooks are spared.
    pub weight_decay: f64,
    /// Gradients are scaled down to at most this norm, all parameters together.
    pub max_grad_norm: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-4, max_grad_norm: 1.0 }
    }
}

#[derive(Debug, Clone)]
struct Moments {
    first: Vec<f32>,
    second: Vec<f32>,
}

/// AdamW over named parameters.
#[derive(Debug)]
pub struct AdamW {
    config: Config,
    moments: BTreeMap<String, Moments>,
}

impl AdamW {
    /// With moments of zero.
    pub fn new(config: Config, parameters: &BTreeMap<String, Var>) -> Self {
        let zero = |var: &Var| Moments { first: vec![0.0; var.elem_count()], second: vec![0.0; var.elem_count()] };
        let moments = parameters.iter().map(|(name, var)| (name.clone(), zero(var))).collect();
        Self { config, moments }
    }

    /// One step; `taken` are those before it, `rate` gives a parameter's learning rate by its name.
    pub fn step(
        &mut self,
        parameters: &BTreeMap<String, Var>,
        gradients: &Gradients,
        taken: usize,
        rate: impl Fn(&str) -> f64 + Sync,
    ) -> Result<()> {
        let norm = gradients.norm();
        let clip = if norm > self.config.max_grad_norm { self.config.max_grad_norm / norm } else { 1.0 };
        let config = self.config;
        let correction = [config.beta1, config.beta2].map(|beta| 1.0 - beta.powf((taken + 1) as f64));
        self.moments.par_iter_mut().try_for_each(|(name, moments)| -> Result<()> {
            let (Some(var), Some(gradient)) = (parameters.get(name), gradients.0.get(name)) else { return Ok(()) };
            let rate = rate(name);
            let decay = if decays(name, var.rank()) { rate * config.weight_decay } else { 0.0 };
            let mut values = var.flatten_all()?.to_vec1::<f32>()?;
            let (b1, b2) = (config.beta1 as f32, config.beta2 as f32);
            let scale = (rate / correction[0]) as f32;
            let root = (1.0 / correction[1]) as f32;
            let all = values.iter_mut().zip(gradient).zip(moments.first.iter_mut().zip(&mut moments.second));
            for ((value, gradient), (first, second)) in all {
                let gradient = gradient * clip as f32;
                *first = b1 * *first + (1.0 - b1) * gradient;
                *second = b2 * *second + (1.0 - b2) * gradient * gradient;
                *value -= decay as f32 * *value + scale * *first / ((*second * root).sqrt() + config.eps as f32);
            }
            Ok(var.set(&Tensor::from_vec(values, var.shape(), var.device())?)?)
        })
    }

    /// The moments as tensors, `first.NAME` and `second.NAME`.
    pub fn state(&self) -> Result<Tensors> {
        let mut tensors = Tensors::new();
        for (name, moments) in &self.moments {
            let tensor = |values: &[f32]| Tensor::from_slice(values, values.len(), &Device::Cpu);
            tensors.insert(format!("first.{name}"), tensor(&moments.first)?);
            tensors.insert(format!("second.{name}"), tensor(&moments.second)?);
        }
        Ok(tensors)
    }

    /// Takes moments back from [`AdamW::state`]; every parameter must have them, in its size.
    pub fn load_state(&mut self, mut tensors: Tensors) -> Result<()> {
        for (name, moments) in &mut self.moments {
            for (part, values) in [("first", &mut moments.first), ("second", &mut moments.second)] {
                let key = format!("{part}.{name}");
                let tensor = tensors.remove(&key).ok_or_else(|| wrong(format!("the moments `{key}` are missing")))?;
                if tensor.elem_count() != values.len() {
                    return Err(wrong(format!(
                        "`{key}` has {} values, expected: {}",
                        tensor.elem_count(),
                        values.len()
                    )));
                }
                *values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
            }
        }
        match tensors.keys().next() {
            Some(left) => Err(wrong(format!("the moments `{left}` belong to no parameter"))),
            None => Ok(()),
        }
    }
}

fn wrong(reason: String) -> Error {
    Error::Training(format!("the checkpoint's optimizer state does not fit the config: {reason}"))
}

/// The gradients of parameters by name, each in one vector.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gradients(BTreeMap<String, Vec<f32>>);

impl Gradients {
    /// Those of one backward pass.
    ///
    /// # Errors
    /// A parameter without a gradient is a bug that training would hide.
    pub fn of(parameters: &BTreeMap<String, Var>, mut store: GradStore) -> Result<Self> {
        // Taken one by one, so that they are not twice in memory.
        let gradient = |(name, var): (&String, &Var)| {
            let gradient = store
                .remove(var.as_tensor())
                .ok_or_else(|| Error::Training(format!("parameter `{name}` received no gradient")))?;
            Ok((name.clone(), gradient.flatten_all()?.to_vec1::<f32>()?))
        };
        parameters.iter().map(gradient).collect::<Result<_>>().map(Self)
    }

    /// Adds those of another part of the batch.
    pub fn add(&mut self, other: Self) {
        for (name, values) in other.0 {
            match self.0.get_mut(&name) {
                Some(sum) => sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
                None => {
                    self.0.insert(name, values);
                }
            }
        }
    }

    /// Turns a sum over `parts` parts of the batch into the mean.
    pub fn divide(&mut self, parts: usize) {
        if parts > 1 {
            self.0.par_iter_mut().for_each(|(_, values)| values.iter_mut().for_each(|value| *value /= parts as f32));
        }
    }

    /// The norm of all of them together.
    pub fn norm(&self) -> f64 {
        self.0.values().map(|values| squares(values)).sum::<f64>().sqrt()
    }

    /// The norm of each group of parameters, which the first word of a name tells.
    pub fn norms(&self) -> BTreeMap<String, f64> {
        let mut sums = BTreeMap::<String, f64>::new();
        for (name, values) in &self.0 {
            *sums.entry(super::config::group(name).to_string()).or_default() += squares(values);
        }
        sums.into_iter().map(|(group, sum)| (group, sum.sqrt())).collect()
    }
}

fn squares(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v) * f64::from(v)).sum()
}

/// Whether weight decay applies: matrices only.
pub fn decays(name: &str, rank: usize) -> bool {
    rank >= 2 && !name.contains("position_embedding") && !name.ends_with("codebook")
}
