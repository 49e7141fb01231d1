//! A codebook's moving averages on a GPU: what quantizer/average.rs computes on the host, to the same bits, where features are.

use candle_core::{Result, Tensor};

/// What a step makes of them.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "read on a GPU alone"))]
pub(crate) struct Step<'a> {
    /// C, `[K, e]`.
    pub(crate) codes: &'a Tensor,
    /// n, `[K]`; all zeros where the averages have not begun.
    pub(crate) sizes: &'a Tensor,
    /// m, `[K, e]`.
    pub(crate) sums: &'a Tensor,
    /// Features `[B, N, e]` as they met the codes, and their indices `[B, N]`; several where levels share the codebook.
    pub(crate) batches: &'a [(Tensor, Tensor)],
    /// γ
    pub(crate) decay: f64,
    /// ε
    pub(crate) eps: f64,
    /// Where codes have length one: what shorter ones are divided by.
    pub(crate) shortest: Option<f64>,
    /// The size of a code that starts again.
    pub(crate) reset: f32,
}

/// Codes that start again, and the features that they become.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "read on a GPU alone"))]
pub(crate) struct Restart {
    pub(crate) dead: Vec<usize>,
    /// As many, among those of all batches, token by token.
    pub(crate) chosen: Vec<usize>,
}

/// Whether [`Step::take`] can.
pub(crate) fn serves(codes: &Tensor) -> bool {
    cfg!(feature = "cuda") && codes.device().is_cuda() && codes.dtype() == candle_core::DType::F32
}

impl Step<'_> {
    /// New codes, sizes and sums. `restart` is told the sizes and how many features there are.
    #[cfg(not(feature = "cuda"))]
    pub(crate) fn take(self, _: impl FnOnce(&[f32], usize) -> Restart) -> Result<[Tensor; 3]> {
        candle_core::bail!("moving averages: {:?} is not a GPU that this program can use", self.codes.device())
    }

    /// New codes, sizes and sums. `restart` is told the sizes and how many features there are.
    #[cfg(feature = "cuda")]
    pub(crate) fn take(self, restart: impl FnOnce(&[f32], usize) -> Restart) -> Result<[Tensor; 3]> {
        use candle_core::Error;
        use vqrae_kernels::cuda::training::{self, ByCode, Smoothing};

        use super::cuda::{self, hold};

        let (k, e) = self.codes.dims2()?;
        let device = self.codes.device();
        let gpu = cuda::gpu(device)?;
        let stream = gpu.stream();
        let begun = self.sizes.to_vec1::<f32>()?.iter().any(|&size| size != 0.0);
        let (mut sizes, mut sums) = match begun {
            true => (cuda::copy(self.sizes)?, cuda::copy(self.sums)?),
            false => (stream.clone_htod(&vec![1f32; k]).map_err(Error::wrap)?, cuda::copy(self.codes)?),
        };
        for (features, indices) in self.batches {
            let (features, indices) = (features.contiguous()?, indices.contiguous()?);
            let (features, indices) = (hold(&features), hold(&indices));
            let by_code = ByCode::sort(&gpu, &indices.view()?, k).map_err(Error::wrap)?;
            let (sizes, sums) = (&mut sizes.as_view_mut(), &mut sums.as_view_mut());
            by_code.follow(&gpu, &features.view()?, e, self.decay, sizes, sums).map_err(Error::wrap)?;
        }
        // K numbers alone come to the host, where their sum has the CPU's order and dead codes are drawn for.
        let known = stream.clone_dtoh(&sizes).map_err(Error::wrap)?;
        let total: f64 = known.iter().map(|&size| f64::from(size)).sum();
        let scale = total / (total + k as f64 * self.eps);
        let smoothing = Smoothing { eps: self.eps, scale, shortest: self.shortest };
        let smoothed = training::smooth(&gpu, &sizes.as_view(), &sums.as_view(), e, smoothing);
        let mut codes = smoothed.map_err(Error::wrap)?;
        let features: Vec<&Tensor> = self.batches.iter().map(|(features, _)| features).collect();
        let features = Tensor::stack(&features, 2)?.contiguous()?;
        let Restart { dead, chosen } = restart(&known, features.elem_count() / e.max(1));
        if !dead.is_empty() {
            let narrow = |indices: Vec<usize>| indices.into_iter().map(|i| i as u32).collect::<Vec<u32>>();
            let (dead, chosen) = (narrow(dead), narrow(chosen));
            let features = hold(&features);
            let (codes, sizes, sums) = (&mut codes.as_view_mut(), &mut sizes.as_view_mut(), &mut sums.as_view_mut());
            training::restart(&gpu, &features.view()?, e, (&chosen, &dead), self.reset, codes, sizes, sums)
                .map_err(Error::wrap)?;
        }
        Ok([cuda::tensor(codes, (k, e), device)?, cuda::tensor(sizes, k, device)?, cuda::tensor(sums, (k, e), device)?])
    }
}
