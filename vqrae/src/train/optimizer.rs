//! AdamW (Loshchilov & Hutter, arXiv 1711.05101) whose moments can be saved: candle's keeps its own private.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var, backprop::GradStore};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::ranks::Ranks;
use super::values::{self, Values};
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
    first: Values,
    second: Values,
}

/// AdamW over named parameters.
#[derive(Debug)]
pub struct AdamW {
    config: Config,
    moments: BTreeMap<String, Moments>,
}

impl AdamW {
    /// With moments of zero.
    ///
    /// # Errors
    /// If a device has no memory left for them.
    pub fn new(config: Config, parameters: &BTreeMap<String, Var>) -> Result<Self> {
        let zeros = |var: &Var| Values::zeros(var.elem_count(), var.device());
        let moments =
            |(name, var): (&String, &Var)| Ok((name.clone(), Moments { first: zeros(var)?, second: zeros(var)? }));
        Ok(Self { config, moments: parameters.iter().map(moments).collect::<Result<_>>()? })
    }

    /// One step; `taken` are those before it, `rate` gives a parameter's learning rate by its name.
    pub fn step(
        &mut self,
        parameters: &BTreeMap<String, Var>,
        gradients: &Gradients,
        taken: usize,
        rate: impl Fn(&str) -> f64 + Sync,
    ) -> Result<()> {
        let norm = gradients.norm()?;
        let clip = if norm > self.config.max_grad_norm { self.config.max_grad_norm / norm } else { 1.0 };
        let correction = [self.config.beta1, self.config.beta2].map(|beta| 1.0 - beta.powf((taken + 1) as f64));
        let config = self.config;
        let update = |(name, moments): (_, _)| -> Option<Update<'_>> {
            let (name, Moments { first, second }): (&String, &mut Moments) = (name, moments);
            let (var, gradient) = (parameters.get(name)?, gradients.0.get(name)?);
            let rate = rate(name);
            let decay = if decays(name, var.rank()) { rate * config.weight_decay } else { 0.0 };
            let scale = rate / correction[0];
            let step = Step { config, clip, decay, scale, root: 1.0 / correction[1] };
            Some(Update { var, gradient, first, second, step })
        };
        let mut left = values::step_together(self.moments.iter_mut().filter_map(update).collect())?;
        let one = |Update { var, gradient, first, second, step }: &mut Update<'_>| -> Result<()> {
            let values = match (&mut **first, &mut **second, *gradient) {
                (Values::Host(first), Values::Host(second), Values::Host(gradient)) => {
                    let mut values = var.flatten_all()?.to_vec1::<f32>()?;
                    step.on_host(&mut values, gradient, first, second);
                    Tensor::from_vec(values, var.shape(), var.device())?
                }
                (first, second, gradient) => step.on_device(var, &gradient.tensor()?, first, second)?,
            };
            Ok(var.set(&values)?)
        };
        // A device does one thing after the other; threads would only stand in each other's way.
        match parameters.values().all(|var| var.device().is_cpu()) {
            true => left.par_iter_mut().try_for_each(one),
            false => left.iter_mut().try_for_each(one),
        }
    }

    /// The moments as tensors of the CPU, `first.NAME` and `second.NAME`.
    pub fn state(&self) -> Result<Tensors> {
        let mut tensors = Tensors::new();
        for (name, moments) in &self.moments {
            tensors.insert(format!("first.{name}"), moments.first.tensor()?.to_device(&Device::Cpu)?);
            tensors.insert(format!("second.{name}"), moments.second.tensor()?.to_device(&Device::Cpu)?);
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
                values.set(&tensor)?;
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

/// A parameter with what moves it.
pub(super) struct Update<'a> {
    pub(super) var: &'a Var,
    pub(super) gradient: &'a Values,
    pub(super) first: &'a mut Values,
    pub(super) second: &'a mut Values,
    pub(super) step: Step,
}

/// One parameter's step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    pub(super) config: Config,
    /// What the gradient is scaled down by.
    pub(super) clip: f64,
    /// Share of the value that decays.
    pub(super) decay: f64,
    /// Of the first moment: the rate over its correction.
    pub(super) scale: f64,
    /// Of the second moment: one over its correction.
    pub(super) root: f64,
}

impl Step {
    fn on_host(&self, values: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        let (b1, b2, eps) = (self.config.beta1 as f32, self.config.beta2 as f32, self.config.eps as f32);
        let (clip, decay, scale, root) = (self.clip as f32, self.decay as f32, self.scale as f32, self.root as f32);
        let all = values.iter_mut().zip(gradient).zip(first.iter_mut().zip(second));
        for ((value, gradient), (first, second)) in all {
            let gradient = gradient * clip;
            *first = b1 * *first + (1.0 - b1) * gradient;
            *second = b2 * *second + (1.0 - b2) * gradient * gradient;
            *value -= decay * *value + scale * *first / ((*second * root).sqrt() + eps);
        }
    }

    /// The same by tensor operations; returns the new value.
    fn on_device(&self, var: &Var, gradient: &Tensor, first: &mut Values, second: &mut Values) -> Result<Tensor> {
        let gradient = (gradient * self.clip)?;
        // One less β in f32, as on the host: of a β near one it is another number than in f64.
        let moment = |old: &Tensor, new: &Tensor, beta: f64| (old * beta)? + (new * f64::from(1.0 - beta as f32))?;
        let new_first = moment(&first.tensor()?, &gradient, self.config.beta1)?;
        let new_second = moment(&second.tensor()?, &gradient.sqr()?, self.config.beta2)?;
        let change = ((&new_first * self.scale)? / ((&new_second * self.root)?.sqrt()? + self.config.eps)?)?;
        let value = var.as_detached_tensor();
        let kept = (&value * (1.0 - self.decay))?;
        (*first, *second) = (Values::Device(new_first), Values::Device(new_second));
        Ok((kept - change.reshape(value.shape())?)?)
    }
}

/// The gradients of parameters by name, where the parameters are.
#[derive(Debug, Clone, Default)]
pub struct Gradients(BTreeMap<String, Values>);

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
            Ok((name.clone(), Values::of(&gradient)?))
        };
        parameters.iter().map(gradient).collect::<Result<_>>().map(Self)
    }

    /// Adds those of another part of the batch.
    ///
    /// # Errors
    /// If a device has no memory left.
    pub fn add(&mut self, other: Self) -> Result<()> {
        for (name, values) in other.0 {
            match self.0.get_mut(&name) {
                Some(sum) => sum.add(values)?,
                None => drop(self.0.insert(name, values)),
            }
        }
        Ok(())
    }

    /// Turns the ranks' own into their sum, many parameters at a time.
    ///
    /// # Errors
    /// If a rank has ended.
    pub fn sum(&mut self, ranks: &dyn Ranks) -> Result<()> {
        /// Numbers that are summed in one go, at least.
        const BUCKET: usize = 1 << 24;
        if ranks.size() == 1 {
            return Ok(());
        }
        let mut left: Vec<&mut Values> = self.0.values_mut().collect();
        while !left.is_empty() {
            let mut count = 0;
            let end = left.iter().position(|values| {
                count += values.len();
                count >= BUCKET
            });
            let bucket: Vec<_> = left.drain(..end.map_or(left.len(), |last| last + 1)).collect();
            let flat = bucket.iter().map(|values| values.tensor()).collect::<candle_core::Result<Vec<_>>>()?;
            let sum = ranks.sum(&Tensor::cat(&flat, 0)?)?;
            let mut at = 0;
            for values in bucket {
                values.set(&sum.narrow(0, at, values.len())?)?;
                at += values.len();
            }
        }
        Ok(())
    }

    /// Turns a sum over `parts` parts of the batch into the mean.
    ///
    /// # Errors
    /// If a device has no memory left.
    pub fn divide(&mut self, parts: usize) -> Result<()> {
        if parts > 1 {
            self.0.par_iter_mut().try_for_each(|(_, values)| values.divide(parts as f32))?;
        }
        Ok(())
    }

    /// The norm of all of them together.
    ///
    /// # Errors
    /// If a device fails.
    pub fn norm(&self) -> Result<f64> {
        Ok(values::squares(self.0.values())?.iter().sum::<f64>().sqrt())
    }

    /// The norm of each group of parameters, which the first word of a name tells.
    ///
    /// # Errors
    /// If a device fails.
    pub fn norms(&self) -> Result<BTreeMap<String, f64>> {
        let mut sums = BTreeMap::<String, f64>::new();
        for (name, square) in self.0.keys().zip(values::squares(self.0.values())?) {
            *sums.entry(super::config::group(name).to_string()).or_default() += square;
        }
        Ok(sums.into_iter().map(|(group, sum)| (group, sum.sqrt())).collect())
    }
}

/// Whether weight decay applies: matrices only.
pub fn decays(name: &str, rank: usize) -> bool {
    rank >= 2 && !name.contains("position_embedding") && !name.ends_with("codebook")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A matrix and a vector, their gradients, and an optimizer that has them where `place` puts them.
    fn toy(device: &Device, place: fn(&Tensor) -> Values) -> (BTreeMap<String, Var>, Gradients, AdamW) {
        let wave = |shape: &[usize], phase: f32| {
            let n = shape.iter().product::<usize>();
            let values = (0..n).map(|i| (i as f32 * 0.7 + phase).sin()).collect::<Vec<f32>>();
            Tensor::from_vec(values, shape, device).unwrap()
        };
        let all = [("decoder.w", wave(&[3, 5], 0.0)), ("decoder.b", wave(&[7], 1.0))];
        let vars = all.map(|(name, value)| (name.to_string(), Var::from_tensor(&value).unwrap()));
        let parameters = BTreeMap::from(vars);
        let gradients = parameters.iter().map(|(name, var)| (name.clone(), place(&(var.as_tensor() * 3.0).unwrap())));
        let gradients = Gradients(gradients.collect());
        let mut optimizer = AdamW::new(Config::default(), &parameters).unwrap();
        for moments in optimizer.moments.values_mut() {
            moments.first = place(&moments.first.tensor().unwrap());
            moments.second = place(&moments.second.tensor().unwrap());
        }
        (parameters, gradients, optimizer)
    }

    #[test]
    fn a_device_takes_the_steps_of_the_cpu() {
        let host = |tensor: &Tensor| Values::of(tensor).unwrap();
        let device = |tensor: &Tensor| Values::Device(tensor.flatten_all().unwrap());
        let run = |place: fn(&Tensor) -> Values| {
            let (parameters, mut gradients, mut optimizer) = toy(&Device::Cpu, place);
            gradients.add(gradients.clone()).unwrap();
            gradients.divide(3).unwrap();
            for taken in 0..4 {
                optimizer.step(&parameters, &gradients, taken, |_| 0.1).unwrap();
            }
            let state = optimizer.state().unwrap();
            let mut all = vec![gradients.norm().unwrap() as f32];
            all.extend(gradients.norms().unwrap().values().map(|&norm| norm as f32));
            for tensor in state.values().chain(parameters.values().map(Var::as_tensor)) {
                all.extend(tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            }
            optimizer.load_state(state).unwrap();
            all
        };
        let (host, device) = (run(host), run(device));
        assert_eq!(host.len(), device.len());
        for (i, (host, device)) in host.iter().zip(&device).enumerate() {
            assert!((host - device).abs() <= 1e-6 * host.abs().max(0.1), "{i}: {host} and {device}");
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_gpu_takes_the_steps_of_the_cpu_bit_for_bit() {
        let Some(gpu) = crate::ops::cuda::test_device() else { return };
        let run = |device: &Device| {
            let (parameters, gradients, mut optimizer) = toy(device, |tensor| Values::of(tensor).unwrap());
            for taken in 0..4 {
                optimizer.step(&parameters, &gradients, taken, |_| 0.1).unwrap();
            }
            let state = optimizer.state().unwrap();
            let all = state.values().chain(parameters.values().map(Var::as_tensor));
            let all: Vec<Vec<f32>> = all.map(|x| x.flatten_all().unwrap().to_vec1().unwrap()).collect();
            (all, gradients.norm().unwrap(), gradients.norms().unwrap())
        };
        let ((here, norm, norms), (expected, expected_norm, expected_norms)) = (run(&gpu), run(&Device::Cpu));
        assert_eq!(here, expected);
        assert!((norm - expected_norm).abs() <= 1e-12 * norm, "{norm} and {expected_norm}");
        assert_eq!(norms.len(), expected_norms.len());
    }
}
