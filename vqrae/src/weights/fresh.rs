//! Fresh weights, from a seed.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

use super::{Tensors, some};

/// The initialiser that makes a fresh square matrix the identity. candle's [`Init`] has none, so a normal distribution
/// with this mean and no spread, which nobody would ask for, stands for it.
pub(crate) const IDENTITY: Init = Init::Randn { mean: f64::INFINITY, stdev: 0.0 };

/// Makes the tensors that a model asks for, each from its own generator keyed by (seed, name), so that what one layer
/// gets does not depend on the others.
pub struct Fresh {
    seed: u64,
    given: Tensors,
    made: Arc<Mutex<Tensors>>,
}

impl Fresh {
    /// Fresh tensors, but for those that are `given`.
    pub fn new(seed: u64, given: Tensors) -> Self {
        Self { seed, given, made: Arc::default() }
    }

    /// Lets `load` ask for its tensors, in f32; returns them.
    pub fn make<T>(self, load: impl FnOnce(VarBuilder) -> candle_core::Result<T>) -> candle_core::Result<Tensors> {
        let made = self.made.clone();
        load(VarBuilder::from_backend(Box::new(self), DType::F32, Device::Cpu))?;
        let made = std::mem::take(&mut *made.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(made)
    }

    fn fresh(&self, shape: &Shape, name: &str, init: Init) -> candle_core::Result<Tensor> {
        let key = blake3::keyed_hash(blake3::hash(&self.seed.to_le_bytes()).as_bytes(), name.as_bytes());
        let mut random = ChaCha8Rng::from_seed(*key.as_bytes());
        let n = shape.elem_count();
        let values: Vec<f32> = match init {
            Init::Randn { mean, .. } if mean.is_infinite() => {
                return Tensor::eye(shape.dims2()?.0, DType::F32, &Device::Cpu);
            }
            Init::Const(value) => vec![value as f32; n],
            Init::Randn { mean, stdev } => {
                let mut draw = || random.sample::<f64, _>(StandardNormal) * stdev + mean;
                (0..n).map(|_| draw() as f32).collect()
            }
            Init::Uniform { lo, up } => (0..n).map(|_| random.random_range(lo..up) as f32).collect(),
            Init::Kaiming { .. } => candle_core::bail!("tensor `{name}` asks for an initialiser that no layer uses"),
        };
        Tensor::from_vec(values, shape, &Device::Cpu)
    }
}

impl SimpleBackend for Fresh {
    fn get(&self, shape: Shape, name: &str, init: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let tensor = match self.given.get(name) {
            Some(tensor) if tensor.shape() == &shape => tensor.to_dtype(DType::F32)?,
            Some(tensor) => {
                candle_core::bail!("tensor `{name}` has shape {:?}, expected: {shape:?}", tensor.dims())
            }
            None if self.given.keys().any(|given| same_module(given, name)) => {
                let held: Vec<&String> = self.given.keys().collect();
                candle_core::bail!("tensor `{name}` is missing; the file holds {} tensors: {}", held.len(), some(&held))
            }
            None => self.fresh(&shape, name, init)?,
        };
        self.made.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_string(), tensor.clone());
        tensor.to_device(device)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        candle_core::bail!("a fresh tensor `{name}` needs a shape")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

/// Whether two tensors belong to the same of encoder, quantizer, decoder: if some of one are given, all must be.
fn same_module(a: &str, b: &str) -> bool {
    a.split('.').next() == b.split('.').next()
}
