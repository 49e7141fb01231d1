//! A model's tensors by what training does to them.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor, Var};

use super::config::Groups;
use crate::error::Result;
use crate::model;
use crate::weights::Tensors;

/// A group is trained when its rate is not zero.
#[derive(Debug)]
pub(super) struct Parameters {
    /// What gradients move.
    pub(super) trained: BTreeMap<String, Var>,
    /// The quantizer's moving averages, which no gradient moves.
    pub(super) averages: BTreeMap<String, Var>,
    /// What stays.
    pub(super) frozen: Tensors,
}

/// What becomes of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Trained,
    Average,
    Frozen,
}

impl Fate {
    /// Of a model's tensor, by its name.
    pub(super) fn of(name: &str, groups: &Groups, model: &model::Config) -> Self {
        let of_quantizer = name.strip_prefix("quantizer.");
        let never_changes =
            name.starts_with("latent.") || of_quantizer.is_some_and(|name| model.quantizer.is_frozen(name));
        if never_changes || groups.of(name).peak == 0.0 {
            Self::Frozen
        } else if of_quantizer.is_some_and(|name| model.quantizer.is_average(name)) {
            Self::Average
        } else {
            Self::Trained
        }
    }
}

impl Parameters {
    /// Those of a model, in f32 on `device`.
    pub(super) fn of(tensors: &Tensors, groups: &Groups, model: &model::Config, device: &Device) -> Result<Self> {
        let (mut trained, mut averages, mut frozen) = (BTreeMap::new(), BTreeMap::new(), Tensors::new());
        for (name, tensor) in tensors {
            let tensor = tensor.to_dtype(DType::F32)?.to_device(device)?;
            match Fate::of(name, groups, model) {
                Fate::Frozen => drop(frozen.insert(name.clone(), tensor)),
                Fate::Average => drop(averages.insert(name.clone(), Var::from_tensor(&tensor)?)),
                Fate::Trained => drop(trained.insert(name.clone(), Var::from_tensor(&tensor)?)),
            }
        }
        Ok(Self { trained, averages, frozen })
    }

    /// All tensors; what is trained is tracked.
    pub(super) fn tracked(&self) -> HashMap<String, Tensor> {
        let vars = self.trained.iter().chain(&self.averages).map(|(name, var)| (name.clone(), var.as_tensor().clone()));
        vars.chain(self.frozen.iter().map(|(name, tensor)| (name.clone(), tensor.clone()))).collect()
    }

    /// All tensors, none of them tracked, on the CPU.
    pub(super) fn tensors(&self) -> Result<Tensors> {
        let vars = self.trained.iter().chain(&self.averages);
        let vars = vars.map(|(name, var)| (name.clone(), var.as_detached_tensor()));
        let on_cpu = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_device(&Device::Cpu)?));
        vars.chain(self.frozen.clone()).map(on_cpu).collect()
    }
}
