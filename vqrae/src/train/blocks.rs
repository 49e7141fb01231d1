//! How training runs the blocks of a transformer: each keeps a graph of its own, which the backward pass frees as soon as the
//! block's gradients are known, so that gradients take the room of what they were computed from; candle alone holds all of a
//! graph to the end. Or it keeps its input alone, and the backward pass computes the block again: activation checkpointing
//! (Chen et al., arXiv 1604.06174).
//!
//! A candle op has at most three inputs, a block has a dozen parameters. So the op is one of the block's input, and the
//! gradients of the parameters, which the backward pass of the block makes along the way, are put aside;
//! [`Blocks::backward`] adds them to those of the whole pass. Values and gradients are the same bits in every way.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor, Var};

use crate::vit::{Block, RunBlock};

/// Runs blocks, each with a graph of its own or with none.
#[derive(Debug, Clone)]
pub(super) struct Blocks {
    /// Whether the backward pass computes blocks again.
    again: bool,
    /// The parameters' gradients of the blocks that the backward pass at hand has been through.
    aside: Arc<Mutex<Option<GradStore>>>,
}

impl Blocks {
    pub(super) fn new(again: bool) -> Self {
        Self { again, aside: Arc::default() }
    }

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

impl RunBlock for Blocks {
    fn run(&self, block: &Block, x: &Tensor) -> Result<Tensor> {
        // Stands for all of the block's parameters: with it the op has a gradient even where the input has none.
        let parameter = &block.mlp.fc1.weight;
        if !x.track_op() && !parameter.track_op() {
            return block.forward(x);
        }
        let held = if self.again { None } else { Some(Graph::of(block, x)?) };
        let output = match &held {
            Some(graph) => graph.output.detach(),
            None => block.forward(&x.detach())?.detach(),
        };
        let (output, held) = (Mutex::new(Some(output)), Mutex::new(held));
        x.apply_op2(parameter, BlockOp { block: block.clone(), output, held, aside: self.aside.clone() })
    }
}

/// What a block has computed, from a leaf on.
struct Graph {
    input: Var,
    output: Tensor,
}

impl Graph {
    fn of(block: &Block, x: &Tensor) -> Result<Self> {
        let input = Var::from_tensor(&x.detach())?;
        Ok(Self { output: block.forward(input.as_tensor())?, input })
    }
}

/// A block as an op of its input.
struct BlockOp {
    block: Block,
    /// Its graph, until the backward pass has taken it.
    held: Mutex<Option<Graph>>,
    /// The value, computed before the op was made: an op sees storage, a block takes tensors.
    output: Mutex<Option<Tensor>>,
    aside: Arc<Mutex<Option<GradStore>>>,
}

impl BlockOp {
    fn take(&self) -> Result<Tensor> {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner).take();
        output.ok_or_else(|| candle_core::Error::Msg("a block's value was asked for twice".into()))?.contiguous()
    }
}

impl CustomOp2 for BlockOp {
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
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Graph { input, output } = held.map_or_else(|| Graph::of(&self.block, x), Ok)?;
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
