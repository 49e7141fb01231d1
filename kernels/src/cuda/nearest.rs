//! Nearest codes on a GPU, by the same [contract](crate::nearest) and to the same bits as on a CPU.
//!
//! | width D | screening | scores |
//! |---|---|---|
//! | to 32 | f32, a thread a token (`nearest_narrow.cu`) | in registers |
//! | to 256 | fp16, `mma.sync` (`nearest_fused.cu`) | in registers |
//! | more | fp16, cuBLAS (`nearest.cu`) | a block of tokens at a time, 64 MiB at most |
//!
//! Each way keeps the codes whose score is within the proven bound of the best one (`nearest/bound.rs`), and binary64 decides
//! among them. A token that cannot be screened is scored against every code.

mod prepare;
mod sums;

use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use cudarc::cublas::sys::{cublasComputeType_t, cublasGemmAlgo_t, cublasOperation_t, cudaDataType_t};
use cudarc::driver::{CudaSlice, CudaStream, CudaView, DevicePtr, DeviceRepr, PushKernelArg};

use prepare::{Screen, Shadow, fold, measure, normalise};

use super::{Gpu, launch};
use crate::nearest::{Metric, Stats};
use crate::{Error, nearest};

/// Threads of kernels that give a row to a warp, and how many rows these are.
const THREADS: u32 = 256;
const WARPS: usize = THREADS as usize / 32;

/// Bytes of scores that exist at a time.
const SCORES: usize = 64 << 20;
/// Bytes of rounded tokens that exist at a time.
const ROUNDED: usize = 32 << 20;

/// How sure an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The contract's code.
    Exact,
    /// The code with the largest screened score, lowest index on ties: some tokens get another code of nearly the same score.
    Fast,
}

/// How codes are screened. It changes the time of a search, never an exact answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// f32, for widths to 32.
    Narrow,
    /// fp16 in one kernel, for widths to 256.
    Fused,
    /// fp16 by cuBLAS, for any width.
    Gemm,
}

impl Method {
    /// Its widest codes.
    pub const fn widest(self) -> usize {
        match self {
            Self::Narrow => 32,
            Self::Fused => 256,
            Self::Gemm => usize::MAX,
        }
    }

    /// The first that serves codes of width `d`, which [`Codebook::new`] takes.
    pub fn for_width(d: usize) -> Self {
        let fits = |method: &Self| d <= method.widest();
        [Self::Narrow, Self::Fused].into_iter().find(fits).unwrap_or(Self::Gemm)
    }

    /// The width that codes are padded to.
    fn padded(self, d: usize) -> usize {
        match self {
            Self::Narrow => d.next_power_of_two().max(4),
            Self::Fused | Self::Gemm => d.next_multiple_of(64),
        }
    }
}

/// K codes of width D on a GPU, prepared for searching: the rows as searched, a shadow of them in fp16 (or f32 where they are
/// narrow) without what they share, and the bound on the shadow's scores. Equal rows are folded into the first.
#[derive(Debug)]
pub struct Codebook {
    gpu: Arc<Gpu>,
    rows: CudaSlice<f32>,
    /// b_k of the contract.
    bias: CudaSlice<f64>,
    codes: usize,
    width: usize,
    metric: Metric,
    /// `None` where no bound holds: every token is scored against every code.
    screen: Option<Screen>,
    workspace: Mutex<Workspace>,
}

/// What is kept from one search to the next, since memory that is given back costs more than a search.
#[derive(Debug, Default)]
struct Workspace {
    scores: Option<CudaSlice<f32>>,
    rounded: Option<CudaSlice<u16>>,
    unscale: Option<CudaSlice<f32>>,
    epsilon: Option<CudaSlice<f64>>,
    /// What tokens have met in each part of the codes.
    met: Option<CudaSlice<u8>>,
}

/// `Bound` of nearest.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct BoundArgs {
    weights: [f64; 4],
    reach: f64,
    level: f64,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for BoundArgs {}

/// `Report` of nearest.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Report {
    candidates: u64,
    rescored: u32,
    refused: u32,
    first_bad: u32,
    unused: u32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for Report {}

/// `Tokens` of nearest_fused.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct TokenArgs {
    z: u64,
    rounded: u64,
    unscale: u64,
    epsilon: u64,
    count: i32,
}

// SAFETY: addresses and numbers in C's layout.
unsafe impl DeviceRepr for TokenArgs {}

/// `Codes` of nearest_fused.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct CodeArgs {
    rows: u64,
    bias: u64,
    shadow: u64,
    centred_bias: u64,
    count: i32,
    width: i32,
    per_part: i32,
}

// SAFETY: addresses and numbers in C's layout.
unsafe impl DeviceRepr for CodeArgs {}

/// The outputs of one search.
struct Answer {
    codes: CudaSlice<u32>,
    /// Tokens for binary64 alone, as many as the report says.
    refused: CudaSlice<u32>,
    report: CudaSlice<Report>,
}

impl Codebook {
    /// Checks `rows`, copies them to the GPU and prepares them, as [`nearest::Codebook::new`] does on a CPU.
    ///
    /// # Shapes
    /// `rows`: (K, d)
    ///
    /// # Errors
    /// As [`nearest::Codebook::new`], or if the GPU's memory does not hold it.
    pub fn new(gpu: &Arc<Gpu>, rows: &[f32], d: usize, metric: Metric) -> Result<Self, Error> {
        nearest::check_codes(rows, d)?;
        Self::on_device(gpu, gpu.stream().clone_htod(rows)?, d, metric, Method::for_width(d))
    }

    /// [`Codebook::new`] of rows that are on the GPU already, screened as wished.
    ///
    /// # Errors
    /// As [`Codebook::new`], and if `d` is above the method's widest.
    pub fn on_device(
        gpu: &Arc<Gpu>,
        mut rows: CudaSlice<f32>,
        d: usize,
        metric: Metric,
        method: Method,
    ) -> Result<Self, Error> {
        let codes = nearest::count(rows.len(), d)?;
        if codes == 0 {
            return Err(Error::NoCodes);
        }
        if d > method.widest() {
            let message = format!("codes of width {d} by {method:?}, expected: at most {}", method.widest());
            return Err(Error::Gpu { message });
        }
        int(codes)?;
        let stream = gpu.stream();
        if metric == Metric::Cosine {
            normalise(gpu, &mut rows, codes, d)?;
        }
        let (bias, hashes) = measure(gpu, &rows, codes, d, metric)?;
        let folded = fold(gpu, &rows, &hashes, d)?;
        let distinct = folded.iter().filter(|&&folded| folded == 0).count();
        let folded = stream.clone_htod(&folded)?;
        let screen = Screen::new(gpu, &rows, &bias, (&folded, distinct), (codes, d), method)?;
        Ok(Self { gpu: gpu.clone(), rows, bias, codes, width: d, metric, screen, workspace: Mutex::default() })
    }

    /// The number of codes, K; never zero.
    #[expect(clippy::len_without_is_empty, reason = "a codebook is never empty")]
    pub fn len(&self) -> usize {
        self.codes
    }

    /// The width of a code, D.
    pub fn width(&self) -> usize {
        self.width
    }

    /// How codes are ranked.
    pub fn metric(&self) -> Metric {
        self.metric
    }

    /// How codes are screened; `None` where no bound holds and binary64 does it all.
    pub fn method(&self) -> Option<Method> {
        self.screen.as_ref().map(|screen| screen.method)
    }

    /// The codes as searched, (K, D): normalised under [`Metric::Cosine`], as given otherwise.
    pub fn rows(&self) -> &CudaSlice<f32> {
        &self.rows
    }

    /// The code of each token, and an account of the work done.
    ///
    /// # Shapes
    /// `z`: (N, D); returns (N)
    ///
    /// # Errors
    /// If the values do not divide into rows, or a row is not finite (the first such row is named); or if the GPU fails.
    pub fn nearest(&self, z: &CudaView<'_, f32>, mode: Mode) -> Result<(CudaSlice<u32>, Stats), Error> {
        let n = nearest::count(z.len(), self.width)?;
        int(n)?;
        let stream = self.gpu.stream();
        // Without a screen every token is refused.
        let refused: u32 = if self.screen.is_none() { n as u32 } else { 0 };
        let report = Report { first_bad: u32::MAX, refused, ..Report::default() };
        let all = if refused > 0 { (0..refused).collect() } else { vec![0; n.max(1)] };
        let mut answer = Answer {
            codes: stream.alloc_zeros(n.max(1))?,
            refused: stream.clone_htod(&all)?,
            report: stream.clone_htod(&[report])?,
        };
        if n > 0 {
            let mut workspace = self.workspace.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            match &self.screen {
                Some(screen) if screen.method == Method::Narrow => {
                    self.meet_narrow(screen, z, mode, &mut answer, &mut workspace)?;
                }
                Some(screen) => self.meet_wide(screen, z, mode, &mut answer, &mut workspace)?,
                None => self.check(z)?,
            }
            self.settle_refused(z, n, &mut answer)?;
        }
        let report = stream.clone_dtoh(&answer.report)?[0];
        if report.first_bad != u32::MAX {
            return Err(Error::NonFiniteToken { row: report.first_bad as usize });
        }
        let stats = Stats {
            rows: n,
            candidates: usize::try_from(report.candidates).unwrap_or(usize::MAX),
            rescored_rows: report.rescored as usize,
            rescreened_rows: 0,
            fallback_rows: report.refused as usize,
        };
        Ok((answer.codes, stats))
    }

    /// [`Codebook::nearest`] of tokens in the host's memory.
    ///
    /// # Errors
    /// As [`Codebook::nearest`].
    pub fn nearest_host(&self, z: &[f32], mode: Mode) -> Result<(Vec<u32>, Stats), Error> {
        if z.is_empty() {
            return Ok((Vec::new(), Stats::default()));
        }
        let z = self.gpu.stream().clone_htod(z)?;
        let (codes, stats) = self.nearest(&z.slice(..), mode)?;
        Ok((self.gpu.stream().clone_dtoh(&codes)?, stats))
    }

    /// The products alone of a search of `n` tokens by cuBLAS, in the same blocks: what no search of the kind can beat.
    ///
    /// # Errors
    /// If codes are not screened by [`Method::Gemm`], or the GPU fails.
    pub fn products_alone(&self, n: usize) -> Result<(), Error> {
        let Some(Screen { method: Method::Gemm, padded, shadow: Shadow::F16(shadow, _), .. }) = &self.screen else {
            return Err(Error::Gpu { message: "products alone: the codes are not screened by cuBLAS".to_string() });
        };
        let mut workspace = self.workspace.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let block = self.block(Method::Gemm, *padded).min(n.max(1));
        workspace.fit(self.gpu.stream(), block, block * padded, block * self.codes, 0)?;
        let Workspace { rounded: Some(rounded), scores: Some(scores), .. } = &mut *workspace else { return Ok(()) };
        for start in (0..n).step_by(block) {
            self.multiply(shadow, *padded, rounded, block.min(n - start), scores)?;
        }
        Ok(())
    }

    /// Bytes of the GPU's memory that searches of `n` tokens take besides the codebook, the tokens and their codes.
    pub fn workspace_bytes(&self, n: usize) -> usize {
        let Some(screen) = &self.screen else { return 4 * n };
        let block = self.block(screen.method, screen.padded).min(n);
        let list = 4 * n;
        match screen.method {
            Method::Narrow => list + block * self.parts(screen.method, block).0 * MET,
            Method::Fused => {
                list + block * (2 * screen.padded + 12) + block * self.parts(screen.method, block).0 * BEST
            }
            Method::Gemm => list + block * (2 * screen.padded + 12) + 4 * block * self.codes,
        }
    }

    /// Tokens that are searched at a time.
    fn block(&self, method: Method, padded: usize) -> usize {
        match method {
            Method::Narrow => 1 << 20,
            Method::Fused => (ROUNDED / 2 / padded).max(128),
            // Whole tiles of a product where there is room for them.
            Method::Gemm => match (SCORES / 4 / self.codes).min(ROUNDED / 2 / padded) {
                few @ 0..128 => few.max(1),
                many => many / 128 * 128,
            },
        }
    }

    /// Into how many parts codes are cut, so that few tokens keep all processors busy, and the codes of a part.
    fn parts(&self, method: Method, tokens: usize) -> (usize, usize) {
        let (tile, blocks_each) = if method == Method::Narrow { (128, 4) } else { (64, 2) };
        let blocks = tokens.div_ceil(128).max(1);
        let wanted = (blocks_each * self.gpu.processors() as usize).div_ceil(blocks);
        let per_part = self.codes.div_ceil(wanted.clamp(1, self.codes.div_ceil(tile))).next_multiple_of(tile);
        (self.codes.div_ceil(per_part), per_part)
    }

    fn meet_narrow(
        &self,
        screen: &Screen,
        z: &CudaView<'_, f32>,
        mode: Mode,
        answer: &mut Answer,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let Shadow::F32(shadow) = &screen.shadow else { return Ok(()) };
        let name = match screen.padded {
            4 => "meet_codes_4",
            8 => "meet_codes_8",
            16 => "meet_codes_16",
            _ => "meet_codes_32",
        };
        let (meet, settle) = (self.gpu.function(name, 0)?, self.gpu.function("settle_narrow", 0)?);
        let (n, stream) = (z.len() / self.width, self.gpu.stream());
        let block = self.block(Method::Narrow, screen.padded).min(n);
        let (codes, width, exact) = (int(self.codes)?, int(self.width)?, i32::from(mode == Mode::Exact));
        for first in (0..n).step_by(block) {
            let tokens = block.min(n - first);
            let (parts, per_part) = self.parts(Method::Narrow, tokens);
            workspace.fit(stream, 0, 0, 0, tokens * parts * MET)?;
            let Some(met) = &mut workspace.met else { return Ok(()) };
            let z = z.slice(first * self.width..(first + tokens) * self.width);
            let (count, per_part, parts_arg, first_arg) = (int(tokens)?, int(per_part)?, int(parts)?, first as u32);
            let mut args = stream.launch_builder(&meet);
            args.arg(&z)
                .arg(&count)
                .arg(&width)
                .arg(shadow)
                .arg(&screen.bias)
                .arg(&codes)
                .arg(&per_part)
                .arg(&mut *met);
            // SAFETY: the kernel's arguments; rows of z and the shadow, and a `Met` a token and part, are there.
            unsafe { launch(args, (tokens.div_ceil(128), parts), 128, 0) }?;
            let mut codes_out = answer.codes.slice_mut(first..first + tokens);
            let mut args = stream.launch_builder(&settle);
            args.arg(&z).arg(&count).arg(&width).arg(&*met).arg(&parts_arg).arg(&screen.bound).arg(&exact);
            args.arg(&first_arg).arg(&mut codes_out).arg(&mut answer.refused).arg(&mut answer.report);
            // SAFETY: as above, and `refused` has room for every token.
            unsafe { launch(args, (tokens.div_ceil(THREADS as usize), 1), THREADS, 0) }?;
        }
        Ok(())
    }

    fn meet_wide(
        &self,
        screen: &Screen,
        z: &CudaView<'_, f32>,
        mode: Mode,
        answer: &mut Answer,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let Shadow::F16(shadow, exponent) = &screen.shadow else { return Ok(()) };
        let (n, stream, padded) = (z.len() / self.width, self.gpu.stream(), screen.padded);
        let prepare = self.gpu.function("prepare_tokens", 0)?;
        let block = self.block(screen.method, padded).min(n);
        let (width, padded_arg) = (int(self.width)?, int(padded)?);
        for first in (0..n).step_by(block) {
            let tokens = block.min(n - first);
            let (parts, per_part) = self.parts(screen.method, tokens);
            let (scores, met) = match screen.method {
                Method::Gemm => (tokens * self.codes, 0),
                _ => (0, tokens * parts * BEST),
            };
            workspace.fit(stream, tokens, tokens * padded, scores, met)?;
            let Workspace { rounded: Some(rounded), unscale: Some(unscale), epsilon: Some(epsilon), .. } = workspace
            else {
                return Ok(());
            };
            let z = z.slice(first * self.width..(first + tokens) * self.width);
            let (count, first_arg) = (int(tokens)?, first as u32);
            let mut args = stream.launch_builder(&prepare);
            args.arg(&z).arg(&count).arg(&width).arg(&padded_arg).arg(exponent).arg(&screen.bound);
            args.arg(&mut *rounded).arg(&mut *unscale).arg(&mut *epsilon).arg(&mut answer.report).arg(&first_arg);
            // SAFETY: the kernel's arguments; the workspace was fitted to `tokens` rows.
            unsafe { launch(args, (tokens.div_ceil(WARPS), 1), THREADS, 0) }?;
            match screen.method {
                Method::Gemm => self.scan(screen, shadow, &z, first, mode, answer, workspace)?,
                _ => self.meet_fused(screen, shadow, &z, (first, per_part), mode, answer, workspace)?,
            }
        }
        Ok(())
    }

    /// Scores by cuBLAS, then the scan.
    #[expect(clippy::too_many_arguments, reason = "one launch's inputs and outputs")]
    fn scan(
        &self,
        screen: &Screen,
        shadow: &CudaSlice<u16>,
        z: &CudaView<'_, f32>,
        first: usize,
        mode: Mode,
        answer: &mut Answer,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        /// Tokens of a block of `scan_products`.
        const ROWS: usize = 4;
        let Workspace {
            scores: Some(scores),
            rounded: Some(rounded),
            unscale: Some(unscale),
            epsilon: Some(epsilon),
            ..
        } = workspace
        else {
            return Ok(());
        };
        let tokens = z.len() / self.width;
        self.multiply(shadow, screen.padded, rounded, tokens, scores)?;
        let stream = self.gpu.stream();
        let (count, codes, width, first_arg) = (int(tokens)?, int(self.codes)?, int(self.width)?, first as u32);
        let mut codes_out = answer.codes.slice_mut(first..first + tokens);
        let function = match mode {
            Mode::Exact => self.gpu.function("scan_products", 0)?,
            Mode::Fast => self.gpu.function("largest_products", 0)?,
        };
        let mut args = stream.launch_builder(&function);
        args.arg(&*scores);
        if mode == Mode::Exact {
            args.arg(&count);
        }
        args.arg(&codes).arg(&*unscale).arg(&*epsilon).arg(&screen.bias);
        if mode == Mode::Exact {
            args.arg(z).arg(&self.rows).arg(&self.bias).arg(&width);
        }
        args.arg(&first_arg).arg(&mut codes_out).arg(&mut answer.refused).arg(&mut answer.report);
        let blocks = if mode == Mode::Exact { tokens.div_ceil(ROWS) } else { tokens };
        // SAFETY: the kernels' arguments; scores of `tokens` rows and K columns are there.
        unsafe { launch(args, (blocks, 1), THREADS, 0) }
    }

    /// Tokens and codes in one kernel, then the best of all parts of the codes.
    #[expect(clippy::too_many_arguments, reason = "one launch's inputs and outputs")]
    fn meet_fused(
        &self,
        screen: &Screen,
        shadow: &CudaSlice<u16>,
        z: &CudaView<'_, f32>,
        (first, per_part): (usize, usize),
        mode: Mode,
        answer: &mut Answer,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        /// Tokens of a block, codes of a tile, candidates of a token and the skew of a tile's rows.
        const ROWS: usize = 128;
        const TILE: usize = 64;
        const CANDIDATES: usize = 32;
        const SKEW: usize = 8;
        let name = match (screen.padded, mode) {
            (64, Mode::Exact) => "meet_codes_exact_64",
            (128, Mode::Exact) => "meet_codes_exact_128",
            (192, Mode::Exact) => "meet_codes_exact_192",
            (_, Mode::Exact) => "meet_codes_exact_256",
            (64, Mode::Fast) => "meet_codes_fast_64",
            (128, Mode::Fast) => "meet_codes_fast_128",
            (192, Mode::Fast) => "meet_codes_fast_192",
            (_, Mode::Fast) => "meet_codes_fast_256",
        };
        let Workspace {
            rounded: Some(rounded), unscale: Some(unscale), epsilon: Some(epsilon), met: Some(met), ..
        } = workspace
        else {
            return Ok(());
        };
        let (stream, tokens) = (self.gpu.stream(), z.len() / self.width);
        let shared = 2 * (TILE * (screen.padded + SKEW) * 2 + TILE * 4) + ROWS * CANDIDATES * 8;
        let (meet, settle) = (self.gpu.function(name, shared)?, self.gpu.function("settle_parts", 0)?);
        let parts = self.codes.div_ceil(per_part);
        let (count, parts_arg, first_arg) = (int(tokens)?, int(parts)?, first as u32);
        {
            // The guards keep the order of reads where several streams are in use.
            let (z, _z) = z.device_ptr(stream);
            let (rounded, _rounded) = rounded.device_ptr(stream);
            let (unscale, _unscale) = unscale.device_ptr(stream);
            let (epsilon, _epsilon) = epsilon.device_ptr(stream);
            let (rows, _rows) = self.rows.device_ptr(stream);
            let (bias, _bias) = self.bias.device_ptr(stream);
            let (shadow, _shadow) = shadow.device_ptr(stream);
            let (centred_bias, _centred_bias) = screen.bias.device_ptr(stream);
            let token_args = TokenArgs { z, rounded, unscale, epsilon, count };
            let (codes, width, per_part) = (int(self.codes)?, int(self.width)?, int(per_part)?);
            let code_args = CodeArgs { rows, bias, shadow, centred_bias, count: codes, width, per_part };
            let mut args = stream.launch_builder(&meet);
            args.arg(&token_args).arg(&code_args).arg(&mut *met).arg(&mut answer.report);
            // SAFETY: the kernel's arguments, with a `Best` a token and part; `shared` is what it lays out.
            unsafe { launch(args, (tokens.div_ceil(ROWS), parts), THREADS, shared) }?;
        }
        let mut codes_out = answer.codes.slice_mut(first..first + tokens);
        let mut args = stream.launch_builder(&settle);
        args.arg(&*met).arg(&count).arg(&parts_arg).arg(&first_arg);
        args.arg(&mut codes_out).arg(&mut answer.refused).arg(&mut answer.report);
        // SAFETY: as above, and `refused` has room for every token.
        unsafe { launch(args, (tokens.div_ceil(THREADS as usize), 1), THREADS, 0) }
    }

    /// `scores` (tokens, K) of rounded tokens and codes, sums in f32.
    fn multiply(
        &self,
        shadow: &CudaSlice<u16>,
        padded: usize,
        rounded: &CudaSlice<u16>,
        tokens: usize,
        scores: &mut CudaSlice<f32>,
    ) -> Result<(), Error> {
        multiply(&self.gpu, (shadow, self.codes), (rounded, tokens), padded, scores)
    }

    fn settle_refused(&self, z: &CudaView<'_, f32>, n: usize, answer: &mut Answer) -> Result<(), Error> {
        let function = self.gpu.function("settle_refused", 0)?;
        let (codes, width) = (int(self.codes)?, int(self.width)?);
        let mut args = self.gpu.stream().launch_builder(&function);
        args.arg(z).arg(&self.rows).arg(&self.bias).arg(&codes).arg(&width);
        args.arg(&answer.refused).arg(&answer.report).arg(&mut answer.codes);
        let blocks = (4 * self.gpu.processors() as usize).min(n);
        // SAFETY: the kernel's arguments; refused tokens are rows of z.
        unsafe { launch(args, (blocks, 1), THREADS, 0) }
    }

    /// Refuses tokens that are not finite, where no screening looks at them.
    fn check(&self, z: &CudaView<'_, f32>) -> Result<(), Error> {
        let values = self.gpu.stream().clone_dtoh(z)?;
        nearest::check_finite(&values, self.width)
    }
}

/// Bytes of a `Met` and of a `Best`.
const MET: usize = 12;
const BEST: usize = 16;

impl Workspace {
    /// Room for `tokens` tokens, the elements of their rounded rows, of scores, and bytes of what they have met.
    fn fit(
        &mut self,
        stream: &Arc<CudaStream>,
        tokens: usize,
        rounded: usize,
        scores: usize,
        met: usize,
    ) -> Result<(), Error> {
        grow(stream, &mut self.unscale, tokens)?;
        grow(stream, &mut self.epsilon, tokens)?;
        grow(stream, &mut self.rounded, rounded)?;
        grow(stream, &mut self.scores, scores)?;
        grow(stream, &mut self.met, met)
    }
}

fn grow<T: DeviceRepr + cudarc::driver::ValidAsZeroBits>(
    stream: &Arc<CudaStream>,
    buffer: &mut Option<CudaSlice<T>>,
    len: usize,
) -> Result<(), Error> {
    if len > 0 && buffer.as_ref().is_none_or(|buffer| buffer.len() < len) {
        // The old one goes first: both may not fit.
        *buffer = None;
        *buffer = Some(stream.alloc_zeros(len)?);
    }
    Ok(())
}

/// `scores` (tokens, codes), row-major, of rows of fp16 `padded` wide; cuBLAS sees columns, so codes come first.
fn multiply(
    gpu: &Gpu,
    (codes, count): (&CudaSlice<u16>, usize),
    (tokens, token_count): (&CudaSlice<u16>, usize),
    padded: usize,
    scores: &mut CudaSlice<f32>,
) -> Result<(), Error> {
    let (m, n, k) = (int(count)?, int(token_count)?, int(padded)?);
    let (alpha, beta) = (1f32, 0f32);
    let stream = gpu.stream();
    let blas = gpu.blas()?;
    let (a, _a) = codes.device_ptr(stream);
    let (b, _b) = tokens.device_ptr(stream);
    let (c, _c) = cudarc::driver::DevicePtrMut::device_ptr_mut(scores, stream);
    // SAFETY: `codes` has m rows of k elements, `tokens` n, `scores` n rows of m.
    unsafe {
        cudarc::cublas::result::gemm_ex(
            *blas.handle(),
            cublasOperation_t::CUBLAS_OP_T,
            cublasOperation_t::CUBLAS_OP_N,
            m,
            n,
            k,
            (&raw const alpha).cast::<c_void>(),
            a as *const c_void,
            cudaDataType_t::CUDA_R_16F,
            k,
            b as *const c_void,
            cudaDataType_t::CUDA_R_16F,
            k,
            (&raw const beta).cast::<c_void>(),
            c as *mut c_void,
            cudaDataType_t::CUDA_R_32F,
            m,
            cublasComputeType_t::CUBLAS_COMPUTE_32F,
            cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }?;
    Ok(())
}

/// A count as kernels take it.
fn int(count: usize) -> Result<i32, Error> {
    i32::try_from(count)
        .map_err(|_| Error::Gpu { message: format!("{count} rows at once, expected: at most {}", i32::MAX) })
}
