//! Photos' bytes to what an encoder reads, on the GPU (`pixels.cu`): a photo crosses the bus as bytes, a quarter of f32.

use cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, PushKernelArg};

use super::real::{Real, blocks, int, name_of, refuse, unwritten};
use super::{Gpu, launch};
use crate::Error;

const THREADS: u32 = 256;
const CHANNELS: usize = 3;
/// Values of a byte.
const LEVELS: usize = 256;

/// How the values of an image lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[3, H, W]`
    Planes,
    /// `[H/P · W/P, 3 · P · P]` for patches of this many pixels P a side, row by row: what a patch embedding multiplies.
    Patches(usize),
}

/// `Photos` of pixels.cu.
#[repr(C)]
struct Photos {
    images: i64,
    height: i32,
    width: i32,
    patch: i32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for Photos {}

/// Each byte's value in the table of its channel, rounded to T.
///
/// # Shapes
/// - bytes: `[B, H, W, 3]`, for `size` H and W
/// - table: `[3, 256]`, the normalised value of each byte
/// - output: `[B, 3, H, W]` or `[B, H/P · W/P, 3 · P · P]`
///
/// # Errors
/// If the bytes are no images of this size, the table has another shape, or patches do not divide an image.
pub fn normalise<T: Real>(
    gpu: &Gpu,
    bytes: &CudaView<'_, u8>,
    table: &CudaView<'_, f32>,
    size: (usize, usize),
    layout: Layout,
) -> Result<CudaSlice<T>, Error> {
    let (height, width) = size;
    let per_image =
        height.checked_mul(width).and_then(|pixels| pixels.checked_mul(CHANNELS)).filter(|values| *values > 0);
    let Some(per_image) = per_image.filter(|values| bytes.len().is_multiple_of(*values)) else {
        return Err(refuse(format!("pixels, expected: images of {height} · {width} · 3 bytes, got: {}", bytes.len())));
    };
    if table.len() != CHANNELS * LEVELS {
        return Err(refuse(format!("pixels: values of the table, expected: 3 · 256, got: {}", table.len())));
    }
    let patch = match layout {
        Layout::Planes => 0,
        Layout::Patches(side) if side > 0 && height.is_multiple_of(side) && width.is_multiple_of(side) => side,
        Layout::Patches(side) => {
            return Err(refuse(format!("pixels: patch, expected: a divisor of {height} and {width}, got: {side}")));
        }
    };
    let photos = Photos {
        images: i64::try_from(bytes.len() / per_image).unwrap_or(i64::MAX),
        height: int("pixels: height", height)?,
        width: int("pixels: width", width)?,
        patch: int("pixels: patch", patch)?,
    };
    let blocks = blocks("pixels", bytes.len() / CHANNELS, THREADS)?;
    let mut out = unwritten::<T>(gpu, "pixels", Some(bytes.len()))?;
    let stream = gpu.stream();
    {
        let ((bytes, _bytes), (table, _table)) = (bytes.device_ptr(stream), table.device_ptr(stream));
        let (out, _out) = out.device_ptr_mut(stream);
        let function = gpu.function(name_of::<T>(["normalise_f32", "normalise_f16", "normalise_bf16"]), 0)?;
        let mut launcher = stream.launch_builder(&function);
        launcher.arg(&bytes).arg(&table).arg(&out).arg(&photos);
        // SAFETY: the kernel's arguments; bytes and out have images · height · width · 3 values, the table 3 · 256.
        unsafe { launch(launcher, blocks, THREADS, 0) }?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
