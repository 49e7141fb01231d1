//! candle's tensors as the kernels' slices, where they lie.

use std::cell::Cell;
use std::ops::Deref;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaDType, cudarc};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaStorage, Device, InplaceOp1, Layout, Result, Shape, Storage, Tensor};
use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaSlice, CudaView, DevicePtrMut};
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
    let stream = tensor.device().as_cuda_device()?.cuda_stream();
    stream.clone_dtod(&hold(&tensor).view::<f32>()?).map_err(candle_core::Error::wrap)
}

/// A tensor of what a kernel made, without a gradient.
pub(crate) fn tensor<T: CudaDType>(made: CudaSlice<T>, shape: impl Into<Shape>, device: &Device) -> Result<Tensor> {
    let storage = CudaStorage::wrap_cuda_slice(made, device.as_cuda_device()?.clone());
    Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
}

/// Where the elements of a contiguous f32 tensor are, which are going to change there.
pub(crate) fn address(tensor: &Tensor) -> Result<CUdeviceptr> {
    struct Address(Cell<CUdeviceptr>);

    impl InplaceOp1 for Address {
        fn name(&self) -> &'static str {
            "address"
        }

        fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
            candle_core::bail!("a kernel was given a tensor that is not on a GPU")
        }

        fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
            let Some((start, end)) = layout.contiguous_offsets() else {
                candle_core::bail!("a kernel was given a tensor that is not contiguous")
            };
            let stream = storage.device().cuda_stream();
            let mut elements = storage.as_cuda_slice_mut::<f32>()?.slice_mut(start..end);
            self.0.set(elements.device_ptr_mut(&stream).0);
            Ok(())
        }
    }

    let address = Address(Cell::new(0));
    tensor.inplace_op1(&address)?;
    Ok(address.0.get())
}

/// A tensor kept from changing while a kernel is given it.
pub(crate) struct Held<'a, G> {
    storage: G,
    layout: &'a Layout,
}

pub(crate) fn hold(tensor: &Tensor) -> Held<'_, impl Deref<Target = Storage>> {
    let (storage, layout) = tensor.storage_and_layout();
    Held { storage, layout }
}

impl<G: Deref<Target = Storage>> Held<'_, G> {
    pub(crate) fn view<T: CudaDType>(&self) -> Result<CudaView<'_, T>> {
        match &*self.storage {
            Storage::Cuda(storage) => slice(storage, self.layout),
            _ => candle_core::bail!("a kernel was given a tensor that is not on a GPU"),
        }
    }
}

/// A GPU for a test, `None` where there is none; where `VQRAE_REQUIRE_GPU` is set that is a failure.
#[cfg(test)]
pub(crate) fn test_device() -> Option<Device> {
    match Device::new_cuda_with_stream(0) {
        Ok(device) => Some(device),
        Err(error) => {
            assert!(std::env::var_os("VQRAE_REQUIRE_GPU").is_none(), "{error}");
            None
        }
    }
}
