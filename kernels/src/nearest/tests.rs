#[cfg(feature = "cuda")]
mod on_gpu;

use super::*;
use crate::cpu::Element;

/// A small generator (xorshift64*), so that a failure repeats on any machine.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 33) as usize % n
    }

    /// Uniform in [-1, 1).
    fn value(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn values(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.value()).collect()
    }
}

const METRICS: [Metric; 2] = [Metric::Euclidean, Metric::Cosine];

fn codebook(rows: &[f32], d: usize, metric: Metric) -> Codebook {
    Codebook::new(rows.to_vec(), d, metric).unwrap()
}

/// Fails with the token on which `got` loses most, and both scores.
#[track_caller]
fn assert_same_codes(codebook: &Codebook, z: &[f32], got: &[u32], expected: &[u32]) {
    assert_eq!(got.len(), expected.len());
    let score = |row: usize, k: u32| codebook.score(&z[row * codebook.width..][..codebook.width], k as usize);
    let loss = |&row: &usize| score(row, expected[row]) - score(row, got[row]);
    let wrong = (0..got.len()).filter(|&row| got[row] != expected[row]);
    let count = wrong.clone().count();
    if let Some(row) = wrong.max_by(|a, b| loss(a).total_cmp(&loss(b))) {
        let (got, expected) = (got[row], expected[row]);
        panic!(
            "{count} of {} tokens differ; worst: token {row}, expected code {expected} (score {:e}), \
             got code {got} (score {:e}); {:?}, K = {}, D = {}",
            z.len() / codebook.width,
            score(row, expected),
            score(row, got),
            codebook.metric,
            codebook.len(),
            codebook.width,
        );
    }
}

/// Every way of screening that this machine has.
fn screenings() -> impl Iterator<Item = (Isa, Precision)> {
    Isa::tested().into_iter().flat_map(|isa| [(isa, Precision::Bf16), (isa, Precision::F32)])
}

/// Searches with every screening, on every vector unit and on a GPU if there is one, compares with the reference, and returns the account of the
/// best instructions in f32.
#[track_caller]
fn assert_exact(rows: &[f32], d: usize, metric: Metric, z: &[f32]) -> Stats {
    let mut codebook = codebook(rows, d, metric);
    let expected = codebook.nearest_reference(z).unwrap();
    for simd in Simd::available() {
        codebook.simd = simd;
        assert_same_codes(&codebook, z, &codebook.nearest(z).unwrap(), &expected);
    }
    let mut stats = Stats::default();
    for (isa, precision) in screenings() {
        let codebook = Codebook::screened(rows.to_vec(), d, metric, isa, precision).unwrap();
        let got = codebook.nearest_with_stats(z).unwrap();
        assert_same_codes(&codebook, z, &got.0, &expected);
        stats = got.1;
    }
    assert_eq!(stats.rows, expected.len());
    #[cfg(feature = "cuda")]
    on_gpu::assert_exact(rows, d, metric, z, &expected);
    stats
}

/// Rows around one direction, at the given distance from it.
fn cone(random: &mut Random, count: usize, d: usize, opening: f32) -> Vec<f32> {
    let axis = random.values(d);
    (0..count * d).map(|i| axis[i % d] + opening * random.value()).collect()
}

#[test]
fn euclidean_scores_match_numbers_worked_by_hand() {
    // |z - c|² is 5, 4, 13 for z = (1, 2) and 25, 20, 1 for z = (3, 4); b is 0, -0.5, -17.
    let codebook = codebook(&[0.0, 0.0, 1.0, 0.0, 3.0, 5.0], 2, Metric::Euclidean);
    let z = [1.0, 2.0, 3.0, 4.0];
    assert_eq!((0..3).map(|k| codebook.score(&z[..2], k)).collect::<Vec<_>>(), [0.0, 0.5, -4.0]);
    assert_eq!((0..3).map(|k| codebook.score(&z[2..], k)).collect::<Vec<_>>(), [0.0, 2.5, 12.0]);
    assert_eq!(codebook.nearest_reference(&z).unwrap(), [1, 2]);
    assert_eq!(codebook.nearest(&z).unwrap(), [1, 2]);
}

#[test]
fn cosine_ranks_directions_and_normalises_codes_once() {
    // The longest code is the nearest by dot product alone, the second by angle.
    let codebook = codebook(&[30.0, 40.0, 0.0, 2.0, 0.0, 0.0], 2, Metric::Cosine);
    assert_eq!(codebook.rows(), [0.6, 0.8, 0.0, 1.0, 0.0, 0.0]);
    let z = [1.0, 9.0, 7.0, 1.0, -1.0, -1.0];
    assert_eq!(codebook.nearest_reference(&z).unwrap(), [1, 0, 2]);
    assert_eq!(codebook.nearest(&z).unwrap(), [1, 0, 2]);
}

#[test]
fn reports_its_size_metric_and_work() {
    let codebook = codebook(&[1.0, 0.0, 0.0, 1.0], 2, Metric::Cosine);
    assert_eq!((codebook.len(), codebook.width(), codebook.metric()), (2, 2, Metric::Cosine));
    assert_eq!(codebook.nearest_with_stats(&[]).unwrap(), (vec![], Stats::default()));
    let (codes, stats) = codebook.nearest_with_stats(&[1.0, 0.0, 2.0, 2.0]).unwrap();
    assert_eq!(codes, [0, 0]);
    assert_eq!(stats, Stats { rows: 2, candidates: 3, rescored_rows: 1, ..Stats::default() });
}

#[test]
fn refuses_codebooks_and_tokens_that_have_no_answer() {
    let new = |rows: Vec<f32>, d| Codebook::new(rows, d, Metric::Euclidean).map(|_| ());
    assert_eq!(new(vec![1.0], 0), Err(Error::ZeroWidth));
    assert_eq!(new(vec![], 2), Err(Error::NoCodes));
    assert_eq!(new(vec![1.0; 3], 2), Err(Error::RaggedRows { values: 3, width: 2 }));
    let codebook = codebook(&[1.0, 2.0], 2, Metric::Euclidean);
    assert_eq!(codebook.nearest(&[1.0; 5]), Err(Error::RaggedRows { values: 5, width: 2 }));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert_eq!(new(vec![0.0, 1.0, 2.0, bad, bad, 0.0], 2), Err(Error::NonFiniteCode { row: 1 }));
        for position in 0..70 {
            let mut z = vec![1.0; 1000 * 2];
            z[position] = bad;
            z[1999] = bad;
            let error = Err(Error::NonFiniteToken { row: position / 2 });
            assert_eq!(codebook.nearest(&z), error);
            assert_eq!(codebook.nearest_reference(&z), error);
        }
    }
}

#[test]
fn messages_name_the_fact_and_the_values() {
    let message = Error::NonFiniteToken { row: 7 }.to_string();
    assert_eq!(message, "values of token 7, expected: all finite, got: a NaN or an infinity");
    let message = Error::RaggedRows { values: 3, width: 2 }.to_string();
    assert_eq!(message, "number of values, expected: a multiple of the width 2, got: 3");
}

#[test]
fn ties_go_to_the_lowest_index_wherever_the_equal_codes_lie() {
    let (mut random, d, k) = (Random(1), 5, 1200);
    for (first, second) in [(0, 1), (0, 1199), (15, 16), (127, 128), (1, 1024), (255, 256), (1023, 1199)] {
        let mut rows = random.values(k * d);
        rows.copy_within(first * d..(first + 1) * d, second * d);
        let z = rows[second * d..][..d].to_vec();
        for metric in METRICS {
            assert_eq!(codebook(&rows, d, metric).nearest(&z).unwrap(), [first as u32], "{metric:?}");
            assert_exact(&rows, d, metric, &z);
        }
    }
}

#[test]
fn mirrored_codes_tie_without_being_equal() {
    // z = (1, 0) is exactly as far from (0.5, y) as from (0.5, -y).
    let rows = [9.0, 9.0, 0.5, -0.25, 0.5, 0.25, 0.5, -0.0, 0.5, 0.0];
    for metric in METRICS {
        let stats = assert_exact(&rows[..6], 2, metric, &[1.0, 0.0]);
        assert_eq!((stats.candidates, stats.rescored_rows), (2, 1));
        // -0 and 0 are one code.
        let stats = assert_exact(&rows[6..], 2, metric, &[1.0, 0.0]);
        assert_eq!((stats.candidates, stats.rescored_rows), (1, 0));
    }
}

#[test]
fn duplicates_are_folded_and_do_not_flood_the_candidates() {
    let (mut random, d) = (Random(2), 8);
    let distinct = random.values(10 * d);
    let rows = (0..3000).flat_map(|k| distinct[k * 7 % 10 * d..][..d].to_vec()).collect::<Vec<_>>();
    let z = random.values(100 * d);
    for metric in METRICS {
        let stats = assert_exact(&rows, d, metric, &z);
        assert_eq!((stats.candidates, stats.fallback_rows), (100, 0));
    }
}

#[test]
fn a_token_of_zeros_gets_the_shortest_code_or_code_zero() {
    let (mut random, d) = (Random(3), 4);
    let mut rows = random.values(2000 * d);
    rows[700 * d..701 * d].fill(1e-3);
    let z = [0.0, -0.0, 0.0, 0.0];
    assert_eq!(codebook(&rows, d, Metric::Euclidean).nearest(&z).unwrap(), [700]);
    assert_eq!(codebook(&rows, d, Metric::Cosine).nearest(&z).unwrap(), [0]);
    for metric in METRICS {
        assert_eq!(assert_exact(&rows, d, metric, &z).fallback_rows, 0);
    }
}

#[test]
fn a_codebook_of_zeros_answers_zero() {
    for metric in METRICS {
        assert_exact(&[0.0; 700 * 3], 3, metric, &Random(4).values(30));
    }
}

#[test]
fn random_shapes_agree_with_the_reference() {
    let mut random = Random(5);
    for _ in 0..100 {
        let (n, k) = (1 + random.below(40), 1 + random.below(1100));
        let d = 1 + random.below(70);
        let (rows, z) = (random.values(k * d), random.values(n * d));
        for metric in METRICS {
            assert_exact(&rows, d, metric, &z);
        }
    }
}

#[test]
fn shapes_at_the_edges_of_tiles_and_lanes_agree_with_the_reference() {
    let mut random = Random(6);
    for k in [1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 1024] {
        for (n, d) in [(1, 1), (7, 31), (8, 32), (47, 33), (48, 64), (49, 2), (129, 17), (385, 8), (5, 250)] {
            let (rows, z) = (random.values(k * d), random.values(n * d));
            for metric in METRICS {
                assert_exact(&rows, d, metric, &z);
            }
        }
    }
}

#[test]
fn wide_codes_of_every_kind_agree_with_the_reference() {
    let mut random = Random(19);
    let positive = |values: Vec<f32>| values.into_iter().map(f32::abs).collect::<Vec<_>>();
    for (n, k, d) in [(1, 257, 1536), (15, 100, 256), (16, 256, 250), (17, 129, 1537), (127, 100, 64)] {
        let rows = random.values(k * d);
        let narrow = |values: Vec<f32>| values.into_iter().map(|x| Bf16::narrow(x).widen()).collect::<Vec<_>>();
        let near = rows.iter().cycle().take(n * d).map(|x| x + 0.3 * random.value()).collect::<Vec<_>>();
        let cases = [
            (rows.clone(), near),
            (rows.clone(), narrow(random.values(n * d))),
            (narrow(rows.clone()), narrow(random.values(n * d))),
            (positive(rows.clone()), positive(random.values(n * d))),
            // All cosines negative: a padding column's zero would win.
            (positive(rows.clone()), positive(random.values(n * d)).iter().map(|x| -x).collect()),
            (cone(&mut random, k, d, 0.3), cone(&mut random, n, d, 0.3)),
            (rows[..d].repeat(k), random.values(n * d)),
        ];
        for (rows, z) in cases {
            for metric in METRICS {
                assert_exact(&rows, d, metric, &z);
            }
        }
    }
}

#[test]
fn tokens_that_share_their_direction_with_the_codes_have_few_candidates_in_bf16() {
    let (mut random, d, k) = (Random(20), 64, 1000);
    let axis = random.values(d);
    for opening in [1.0, 0.1, 0.01, 0.001] {
        let mut around =
            |count: usize| (0..count * d).map(|i| axis[i % d] + opening * random.value()).collect::<Vec<_>>();
        let (rows, z) = (around(k), around(100));
        for metric in METRICS {
            assert_exact(&rows, d, metric, &z);
            let codebook = Codebook::screened(rows.clone(), d, metric, Isa::PORTABLE, Precision::Bf16).unwrap();
            let stats = codebook.nearest_with_stats(&z).unwrap().1;
            assert!(stats.fallback_rows == 0 && stats.candidates < 3 * stats.rows, "{metric:?} {opening}: {stats:?}");
        }
    }
}

#[test]
fn the_precision_follows_the_instructions_and_the_width() {
    for isa in Isa::tested() {
        let wide = if isa.has_bf16() { Precision::Bf16 } else { Precision::F32 };
        assert_eq!(Precision::for_width(1536, isa), wide);
        assert_eq!(Precision::for_width(4, isa), Precision::F32);
    }
    for (isa, precision) in screenings() {
        let codebook = Codebook::screened(vec![1.0; 8], 4, Metric::Cosine, isa, precision).unwrap();
        assert_eq!(codebook.screening(), Some((isa, precision)));
        let codebook = Codebook::screened(vec![3e38, -3e38], 1, Metric::Euclidean, isa, precision).unwrap();
        assert_eq!(codebook.screening(), None);
    }
}

#[test]
fn codes_one_ulp_apart_are_told_apart() {
    let mut random = Random(7);
    for d in [1, 3, 32, 250] {
        let base = random.values(d);
        let mut rows = Vec::new();
        for k in 0..200 {
            let mut row = base.clone();
            let at = k % d;
            row[at] = if k % 2 == 0 { row[at].next_up() } else { row[at].next_down() };
            rows.extend(row);
        }
        let z = [rows.clone(), random.values(20 * d)].concat();
        for metric in METRICS {
            assert_exact(&rows, d, metric, &z);
        }
    }
}

#[test]
fn near_ties_on_both_sides_of_the_bound_are_told_apart() {
    // The second code is the first plus t times a direction orthogonal to it, t from 2^-2 to 2^-30.
    let (mut random, d) = (Random(8), 64);
    for exponent in 2..=30 {
        let t = 2f32.powi(-exponent);
        let mut rows = random.values(600 * d);
        rows[..2 * d].fill(0.0);
        for i in 0..d / 2 {
            (rows[i], rows[d + i]) = (random.value() * 2.0, rows[i]);
            rows[d + i] = rows[i];
            rows[d + d / 2 + i] = t * random.value();
        }
        let z = [&rows[..2 * d], &random.values(20 * d)].concat();
        for metric in METRICS {
            assert_exact(&rows, d, metric, &z);
        }
    }
}

#[test]
fn a_cone_of_codes_is_exact_with_few_candidates() {
    let (mut random, d) = (Random(9), 64);
    let rows = cone(&mut random, 2000, d, 0.02);
    let z = [cone(&mut random, 40, d, 0.02), rows[..40 * d].to_vec()].concat();
    for metric in METRICS {
        let stats = assert_exact(&rows, d, metric, &z);
        assert_eq!(stats.fallback_rows, 0);
        assert!(stats.candidates < 4 * stats.rows, "{metric:?}: {stats:?}");
    }
}

#[test]
fn codes_too_close_to_screen_fall_back_and_stay_exact() {
    let (mut random, d) = (Random(10), 16);
    // Two opposite clusters: centring cannot shorten the codes, and each is narrower than the bound.
    let cluster = cone(&mut random, 1500, d, 1e-7);
    let rows = cluster.iter().enumerate().map(|(i, x)| if i / d % 2 == 0 { *x } else { -x }).collect::<Vec<_>>();
    let z = random.values(20 * d);
    for metric in METRICS {
        let stats = assert_exact(&rows, d, metric, &z);
        assert!(stats.fallback_rows > 0, "the test no longer reaches the fallback: {stats:?}");
    }
}

#[test]
fn codes_too_close_for_bf16_are_screened_again_in_f32() {
    let (mut random, d) = (Random(18), 32);
    // Two opposite clusters, narrower than the bound of bf16 and wider than that of f32.
    let cluster = cone(&mut random, 1500, d, 1e-3);
    let rows = cluster.iter().enumerate().map(|(i, x)| if i / d % 2 == 0 { *x } else { -x }).collect::<Vec<_>>();
    let z = random.values((MANY + 7) * d);
    for metric in METRICS {
        let expected = codebook(&rows, d, metric).nearest_reference(&z).unwrap();
        for isa in Isa::tested() {
            let codebook = Codebook::screened(rows.clone(), d, metric, isa, Precision::Bf16).unwrap();
            let few = codebook.nearest_with_stats(&z[..5 * d]).unwrap();
            assert_same_codes(&codebook, &z[..5 * d], &few.0, &expected[..5]);
            assert_eq!((few.1.rescreened_rows, few.1.fallback_rows), (0, 5), "{few:?}");
            let many = codebook.nearest_with_stats(&z).unwrap();
            assert_same_codes(&codebook, &z, &many.0, &expected);
            assert_eq!((many.1.rescreened_rows, many.1.fallback_rows), (MANY + 7, 0), "{many:?}");
            // The finer screen stays.
            assert_eq!(codebook.nearest_with_stats(&z[..5 * d]).unwrap().1.rescreened_rows, 5);
        }
    }
}

#[test]
fn magnitudes_across_the_whole_f32_range_agree_with_the_reference() {
    let (mut random, d) = (Random(11), 7);
    let scales = [1e-45, 1e-42, 1e-38, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e18, 1e20, 1e30, 1e37, 3e38];
    for code_scale in scales {
        let scale = |values: Vec<f32>, by: f32| values.iter().map(|x| x * by).collect::<Vec<_>>();
        let rows = scale(random.values(600 * d), code_scale);
        let z = scales.iter().flat_map(|by| scale(random.values(4 * d), *by)).collect::<Vec<_>>();
        for metric in METRICS {
            assert_exact(&rows, d, metric, &z);
        }
    }
}

#[test]
fn scores_that_overflow_f32_fall_back() {
    let stats = assert_exact(&[1e38, -1e38, -1e38, 1e38, 3e38, 1.0], 2, Metric::Euclidean, &[3e38, 3e38, 1.0, 0.0]);
    assert_eq!(stats.fallback_rows, 2);
    let stats = assert_exact(&[1.0, 0.0, -1.0, 0.0], 2, Metric::Cosine, &[3e38, 3e38, 1.0, 0.0]);
    assert_eq!(stats.fallback_rows, 1);
}

#[test]
fn codes_of_mixed_magnitude_in_one_tile_agree_with_the_reference() {
    let (mut random, d) = (Random(12), 9);
    let mut rows = random.values(1300 * d);
    for (k, row) in rows.chunks_exact_mut(d).enumerate() {
        let scale = 10f32.powi((k % 24) as i32 - 12);
        row.iter_mut().for_each(|x| *x *= scale);
    }
    let z = [random.values(30 * d), rows[..60 * d].to_vec()].concat();
    for metric in METRICS {
        assert_exact(&rows, d, metric, &z);
    }
}

#[test]
fn small_integers_tie_often_and_agree_with_the_reference() {
    let mut random = Random(13);
    for d in [1, 2, 3, 4] {
        let mut integers = |len| (0..len).map(|_| random.below(5) as f32 - 2.0).collect::<Vec<_>>();
        let (rows, z) = (integers(900 * d), integers(200 * d));
        for metric in METRICS {
            assert_exact(&rows, d, metric, &z);
        }
    }
}

#[test]
fn any_split_of_the_batch_gives_the_same_codes() {
    let (mut random, d, n) = (Random(14), 12, 301);
    let rows = cone(&mut random, 1500, d, 1e-3);
    let z = cone(&mut random, n, d, 1e-3);
    for metric in METRICS {
        let codebook = codebook(&rows, d, metric);
        let together = codebook.nearest(&z).unwrap();
        for size in [1, 2, 7, 8, 64, 100, 300] {
            let parts = z.chunks(size * d).flat_map(|z| codebook.nearest(z).unwrap()).collect::<Vec<_>>();
            assert_same_codes(&codebook, &z, &parts, &together);
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_codes() {
    let (mut random, d) = (Random(15), 12);
    let codebook = codebook(&cone(&mut random, 1500, d, 1e-3), d, Metric::Euclidean);
    let z = cone(&mut random, 999, d, 1e-3);
    let expected = codebook.nearest_reference(&z).unwrap();
    for threads in [1, 2, 4] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let got = pool.install(|| codebook.nearest(&z)).unwrap();
        assert_same_codes(&codebook, &z, &got, &expected);
    }
}

/// A random order of 0..len.
fn shuffled(random: &mut Random, len: usize) -> Vec<usize> {
    let mut order = (0..len).collect::<Vec<_>>();
    (1..len).rev().for_each(|i| order.swap(i, random.below(i + 1)));
    order
}

pub(super) fn reorder(rows: &[f32], d: usize, order: &[usize]) -> Vec<f32> {
    order.iter().flat_map(|&row| &rows[row * d..][..d]).copied().collect()
}

#[test]
fn permuting_tokens_permutes_their_codes() {
    let (mut random, d, n) = (Random(16), 10, 200);
    let codebook = codebook(&random.values(1100 * d), d, Metric::Cosine);
    let z = random.values(n * d);
    let order = shuffled(&mut random, n);
    let codes = codebook.nearest(&z).unwrap();
    let expected = order.iter().map(|&row| codes[row]).collect::<Vec<_>>();
    let z = reorder(&z, d, &order);
    assert_same_codes(&codebook, &z, &codebook.nearest(&z).unwrap(), &expected);
}

#[test]
fn permuting_codes_permutes_the_answers() {
    let (mut random, d, k) = (Random(17), 10, 1100);
    let (rows, z) = (random.values(k * d), random.values(200 * d));
    let order = shuffled(&mut random, k);
    for metric in METRICS {
        let expected = codebook(&rows, d, metric).nearest(&z).unwrap();
        let codes = codebook(&reorder(&rows, d, &order), d, metric).nearest(&z).unwrap();
        let back = codes.iter().map(|&code| order[code as usize] as u32).collect::<Vec<_>>();
        assert_eq!(back, expected, "{metric:?}");
    }
}
