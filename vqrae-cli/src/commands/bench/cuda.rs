//! The search for the nearest code on a GPU, measured: cuBLAS's products alone, ours exact and fast, and how many codes
//! differ from those of binary64 on the CPU.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use vqrae_kernels::cuda::cudarc::driver::CudaSlice;
use vqrae_kernels::cuda::cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use vqrae_kernels::cuda::{Codebook, Gpu, Method, Mode};
use vqrae_kernels::{Metric, Stats, nearest};

use super::search::{Row, Wanted, checked};
use super::table::median;
use crate::interrupts::interrupted;

/// Sets of tokens that take turns, so that no search finds its own tokens in the cache.
const SETS: u64 = 4;

/// Times that something is done before it is measured: the first of them loads kernels and makes the workspace.
const WARM_UP: usize = 3;

/// Of the compared tokens, those that the plain loop in binary64 is asked about too: every one would take minutes.
const PLAIN: usize = 64;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// The scores alone, by cuBLAS from fp16 to f32, in the blocks of a search.
    Products,
    Exact,
    Fast,
}

/// A codebook on a GPU, and tokens to search.
pub(super) struct Search {
    gpu: Arc<Gpu>,
    pub(super) codebook: Codebook,
    /// The same codes for cuBLAS, whatever screens them in a search.
    products: Codebook,
    sets: Vec<CudaSlice<f32>>,
    turn: usize,
    /// On the host: the codes `[K, D]` and the first set `[N, D]`.
    pub(super) rows: Vec<f32>,
    pub(super) tokens: Vec<f32>,
}

impl Search {
    /// The codes and the most tokens that are wanted.
    pub(super) fn new(gpu: &Arc<Gpu>, wanted: &Wanted) -> Result<Self> {
        let most = wanted.tokens.iter().copied().max().unwrap_or_default();
        let (rows, d) = wanted.inputs.codes(wanted.k, wanted.d)?;
        let codebook = Codebook::new(gpu, &rows, d, Metric::Cosine)?;
        let products = Codebook::on_device(gpu, gpu.stream().clone_htod(&rows)?, d, Metric::Cosine, Method::Gemm)?;
        let tokens = wanted.inputs.tokens(&rows, most, d, 0);
        let mut sets = vec![gpu.stream().clone_htod(&tokens)?];
        for set in 1..SETS {
            sets.push(gpu.stream().clone_htod(&wanted.inputs.tokens(&rows, most, d, set))?);
        }
        Ok(Self { gpu: gpu.clone(), codebook, products, sets, turn: 0, rows, tokens })
    }

    /// Seconds of one piece of work on `n` tokens of the set whose turn it is, as the GPU's own clock has them.
    pub(super) fn time(&mut self, work: Work, n: usize) -> Result<f64> {
        let values = n * self.codebook.width();
        let set = &self.sets[self.turn % self.sets.len()];
        self.turn += 1;
        if values > set.len() {
            bail!("{n} tokens are more than were made");
        }
        let (z, stream) = (set.slice(..values), self.gpu.stream());
        stream.synchronize()?;
        let begin = stream.record_event(Some(CU_EVENT_DEFAULT))?;
        let codes = match work {
            Work::Products => self.products.products_alone(n).map(|()| None)?,
            Work::Exact => Some(self.codebook.nearest(&z, Mode::Exact)?),
            Work::Fast => Some(self.codebook.nearest(&z, Mode::Fast)?),
        };
        let end = stream.record_event(Some(CU_EVENT_DEFAULT))?;
        end.synchronize()?;
        drop(codes);
        Ok(f64::from(begin.elapsed_ms(&end)?) / 1e3)
    }

    /// The median of `rounds`.
    fn median(&mut self, work: Work, n: usize, rounds: usize) -> Result<f64> {
        for _ in 0..WARM_UP {
            self.time(work, n)?;
        }
        let mut seconds = Vec::new();
        for _ in 0..rounds {
            if interrupted() {
                bail!("interrupted");
            }
            seconds.push(self.time(work, n)?);
        }
        Ok(median(&mut seconds))
    }

    /// The codes of the first `n` tokens of the first set.
    pub(super) fn codes(&self, mode: Mode, n: usize) -> Result<(Vec<u32>, Stats)> {
        Ok(self.codebook.nearest_host(&self.tokens[..n * self.codebook.width()], mode)?)
    }
}

/// Measures every size of one codebook, and tells `done` each row when it is there.
pub(super) fn measure(
    gpu: &Arc<Gpu>,
    wanted: &Wanted,
    rounds: usize,
    done: &mut impl FnMut(Row) -> Result<()>,
) -> Result<()> {
    let mut search = Search::new(gpu, wanted).with_context(|| format!("codes of width {}", wanted.d))?;
    let truth = Truth::new(&search)?;
    for &n in &wanted.tokens {
        let [gemm, exact, fast] = [Work::Products, Work::Exact, Work::Fast].map(|work| search.median(work, n, rounds));
        let ((exact_codes, stats), (fast_codes, _)) = (search.codes(Mode::Exact, n)?, search.codes(Mode::Fast, n)?);
        let places = checked(n);
        let expected = truth.codes(&search, &places)?;
        let differ =
            |codes: &[u32]| places.iter().zip(&expected).filter(|(place, code)| codes[**place] != **code).count();
        done(Row {
            device: gpu.stream().context().name()?,
            inputs: wanted.inputs.name(),
            tokens: n,
            width: search.codebook.width(),
            codes: search.codebook.len(),
            method: search
                .codebook
                .method()
                .map_or("binary64".to_string(), |method| format!("{method:?}").to_lowercase()),
            gemm: gemm?,
            exact: exact?,
            fast: fast?,
            workspace: search.codebook.workspace_bytes(n),
            checked: places.len(),
            exact_differ: differ(&exact_codes),
            fast_differ: differ(&fast_codes),
            candidates: stats.candidates as f64 / n.max(1) as f64,
            fallbacks: stats.fallback_rows,
            rounds,
        })?;
    }
    Ok(())
}

/// The codes of binary64, by the CPU's search, which the plain loop of the contract confirms for some tokens.
struct Truth {
    codebook: nearest::Codebook,
}

impl Truth {
    fn new(search: &Search) -> Result<Self> {
        Ok(Self { codebook: nearest::Codebook::new(search.rows.clone(), search.codebook.width(), Metric::Cosine)? })
    }

    /// The codes of the tokens at these places.
    fn codes(&self, search: &Search, places: &[usize]) -> Result<Vec<u32>> {
        let d = search.codebook.width();
        let take = |places: &[usize]| -> Vec<f32> {
            places.iter().flat_map(|&place| &search.tokens[place * d..(place + 1) * d]).copied().collect()
        };
        let codes = self.codebook.nearest(&take(places))?;
        let step = places.len().div_ceil(PLAIN).max(1);
        let some: Vec<usize> = places.iter().copied().step_by(step).collect();
        let plain = self.codebook.nearest_reference(&take(&some))?;
        if !plain.iter().eq(codes.iter().step_by(step)) {
            bail!("the CPU's search differs from the plain loop in binary64: a bug of this program");
        }
        Ok(codes)
    }
}

/// The GPU with the kernels, of a device that candle has opened.
pub(super) fn gpu(device: &vqrae::Device) -> Result<Arc<Gpu>> {
    Ok(Gpu::open(device.as_cuda_device()?.cuda_stream().context().ordinal())?)
}

/// What a GPU is called by its maker.
pub(super) fn gpu_name(device: &vqrae::Device) -> Result<String> {
    Ok(device.as_cuda_device()?.cuda_stream().context().name()?)
}

#[cfg(test)]
mod tests {
    use super::super::inputs::Inputs;
    use super::*;

    #[test]
    fn on_a_gpu_no_code_differs_from_binary64() {
        let gpu = match Gpu::open(0) {
            Ok(gpu) => gpu,
            Err(error) => {
                assert!(std::env::var_os("VQRAE_REQUIRE_GPU").is_none(), "VQRAE_REQUIRE_GPU is set, and: {error}");
                return;
            }
        };
        for inputs in [Inputs::Random, Inputs::Cone, Inputs::PowerLaw] {
            for d in [8, 64, 320] {
                let wanted = Wanted { inputs, k: 1000, d, tokens: vec![300] };
                let mut rows = Vec::new();
                let mut done = |row| {
                    rows.push(row);
                    Ok(())
                };
                measure(&gpu, &wanted, 1, &mut done).unwrap();
                assert_eq!((rows.len(), rows[0].exact_differ, rows[0].checked), (1, 0, 300), "{inputs:?}, width {d}");
            }
        }
    }
}
