use cudarc::driver::{CudaSlice, CudaView, CudaViewMut, PushKernelArg};

use super::super::{Gpu, launch};
use super::{THREADS, check, count, rows, thread_blocks, unset, warp_blocks, zeros};
use crate::Error;

/// How many tokens have each code, `[K]`, of indices `[N]`; those that name no code are not counted.
///
/// # Errors
/// If there are too many of either, or the device fails.
pub fn code_histogram(gpu: &Gpu, indices: &CudaView<'_, u32>, codes: usize) -> Result<CudaSlice<u32>, Error> {
    let tokens = count("indices", indices.len())?;
    let k = count("codes", codes)? as u32;
    let mut counts = zeros::<u32>(gpu, codes)?;
    let function = gpu.function("count_codes", 0)?;
    let mut args = gpu.stream().launch_builder(&function);
    args.arg(indices).arg(&tokens).arg(&k).arg(&mut counts);
    // SAFETY: the kernel's arguments; it checks indices.
    unsafe { launch(args, thread_blocks(indices.len()), THREADS, 0) }?;
    Ok(counts)
}

/// A batch's N tokens in the order of their K codes, those of one code in the order of the batch.
#[derive(Debug)]
pub struct ByCode {
    /// `[N]`, tokens.
    order: CudaSlice<u32>,
    /// `[K + 1]`, where each code's begin in `order`.
    starts: CudaSlice<u32>,
    codes: usize,
}

impl ByCode {
    /// Sorts tokens by their indices `[N]`; those that name no code are left out.
    ///
    /// # Errors
    /// As [`code_histogram`].
    pub fn sort(gpu: &Gpu, indices: &CudaView<'_, u32>, codes: usize) -> Result<Self, Error> {
        /// Bits of a pass, and the digits that they make.
        const BITS: u32 = 8;
        const DIGITS: usize = 1 << BITS;
        let (tokens, k) = (count("indices", indices.len())?, count("codes", codes)? as u32);
        let blocks = thread_blocks(indices.len());
        let tiles = count("tiles", blocks.0)?;
        // SAFETY: `begin_sort` writes every element of the first two, every pass every element of the last two, whose
        // digits are counted before they are read.
        let (mut keys, mut order, mut placed_keys, mut placed_order, mut counts) = unsafe {
            let tokens = || unset::<u32>(gpu, indices.len());
            (tokens()?, tokens()?, tokens()?, tokens()?, unset::<u32>(gpu, blocks.0 * DIGITS)?)
        };
        let function = gpu.function("begin_sort", 0)?;
        let mut args = gpu.stream().launch_builder(&function);
        args.arg(indices).arg(&tokens).arg(&k).arg(&mut keys).arg(&mut order);
        // SAFETY: the kernel's arguments.
        unsafe { launch(args, blocks, THREADS, 0) }?;
        // The largest key is K itself.
        let passes = (u32::BITS - k.leading_zeros()).div_ceil(BITS);
        for shift in (0..passes as i32).map(|pass| pass * BITS as i32) {
            let function = gpu.function("count_digits", 0)?;
            let mut args = gpu.stream().launch_builder(&function);
            args.arg(&keys).arg(&tokens).arg(&shift).arg(&mut counts);
            // SAFETY: the kernel's arguments; a block has its row of `counts`.
            unsafe { launch(args, blocks, THREADS, 0) }?;
            let function = gpu.function("scan_digits", 0)?;
            let mut args = gpu.stream().launch_builder(&function);
            args.arg(&mut counts).arg(&tiles);
            // SAFETY: the kernel's arguments; there are as many rows as tiles.
            unsafe { launch(args, (1, 1), THREADS, 0) }?;
            let function = gpu.function("place_tokens", 0)?;
            let mut args = gpu.stream().launch_builder(&function);
            args.arg(&keys).arg(&order).arg(&tokens).arg(&shift).arg(&counts);
            args.arg(&mut placed_keys).arg(&mut placed_order);
            // SAFETY: the kernel's arguments; the scan of the same keys' digits gives each its own place below N.
            unsafe { launch(args, blocks, THREADS, 0) }?;
            std::mem::swap(&mut keys, &mut placed_keys);
            std::mem::swap(&mut order, &mut placed_order);
        }
        // SAFETY: the kernel writes every element.
        let mut starts = unsafe { unset::<u32>(gpu, codes + 1)? };
        let function = gpu.function("find_starts", 0)?;
        let mut args = gpu.stream().launch_builder(&function);
        args.arg(&keys).arg(&tokens).arg(&k).arg(&mut starts);
        // SAFETY: the kernel's arguments; it writes a start a code and one more.
        unsafe { launch(args, thread_blocks(codes + 1), THREADS, 0) }?;
        Ok(Self { order, starts, codes })
    }

    /// `Σ h` over each code's tokens, `[K, D]`, of the batch's features `[N, D]`: binary64, in the order of the batch. A code
    /// without tokens has zeros.
    ///
    /// # Errors
    /// If sizes do not fit together, or the device fails.
    pub fn sums(&self, gpu: &Gpu, features: &CudaView<'_, f32>, width: usize) -> Result<CudaSlice<f64>, Error> {
        let d = self.width(features, width)?;
        // SAFETY: the kernel writes every element.
        let mut sums = unsafe { unset::<f64>(gpu, self.codes.saturating_mul(width))? };
        let function = gpu.function("sum_features", 0)?;
        let mut args = gpu.stream().launch_builder(&function);
        args.arg(features).arg(&self.order).arg(&self.starts).arg(&d).arg(&mut sums);
        // SAFETY: the kernel's arguments; `order` names rows of the features, `starts` parts of `order`.
        unsafe { launch(args, self.blocks(width), THREADS, 0) }?;
        Ok(sums)
    }

    /// Moves averages towards the batch: `n ← γ n + (1 − γ) count` and `m ← γ m + (1 − γ) Σ h`, in binary64, rounded once.
    ///
    /// # Shapes
    /// - features: `[N, D]`, in the order that was sorted
    /// - sizes: n, `[K]`
    /// - sums: m, `[K, D]`
    ///
    /// # Errors
    /// As [`ByCode::sums`].
    pub fn follow(
        &self,
        gpu: &Gpu,
        features: &CudaView<'_, f32>,
        width: usize,
        decay: f64,
        sizes: &mut CudaViewMut<'_, f32>,
        sums: &mut CudaViewMut<'_, f32>,
    ) -> Result<(), Error> {
        let d = self.width(features, width)?;
        check("codes' sizes", self.codes, sizes.len())?;
        check("codes' sums", self.codes.saturating_mul(width), sums.len())?;
        let rest = 1.0 - decay;
        let function = gpu.function("follow_features", 0)?;
        let mut args = gpu.stream().launch_builder(&function);
        args.arg(features).arg(&self.order).arg(&self.starts).arg(&d).arg(&decay).arg(&rest).arg(sizes).arg(sums);
        // SAFETY: as in `sums`; the averages have the sizes that were checked.
        unsafe { launch(args, self.blocks(width), THREADS, 0) }
    }

    fn width(&self, features: &CudaView<'_, f32>, width: usize) -> Result<i32, Error> {
        check("features", self.order.len(), rows(features.len(), width)? as usize)?;
        count("columns", width)
    }

    /// A code and 256 columns each.
    fn blocks(&self, width: usize) -> (usize, usize) {
        (self.codes, thread_blocks(width).0)
    }
}

/// What makes codes of sums and sizes.
#[derive(Debug, Clone, Copy)]
pub struct Smoothing {
    /// Added to a size.
    pub eps: f64,
    /// What sizes are multiplied by after that.
    pub scale: f64,
    /// Codes are then brought to length one, or divided by this if they are shorter; `None` leaves them.
    pub shortest: Option<f64>,
}

/// Codes `[K, D]`, `m / ((n + ε) scale)`, in binary64 and rounded to f32; lengths are summed in the order of columns.
///
/// # Shapes
/// - sizes: n, `[K]`
/// - sums: m, `[K, D]`
///
/// # Errors
/// As [`ByCode::sums`].
pub fn smooth(
    gpu: &Gpu,
    sizes: &CudaView<'_, f32>,
    sums: &CudaView<'_, f32>,
    width: usize,
    smoothing: Smoothing,
) -> Result<CudaSlice<f32>, Error> {
    let (codes, d) = (rows(sums.len(), width)?, count("columns", width)?);
    check("codes' sizes", codes as usize, sizes.len())?;
    let Smoothing { eps, scale, shortest } = smoothing;
    let (unit, shortest) = (i32::from(shortest.is_some()), shortest.unwrap_or_default());
    // SAFETY: the kernel writes every element.
    let mut out = unsafe { unset::<f32>(gpu, sums.len())? };
    let function = gpu.function("smooth_codes", 0)?;
    let mut args = gpu.stream().launch_builder(&function);
    args.arg(sums).arg(sizes).arg(&codes).arg(&d).arg(&eps).arg(&scale).arg(&unit).arg(&shortest).arg(&mut out);
    // SAFETY: the kernel's arguments, in the sizes that were checked.
    unsafe { launch(args, warp_blocks(sizes.len()), THREADS, 0) }?;
    Ok(out)
}

/// The codes `dead` become the features `chosen`, as many of both, with `size` as their size: `c = x`, `m = x size`. A pair of
/// which either does not exist changes nothing; no code may stand twice.
///
/// # Shapes
/// - features: `[N, D]`
/// - codes, sums: `[K, D]`
/// - sizes: `[K]`
///
/// # Errors
/// As [`ByCode::sums`]; also if a code stands twice.
#[allow(clippy::too_many_arguments)]
pub fn restart(
    gpu: &Gpu,
    features: &CudaView<'_, f32>,
    width: usize,
    (chosen, dead): (&[u32], &[u32]),
    size: f32,
    codes: &mut CudaViewMut<'_, f32>,
    sizes: &mut CudaViewMut<'_, f32>,
    sums: &mut CudaViewMut<'_, f32>,
) -> Result<(), Error> {
    let (tokens, k, d) = (rows(features.len(), width)?, rows(codes.len(), width)?, count("columns", width)?);
    check("codes' sizes", k as usize, sizes.len())?;
    check("codes' sums", codes.len(), sums.len())?;
    check("chosen features", dead.len(), chosen.len())?;
    let restarts = count("restarts", dead.len())?;
    let mut sorted = dead.to_vec();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::Gpu { message: format!("code {} is to restart twice", twice[0]) });
    }
    if dead.is_empty() {
        return Ok(());
    }
    let (chosen, dead) = (gpu.stream().clone_htod(chosen)?, gpu.stream().clone_htod(dead)?);
    let function = gpu.function("restart_codes", 0)?;
    let mut args = gpu.stream().launch_builder(&function);
    args.arg(features).arg(&chosen).arg(&dead).arg(&restarts).arg(&tokens).arg(&k).arg(&d).arg(&size);
    args.arg(codes).arg(sizes).arg(sums);
    // SAFETY: the kernel's arguments, in the sizes that were checked; it checks what is chosen and dead.
    unsafe { launch(args, warp_blocks(restarts as usize), THREADS, 0) }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{USES, bits, indices, noise};
    use super::*;

    const SHAPES: [(usize, usize, usize); 9] = [
        (0, 3, 4),
        (1, 1, 1),
        (7, 5, 3),
        (255, 1, 33),
        (256, 255, 2),
        (257, 256, 1),
        (300, 40, 257),
        (1025, 300, 3),
        (600, 70_000, 1),
    ];

    /// What vqrae/src/quantizer/average.rs counts: sizes and sums, token by token.
    fn counted(features: &[f32], chosen: &[u32], k: usize, d: usize) -> (Vec<f64>, Vec<f64>) {
        let (mut sizes, mut sums) = (vec![0f64; k], vec![0f64; k * d]);
        for (feature, &i) in features.chunks_exact(d).zip(chosen) {
            sizes[i as usize] += 1.0;
            sums[i as usize * d..][..d].iter_mut().zip(feature).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        (sizes, sums)
    }

    #[test]
    fn sums_and_averages_are_the_cpus_bits() {
        let Some(gpu) = super::super::super::test_gpu() else { return };
        let stream = gpu.stream();
        for (n, k, d) in SHAPES {
            for uses in USES {
                let case = format!("{n} {k} {d} {uses}");
                let (features, chosen) = (noise(n * d, 1), indices(n, k, uses, 2));
                let (sizes, sums) = counted(&features, &chosen, k, d);
                let (dfeatures, dchosen) = (stream.clone_htod(&features).unwrap(), stream.clone_htod(&chosen).unwrap());
                let counts = stream.clone_dtoh(&code_histogram(&gpu, &dchosen.as_view(), k).unwrap()).unwrap();
                assert!(counts.iter().zip(&sizes).all(|(&count, &size)| f64::from(count) == size), "{case}");
                let by_code = ByCode::sort(&gpu, &dchosen.as_view(), k).unwrap();
                let found = stream.clone_dtoh(&by_code.sums(&gpu, &dfeatures.as_view(), d).unwrap()).unwrap();
                assert!(found.iter().zip(&sums).all(|(a, b)| a.to_bits() == b.to_bits()), "{case}");

                let (old_sizes, old_sums, decay) = (noise(k, 3), noise(k * d, 4), 0.8f64);
                let lerp = |(&old, new): (&f32, f64)| (decay * f64::from(old) + (1.0 - decay) * new) as f32;
                let expected_sizes: Vec<f32> = old_sizes.iter().zip(sizes).map(lerp).collect();
                let expected_sums: Vec<f32> = old_sums.iter().zip(sums).map(lerp).collect();
                for _ in 0..2 {
                    let mut sizes = stream.clone_htod(&old_sizes).unwrap();
                    let mut sums = stream.clone_htod(&old_sums).unwrap();
                    let (sizes_mut, sums_mut) = (&mut sizes.as_view_mut(), &mut sums.as_view_mut());
                    by_code.follow(&gpu, &dfeatures.as_view(), d, decay, sizes_mut, sums_mut).unwrap();
                    assert_eq!(bits(&stream.clone_dtoh(&sizes).unwrap()), bits(&expected_sizes), "{case}");
                    assert_eq!(bits(&stream.clone_dtoh(&sums).unwrap()), bits(&expected_sums), "{case}");
                }
            }
        }
    }

    #[test]
    fn tokens_of_no_code_are_left_out() {
        let Some(gpu) = super::super::super::test_gpu() else { return };
        let stream = gpu.stream();
        let features = stream.clone_htod(&[1f32, 2., 4., 8.]).unwrap();
        let chosen = stream.clone_htod(&[1u32, 2, u32::MAX, 1]).unwrap();
        assert_eq!(stream.clone_dtoh(&code_histogram(&gpu, &chosen.as_view(), 2).unwrap()).unwrap(), [0, 2]);
        let by_code = ByCode::sort(&gpu, &chosen.as_view(), 2).unwrap();
        let sums = by_code.sums(&gpu, &features.as_view(), 1).unwrap();
        assert_eq!(stream.clone_dtoh(&sums).unwrap(), [0.0, 9.0]);
        assert!(by_code.sums(&gpu, &features.as_view(), 2).is_err());
        assert_eq!(by_code.sums(&gpu, &features.as_view(), 0).unwrap_err(), Error::ZeroWidth);
    }

    #[test]
    fn codes_are_the_cpus_bits() {
        let Some(gpu) = super::super::super::test_gpu() else { return };
        let stream = gpu.stream();
        for (_, k, d) in SHAPES {
            let (mut sums, sizes) = (noise(k * d, 5), noise(k, 6).iter().map(|x| x + 1.5).collect::<Vec<f32>>());
            // A row of zeros has no length to be divided by.
            sums[..d].fill(0.0);
            let (dsums, dsizes) = (stream.clone_htod(&sums).unwrap(), stream.clone_htod(&sizes).unwrap());
            for shortest in [None, Some(1e-6f64)] {
                let smoothing = Smoothing { eps: 1e-5, scale: 0.97, shortest };
                let codes = smooth(&gpu, &dsizes.as_view(), &dsums.as_view(), d, smoothing).unwrap();
                let mut expected = Vec::with_capacity(k * d);
                for (sum, &size) in sums.chunks_exact(d).zip(&sizes) {
                    let size = (f64::from(size) + 1e-5) * 0.97;
                    let mut code: Vec<f32> = sum.iter().map(|&sum| (f64::from(sum) / size) as f32).collect();
                    if let Some(shortest) = shortest {
                        let length = code.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt().max(shortest);
                        code.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
                    }
                    expected.extend(code);
                }
                assert_eq!(bits(&stream.clone_dtoh(&codes).unwrap()), bits(&expected), "{k} {d} {shortest:?}");
            }
        }
    }

    #[test]
    fn dead_codes_become_features() {
        let Some(gpu) = super::super::super::test_gpu() else { return };
        let stream = gpu.stream();
        let features = stream.clone_htod(&[1f32, 2., 3., 4.]).unwrap();
        let mut codes = stream.clone_htod(&[0f32; 6]).unwrap();
        let mut sizes = stream.clone_htod(&[9f32; 3]).unwrap();
        let mut sums = stream.clone_htod(&[7f32; 6]).unwrap();
        let mut run = |chosen: &[u32], dead: &[u32]| {
            let pairs = (chosen, dead);
            let (codes, sizes, sums) = (&mut codes.as_view_mut(), &mut sizes.as_view_mut(), &mut sums.as_view_mut());
            restart(&gpu, &features.as_view(), 2, pairs, 0.5, codes, sizes, sums)
        };
        run(&[], &[]).unwrap();
        run(&[1, 0, 5, 0], &[0, 2, 1, 3]).unwrap();
        assert!(run(&[1], &[]).is_err());
        assert!(run(&[0, 1], &[2, 2]).is_err());
        assert_eq!(stream.clone_dtoh(&codes).unwrap(), [3., 4., 0., 0., 1., 2.]);
        assert_eq!(stream.clone_dtoh(&sizes).unwrap(), [0.5, 9.0, 0.5]);
        assert_eq!(stream.clone_dtoh(&sums).unwrap(), [1.5, 2., 7., 7., 0.5, 1.]);
    }
}
