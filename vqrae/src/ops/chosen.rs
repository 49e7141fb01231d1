//! What training does with the codes that were chosen: on a GPU in as few passes over memory as there are results.

use candle_core::{Result, Tensor};

/// `weight · mean (h − sg(q))²`, which draws features to their codes.
///
/// # Shapes
/// - h, q: `[B, N, e]`
/// - output: `[]`
///
/// # Errors
/// If the shapes differ.
pub(crate) fn commitment(h: &Tensor, q: &Tensor, weight: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if gpu::serves(h) && gpu::serves(q) && h.dims() == q.dims() {
        return h.contiguous()?.apply_op2(&q.detach().contiguous()?, gpu::Commitment { weight });
    }
    (h - q.detach())?.sqr()?.mean_all()? * weight
}

/// Rows of `codes = C Wᵀ` by indices, whose gradient reaches W through the rows that were chosen alone: a product over N rows
/// where that of all codes has K, and nothing is scattered. `None` where it is not worth it: not on a GPU, or W is frozen.
///
/// # Shapes
/// - codes: `[K, e]`
/// - codebook: C, without a gradient, `[K, e]`
/// - weight: W, `[e, e]`
/// - indices: u32 `[B, N]`
/// - output: `[B, N, e]`
///
/// # Errors
/// If the shapes do not fit.
pub(crate) fn transformed_rows(
    codes: &Tensor,
    codebook: &Tensor,
    weight: &Tensor,
    indices: &Tensor,
) -> Result<Option<Tensor>> {
    #[cfg(feature = "cuda")]
    if weight.track_op() && [codes, codebook, weight].into_iter().all(gpu::serves) {
        let (codes, codebook) = (codes.detach().contiguous()?, codebook.detach().contiguous()?);
        let rows = gpu::TransformedRows { codes, codebook, indices: indices.contiguous()? };
        return weight.apply_op1(rows).map(Some);
    }
    let _ = (codes, codebook, weight, indices);
    Ok(None)
}

#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::backend::BackendStorage;
    use candle_core::{
        CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Error, Layout, Result, Shape, Tensor,
    };
    use vqrae_kernels::cuda::training;

    use super::super::cuda::{gpu, gpu_of, hold, slice, tensor};

    pub(super) fn serves(x: &Tensor) -> bool {
        x.device().is_cuda() && x.dtype() == DType::F32 && x.elem_count() > 0
    }

    fn not_here<T>() -> Result<T> {
        candle_core::bail!("a kernel was given a tensor that is not on a GPU")
    }

    pub(super) struct Commitment {
        pub(super) weight: f64,
    }

    impl CustomOp2 for Commitment {
        fn name(&self) -> &'static str {
            "commitment"
        }

        fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
            not_here()
        }

        fn cuda_fwd(
            &self,
            h: &CudaStorage,
            h_layout: &Layout,
            q: &CudaStorage,
            q_layout: &Layout,
        ) -> Result<(CudaStorage, Shape)> {
            let width = h_layout.dims().last().copied().unwrap_or(1);
            let scale = self.weight / h_layout.shape().elem_count() as f64;
            let (h_slice, q) = (slice(h, h_layout)?, slice(q, q_layout)?);
            let gpu = gpu_of(h)?;
            let loss = training::commitment(&gpu, &h_slice, &q, width, scale).map_err(Error::wrap)?;
            Ok((CudaStorage::wrap_cuda_slice(loss, h.device().clone()), Shape::from(())))
        }

        fn bwd(&self, h: &Tensor, q: &Tensor, _: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
            let gradient = Gradient { weight: 2.0 * self.weight / h.elem_count() as f64 };
            Ok((Some(h.apply_op3_no_bwd(q, &g.contiguous()?, &gradient)?), None))
        }
    }

    /// `weight g (h − q)`
    struct Gradient {
        weight: f64,
    }

    impl CustomOp3 for Gradient {
        fn name(&self) -> &'static str {
            "commitment-gradient"
        }

        fn cpu_fwd(
            &self,
            _: &CpuStorage,
            _: &Layout,
            _: &CpuStorage,
            _: &Layout,
            _: &CpuStorage,
            _: &Layout,
        ) -> Result<(CpuStorage, Shape)> {
            not_here()
        }

        fn cuda_fwd(
            &self,
            h: &CudaStorage,
            h_layout: &Layout,
            q: &CudaStorage,
            q_layout: &Layout,
            g: &CudaStorage,
            g_layout: &Layout,
        ) -> Result<(CudaStorage, Shape)> {
            let (h_slice, q, g) = (slice(h, h_layout)?, slice(q, q_layout)?, slice(g, g_layout)?);
            let gpu = gpu_of(h)?;
            let made = training::straight_through_gradient(&gpu, None, &h_slice, &q, &g, self.weight);
            let made = made.map_err(Error::wrap)?;
            Ok((CudaStorage::wrap_cuda_slice(made, h.device().clone()), h_layout.shape().clone()))
        }
    }

    pub(super) struct TransformedRows {
        pub(super) codes: Tensor,
        pub(super) codebook: Tensor,
        pub(super) indices: Tensor,
    }

    impl CustomOp1 for TransformedRows {
        fn name(&self) -> &'static str {
            "transformed-rows"
        }

        fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
            not_here()
        }

        fn cuda_fwd(&self, weight: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
            let ((_, e), (b, n)) = (self.codes.dims2()?, self.indices.dims2()?);
            let (codes, indices) = (hold(&self.codes), hold(&self.indices));
            let gpu = gpu_of(weight)?;
            let rows = training::gather_rows(&gpu, &codes.view()?, &indices.view()?, e);
            let rows = rows.map_err(Error::wrap)?;
            Ok((CudaStorage::wrap_cuda_slice(rows, weight.device().clone()), Shape::from((b, n, e))))
        }

        fn bwd(&self, weight: &Tensor, _: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
            let (e, d) = weight.dims2()?;
            let g = g.contiguous()?;
            let (codebook, indices, g) = (hold(&self.codebook), hold(&self.indices), hold(&g));
            let device = weight.device();
            let gpu = gpu(device)?;
            let gradient = training::simvq_gradient(&gpu, &codebook.view()?, &indices.view()?, &g.view()?, (d, e));
            tensor(gradient.map_err(Error::wrap)?, (e, d), device).map(Some)
        }
    }
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::ops::cuda::test_device;

    fn wave(shape: &[usize], phase: f32) -> Tensor {
        let values = (0..shape.iter().product()).map(|i: usize| (i as f32 * 0.7 + phase).sin()).collect::<Vec<f32>>();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    fn vector(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn assert_close(a: &Tensor, b: &Tensor) {
        for (i, (a, b)) in vector(a).iter().zip(vector(b)).enumerate() {
            assert!((a - b).abs() <= 1e-5 * b.abs().max(0.1), "{i}: {a} and {b}");
        }
    }

    #[test]
    fn commitment_on_a_gpu_is_the_cpus() {
        let Some(gpu) = test_device() else { return };
        let run = |device: &Device| {
            let h = Var::from_tensor(&wave(&[2, 5, 33], 0.0).to_device(device).unwrap()).unwrap();
            let q = Var::from_tensor(&wave(&[2, 5, 33], 1.0).to_device(device).unwrap()).unwrap();
            let loss = commitment(&h, &q, 0.25).unwrap();
            let gradients = (&loss * 3.0).unwrap().backward().unwrap();
            assert!(gradients.get(&q).is_none());
            (loss, gradients.get(&h).unwrap().clone())
        };
        let ((loss, gradient), (expected, expected_gradient)) = (run(&gpu), run(&Device::Cpu));
        assert_close(&loss, &expected);
        assert_close(&gradient, &expected_gradient);
    }

    #[test]
    fn rows_of_a_layer_have_the_gradient_of_all_codes() {
        let Some(gpu) = test_device() else { return };
        let (codebook, start, g) = (wave(&[9, 6], 0.0), wave(&[6, 6], 1.0), wave(&[2, 5, 6], 2.0));
        let indices = Tensor::new(&[[0u32, 3, 3, 8, 1], [3, 0, 7, 7, 3]], &Device::Cpu).unwrap();
        let run = |device: &Device| {
            let here = |x: &Tensor| x.to_device(device).unwrap();
            let (codebook, weight) = (here(&codebook), Var::from_tensor(&here(&start)).unwrap());
            let codes = codebook.matmul(&weight.t().unwrap()).unwrap();
            let plain = || codes.index_select(&here(&indices).flatten_all().unwrap(), 0).unwrap().reshape((2, 5, 6));
            let rows = transformed_rows(&codes, &codebook, &weight, &here(&indices)).unwrap();
            assert_eq!(rows.is_some(), device.is_cuda());
            let rows = rows.unwrap_or_else(|| plain().unwrap());
            assert_eq!(vector(&rows), vector(&plain().unwrap()));
            let gradients = (rows * here(&g)).unwrap().sum_all().unwrap().backward().unwrap();
            gradients.get(&weight).unwrap().clone()
        };
        assert_close(&run(&gpu), &run(&Device::Cpu));
    }
}
