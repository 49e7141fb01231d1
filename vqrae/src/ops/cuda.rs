//! candle's tensors as the kernels' slices, where they lie.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDType, cudarc};
use candle_core::{CudaStorage, Device, Layout, Result, Storage, Tensor};
use cudarc::driver::{CudaSlice, CudaView};
use vqrae_kernels::cuda::Gpu;

/// The kernels on a device's stream.
pub(crate) fn gpu(device: &Device) -> Result<Arc<Gpu>> {
    on_stream(device.as_cuda_device()?)
}

/// [`gpu`] of the device that a storage is on.
pub(crate) fn gpu_of(storage: &CudaStorage) -> Result<Arc<Gpu>> {
    on_stream(storage.device())
}

fn on_stream(device: &candle_core::CudaDevice) -> Result<Arc<Gpu>> {
    Gpu::on(&device.cuda_stream()).map_err(candle_core::Error::wrap)
}

/// The elements of a contiguous tensor, as a custom op sees them.
pub(crate) fn slice<'a, T: CudaDType>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| candle_core::Error::msg("a kernel was given a tensor that is not contiguous"))?;
    Ok(storage.as_cuda_slice::<T>()?.slice(start..end))
}

/// A copy of a tensor's elements, f32.
pub(crate) fn copy(tensor: &Tensor) -> Result<CudaSlice<f32>> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { candle_core::bail!("a tensor that is not on a GPU") };
    let stream = storage.device().cuda_stream();
    stream.clone_dtod(&slice::<f32>(storage, layout)?).map_err(candle_core::Error::wrap)
}
