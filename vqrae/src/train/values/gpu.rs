//! All parameters of a GPU at once: AdamW in one launch, the squares of gradients in two and one transfer.

use candle_core::{DType, Device, Result, Tensor};
use vqrae_kernels::cuda::training::{self, Constants, Parameter};

use super::Values;
use crate::ops::cuda;
use crate::train::optimizer::{Step, Update};

/// Takes the steps of those whose numbers are all on one GPU, and returns the others.
pub(super) fn step(updates: Vec<Update<'_>>) -> Result<Vec<Update<'_>>> {
    let Some(device) = updates.iter().map(|update| update.var.device()).find(|device| device.is_cuda()) else {
        return Ok(updates);
    };
    let device = device.clone();
    let serves = |tensor: &Tensor| is_f32_on(tensor, &device) && tensor.is_contiguous();
    let (mut here, mut left) = (Vec::new(), Vec::new());
    for update in updates {
        let count = update.var.elem_count();
        let fits = |values: &Values| matches!(values, Values::Device(x) if serves(x) && x.elem_count() == count);
        match serves(update.var) && [update.gradient, update.first, update.second].into_iter().all(fits) {
            true => here.push(update),
            false => left.push(update),
        }
    }
    let Some(Step { config, clip, root, .. }) = here.first().map(|update| update.step) else { return Ok(left) };
    let constants = Constants {
        beta1: config.beta1 as f32,
        beta2: config.beta2 as f32,
        eps: config.eps as f32,
        clip: clip as f32,
        root: root as f32,
    };
    let parameter = |Update { var, gradient, first, second, step }: &Update<'_>| {
        Ok(Parameter {
            value: cuda::address(var)?,
            gradient: cuda::address(&gradient.tensor()?)?,
            first: cuda::address(&first.tensor()?)?,
            second: cuda::address(&second.tensor()?)?,
            length: var.elem_count(),
            decay: step.decay as f32,
            scale: step.scale as f32,
        })
    };
    let parameters = here.iter().map(parameter).collect::<Result<Vec<_>>>()?;
    let gpu = cuda::gpu(&device)?;
    // SAFETY: contiguous f32 tensors of these lengths on this device, which `here` keeps until after the launch; what frees
    // or reads them later stands in the same stream. Moments and variables are nobody else's storage.
    unsafe { training::adamw(&gpu, &parameters, constants) }.map_err(candle_core::Error::wrap)?;
    Ok(left)
}

/// The sum of the squares of each, in binary64; `None` where they are not all on one GPU.
pub(super) fn squares(all: &[&Tensor]) -> Result<Option<Vec<f64>>> {
    let Some(device) = all.first().map(|values| values.device()).filter(|device| device.is_cuda()) else {
        return Ok(None);
    };
    if !all.iter().all(|values| is_f32_on(values, device)) {
        return Ok(None);
    }
    let contiguous = all.iter().map(|values| values.contiguous()).collect::<Result<Vec<_>>>()?;
    let held = contiguous.iter().map(cuda::hold).collect::<Vec<_>>();
    let views = held.iter().map(|held| held.view::<f32>()).collect::<Result<Vec<_>>>()?;
    let gpu = cuda::gpu(device)?;
    training::squares(&gpu, &views).map(Some).map_err(candle_core::Error::wrap)
}

fn is_f32_on(tensor: &Tensor, device: &Device) -> bool {
    tensor.dtype() == DType::F32 && tensor.device().same_device(device)
}
