use cudarc::driver::{CudaSlice, CudaView, PushKernelArg};

use super::super::{Gpu, launch};
use super::{THREADS, check, count, rows, thread_blocks, unset, warp_blocks};
use crate::Error;

/// Codes by their indices, and how far they are from their features.
#[derive(Debug)]
pub struct Gathered {
    /// q, `[N, D]`, each token's code bit for bit: what straight-through passes on.
    pub tokens: CudaSlice<f32>,
    /// `scale Σ (z − q)²`, one number.
    pub loss: CudaSlice<f32>,
}

/// q and `scale Σ (z − q)²` in one pass over memory; the sum is in binary64.
///
/// # Shapes
/// - z: `[N, D]`
/// - codes: `[K, D]`
/// - indices: `[N]`; one that names no code gives a row of NaN
///
/// # Errors
/// If sizes do not fit together, or the device fails.
pub fn gather(
    gpu: &Gpu,
    z: &CudaView<'_, f32>,
    codes: &CudaView<'_, f32>,
    indices: &CudaView<'_, u32>,
    width: usize,
    scale: f64,
) -> Result<Gathered, Error> {
    let (tokens, codes_count, d) = (rows(z.len(), width)?, rows(codes.len(), width)?, count("columns", width)?);
    check("indices", tokens as usize, indices.len())?;
    // SAFETY: the kernel writes every element of both.
    let (mut q, mut distances) = unsafe { (unset::<f32>(gpu, z.len())?, unset::<f64>(gpu, indices.len())?) };
    let function = gpu.function("gather_codes", 0)?;
    let mut args = gpu.stream().launch_builder(&function);
    args.arg(z).arg(codes).arg(indices).arg(&tokens).arg(&codes_count).arg(&d).arg(&mut q).arg(&mut distances);
    // SAFETY: the kernel's arguments; the sizes are those of the slices, and it checks indices.
    unsafe { launch(args, warp_blocks(indices.len()), THREADS, 0) }?;
    Ok(Gathered { tokens: q, loss: sum_distances(gpu, &distances, scale)? })
}

/// `scale Σ (z − q)²`, one number, of tokens that are gathered already.
///
/// # Shapes
/// - z, q: `[N, D]`
///
/// # Errors
/// As [`gather`].
pub fn commitment(
    gpu: &Gpu,
    z: &CudaView<'_, f32>,
    q: &CudaView<'_, f32>,
    width: usize,
    scale: f64,
) -> Result<CudaSlice<f32>, Error> {
    let (tokens, d) = (rows(z.len(), width)?, count("columns", width)?);
    check("values of codes", z.len(), q.len())?;
    // SAFETY: the kernel writes every element.
    let mut distances = unsafe { unset::<f64>(gpu, tokens as usize)? };
    let function = gpu.function("measure_distances", 0)?;
    let mut args = gpu.stream().launch_builder(&function);
    args.arg(z).arg(q).arg(&tokens).arg(&d).arg(&mut distances);
    // SAFETY: the kernel's arguments, in the sizes that were checked.
    unsafe { launch(args, warp_blocks(tokens as usize), THREADS, 0) }?;
    sum_distances(gpu, &distances, scale)
}

fn sum_distances(gpu: &Gpu, distances: &CudaSlice<f64>, scale: f64) -> Result<CudaSlice<f32>, Error> {
    let tokens = count("tokens", distances.len())?;
    // SAFETY: the kernel writes it.
    let mut sum = unsafe { unset::<f32>(gpu, 1)? };
    let function = gpu.function("sum_distances", 0)?;
    let mut args = gpu.stream().launch_builder(&function);
    args.arg(distances).arg(&tokens).arg(&scale).arg(&mut sum);
    // SAFETY: the kernel's arguments; there are as many distances as it is told.
    unsafe { launch(args, (1, 1), THREADS, 0) }?;
    Ok(sum)
}

/// The gradient of both parts of [`gather`] in one pass: `dz = g + weight · g_loss · (z − q)`, where weight is 2 β / (N D) for
/// β mean (z − q)².
///
/// # Shapes
/// - g: `[N, D]`, what the tokens' gradient is; `None` for the loss alone
/// - z, q: `[N, D]`
/// - loss_gradient: one number
/// - output: `[N, D]`
///
/// # Errors
/// As [`gather`].
pub fn straight_through_gradient(
    gpu: &Gpu,
    g: Option<&CudaView<'_, f32>>,
    z: &CudaView<'_, f32>,
    q: &CudaView<'_, f32>,
    loss_gradient: &CudaView<'_, f32>,
    weight: f64,
) -> Result<CudaSlice<f32>, Error> {
    /// Enough to fill any device, and few enough that blocks have work.
    const MOST_BLOCKS: usize = 1 << 14;
    check("values of codes", z.len(), q.len())?;
    check("values of the gradient", z.len(), g.map_or(z.len(), |g| g.len()))?;
    check("numbers of the loss's gradient", 1, loss_gradient.len())?;
    // SAFETY: the kernel writes every element.
    let mut dz = unsafe { unset::<f32>(gpu, z.len())? };
    let (elements, weight, nowhere) = (z.len() as u64, weight as f32, 0u64);
    let function = gpu.function("straight_through_gradient", 0)?;
    let mut args = gpu.stream().launch_builder(&function);
    match g {
        Some(g) => args.arg(g),
        None => args.arg(&nowhere),
    };
    args.arg(z).arg(q).arg(loss_gradient).arg(&weight).arg(&elements).arg(&mut dz);
    let blocks = (thread_blocks(z.len()).0.min(MOST_BLOCKS), 1);
    // SAFETY: the kernel's arguments; a null gradient is one of them, all others have the length that it is told.
    unsafe { launch(args, blocks, THREADS, 0) }?;
    Ok(dz)
}

/// Rows by their indices.
///
/// # Shapes
/// - table: `[K, D]`
/// - indices: `[N]`; one that names no row gives a row of NaN
/// - output: `[N, D]`
///
/// # Errors
/// As [`gather`].
pub fn gather_rows(
    gpu: &Gpu,
    table: &CudaView<'_, f32>,
    indices: &CudaView<'_, u32>,
    width: usize,
) -> Result<CudaSlice<f32>, Error> {
    let (rows, tokens, d) = (rows(table.len(), width)?, count("indices", indices.len())?, count("columns", width)?);
    // SAFETY: the kernel writes every element.
    let mut out = unsafe { unset::<f32>(gpu, indices.len().saturating_mul(width))? };
    let function = gpu.function("gather_rows", 0)?;
    let mut args = gpu.stream().launch_builder(&function);
    args.arg(table).arg(indices).arg(&tokens).arg(&rows).arg(&d).arg(&mut out);
    // SAFETY: the kernel's arguments; the sizes are those of the slices, and it checks indices.
    unsafe { launch(args, warp_blocks(indices.len()), THREADS, 0) }?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{USES, bits, indices, noise};
    use super::*;

    #[test]
    fn gathered_tokens_are_codes_and_the_loss_is_the_plain_sum() {
        let Some(gpu) = super::super::super::test_gpu() else { return };
        let stream = gpu.stream();
        for (n, k, d) in [(0, 3, 4), (1, 1, 1), (7, 5, 3), (8, 1, 32), (9, 300, 33), (257, 17, 70), (1000, 64, 8)] {
            for uses in USES {
                let (z, codes, chosen) = (noise(n * d, 1), noise(k * d, 2), indices(n, k, uses, 3));
                let scale = 0.25 / (n * d).max(1) as f64;
                let (dz, dcodes) = (stream.clone_htod(&z).unwrap(), stream.clone_htod(&codes).unwrap());
                let dchosen = stream.clone_htod(&chosen).unwrap();
                let run = || {
                    let found = gather(&gpu, &dz.as_view(), &dcodes.as_view(), &dchosen.as_view(), d, scale).unwrap();
                    let again = commitment(&gpu, &dz.as_view(), &found.tokens.as_view(), d, scale).unwrap();
                    let rows = gather_rows(&gpu, &dcodes.as_view(), &dchosen.as_view(), d).unwrap();
                    let host = |x: &CudaSlice<f32>| stream.clone_dtoh(x).unwrap();
                    (host(&found.tokens), host(&found.loss), host(&again), host(&rows))
                };
                let (q, loss, again, rows) = run();
                let expected: Vec<f32> =
                    chosen.iter().flat_map(|&i| codes[i as usize * d..][..d].iter().copied()).collect();
                assert_eq!(bits(&q), bits(&expected), "{n} {k} {d} {uses}");
                assert_eq!(bits(&rows), bits(&expected), "{n} {k} {d} {uses}");
                let square = |(&z, &q): (&f32, &f32)| (f64::from(z) - f64::from(q)).powi(2);
                let sum: f64 = z.iter().zip(&expected).map(square).sum::<f64>() * scale;
                assert!((f64::from(loss[0]) - sum).abs() <= 1e-6 * sum, "{n} {k} {d} {uses}: {} and {sum}", loss[0]);
                assert_eq!(bits(&loss), bits(&again), "{n} {k} {d} {uses}");
                let second = run();
                assert_eq!((bits(&q), bits(&loss)), (bits(&second.0), bits(&second.1)), "{n} {k} {d} {uses}");
            }
        }
    }

    #[test]
    fn an_index_that_names_no_code_gives_nan_and_nothing_else() {
        let Some(gpu) = super::super::super::test_gpu() else { return };
        let stream = gpu.stream();
        let (z, codes) = (stream.clone_htod(&[1f32; 6]).unwrap(), stream.clone_htod(&[2f32; 4]).unwrap());
        let chosen = stream.clone_htod(&[1u32, 2, u32::MAX]).unwrap();
        let found = gather(&gpu, &z.as_view(), &codes.as_view(), &chosen.as_view(), 2, 1.0).unwrap();
        let q = stream.clone_dtoh(&found.tokens).unwrap();
        assert_eq!(q[..2], [2.0, 2.0]);
        assert!(q[2..].iter().all(|x| x.is_nan()), "{q:?}");
        assert!(stream.clone_dtoh(&found.loss).unwrap()[0].is_nan());
        let rows = gather_rows(&gpu, &codes.as_view(), &chosen.as_view(), 2).unwrap();
        assert_eq!(stream.clone_dtoh(&rows).unwrap().iter().filter(|x| x.is_nan()).count(), 4);
    }

    #[test]
    fn the_gradient_is_the_formula() {
        let Some(gpu) = super::super::super::test_gpu() else { return };
        let stream = gpu.stream();
        for n in [0, 1, 255, 256, 257, 5000] {
            let (g, z, q) = (noise(n, 4), noise(n, 5), noise(n, 6));
            let [dg, dz, dq] = [&g, &z, &q].map(|x| stream.clone_htod(x).unwrap());
            let loss_gradient = stream.clone_htod(&[3f32]).unwrap();
            let run = |g: Option<&CudaView<'_, f32>>| {
                let (z, q, loss_gradient) = (dz.as_view(), dq.as_view(), loss_gradient.as_view());
                let out = straight_through_gradient(&gpu, g, &z, &q, &loss_gradient, 0.1).unwrap();
                stream.clone_dtoh(&out).unwrap()
            };
            let (with, without) = (run(Some(&dg.as_view())), run(None));
            for i in 0..n {
                let pull = 0.1f32 * 3.0 * (z[i] - q[i]);
                assert_eq!((with[i], without[i]), (g[i] + pull, pull), "{i} of {n}");
            }
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors() {
        let Some(gpu) = super::super::super::test_gpu() else { return };
        let six = gpu.stream().clone_htod(&[0f32; 6]).unwrap();
        let two = gpu.stream().clone_htod(&[0u32; 2]).unwrap();
        let (six, two) = (six.as_view(), two.as_view());
        assert_eq!(gather(&gpu, &six, &six, &two, 0, 1.0).unwrap_err(), Error::ZeroWidth);
        assert_eq!(gather(&gpu, &six, &six, &two, 4, 1.0).unwrap_err(), Error::RaggedRows { values: 6, width: 4 });
        let error = gather(&gpu, &six, &six, &two, 2, 1.0).unwrap_err().to_string();
        assert_eq!(error, "number of indices, expected: 3, got: 2");
        assert!(commitment(&gpu, &six, &six.slice(..3), 3, 1.0).is_err());
        assert!(straight_through_gradient(&gpu, None, &six, &six, &six, 1.0).is_err());
    }
}
