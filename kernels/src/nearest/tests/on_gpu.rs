//! The contract on a GPU, or on the one that CPUs play (`kernels/cuda/cpu`): every input of the other tests, screened in every
//! way, and what only a GPU can get wrong.

use std::sync::Arc;

use super::{METRICS, Random, assert_same_codes, codebook, cone, shuffled};
use crate::cuda::{Codebook, Gpu, Method, Mode, test_gpu};
use crate::{Error, Metric, Stats};

/// Every way that codes of a width can be screened.
fn methods(d: usize) -> impl Iterator<Item = Method> {
    [Method::Narrow, Method::Fused, Method::Gemm].into_iter().filter(move |method| d <= method.widest())
}

fn prepare(gpu: &Arc<Gpu>, rows: &[f32], d: usize, metric: Metric, method: Method) -> Codebook {
    Codebook::on_device(gpu, gpu.stream().clone_htod(rows).unwrap(), d, metric, method).unwrap()
}

/// Searches in every way and compares with what the reference says.
#[track_caller]
pub(super) fn assert_exact(rows: &[f32], d: usize, metric: Metric, z: &[f32], expected: &[u32]) {
    let Some(gpu) = test_gpu() else { return };
    let on_cpu = codebook(rows, d, metric);
    for method in methods(d) {
        let on_gpu = prepare(&gpu, rows, d, metric, method);
        let searched = gpu.stream().clone_dtoh(on_gpu.rows()).unwrap();
        assert!(searched.iter().map(|x| x.to_bits()).eq(on_cpu.rows().iter().map(|x| x.to_bits())), "{method:?}");
        let (got, stats) = on_gpu.nearest_host(z, Mode::Exact).unwrap();
        assert_same_codes(&on_cpu, z, &got, expected);
        assert_eq!(stats.rows, expected.len());
    }
}

#[track_caller]
fn search(gpu: &Arc<Gpu>, rows: &[f32], d: usize, metric: Metric, method: Method, z: &[f32]) -> Stats {
    let expected = codebook(rows, d, metric).nearest(z).unwrap();
    let (got, stats) = prepare(gpu, rows, d, metric, method).nearest_host(z, Mode::Exact).unwrap();
    assert_same_codes(&codebook(rows, d, metric), z, &got, &expected);
    stats
}

#[test]
fn a_gpu_takes_few_candidates_where_codes_are_spread() {
    let Some(gpu) = test_gpu() else { return };
    let mut random = Random(31);
    for d in [8, 64, 200, 320] {
        let (rows, z) = (random.values(600 * d), random.values(150 * d));
        for metric in METRICS {
            for method in methods(d) {
                let stats = search(&gpu, &rows, d, metric, method, &z);
                assert!(stats.fallback_rows <= 2, "{method:?}, width {d}: {stats:?}");
                assert!(stats.candidates < 2 * stats.rows, "{method:?}, width {d}: {stats:?}");
            }
        }
    }
}

#[test]
fn few_tokens_meet_the_codes_in_parts() {
    let Some(gpu) = test_gpu() else { return };
    let mut random = Random(32);
    for (n, k) in [(1, 2000), (3, 129), (17, 4097), (130, 1500)] {
        for d in [3, 40] {
            let mut rows = random.values(k * d);
            // Two equal rows in different parts, and a part that is folded away whole.
            rows.copy_within(5 * d..6 * d, (k - 1) * d);
            for copy in 64..128 {
                rows.copy_within(0..d, copy * d);
            }
            let z = [rows[(k - 1) * d..].to_vec(), random.values((n - 1) * d)].concat();
            for metric in METRICS {
                for method in methods(d) {
                    search(&gpu, &rows, d, metric, method, &z);
                }
            }
        }
    }
}

#[test]
fn more_near_ties_than_a_list_holds_are_settled_in_binary64() {
    let Some(gpu) = test_gpu() else { return };
    let (mut random, d) = (Random(33), 48);
    let cluster = cone(&mut random, 1200, d, 1e-7);
    let rows = cluster.iter().enumerate().map(|(i, x)| if i / d % 2 == 0 { *x } else { -x }).collect::<Vec<_>>();
    let z = random.values(9 * d);
    for metric in METRICS {
        for method in methods(d) {
            let stats = search(&gpu, &rows, d, metric, method, &z);
            assert!(stats.fallback_rows > 0, "the test no longer reaches the fallback: {stats:?}");
        }
    }
}

#[test]
fn scores_that_grow_from_tile_to_tile_do_not_fill_a_list_with_what_is_beaten() {
    let Some(gpu) = test_gpu() else { return };
    let (mut random, d, k) = (Random(34), 64, 3000);
    let direction = random.values(d);
    // Every code is a little better than the one before it.
    let rows: Vec<f32> =
        (0..k).flat_map(|i| direction.iter().map(move |x| x * (1.0 + i as f32 / 1000.0)).collect::<Vec<_>>()).collect();
    let z = direction.iter().map(|x| x * 10.0).collect::<Vec<_>>();
    let stats = search(&gpu, &rows, d, Metric::Euclidean, Method::Fused, &z);
    assert_eq!(stats.fallback_rows, 0, "{stats:?}");
}

#[test]
fn a_gpu_refuses_what_has_no_answer() {
    let Some(gpu) = test_gpu() else { return };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = Codebook::new(&gpu, &[1.0, 2.0, bad, 0.0], 2, Metric::Cosine).unwrap_err();
        assert_eq!(error, Error::NonFiniteCode { row: 1 });
        let on_device = gpu.stream().clone_htod(&[1.0, 2.0, bad, 0.0, bad, bad]).unwrap();
        let error = Codebook::on_device(&gpu, on_device, 2, Metric::Euclidean, Method::Narrow).unwrap_err();
        assert_eq!(error, Error::NonFiniteCode { row: 1 });
        for (d, method) in [(2, Method::Narrow), (2, Method::Fused), (2, Method::Gemm)] {
            let codebook = prepare(&gpu, &[1.0, 2.0, 3.0, 4.0], d, Metric::Euclidean, method);
            let mut z = vec![1.0; 600];
            (z[401], z[599]) = (bad, bad);
            assert_eq!(
                codebook.nearest_host(&z, Mode::Exact).unwrap_err(),
                Error::NonFiniteToken { row: 200 },
                "{method:?}"
            );
            assert!(codebook.nearest_host(&[1.0; 3], Mode::Exact).is_err());
        }
    }
    assert!(Codebook::new(&gpu, &[], 2, Metric::Cosine).is_err());
    assert!(Codebook::new(&gpu, &[1.0], 0, Metric::Cosine).is_err());
    let rows = gpu.stream().clone_htod(&[1.0; 64]).unwrap();
    let error = Codebook::on_device(&gpu, rows, 64, Metric::Cosine, Method::Narrow).unwrap_err();
    assert!(error.to_string().contains("expected: at most 32"), "{error}");
}

#[test]
fn the_fast_mode_takes_the_largest_screened_score() {
    let Some(gpu) = test_gpu() else { return };
    let (mut random, k) = (Random(35), 500);
    for d in [8, 64, 300] {
        let (rows, z) = (random.values(k * d), random.values(100 * d));
        let exact = codebook(&rows, d, Metric::Cosine).nearest(&z).unwrap();
        for method in methods(d) {
            let codebook = prepare(&gpu, &rows, d, Metric::Cosine, method);
            let (codes, stats) = codebook.nearest_host(&z, Mode::Fast).unwrap();
            let wrong = codes.iter().zip(&exact).filter(|(a, b)| a != b).count();
            assert!(wrong <= 2 && stats.rescored_rows == 0, "{method:?}: {wrong} of 100 differ");
        }
    }
    // Of equal codes the first.
    let rows = random.values(4).repeat(300);
    for method in methods(4) {
        let codebook = prepare(&gpu, &rows, 4, Metric::Cosine, method);
        assert_eq!(codebook.nearest_host(&rows[..40], Mode::Fast).unwrap().0, [0; 10]);
    }
}

#[test]
fn searches_repeat_bit_by_bit_in_any_batch_and_order() {
    let Some(gpu) = test_gpu() else { return };
    let (mut random, n, k) = (Random(36), 70, 300);
    for d in [6, 64, 300] {
        let (rows, z) = (cone(&mut random, k, d, 0.01), cone(&mut random, n, d, 0.01));
        for method in methods(d) {
            let codebook = prepare(&gpu, &rows, d, Metric::Cosine, method);
            let (together, _) = codebook.nearest_host(&z, Mode::Exact).unwrap();
            for _ in 0..3 {
                assert_eq!(codebook.nearest_host(&z, Mode::Exact).unwrap().0, together);
            }
            for size in [1, 16, 33] {
                let parts = z.chunks(size * d).flat_map(|z| codebook.nearest_host(z, Mode::Exact).unwrap().0);
                assert!(parts.eq(together.iter().copied()), "{method:?} in batches of {size}");
            }
            let order = shuffled(&mut random, n);
            let permuted = super::reorder(&z, d, &order);
            let codes = codebook.nearest_host(&permuted, Mode::Exact).unwrap().0;
            assert!(codes.iter().zip(&order).all(|(&code, &row)| code == together[row]), "{method:?}");
        }
    }
}

#[test]
fn a_search_takes_bounded_memory_whatever_the_number_of_tokens() {
    let Some(gpu) = test_gpu() else { return };
    let random = &mut Random(37);
    for d in [8, 64, 256] {
        for method in methods(d) {
            let codebook = prepare(&gpu, &random.values(1000 * d), d, Metric::Cosine, method);
            let bytes = codebook.workspace_bytes(4 << 20);
            assert!(bytes <= (128 << 20), "{method:?}, width {d}: {bytes}");
        }
    }
}
