//! A codebook made ready for searching, on the GPU that holds it: what `nearest/prepare.rs` and `nearest/screen.rs` do on a CPU.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, PushKernelArg};

use super::super::{Gpu, launch};
use super::{BoundArgs, Method, THREADS, WARPS, int};
use crate::Error;
use crate::nearest::Metric;
use crate::nearest::bound::{self, Extent, SAFE};

/// What is screened in place of the codes.
#[derive(Debug)]
pub(super) struct Screen {
    pub(super) method: Method,
    pub(super) padded: usize,
    pub(super) shadow: Shadow,
    /// b', −∞ for rows that are folded away.
    pub(super) bias: CudaSlice<f32>,
    pub(super) bound: BoundArgs,
}

#[derive(Debug)]
pub(super) enum Shadow {
    F32(CudaSlice<f32>),
    /// fp16 of codes times 2 to the exponent.
    F16(CudaSlice<u16>, i32),
}

impl Screen {
    /// Takes off the distinct rows what they share, and bounds what is left; `None` where no bound holds.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        rows: &CudaSlice<f32>,
        bias: &CudaSlice<f64>,
        (folded, distinct): (&CudaSlice<u8>, usize),
        (codes, d): (usize, usize),
        method: Method,
    ) -> Result<Option<Self>, Error> {
        const EXTENTS: usize = 6;
        let padded = method.padded(d);
        let sums = match method {
            Method::Narrow => bound::plain_sums(padded),
            _ if gpu.sums_hold()? => bound::tensor_core_sums(padded),
            _ => None,
        };
        let Some(sums) = sums else { return Ok(None) };
        let stream = gpu.stream();
        let (codes_arg, width, padded_arg, distinct) = (int(codes)?, int(d)?, int(padded)?, int(distinct)?);

        let mut mean = stream.alloc_zeros::<f64>(d + 1)?;
        let function = gpu.function("mean_code", 0)?;
        let mut args = stream.launch_builder(&function);
        args.arg(rows).arg(bias).arg(folded).arg(&mut mean).arg(&codes_arg).arg(&distinct).arg(&width);
        // SAFETY: the kernel's arguments; it writes d + 1 means.
        unsafe { launch(args, ((d + 1).div_ceil(32), 1), THREADS, 0) }?;

        let exponent = match method {
            Method::Narrow => 0,
            _ => {
                let mut largest = stream.alloc_zeros::<u32>(1)?;
                let function = gpu.function("largest_element", 0)?;
                let elements = rows.len() as u64;
                let mut args = stream.launch_builder(&function);
                args.arg(rows).arg(&mean).arg(&mut largest).arg(&elements).arg(&width);
                let blocks = rows.len().div_ceil(THREADS as usize).min(8 * gpu.processors() as usize);
                // SAFETY: the kernel's arguments.
                unsafe { launch(args, (blocks, 1), THREADS, 0) }?;
                match f32::from_bits(stream.clone_dtoh(&largest)?[0]) {
                    0.0 => 0,
                    largest if largest.is_finite() => 14 - exponent_of(largest),
                    _ => return Ok(None),
                }
            }
        };
        let none = 0u64;
        let mut centred_bias = stream.alloc_zeros::<f32>(codes)?;
        let mut extents = stream.alloc_zeros::<u64>(EXTENTS)?;
        let function = gpu.function("shadow_codes", 0)?;
        let mut args = stream.launch_builder(&function);
        args.arg(rows).arg(bias).arg(folded).arg(&mean);
        let mut shadow = match method {
            Method::Narrow => Shadow::F32(stream.alloc_zeros(codes * padded)?),
            _ => Shadow::F16(stream.alloc_zeros(codes * padded)?, exponent),
        };
        match &mut shadow {
            Shadow::F32(shadow) => args.arg(&none).arg(shadow),
            Shadow::F16(shadow, _) => args.arg(shadow).arg(&none),
        };
        args.arg(&mut centred_bias).arg(&mut extents).arg(&codes_arg).arg(&width).arg(&padded_arg).arg(&exponent);
        // SAFETY: the kernel's arguments; the shadow has K rows of `padded`.
        unsafe { launch(args, (codes.div_ceil(WARPS), 1), THREADS, 0) }?;

        let extents = stream.clone_dtoh(&extents)?;
        let extent = |i: usize| f64::from_bits(extents[i]);
        let extent = Extent {
            code: extent(0).sqrt(),
            centred: extent(1).sqrt(),
            rounded: extent(2).sqrt(),
            error: extent(3).sqrt(),
            bias: extent(4),
            centred_bias: extent(5),
        };
        let reach = 1.02 * extent.centred.max(extent.rounded);
        let level = extent.centred_bias;
        // An overflow in c' or b' is infinite here; a NaN fails too.
        if !(reach < SAFE && level < SAFE) {
            return Ok(None);
        }
        let weights = bound::Bound::new(extent, sums, padded).weights();
        let bound = BoundArgs { weights, reach, level };
        Ok(Some(Self { method, padded, shadow, bias: centred_bias, bound }))
    }
}

/// Divides every row by its norm, to the bits of the CPU.
pub(super) fn normalise(gpu: &Gpu, rows: &mut CudaSlice<f32>, codes: usize, d: usize) -> Result<(), Error> {
    let function = gpu.function("normalise_codes", 0)?;
    let (count, width) = (int(codes)?, int(d)?);
    let mut args = gpu.stream().launch_builder(&function);
    args.arg(rows).arg(&count).arg(&width);
    // SAFETY: the kernel's arguments.
    unsafe { launch(args, (codes.div_ceil(WARPS), 1), THREADS, 0) }
}

/// Biases by the contract, and hashes of the rows.
pub(super) fn measure(
    gpu: &Gpu,
    rows: &CudaSlice<f32>,
    codes: usize,
    d: usize,
    metric: Metric,
) -> Result<(CudaSlice<f64>, Vec<u64>), Error> {
    let stream = gpu.stream();
    let (mut bias, mut hashes) = (stream.alloc_zeros::<f64>(codes)?, stream.alloc_zeros::<u64>(codes)?);
    let mut first_bad = stream.clone_htod(&[u32::MAX])?;
    let function = gpu.function("measure_codes", 0)?;
    let (count, width, euclidean) = (int(codes)?, int(d)?, i32::from(metric == Metric::Euclidean));
    let mut args = stream.launch_builder(&function);
    args.arg(rows).arg(&mut bias).arg(&mut hashes).arg(&mut first_bad).arg(&count).arg(&width).arg(&euclidean);
    // SAFETY: the kernel's arguments; it writes a bias and a hash a row.
    unsafe { launch(args, (codes.div_ceil(WARPS), 1), THREADS, 0) }?;
    match stream.clone_dtoh(&first_bad)?[0] {
        u32::MAX => Ok((bias, stream.clone_dtoh(&hashes)?)),
        row => Err(Error::NonFiniteCode { row: row as usize }),
    }
}

/// 1 for each row that equals an earlier one, whose answers the earlier one gives.
pub(super) fn fold(gpu: &Gpu, rows: &CudaSlice<f32>, hashes: &[u64], d: usize) -> Result<Vec<u8>, Error> {
    let mut folded = vec![0u8; hashes.len()];
    let (mut first, mut pairs) = (HashMap::with_capacity(hashes.len()), Vec::new());
    for (row, hash) in (0u32..).zip(hashes) {
        let seen = *first.entry(hash).or_insert(row);
        if seen != row {
            pairs.extend([seen, row]);
        }
    }
    if pairs.is_empty() {
        return Ok(folded);
    }
    // Different rows may have one hash: only the rows themselves tell.
    let (stream, count) = (gpu.stream(), pairs.len() / 2);
    let mut equal = stream.alloc_zeros::<u8>(count)?;
    let (device_pairs, count_arg, width) = (stream.clone_htod(&pairs)?, int(count)?, int(d)?);
    let function = gpu.function("compare_codes", 0)?;
    let mut args = stream.launch_builder(&function);
    args.arg(rows).arg(&device_pairs).arg(&mut equal).arg(&count_arg).arg(&width);
    // SAFETY: the kernel's arguments; pairs are rows.
    unsafe { launch(args, (count.div_ceil(WARPS), 1), THREADS, 0) }?;
    for (pair, equal) in pairs.chunks_exact(2).zip(stream.clone_dtoh(&equal)?) {
        folded[pair[1] as usize] = equal;
    }
    Ok(folded)
}

/// The largest e with 2^e <= x, for x > 0.
fn exponent_of(x: f32) -> i32 {
    // Exact: f32's subnormal numbers are normal in f64.
    (f64::from(x).to_bits() >> 52) as i32 - 1023
}
