//! LayerNorm and RMSNorm of rows on the GPU (`norm.cu`), alone or in one pass with the addition before.

use cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, PushKernelArg};

use super::real::{Real, int, name_of, refuse, unwritten, whole};
use super::{Gpu, launch};
use crate::Error;

/// Dynamic shared memory that a block has on every part.
const SHARED: usize = 99 << 10;
/// Up to which several rows share a block.
const SHARED_BY_ROWS: usize = 48 << 10;
const MOST_ROWS: usize = 4;

/// What rows are measured from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Centre {
    /// Their mean: LayerNorm.
    Mean,
    /// Zero: RMSNorm.
    Zero,
}

/// (x − centre) / √(mean of (x − centre)² + eps) ⊙ weight + bias, the mean in f32.
#[derive(Debug)]
pub struct Norm<'a, T> {
    /// The mean or zero.
    pub centre: Centre,
    /// `[D]`
    pub weight: CudaView<'a, T>,
    /// `[D]`
    pub bias: Option<CudaView<'a, T>>,
    /// What keeps the root from zero.
    pub eps: f32,
}

/// `Rows` of norm.cu.
#[repr(C)]
struct Arguments {
    x: u64,
    residual: u64,
    weight: u64,
    bias: u64,
    sum: u64,
    out: u64,
    rows: i64,
    d: i32,
    eps: f32,
    whole: i32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for Arguments {}

impl<T: Real> Norm<'_, T> {
    /// The norm of each row.
    ///
    /// # Shapes
    /// - x: `[M, D]`
    /// - output: `[M, D]`
    ///
    /// # Errors
    /// If x is not rows of D values, weight and bias differ in length, or D is more than 25,344.
    pub fn of(&self, gpu: &Gpu, x: &CudaView<'_, T>) -> Result<CudaSlice<T>, Error> {
        let mut out = self.result(gpu, x)?;
        self.launch(gpu, x, None, &mut out)?;
        Ok(out)
    }

    /// x + residual, and its norm: of the sum as it was rounded.
    ///
    /// # Shapes
    /// - x, residual: `[M, D]`
    /// - output: twice `[M, D]`, the sum and its norm
    ///
    /// # Errors
    /// As [`Norm::of`], or if x and residual differ in length.
    pub fn of_sum(
        &self,
        gpu: &Gpu,
        x: &CudaView<'_, T>,
        residual: &CudaView<'_, T>,
    ) -> Result<(CudaSlice<T>, CudaSlice<T>), Error> {
        if x.len() != residual.len() {
            return Err(refuse(format!(
                "norm: values of the residual, expected: {}, got: {}",
                x.len(),
                residual.len()
            )));
        }
        let (mut sum, mut out) = (self.result(gpu, x)?, self.result(gpu, x)?);
        self.launch(gpu, x, Some((residual, &mut sum)), &mut out)?;
        Ok((sum, out))
    }

    fn result(&self, gpu: &Gpu, x: &CudaView<'_, T>) -> Result<CudaSlice<T>, Error> {
        let d = self.weight.len();
        if d == 0 || !x.len().is_multiple_of(d) || self.bias.as_ref().is_some_and(|bias| bias.len() != d) {
            let bias = self.bias.as_ref().map(|bias| bias.len());
            let message = format!(
                "norm: values, expected: rows of the weight's {d} and a bias as long, got: {} and {bias:?}",
                x.len()
            );
            return Err(refuse(message));
        }
        if row_bytes(d) > SHARED {
            return Err(refuse(format!("norm: width, expected: at most {}, got: {d}", SHARED / size_of::<f32>())));
        }
        unwritten(gpu, "norm", Some(x.len()))
    }

    fn launch(
        &self,
        gpu: &Gpu,
        x: &CudaView<'_, T>,
        sum: Option<(&CudaView<'_, T>, &mut CudaSlice<T>)>,
        out: &mut CudaSlice<T>,
    ) -> Result<(), Error> {
        let (d, stream) = (self.weight.len(), gpu.stream());
        let rows = x.len() / d;
        let (x, _x) = x.device_ptr(stream);
        let (weight, _weight) = self.weight.device_ptr(stream);
        let bias = self.bias.as_ref().map(|bias| bias.device_ptr(stream));
        let sum = sum.map(|(residual, sum)| (residual.device_ptr(stream), sum.device_ptr_mut(stream)));
        let (out, _out) = out.device_ptr_mut(stream);
        let bias = bias.as_ref().map_or(0, |(bias, _)| *bias);
        let (residual, sum) = sum.as_ref().map_or((0, 0), |((residual, _), (sum, _))| (*residual, *sum));
        let whole = whole::<T>(d, &[x, residual, weight, bias, sum, out]);
        let arguments = Arguments {
            x,
            residual,
            weight,
            bias,
            sum,
            out,
            rows: i64::try_from(rows).unwrap_or(i64::MAX),
            d: int("norm: width", d)?,
            eps: self.eps,
            whole: i32::from(whole),
        };
        let per_block = (SHARED_BY_ROWS / row_bytes(d)).clamp(1, MOST_ROWS);
        let shared = per_block * row_bytes(d);
        let name = match self.centre {
            Centre::Mean => name_of::<T>(["layer_norm_f32", "layer_norm_f16", "layer_norm_bf16"]),
            Centre::Zero => name_of::<T>(["rms_norm_f32", "rms_norm_f16", "rms_norm_bf16"]),
        };
        let function = gpu.function(name, shared)?;
        let mut launcher = stream.launch_builder(&function);
        launcher.arg(&arguments);
        // SAFETY: the kernel's one argument; all arrays but weight and bias have rows · d values, these have d.
        unsafe { launch(launcher, (rows.div_ceil(per_block), 1), 32 * per_block as u32, shared) }
    }
}

/// What a row takes of shared memory.
fn row_bytes(d: usize) -> usize {
    d.next_multiple_of(4) * size_of::<f32>()
}

#[cfg(test)]
mod tests;
