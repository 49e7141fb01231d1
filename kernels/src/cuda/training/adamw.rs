use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaView, DevicePtr, DeviceRepr, PushKernelArg};

use super::super::{Gpu, launch};
use super::{THREADS, count, unset};
use crate::Error;

/// Elements of a block, as in cuda/adamw.cu.
const PIECE: usize = 1 << 14;

/// A parameter of [`adamw`]: f32 arrays on the device, all of one length.
#[derive(Debug, Clone, Copy)]
pub struct Parameter {
    /// Where the values are; they change.
    pub value: CUdeviceptr,
    /// Where their gradient is.
    pub gradient: CUdeviceptr,
    /// Where the first moments are; they change.
    pub first: CUdeviceptr,
    /// Where the second moments are; they change.
    pub second: CUdeviceptr,
    /// Elements of each.
    pub length: usize,
    /// The share of a value that decays: rate times weight decay.
    pub decay: f32,
    /// The rate over the first moment's correction.
    pub scale: f32,
}

/// What all parameters of [`adamw`] share.
#[derive(Debug, Clone, Copy)]
pub struct Constants {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// What gradients are scaled down by.
    pub clip: f32,
    /// One over the second moment's correction.
    pub root: f32,
}

/// As cuda/adamw.cu has it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Entry {
    value: u64,
    gradient: u64,
    first: u64,
    second: u64,
    length: u64,
    first_block: u32,
    decay: f32,
    scale: f32,
    unused: u32,
}

// SAFETY: words without padding, as the kernel declares them.
unsafe impl DeviceRepr for Entry {}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Shared {
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    eps: f32,
    clip: f32,
    root: f32,
}

// SAFETY: words without padding, as the kernel declares them.
unsafe impl DeviceRepr for Shared {}

/// One step over all parameters in one launch, each operation rounded as on a CPU:
///
/// ```text
/// g ← clip g     m ← β₁ m + (1 − β₁) g     v ← β₂ v + (1 − β₂) g g
/// w ← w − (decay w + scale m / (√(v root) + ε))
/// ```
///
/// # Errors
/// If there are too many elements for one launch, or the device fails.
///
/// # Safety
/// Every address is that of `length` f32 on the device of `gpu`, aligned and initialised, which stay there until the stream has
/// come past the launch; what changes overlaps nothing else that is named, and only the stream uses it until then.
pub unsafe fn adamw(gpu: &Gpu, parameters: &[Parameter], constants: Constants) -> Result<(), Error> {
    let mut blocks = 0;
    let mut table = Vec::with_capacity(parameters.len());
    for p in parameters.iter().filter(|p| p.length > 0) {
        let Parameter { value, gradient, first, second, length, decay, scale } = *p;
        let first_block = count("pieces", blocks)? as u32;
        table.push(Entry {
            value,
            gradient,
            first,
            second,
            length: length as u64,
            first_block,
            decay,
            scale,
            unused: 0,
        });
        blocks += length.div_ceil(PIECE);
    }
    count("pieces", blocks)?;
    if table.is_empty() {
        return Ok(());
    }
    let Constants { beta1, beta2, eps, clip, root } = constants;
    let shared = Shared { beta1, rest1: 1.0 - beta1, beta2, rest2: 1.0 - beta2, eps, clip, root };
    let entries = count("parameters", table.len())?;
    let table = gpu.stream().clone_htod(&table)?;
    let function = gpu.function("adamw_step", 0)?;
    let mut args = gpu.stream().launch_builder(&function);
    args.arg(&table).arg(&entries).arg(&shared);
    // SAFETY: the kernel's arguments, each block within its parameter; what they name is the caller's promise.
    unsafe { launch(args, (blocks, 1), THREADS, 0) }
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Values {
    values: u64,
    length: u64,
    first_block: u32,
    blocks: u32,
}

// SAFETY: words without padding, as the kernel declares them.
unsafe impl DeviceRepr for Values {}

/// The sum of the squares of each array, in binary64; waits for the device.
///
/// # Errors
/// If there are too many elements for one launch, or the device fails.
pub fn squares(gpu: &Gpu, all: &[CudaView<'_, f32>]) -> Result<Vec<f64>, Error> {
    if all.is_empty() {
        return Ok(Vec::new());
    }
    let mut blocks = 0;
    let mut table = Vec::with_capacity(all.len());
    let mut used = Vec::with_capacity(all.len());
    for view in all {
        let (values, guard) = view.device_ptr(gpu.stream());
        // Kept to the launch: with several streams it says when the values may change again.
        used.push(guard);
        let own = view.len().div_ceil(PIECE);
        let (first_block, own_blocks) = (count("pieces", blocks)? as u32, count("pieces", own)? as u32);
        table.push(Values { values, length: view.len() as u64, first_block, blocks: own_blocks });
        blocks += own;
    }
    count("pieces", blocks)?;
    // The kernel takes the last entry that begins at or before its block, which no empty one is: the next begins there too.
    let entries = count("arrays", table.len())?;
    let table = gpu.stream().clone_htod(&table)?;
    // SAFETY: the kernels write every element.
    let (mut parts, mut sums) = unsafe { (unset::<f64>(gpu, blocks)?, unset::<f64>(gpu, all.len())?) };
    let function = gpu.function("square_values", 0)?;
    let mut args = gpu.stream().launch_builder(&function);
    args.arg(&table).arg(&entries).arg(&mut parts);
    // SAFETY: the kernel's arguments, each block within its array.
    unsafe { launch(args, (blocks, 1), THREADS, 0) }?;
    let function = gpu.function("sum_squares", 0)?;
    let mut args = gpu.stream().launch_builder(&function);
    args.arg(&table).arg(&parts).arg(&mut sums);
    // SAFETY: the kernel's arguments; the parts of an entry are there.
    unsafe { launch(args, (all.len(), 1), THREADS, 0) }?;
    drop(used);
    Ok(gpu.stream().clone_dtoh(&sums)?)
}

#[cfg(test)]
mod tests {
    use cudarc::driver::CudaSlice;

    use super::super::tests::{bits, noise};
    use super::*;

    /// About a block's piece and its threads, and nothing.
    const LENGTHS: [usize; 9] = [1, 0, 255, 257, PIECE - 1, PIECE, 0, PIECE + 1, 2 * PIECE + 300];

    /// The loop of vqrae/src/train/optimizer.rs.
    fn on_host(p: (f32, f32), c: Constants, w: &mut [f32], gradient: &[f32], first: &mut [f32], second: &mut [f32]) {
        let (decay, scale) = p;
        for ((value, gradient), (first, second)) in w.iter_mut().zip(gradient).zip(first.iter_mut().zip(second)) {
            let gradient = gradient * c.clip;
            *first = c.beta1 * *first + (1.0 - c.beta1) * gradient;
            *second = c.beta2 * *second + (1.0 - c.beta2) * gradient * gradient;
            *value -= decay * *value + scale * *first / ((*second * c.root).sqrt() + c.eps);
        }
    }

    #[test]
    fn steps_are_the_cpus_bits() {
        let Some(gpu) = super::super::super::test_gpu() else { return };
        let stream = gpu.stream();
        let mut host: Vec<[Vec<f32>; 4]> = LENGTHS
            .iter()
            .enumerate()
            .map(|(i, &n)| [noise(n, i as u64), noise(n, 50 + i as u64), vec![0.0; n], vec![0.0; n]])
            .collect();
        // Gradients of zero and of the smallest size are met too.
        host[2][1][..3].copy_from_slice(&[0.0, 1e-40, -1e-30]);
        let upload = |x: &Vec<f32>| if x.is_empty() { stream.null() } else { stream.clone_htod(x) };
        let mut device: Vec<[CudaSlice<f32>; 4]> =
            host.iter().map(|all| std::array::from_fn(|i| upload(&all[i]).unwrap())).collect();
        for step in 1..4 {
            let (beta1, beta2) = (0.9f64, 0.999f64);
            let root = (1.0 / (1.0 - beta2.powi(step))) as f32;
            let constants = Constants { beta1: beta1 as f32, beta2: beta2 as f32, eps: 1e-8, clip: 0.37, root };
            let rates = |i: usize| (1e-4 * i as f32, (1e-3 * (i + 1) as f64 / (1.0 - beta1.powi(step))) as f32);
            let parameters: Vec<Parameter> = device
                .iter_mut()
                .enumerate()
                .map(|(i, arrays)| {
                    let [value, gradient, first, second] = arrays.each_ref().map(|x| x.device_ptr(stream).0);
                    let (decay, scale) = rates(i);
                    Parameter { value, gradient, first, second, length: arrays[0].len(), decay, scale }
                })
                .collect();
            // SAFETY: the arrays are the device's, of one length each, and this stream is the only one.
            unsafe { adamw(&gpu, &parameters, constants) }.unwrap();
            for (i, [value, gradient, first, second]) in host.iter_mut().enumerate() {
                on_host(rates(i), constants, value, gradient, first, second);
            }
        }
        for (i, (host, device)) in host.iter().zip(&device).enumerate().filter(|(i, _)| LENGTHS[*i] > 0) {
            for (part, (host, device)) in host.iter().zip(device).enumerate() {
                assert_eq!(bits(&stream.clone_dtoh(device).unwrap()), bits(host), "array {part} of parameter {i}");
            }
        }
        // SAFETY: there is nothing to reach.
        unsafe { adamw(&gpu, &[], Constants { beta1: 0.9, beta2: 0.9, eps: 1.0, clip: 1.0, root: 1.0 }) }.unwrap();
    }

    #[test]
    fn squares_are_the_plain_sums_at_every_run() {
        let Some(gpu) = super::super::super::test_gpu() else { return };
        let stream = gpu.stream();
        let host: Vec<Vec<f32>> = LENGTHS.iter().enumerate().map(|(i, &n)| noise(n, 9 + i as u64)).collect();
        let upload = |x: &Vec<f32>| if x.is_empty() { stream.null() } else { stream.clone_htod(x) };
        let device: Vec<CudaSlice<f32>> = host.iter().map(|x| upload(x).unwrap()).collect();
        let views: Vec<_> = device.iter().map(|x| x.as_view()).collect();
        let found = squares(&gpu, &views).unwrap();
        assert_eq!(found.len(), host.len());
        for (found, host) in found.iter().zip(&host) {
            let sum: f64 = host.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!((found - sum).abs() <= 1e-12 * sum, "{} values: {found} and {sum}", host.len());
        }
        assert_eq!(squares(&gpu, &views).unwrap(), found);
        // A sum depends on its own values alone, not on where they stand in the table.
        assert_eq!(squares(&gpu, &views[4..5]).unwrap(), found[4..5]);
        assert_eq!(squares(&gpu, &views[1..2]).unwrap(), [0.0]);
        assert_eq!(squares(&gpu, &[]).unwrap(), []);
    }
}
