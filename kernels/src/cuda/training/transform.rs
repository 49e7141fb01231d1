use cudarc::cublas::sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
use cudarc::cublas::{Gemm, GemmConfig};
use cudarc::driver::{CudaSlice, CudaView};

use super::super::Gpu;
use super::{check, count, gather_rows, rows, zeros};
use crate::Error;

/// The gradient of W where codes are `C Wᵀ` and a token's is row `i`: `dW = Σ_n g_n C_iᵀ`, as one product over the N rows that were
/// chosen instead of one over all K codes, and nothing is scattered.
///
/// # Shapes
/// - codebook: C, `[K, D]`
/// - indices: `[N]`; one that names no code makes the gradient NaN
/// - g: the gradient of the chosen codes, `[N, E]`
/// - output: `[E, D]`
///
/// # Errors
/// If sizes do not fit together, or the device fails.
pub fn simvq_gradient(
    gpu: &Gpu,
    codebook: &CudaView<'_, f32>,
    indices: &CudaView<'_, u32>,
    g: &CudaView<'_, f32>,
    (d, e): (usize, usize),
) -> Result<CudaSlice<f32>, Error> {
    /// Values gathered at a time.
    const MOST_GATHERED: usize = 1 << 24;
    let (tokens, _) = (rows(g.len(), e)? as usize, rows(codebook.len(), d)?);
    check("indices", tokens, indices.len())?;
    let (m, n) = (count("columns", d)?, count("rows", e)?);
    let mut gradient = zeros::<f32>(gpu, d.saturating_mul(e))?;
    let chunk = (MOST_GATHERED / d).max(1);
    for start in (0..tokens).step_by(chunk) {
        let end = tokens.min(start + chunk);
        let chosen = gather_rows(gpu, codebook, &indices.slice(start..end), d)?;
        // cuBLAS sees rows as columns: dWᵀ [D, E] += Cᵢᵀ [D, N] g [N, E].
        let config = GemmConfig {
            transa: CUBLAS_OP_N,
            transb: CUBLAS_OP_T,
            m,
            n,
            k: count("tokens", end - start)?,
            alpha: 1.0,
            lda: m,
            ldb: n,
            beta: 1.0,
            ldc: m,
        };
        // SAFETY: the three have the sizes that the product is told.
        unsafe { gpu.blas()?.gemm(config, &chosen, &g.slice(start * e..end * e), &mut gradient) }?;
    }
    Ok(gradient)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{USES, bits, indices, noise};
    use super::*;

    #[test]
    fn the_gradient_is_the_plain_sum() {
        let Some(gpu) = super::super::super::test_gpu() else { return };
        let stream = gpu.stream();
        for (n, k, d, e) in [(0, 2, 3, 2), (1, 1, 1, 1), (5, 4, 3, 3), (65, 40, 17, 9), (300, 7, 33, 33)] {
            for uses in USES {
                let (codes, chosen, g) = (noise(k * d, 1), indices(n, k, uses, 2), noise(n * e, 3));
                let (dcodes, dg) = (stream.clone_htod(&codes).unwrap(), stream.clone_htod(&g).unwrap());
                let dchosen = stream.clone_htod(&chosen).unwrap();
                let run = || {
                    let (codes, chosen, g) = (dcodes.as_view(), dchosen.as_view(), dg.as_view());
                    stream.clone_dtoh(&simvq_gradient(&gpu, &codes, &chosen, &g, (d, e)).unwrap()).unwrap()
                };
                let gradient = run();
                for (o, i) in (0..e).flat_map(|o| (0..d).map(move |i| (o, i))) {
                    let term = |t: usize| f64::from(g[t * e + o]) * f64::from(codes[chosen[t] as usize * d + i]);
                    let (sum, size) = (0..n).map(term).fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
                    let got = f64::from(gradient[o * d + i]);
                    assert!((got - sum).abs() <= 1e-6 * size, "{n} {k} {d} {e} {uses}, {o} {i}: {got} and {sum}");
                }
                assert_eq!(bits(&gradient), bits(&run()));
            }
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_errors() {
        let Some(gpu) = super::super::super::test_gpu() else { return };
        let six = gpu.stream().clone_htod(&[0f32; 6]).unwrap();
        let two = gpu.stream().clone_htod(&[0u32; 2]).unwrap();
        let gradient = |d, e| simvq_gradient(&gpu, &six.as_view(), &two.as_view(), &six.as_view(), (d, e));
        assert_eq!(gradient(3, 3).unwrap().len(), 9);
        assert!(gradient(3, 2).is_err());
        assert!(gradient(4, 3).is_err());
        assert_eq!(gradient(0, 3).unwrap_err(), Error::ZeroWidth);
    }
}
