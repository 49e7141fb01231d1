//! A moving average of the trained weights (Polyak & Juditsky, 1992), which is validated and written in their place.

use std::collections::BTreeMap;

use candle_core::{Device, Var};
use rayon::prelude::*;

use super::values::Values;
use crate::error::{Error, Result};
use crate::weights::Tensors;

/// `a ← γ a + (1 − γ) w` after every step, from the weights that the run starts with. A quantizer's moving averages are not
/// averaged again: they are taken as they are.
#[derive(Debug)]
pub struct WeightAverage {
    values: BTreeMap<String, Values>,
}

impl WeightAverage {
    /// Starts from the weights as they are.
    ///
    /// # Errors
    /// If a device has no memory left for them.
    pub fn new(parameters: &BTreeMap<String, Var>) -> Result<Self> {
        let values = |(name, var): (&String, &Var)| Ok((name.clone(), Values::of(&var.copy()?)?));
        Ok(Self { values: parameters.iter().map(values).collect::<Result<_>>()? })
    }

    /// Follows the weights after a step, with this γ.
    ///
    /// # Errors
    /// If a weight has another size than when the average began.
    pub fn follow(&mut self, parameters: &BTreeMap<String, Var>, decay: f64) -> Result<()> {
        let decay = decay as f32;
        self.values.par_iter_mut().try_for_each(|(name, values)| {
            let Some(var) = parameters.get(name) else { return Ok(()) };
            Ok(values.follow(var, decay)?)
        })
    }

    /// The averages in the shapes of the parameters, on the CPU.
    ///
    /// # Errors
    /// If a parameter has no average.
    pub fn tensors(&self, parameters: &BTreeMap<String, Var>) -> Result<Tensors> {
        let tensor = |(name, var): (&String, &Var)| {
            let values = self.values.get(name).ok_or_else(|| missing(name))?;
            Ok((name.clone(), values.tensor()?.reshape(var.shape())?.to_device(&Device::Cpu)?))
        };
        parameters.iter().map(tensor).collect()
    }

    /// Goes on from what a checkpoint has.
    ///
    /// # Errors
    /// If an average is missing or of another size.
    pub fn load(&mut self, mut tensors: Tensors) -> Result<()> {
        for (name, values) in &mut self.values {
            let tensor = tensors.remove(name).ok_or_else(|| missing(name))?;
            if tensor.elem_count() != values.len() {
                return Err(missing(name));
            }
            values.set(&tensor)?;
        }
        Ok(())
    }
}

fn missing(name: &str) -> Error {
    Error::Training(format!("the checkpoint has no average of `{name}` in its size; train in a new --output-dir"))
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;

    use super::*;

    #[test]
    fn two_steps_by_hand() {
        let var = Var::new(&[4f32, 8.0], &Device::Cpu).unwrap();
        let parameters = BTreeMap::from([("w".to_string(), var.clone())]);
        let mut average = WeightAverage::new(&parameters).unwrap();
        for values in [[0f32, 8.0], [0.0, 0.0]] {
            var.set(&Tensor::new(&values, &Device::Cpu).unwrap()).unwrap();
            average.follow(&parameters, 0.75).unwrap();
        }
        assert_eq!(average.tensors(&parameters).unwrap()["w"].to_vec1::<f32>().unwrap(), [2.25, 6.0]);
        assert!(average.load(Tensors::new()).is_err());

        let mut on_device = Values::Device(Tensor::new(&[4f32, 8.0], &Device::Cpu).unwrap());
        for values in [[0f32, 8.0], [0.0, 0.0]] {
            on_device.follow(&Tensor::new(&values, &Device::Cpu).unwrap(), 0.75).unwrap();
        }
        assert_eq!(on_device.tensor().unwrap().to_vec1::<f32>().unwrap(), [2.25, 6.0]);
    }
}
