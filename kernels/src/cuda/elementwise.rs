//! What stands between products (`elementwise.cu`): activations, gates, and a scaled value added to the residual.

use cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, PushKernelArg};

use super::real::{Real, WHOLE, blocks, int, name_of, refuse, unwritten, whole};
use super::{Gpu, launch};
use crate::Error;

const THREADS: u32 = 256;

/// Which Φ is in x Φ(x).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// The normal distribution's.
    Erf,
    /// ½(1 + tanh(√(2/π)(x + 0.044715 x³))).
    Tanh,
}

/// `Biased` of elementwise.cu.
#[repr(C)]
struct Biased {
    x: u64,
    bias: u64,
    rows: i64,
    d: i32,
    whole: i32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for Biased {}

/// gelu(x + bias).
///
/// # Shapes
/// - x: `[M, D]`; any shape without a bias
/// - bias: `[D]`
/// - output: as x
///
/// # Errors
/// If x is not rows of D values.
pub fn gelu<T: Real>(
    gpu: &Gpu,
    x: &CudaView<'_, T>,
    bias: Option<&CudaView<'_, T>>,
    form: Gelu,
) -> Result<CudaSlice<T>, Error> {
    let mut out = unwritten(gpu, "gelu", Some(x.len()))?;
    let stream = gpu.stream();
    {
        let ((x_at, _x), (out, _out)) = (x.device_ptr(stream), out.device_ptr_mut(stream));
        gelu_at::<T>(gpu, x_at, out, x.len(), bias, form)?;
    }
    Ok(out)
}

/// As [`gelu`], in x's own place.
pub(super) fn gelu_in_place<T: Real>(
    gpu: &Gpu,
    x: &mut CudaSlice<T>,
    bias: Option<&CudaView<'_, T>>,
    form: Gelu,
) -> Result<(), Error> {
    let len = x.len();
    let (x, _x) = x.device_ptr_mut(gpu.stream());
    gelu_at::<T>(gpu, x, x, len, bias, form)
}

/// Both addresses have `len` values, at least one.
fn gelu_at<T: Real>(
    gpu: &Gpu,
    x: u64,
    out: u64,
    len: usize,
    bias: Option<&CudaView<'_, T>>,
    form: Gelu,
) -> Result<(), Error> {
    let stream = gpu.stream();
    let width = bias.map_or_else(|| own_width::<T>(len), |bias| bias.len());
    let bias = bias.map(|bias| bias.device_ptr(stream));
    let bias = bias.as_ref().map_or(0, |(bias, _)| *bias);
    let (biased, blocks) = biased::<T>("gelu", x, bias, len, width, &[x, out])?;
    let name = match form {
        Gelu::Erf => name_of::<T>(["gelu_erf_f32", "gelu_erf_f16", "gelu_erf_bf16"]),
        Gelu::Tanh => name_of::<T>(["gelu_tanh_f32", "gelu_tanh_f16", "gelu_tanh_bf16"]),
    };
    let function = gpu.function(name, 0)?;
    let mut launcher = stream.launch_builder(&function);
    launcher.arg(&biased).arg(&out);
    // SAFETY: the kernel's arguments; x and out have rows · d values, the bias d.
    unsafe { launch(launcher, blocks, THREADS, 0) }
}

/// silu(a) ⊙ b, as a gated feed-forward layer has it.
///
/// # Shapes
/// - x: `[M, 2·D]`, the columns of a, then of b
/// - output: `[M, D]`
///
/// # Errors
/// If x is not rows of 2·D values.
pub fn gate_silu<T: Real>(gpu: &Gpu, x: &CudaView<'_, T>, width: usize) -> Result<CudaSlice<T>, Error> {
    let twice = width.checked_mul(2).filter(|twice| *twice > 0 && x.len().is_multiple_of(*twice));
    let Some(twice) = twice else {
        return Err(refuse(format!("gate: values, expected: rows of twice {width}, got: {}", x.len())));
    };
    let rows = x.len() / twice;
    let mut out = unwritten(gpu, "gate", rows.checked_mul(width))?;
    let stream = gpu.stream();
    {
        let ((x, _x), (out, _out)) = (x.device_ptr(stream), out.device_ptr_mut(stream));
        let (biased, blocks) = biased::<T>("gate", x, 0, rows * width, width, &[x, out])?;
        let function = gpu.function(name_of::<T>(["gate_silu_f32", "gate_silu_f16", "gate_silu_bf16"]), 0)?;
        let mut launcher = stream.launch_builder(&function);
        launcher.arg(&x).arg(&out).arg(&biased.rows).arg(&biased.d).arg(&biased.whole);
        // SAFETY: the kernel's arguments; x has 2 · rows · d values, out half of them.
        unsafe { launch(launcher, blocks, THREADS, 0) }?;
    }
    Ok(out)
}

/// residual + scale ⊙ (x + bias), the residual's way around a layer with LayerScale.
///
/// # Shapes
/// - x, residual: `[M, D]`
/// - bias, scale: `[D]`; without either, x has any shape
/// - output: as x
///
/// # Errors
/// If the shapes differ.
pub fn add<T: Real>(
    gpu: &Gpu,
    x: &CudaView<'_, T>,
    bias: Option<&CudaView<'_, T>>,
    scale: Option<&CudaView<'_, T>>,
    residual: Option<&CudaView<'_, T>>,
) -> Result<CudaSlice<T>, Error> {
    let mut out = unwritten(gpu, "add", Some(x.len()))?;
    let stream = gpu.stream();
    {
        let ((x_at, _x), (out, _out)) = (x.device_ptr(stream), out.device_ptr_mut(stream));
        add_at(gpu, x_at, out, x.len(), bias, scale, residual)?;
    }
    Ok(out)
}

/// As [`add`], in x's own place.
pub(super) fn add_in_place<T: Real>(
    gpu: &Gpu,
    x: &mut CudaSlice<T>,
    bias: Option<&CudaView<'_, T>>,
    residual: Option<&CudaView<'_, T>>,
) -> Result<(), Error> {
    let len = x.len();
    let (x, _x) = x.device_ptr_mut(gpu.stream());
    add_at(gpu, x, x, len, bias, None, residual)
}

/// Both addresses have `len` values, at least one.
fn add_at<T: Real>(
    gpu: &Gpu,
    x: u64,
    out: u64,
    len: usize,
    bias: Option<&CudaView<'_, T>>,
    scale: Option<&CudaView<'_, T>>,
    residual: Option<&CudaView<'_, T>>,
) -> Result<(), Error> {
    let stream = gpu.stream();
    let width = bias.or(scale).map_or_else(|| own_width::<T>(len), |row| row.len());
    let fits = scale.is_none_or(|scale| scale.len() == width) && residual.is_none_or(|residual| residual.len() == len);
    if !fits {
        let (scale, residual) = (scale.map(|scale| scale.len()), residual.map(|residual| residual.len()));
        let message =
            format!("add: values of scale and residual, expected: {width} and {len}, got: {scale:?} and {residual:?}");
        return Err(refuse(message));
    }
    let [bias, scale, residual] = [bias, scale, residual].map(|view| view.map(|view| view.device_ptr(stream)));
    let at = |view: &Option<(u64, _)>| view.as_ref().map_or(0, |(address, _)| *address);
    let (bias, scale, residual) = (at(&bias), at(&scale), at(&residual));
    let (biased, blocks) = biased::<T>("add", x, bias, len, width, &[x, out, scale, residual])?;
    let function = gpu.function(name_of::<T>(["add_f32", "add_f16", "add_bf16"]), 0)?;
    let mut launcher = stream.launch_builder(&function);
    launcher.arg(&biased).arg(&scale).arg(&residual).arg(&out);
    // SAFETY: the kernel's arguments; x, residual and out have rows · d values, bias and scale d, or their address is zero.
    unsafe { launch(launcher, blocks, THREADS, 0) }
}

/// A width of rows for `len` values that have none: 16 bytes where these divide them.
fn own_width<T>(len: usize) -> usize {
    let lanes = WHOLE / size_of::<T>();
    if len.is_multiple_of(lanes) { lanes } else { 1 }
}

/// The first argument of a kernel on `len` values in rows of `width`, and its blocks.
fn biased<T>(
    what: &str,
    x: u64,
    bias: u64,
    len: usize,
    width: usize,
    others: &[u64],
) -> Result<(Biased, (usize, usize)), Error> {
    if width == 0 || !len.is_multiple_of(width) {
        return Err(refuse(format!("{what}: values, expected: rows of {width}, got: {len}")));
    }
    let whole = whole::<T>(width, others) && bias.is_multiple_of(WHOLE as u64);
    let threads = if whole { len / (WHOLE / size_of::<T>()) } else { len };
    let rows = i64::try_from(len / width).unwrap_or(i64::MAX);
    let biased = Biased { x, bias, rows, d: int(what, width)?, whole: i32::from(whole) };
    Ok((biased, blocks(what, threads, THREADS)?))
}

#[cfg(test)]
mod tests;
