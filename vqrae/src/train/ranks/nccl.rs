//! Ranks as threads of one process with a GPU each: tensors are summed by NCCL, on the stream that computes them.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::nccl::{self, Comm, ReduceOp};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Device, Layout, Shape, Tensor};

use super::{Ranks, Threads};
use crate::error::{Error, Result};

/// What the ranks of one run find each other by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Id(nccl::Id);

impl Id {
    pub(super) fn new() -> Result<Self> {
        nccl::Id::new().map(Self).map_err(|error| wrong("has no id for the ranks", &error))
    }
}

/// One of several ranks, each a thread with a GPU.
#[derive(Debug)]
pub(super) struct Nccl {
    /// What is on the host goes its way, and no rank begins a sum before all are there: NCCL would wait for ever.
    host: Threads,
    op: AllReduce,
}

impl Nccl {
    /// To be called on all ranks at once, each in its thread.
    pub(super) fn new(host: Threads, Id(id): Id) -> Result<Self> {
        let stream = host.device().as_cuda_device()?.cuda_stream();
        // NCCL takes the device that is the thread's.
        stream.context().bind_to_thread().map_err(candle_core::Error::wrap)?;
        host.gather(Vec::new())?;
        let comm = Comm::from_rank(stream, host.rank(), host.size(), id)
            .map_err(|error| wrong("did not bring the ranks together", &error))?;
        Ok(Self { host, op: AllReduce(comm) })
    }
}

fn wrong(what: &str, error: &nccl::result::NcclError) -> Error {
    Error::Training(format!("NCCL {what}: {error:?}; NCCL_DEBUG=INFO makes it say more"))
}

impl Ranks for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn device(&self) -> &Device {
        self.host.device()
    }

    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Arc<Vec<u8>>>> {
        self.host.gather(bytes)
    }

    fn sum(&self, tensor: &Tensor) -> Result<Tensor> {
        if !tensor.device().is_cuda() {
            return self.host.sum(tensor);
        }
        let tensor = tensor.contiguous()?;
        self.host.gather(Vec::new())?;
        Ok(tensor.apply_op1_no_bwd(&self.op)?)
    }
}

/// The sum over all ranks, as an op of this rank's part.
#[derive(Debug)]
struct AllReduce(Comm);

impl CustomOp1 for AllReduce {
    fn name(&self) -> &'static str {
        "all-reduce"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        candle_core::bail!("NCCL sums tensors on a GPU alone")
    }

    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let device = storage.device().clone();
        let Some((first, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("NCCL was given a tensor that is not contiguous")
        };
        let own = storage.as_cuda_slice::<f32>()?.slice(first..end);
        let mut sum = device.alloc_zeros::<f32>(end - first)?;
        self.0.all_reduce(&own, &mut sum, &ReduceOp::Sum).map_err(candle_core::Error::debug)?;
        Ok((CudaStorage::wrap_cuda_slice(sum, device), layout.shape().clone()))
    }
}
