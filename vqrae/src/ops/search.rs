//! Nearest codes where the features are: on the CPU, or on the GPU without a way through the host.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use vqrae_kernels as kernels;

/// Codes `[K, e]` made ready for searching on their device. Both devices answer by the contract of [`kernels::nearest`], so
/// they give the same codes for the same features.
#[derive(Debug, Clone)]
pub(crate) enum Search {
    Cpu(Arc<kernels::Codebook>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<kernels::cuda::Codebook>),
}

impl Search {
    /// Prepares codes `[K, e]`, f32.
    ///
    /// # Errors
    /// If one is not finite, or the GPU's memory does not hold them.
    pub(crate) fn new(codes: &Tensor, metric: kernels::Metric) -> Result<Self> {
        let (_, e) = codes.dims2()?;
        #[cfg(feature = "cuda")]
        if codes.device().is_cuda() {
            let rows = super::cuda::copy(codes)?;
            let gpu = super::cuda::gpu(codes.device())?;
            let method = kernels::cuda::Method::for_width(e);
            let search = kernels::cuda::Codebook::on_device(&gpu, rows, e, metric, method);
            return Ok(Self::Cuda(Arc::new(search.map_err(candle_core::Error::wrap)?)));
        }
        let rows = codes.flatten_all()?.to_vec1::<f32>()?;
        let search = kernels::Codebook::new(rows, e, metric).map_err(candle_core::Error::wrap)?;
        Ok(Self::Cpu(Arc::new(search)))
    }

    /// The nearest code of every feature.
    ///
    /// # Shapes
    /// - features: f32 `[…, e]`
    /// - output: u32 `[…]`
    ///
    /// # Errors
    /// If a feature is not finite: the first such one is named.
    pub(crate) fn nearest(&self, features: &Tensor) -> Result<Tensor> {
        features.contiguous()?.apply_op1_no_bwd(self)
    }

    fn width(&self) -> usize {
        match self {
            Self::Cpu(codes) => codes.width(),
            #[cfg(feature = "cuda")]
            Self::Cuda(codes) => codes.width(),
        }
    }

    /// The shape of the codes of features of a shape.
    fn shape(&self, features: &Layout) -> Result<Shape> {
        match features.dims().split_last() {
            Some((&e, rest)) if e == self.width() => Ok(Shape::from(rest)),
            _ => candle_core::bail!("nearest: features {:?}, expected width {}", features.dims(), self.width()),
        }
    }
}

impl CustomOp1 for Search {
    fn name(&self) -> &'static str {
        "nearest"
    }

    fn cpu_fwd(&self, features: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = self.shape(layout)?;
        match self {
            Self::Cpu(codes) => {
                let found = codes.nearest(super::f32_slice(features, layout)?).map_err(candle_core::Error::wrap)?;
                Ok((CpuStorage::U32(found), shape))
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => candle_core::bail!("nearest: the codes are on a GPU, the features are not"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        features: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        use kernels::cuda::Mode;

        let shape = self.shape(layout)?;
        let Self::Cuda(codes) = self else {
            candle_core::bail!("nearest: the features are on a GPU, the codes are not")
        };
        let features_slice = super::cuda::slice::<f32>(features, layout)?;
        let (found, _) = codes.nearest(&features_slice, Mode::Exact).map_err(candle_core::Error::wrap)?;
        Ok((candle_core::CudaStorage::wrap_cuda_slice(found, features.device().clone()), shape))
    }
}
