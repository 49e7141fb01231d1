//! Activation checkpointing (Chen et al., arXiv 1604.06174): a block keeps its input alone, and the backward pass computes
//! the block again for what its gradient needs.
//!
//! A candle op has at most three inputs, a block has a dozen parameters. So the op is one of the block's input, and the
//! gradients of the parameters, which the backward pass of the block makes along the way, are put aside;
//! [`Recompute::backward`] adds them to those of the whole pass. Values and gradients are the same bits.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor, Var};

use crate::vit::{Block, RunBlock};

/// Runs blocks so that they hold nothing for the gradient.
#[derive(Debug, Clone, Default)]
pub(super) struct Recompute {
    /// The parameters' gradients of the blocks that the backward pass at hand has been through.
    aside: Arc<Mutex<Option<GradStore>>>,
}

impl Recompute {
    /// All gradients of `loss`.
    pub(super) fn backward(&self, loss: &Tensor) -> Result<GradStore> {
        self.aside.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut gradients = loss.backward()?;
        if let Some(aside) = self.aside.lock().unwrap_or_else(PoisonError::into_inner).take() {
            gradients.extend(aside)?;
        }
        Ok(gradients)
    }
}

impl RunBlock for Recompute {
    fn run(&self, block: &Block, x: &Tensor) -> Result<Tensor> {
        // Stands for all of the block's parameters: with it the op has a gradient even where the input has none.
        let parameter = &block.mlp.fc1.weight;
        if !x.track_op() && !parameter.track_op() {
            return block.forward(x);
        }
        let output = Mutex::new(Some(block.forward(&x.detach())?));
        x.apply_op2(parameter, Again { block: block.clone(), output, aside: self.aside.clone() })
    }
}

/// A block as an op of its input.
struct Again {
    block: Block,
    /// The value, computed before the op was made: an op sees storage, a block takes tensors.
    output: Mutex<Option<Tensor>>,
    aside: Arc<Mutex<Option<GradStore>>>,
}

impl Again {
    fn take(&self) -> Result<Tensor> {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner).take();
        output.ok_or_else(|| candle_core::Error::Msg("a block's value was asked for twice".into()))?.contiguous()
    }
}

impl CustomOp2 for Again {
    fn name(&self) -> &'static str {
        "block"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let output = self.take()?;
        let (storage, layout) = output.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) if layout.start_offset() == 0 => Ok((storage.clone(), output.shape().clone())),
            _ => candle_core::bail!("a block's value lies elsewhere than its input"),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let output = self.take()?;
        let (storage, layout) = output.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, output.shape().clone())),
            _ => candle_core::bail!("a block's value lies elsewhere than its input"),
        }
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let input = Var::from_tensor(&x.detach())?;
        let output = self.block.forward(input.as_tensor())?;
        let mut gradients = output.apply_op1(Given(gradient.clone()))?.backward()?;
        let of_input = gradients.remove(input.as_tensor()).map(|gradient| gradient.detach());
        // Else they would hold the graph that made them, and with it all that the block has computed.
        for id in gradients.get_ids().copied().collect::<Vec<_>>() {
            if let Some(gradient) = gradients.get_id(id).map(Tensor::detach) {
                gradients.insert_id(id, gradient);
            }
        }
        let mut aside = self.aside.lock().unwrap_or_else(PoisonError::into_inner);
        match aside.as_mut() {
            Some(aside) => aside.extend(gradients)?,
            None => *aside = Some(gradients),
        }
        // The parameter's own gradient is among those put aside.
        Ok((of_input, None))
    }
}

/// A scalar, worth nothing, whose gradient is given: where a backward pass begins.
struct Given(Tensor);

impl CustomOp1 for Given {
    fn name(&self) -> &'static str {
        "given-gradient"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let nothing = Tensor::zeros((), self.0.dtype(), self.0.device())?;
        let (given, layout) = nothing.storage_and_layout();
        match &*given {
            Storage::Cuda(given) => Ok((given.try_clone(layout)?, Shape::from(()))),
            _ => Ok((storage.try_clone(&Layout::contiguous(()))?, Shape::from(()))),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
