//! Time, arithmetic rate, candidates and peak memory of the search, against a full matrix of scores.
//!
//! ```text
//! cargo bench -p vqrae-kernels --bench nearest -- [--n N] [--k K] [--d D] [--metric euclidean|cosine] [--cone]
//!     [--isa NAME] [--precision bf16|f32] [--no-matrix]
//! ```
//!
//! `--cone` gives all tokens and codes a common direction, as untrained encoders do. \
//! `--isa` and `--precision` choose how codes are screened, instead of `VQRAE_CPU` and the library's own choice. \
//! Without `--d` the widths 32, 64, 256 and 1536 are run in turn. The matrix is the `gemm` crate on all
//! threads into N × K f32 scores, then an argmax over rows: what the search replaces. It is skipped above
//! 4 GiB, so `--n 262144` shows the search's own memory.

#![expect(clippy::print_stdout, reason = "a bench prints its results")]

use std::time::{Duration, Instant};

use gemm::{Parallelism, gemm};
use rayon::prelude::*;
use vqrae_kernels::cpu::Isa;
use vqrae_kernels::nearest::Precision;
use vqrae_kernels::{Codebook, Metric};

/// Runs whose fastest is reported.
const RUNS: usize = 3;

struct Options {
    n: usize,
    k: usize,
    widths: Vec<usize>,
    metric: Metric,
    cone: bool,
    isa: Isa,
    precision: Option<Precision>,
    matrix: bool,
}

fn options() -> Options {
    let mut options = Options {
        n: 4096,
        k: 16384,
        widths: vec![32, 64, 256, 1536],
        metric: Metric::Cosine,
        cone: false,
        isa: Isa::detect().unwrap_or_else(|error| panic!("{error}")),
        precision: None,
        matrix: true,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_else(|| panic!("a value after {word}"));
        match word.as_str() {
            "--n" => options.n = value().parse().expect("a number of tokens"),
            "--k" => options.k = value().parse().expect("a number of codes"),
            "--d" => options.widths = vec![value().parse().expect("a width")],
            "--metric" => {
                options.metric = match value().as_str() {
                    "euclidean" => Metric::Euclidean,
                    "cosine" => Metric::Cosine,
                    other => panic!("unknown metric {other}"),
                }
            }
            "--isa" => options.isa = Isa::named(&value()).unwrap_or_else(|error| panic!("{error}")),
            "--precision" => {
                options.precision = match value().as_str() {
                    "bf16" => Some(Precision::Bf16),
                    "f32" => Some(Precision::F32),
                    other => panic!("unknown precision {other}"),
                }
            }
            "--cone" => options.cone = true,
            "--no-matrix" => options.matrix = false,
            // Cargo adds this to every bench.
            "--bench" => {}
            other => panic!("unknown option {other}"),
        }
    }
    options
}

/// Roughly gaussian values, from a linear congruential generator.
fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| uniform() + uniform() + uniform()).collect()
}

/// Adds one direction, about 2.5 times as long as a row, to every row.
fn lean(rows: &mut [f32], d: usize) {
    let axis = values(d, 3);
    for row in rows.chunks_exact_mut(d) {
        row.iter_mut().zip(&axis).for_each(|(x, a)| *x += 2.5 * a);
    }
}

fn fastest<T>(mut run: impl FnMut() -> T) -> (Duration, T) {
    let mut timed = || {
        let start = Instant::now();
        let out = run();
        (start.elapsed(), out)
    };
    (1..RUNS).fold(timed(), |best, _| {
        let next = timed();
        if next.0 < best.0 { next } else { best }
    })
}

/// Peak resident memory since the last reset, where /proc tells it.
fn peak_mebibytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<usize>().ok().map(|kib| kib >> 10)
}

fn reset_peak() {
    // Where this is refused, the peak printed is that of the whole run.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The search's rival: all N × K scores at once, then the largest of each row.
fn matrix_argmax(z: &[f32], rows: &[f32], bias: &[f32], d: usize) -> Vec<u32> {
    let (n, k) = (z.len() / d, rows.len() / d);
    let mut scores = vec![0f32; n * k];
    let (column, row) = (k as isize, 1);
    // SAFETY: scores is (N, K), rows (K, D) and z (N, D), as the strides say.
    unsafe {
        gemm(
            k,
            n,
            d,
            scores.as_mut_ptr(),
            column,
            row,
            false,
            rows.as_ptr(),
            1,
            d as isize,
            z.as_ptr(),
            d as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::Rayon(0),
        );
    }
    let argmax = |scores: &[f32]| {
        let sums = scores.iter().zip(bias).map(|(s, b)| s + b);
        let larger = |best: (usize, f32), next: (usize, f32)| if next.1 > best.1 { next } else { best };
        sums.enumerate().reduce(larger).map_or(0, |(k, _)| k as u32)
    };
    scores.par_chunks(k).map(argmax).collect()
}

fn bench(options: &Options, d: usize) {
    let &Options { n, k, metric, cone, isa, matrix, .. } = options;
    let draw = |count: usize, seed| {
        let mut rows = values(count * d, seed);
        if cone {
            lean(&mut rows, d);
        }
        rows
    };
    let z = draw(n, 1);
    let (prepare, codebook) = {
        let rows = draw(k, 2);
        let start = Instant::now();
        let precision = options.precision.unwrap_or(Precision::for_width(d, isa));
        let codebook = Codebook::screened(rows, d, metric, isa, precision).expect("a finite codebook");
        (start.elapsed(), codebook)
    };
    reset_peak();
    let resident = peak_mebibytes();
    let (time, (codes, stats)) = fastest(|| codebook.nearest_with_stats(&z).expect("finite tokens"));
    let peak = peak_mebibytes();
    let gflops = 2.0 * (n * k * d) as f64 / time.as_secs_f64() / 1e9;
    let screening = match codebook.screening() {
        Some((isa, precision)) => format!("{precision:?} {}", isa.name()),
        None => "none".to_string(),
    };
    print!(
        "N {n}  K {k}  D {d}  {screening}  prepare {:.1} ms  search {:.1} ms  {gflops:.0} GFLOP/s  {:.4} candidates a token  {} again  {} fallback",
        prepare.as_secs_f64() * 1e3,
        time.as_secs_f64() * 1e3,
        stats.candidates as f64 / stats.rows as f64,
        stats.rescreened_rows,
        stats.fallback_rows,
    );
    if let (Some(resident), Some(peak)) = (resident, peak) {
        print!("  memory {resident} -> {peak} MiB");
    }
    if matrix && n * k < 1 << 30 {
        let bias = codebook.rows().chunks_exact(d).map(|row| bias(row, metric)).collect::<Vec<_>>();
        reset_peak();
        let (rival, theirs) = fastest(|| matrix_argmax(&z, codebook.rows(), &bias, d));
        let differ = codes.iter().zip(&theirs).filter(|(a, b)| a != b).count();
        print!(
            "  | matrix {:.1} ms ({:.2} x)  {differ} codes differ",
            rival.as_secs_f64() * 1e3,
            rival.as_secs_f64() / time.as_secs_f64()
        );
        if let Some(peak) = peak_mebibytes() {
            print!("  peak {peak} MiB");
        }
    }
    println!();
}

/// b_k in f32, for the rival.
fn bias(row: &[f32], metric: Metric) -> f32 {
    match metric {
        Metric::Euclidean => -row.iter().map(|x| x * x).sum::<f32>() / 2.0,
        Metric::Cosine => 0.0,
    }
}

fn main() {
    let options = options();
    println!("{:?}, {} threads, fastest of {RUNS}", options.metric, rayon::current_num_threads());
    for &d in &options.widths {
        bench(&options, d);
    }
}
