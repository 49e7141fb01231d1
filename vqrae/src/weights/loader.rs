//! Tensors from a [`Store`] to a model, strictly both ways.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};

use super::{Store, some};
use crate::error::{Error, Result};

/// Gives a model its tensors, and remembers which were asked for.
#[derive(Debug, Clone)]
pub struct Loader {
    store: Arc<Store>,
    asked: Arc<Mutex<BTreeSet<String>>>,
}

impl Loader {
    /// Over the tensors of a store.
    pub fn new(store: Store) -> Self {
        Self { store: Arc::new(store), asked: Arc::default() }
    }

    /// What a model loads itself from.
    pub fn builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        self.backend(true, dtype, device)
    }

    /// The same, but for the values, which are zeros that take no memory: to check names and shapes before any tensor is
    /// read.
    pub fn shapes(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        self.backend(false, dtype, device)
    }

    fn backend(&self, with_values: bool, dtype: DType, device: &Device) -> VarBuilder<'static> {
        let backend = Strict { store: self.store.clone(), asked: self.asked.clone(), with_values };
        VarBuilder::from_backend(Box::new(backend), dtype, device.clone())
    }

    /// Turns a failed load into an error that names the file, and left-over tensors into an error too.
    pub fn finish<T>(&self, loaded: candle_core::Result<T>) -> Result<T> {
        let loaded = loaded.map_err(|e| Error::weights(self.store.path(), e))?;
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let left: Vec<&String> = self.store.names().filter(|name| !asked.contains(*name)).collect();
        if left.is_empty() {
            return Ok(loaded);
        }
        Err(Error::weights(
            self.store.path(),
            format!("{} tensors that the model has no use for: {}", left.len(), some(&left)),
        ))
    }
}

struct Strict {
    store: Arc<Store>,
    asked: Arc<Mutex<BTreeSet<String>>>,
    with_values: bool,
}

impl SimpleBackend for Strict {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_string());
        let found = self.find(name)?;
        if found != shape.dims() {
            candle_core::bail!("tensor `{name}` has shape {found:?}, expected: {shape:?}");
        }
        if self.with_values {
            self.get_unchecked(name, dtype, device)
        } else {
            Tensor::zeros((), dtype, device)?.broadcast_as(shape)
        }
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        self.find(name)?;
        let tensor = self.store.tensor(name).map_err(candle_core::Error::wrap)?;
        tensor.to_device(device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.store.shape(name).is_some()
    }
}

impl Strict {
    /// The shape of a tensor, or an error that says what there is instead.
    fn find(&self, name: &str) -> candle_core::Result<&[usize]> {
        let Some(shape) = self.store.shape(name) else {
            let held: Vec<&String> = self.store.names().collect();
            candle_core::bail!("tensor `{name}` is missing; the file holds {} tensors: {}", held.len(), some(&held));
        };
        Ok(shape)
    }
}
