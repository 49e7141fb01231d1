//! What a training step needs beside products: codes by their indices with the commitment loss, moving averages of a
//! codebook, the gradient of SimVQ's layer, and AdamW.
//!
//! The same inputs give the same bits at every run: sums have an order that depends on sizes alone. Nothing here has the shape
//! `[N, K]`. Where a CPU does the same element by element (averages, AdamW), the bits are the CPU's.

mod adamw;
mod averages;
mod gather;
mod transform;

use cudarc::driver::{CudaSlice, DeviceRepr, ValidAsZeroBits};

pub use adamw::{Constants, Parameter, adamw, squares};
pub use averages::{ByCode, Smoothing, code_histogram, restart, smooth};
pub use gather::{Gathered, commitment, gather, gather_rows, straight_through_gradient};
pub use transform::simvq_gradient;

use super::Gpu;
use crate::Error;

/// `THREADS` and `WARPS` of cuda/training.cuh.
const THREADS: u32 = 256;
const WARPS: usize = 8;

/// Blocks of a thread an element, and of a warp a row.
fn thread_blocks(elements: usize) -> (usize, usize) {
    (elements.div_ceil(THREADS as usize), 1)
}

fn warp_blocks(rows: usize) -> (usize, usize) {
    (rows.div_ceil(WARPS), 1)
}

/// Zeros on the device; of length zero without asking the driver, which refuses that.
fn zeros<T: DeviceRepr + ValidAsZeroBits>(gpu: &Gpu, len: usize) -> Result<CudaSlice<T>, Error> {
    Ok(if len == 0 { gpu.stream().null()? } else { gpu.stream().alloc_zeros(len)? })
}

/// Memory on the device.
///
/// # Safety
/// Nothing may read an element before it was written.
unsafe fn unset<T: DeviceRepr>(gpu: &Gpu, len: usize) -> Result<CudaSlice<T>, Error> {
    // SAFETY: the caller's promise.
    Ok(if len == 0 { gpu.stream().null()? } else { unsafe { gpu.stream().alloc(len) }? })
}

/// How many rows of `width` values there are, as kernels take it.
fn rows(values: usize, width: usize) -> Result<i32, Error> {
    if width == 0 {
        return Err(Error::ZeroWidth);
    }
    if !values.is_multiple_of(width) {
        return Err(Error::RaggedRows { values, width });
    }
    count("rows", values / width)
}

/// A size as kernels take it.
fn count(what: &str, size: usize) -> Result<i32, Error> {
    // Less than the largest by a block, so that no index of a last block's idle thread wraps.
    const MOST: usize = i32::MAX as usize - THREADS as usize;
    match i32::try_from(size) {
        Ok(narrow) if size <= MOST => Ok(narrow),
        _ => Err(Error::Gpu { message: format!("number of {what}, expected: at most {MOST}, got: {size}") }),
    }
}

fn check(what: &str, expected: usize, got: usize) -> Result<(), Error> {
    match got == expected {
        true => Ok(()),
        false => Err(Error::Gpu { message: format!("number of {what}, expected: {expected}, got: {got}") }),
    }
}

#[cfg(test)]
mod tests {
    /// Numbers in (-1, 1) that look random, and are the same at every run.
    pub(super) fn noise(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// How a batch may use K codes.
    pub(super) const USES: [&str; 4] = ["random", "one", "few", "last"];

    /// Indices of N tokens into K codes.
    pub(super) fn indices(n: usize, k: usize, uses: &str, seed: u64) -> Vec<u32> {
        let among = |codes: usize| noise(n, seed).into_iter().map(move |x| ((x + 1.0) / 2.0 * codes as f32) as u32);
        match uses {
            "random" => among(k).map(|i| i.min(k as u32 - 1)).collect(),
            "few" => among(k.min(3)).map(|i| i.min(k as u32 - 1)).collect(),
            "one" => vec![k as u32 / 2; n],
            _ => vec![k as u32 - 1; n],
        }
    }

    pub(super) fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|x| x.to_bits()).collect()
    }
}
