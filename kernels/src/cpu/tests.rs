//! Every instruction set of this machine against sums in f64, and against the others.

use super::*;

/// Values in (−1, 1) from a linear congruential generator.
pub(super) fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn matrix<T: Element>(rows: usize, columns: usize, seed: u64) -> Matrix<T> {
    let mut matrix = Matrix::new(rows, columns);
    for (i, row) in values(rows * columns, seed).chunks_exact(columns).enumerate() {
        matrix.row_mut(i).iter_mut().zip(row).for_each(|(out, &x)| *out = T::narrow(x));
    }
    matrix
}

pub(super) fn rounded<T: Element>(x: f32) -> f64 {
    f64::from(T::narrow(x).widen())
}

/// Shapes with rows, widths and columns on and beside every edge of strips, tiles and panels.
const SHAPES: [(usize, usize, usize); 12] = [
    (1, 1, 1),
    (1, 2, 17),
    (5, 3, 16),
    (6, 31, 64),
    (7, 32, 65),
    (13, 33, 63),
    (16, 64, 32),
    (17, 511, 48),
    (33, 512, 33),
    (47, 513, 31),
    (97, 72, 129),
    (64, 1100, 20),
];

fn product<T: Element>(isa: Isa, (n, d, e): (usize, usize, usize)) -> Matrix<f32> {
    let weight = Packed::<T>::new(&values(e * d, 2), d, isa);
    let mut out = Matrix::new(n, e);
    linear(&matrix(n, d, 1), &weight, &values(e, 3), End::Wide(&mut out));
    out
}

fn products_are_near_their_real_sums<T: Element>() {
    for isa in Isa::tested() {
        for (n, d, e) in SHAPES {
            let (x, weight, bias) = (matrix::<T>(n, d, 1), values(e * d, 2), values(e, 3));
            let out = product::<T>(isa, (n, d, e));
            for i in 0..n {
                for j in 0..e {
                    let product = |k: usize| f64::from(x.row(i)[k].widen()) * rounded::<T>(weight[j * d + k]);
                    let real = (0..d).map(product).sum::<f64>() + f64::from(bias[j]);
                    let off = (f64::from(out.row(i)[j]) - real).abs();
                    // d roundings of sums that stay below d.
                    let bound = (d * (d + 1)) as f64 * 2f64.powi(-23);
                    assert!(off <= bound, "{} {n}×{d}×{e} at ({i}, {j}): off by {off:e}", isa.name());
                }
            }
        }
    }
}

#[test]
fn f32_products_are_near_their_real_sums() {
    products_are_near_their_real_sums::<f32>();
}

#[test]
fn bf16_products_are_near_their_real_sums() {
    products_are_near_their_real_sums::<Bf16>();
}

#[test]
fn sets_of_one_arithmetic_give_the_same_bits() {
    let pairs = || Isa::tested().into_iter().flat_map(|a| Isa::tested().into_iter().map(move |b| (a, b)));
    for shape in SHAPES {
        for (a, b) in pairs().filter(|(a, b)| a.arithmetic(false) == b.arithmetic(false)) {
            assert_eq!(product::<f32>(a, shape).to_vec(), product::<f32>(b, shape).to_vec(), "{a:?} {b:?} {shape:?}");
        }
        for (a, b) in pairs().filter(|(a, b)| a.arithmetic(true) == b.arithmetic(true)) {
            assert_eq!(product::<Bf16>(a, shape).to_vec(), product::<Bf16>(b, shape).to_vec(), "{a:?} {b:?} {shape:?}");
        }
    }
}

fn a_row_does_not_depend_on_the_others<T: Element>() {
    for isa in Isa::tested().into_iter().filter(|isa| *isa != Isa::PORTABLE) {
        let (n, d, e) = (101, 130, 77);
        let weight = Packed::<T>::new(&values(e * d, 2), d, isa);
        let run = |x: &Matrix<T>| {
            let mut out = Matrix::<f32>::new(x.rows(), e);
            linear(x, &weight, &values(e, 3), End::Wide(&mut out));
            out
        };
        let (all, x) = (run(&matrix(n, d, 1)), matrix::<T>(n, d, 1));
        for i in [0, 5, 6, 31, 32, 95, 96, 100] {
            let mut one = Matrix::new(1, d);
            one.row_mut(0).copy_from_slice(x.row(i));
            assert_eq!(run(&one).row(0), all.row(i), "{} row {i}", isa.name());
        }
    }
}

#[test]
fn a_row_of_a_product_does_not_depend_on_the_others() {
    a_row_does_not_depend_on_the_others::<f32>();
    a_row_does_not_depend_on_the_others::<Bf16>();
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let isa = Isa::detect().unwrap();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut out = Matrix::<Bf16>::new(200, 96);
            attention(&matrix(200, 288, 4), 3, Mask::None, isa, &mut out);
            (product::<Bf16>(isa, (200, 96, 300)).to_vec(), out.to_vec())
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn stacked_weights_are_one_weight() {
    let (d, weight) = (40, values(50 * 40, 2));
    let (upper, lower) = weight.split_at(33 * d);
    let isa = Isa::detect().unwrap();
    let run = |weight: &Packed<Bf16>| {
        let mut out = Matrix::<f32>::new(3, 50);
        linear(&matrix(3, d, 1), weight, &[0.5; 50], End::Wide(&mut out));
        out.to_vec()
    };
    assert_eq!(run(&Packed::stacked(&[upper, lower], d, isa)), run(&Packed::new(&weight, d, isa)));
}

#[test]
fn the_ends_of_a_linear_layer() {
    let isa = Isa::detect().unwrap();
    // One token [1, 2], two outputs: 1·3 + 2·4 + 0.5 = 11.5 and 1·(−1) + 2·0 + 1 = 0.
    let mut x = Matrix::<Bf16>::new(1, 2);
    x.row_mut(0).copy_from_slice(&[Bf16::narrow(1.0), Bf16::narrow(2.0)]);
    let weight = Packed::new(&[3.0, 4.0, -1.0, 0.0], 2, isa);
    let bias = [0.5, 1.0];
    let (mut wide, mut narrow) = (Matrix::<f32>::new(1, 2), Matrix::<Bf16>::new(1, 2));
    linear(&x, &weight, &bias, End::Wide(&mut wide));
    assert_eq!(wide.row(0), [11.5, 0.0]);
    linear(&x, &weight, &bias, End::Add(&mut wide));
    assert_eq!(wide.row(0), [23.0, 0.0]);
    linear(&x, &weight, &bias, End::Store(&mut narrow));
    assert_eq!(narrow.to_vec(), [11.5, 0.0]);
    linear(&x, &weight, &[0.5, 2.0], End::Gelu(&mut narrow));
    // GELU(11.5) = 11.5 and GELU(1) = 0.84119 in the tanh form; in bf16 the latter is 215/256.
    assert_eq!(narrow.to_vec(), [11.5, 0.839_843_75]);
}

fn attention_is_near_the_real_one<T: Element>(mask: Mask, tolerance: f64) {
    for isa in Isa::tested() {
        for (n, heads, width) in [(1, 1, 1), (5, 2, 4), (3, 5, 3), (17, 2, 24), (96, 1, 64), (130, 3, 72)] {
            let d = heads * width;
            let qkv = matrix::<T>(n, 3 * d, 9);
            let mut out = Matrix::<T>::new(n, d);
            attention(&qkv, heads, mask, isa, &mut out);
            let at = |i: usize, j: usize| f64::from(qkv.row(i)[j].widen());
            for head in 0..heads {
                for i in 0..n {
                    let score = |j: usize| {
                        let dot: f64 = (0..width).map(|c| at(i, head * width + c) * at(j, d + head * width + c)).sum();
                        (dot / (width as f64).sqrt()).exp()
                    };
                    let weights: Vec<f64> = (0..mask.seen(i, n)).map(score).collect();
                    let sum: f64 = weights.iter().sum();
                    for c in 0..width {
                        let value = |j: usize| weights[j] / sum * at(j, 2 * d + head * width + c);
                        let real: f64 = (0..weights.len()).map(value).sum();
                        let off = (f64::from(out.row(i)[head * width + c].widen()) - real).abs();
                        assert!(off < tolerance, "{} n {n} head {head} query {i}: off by {off:e}", isa.name());
                    }
                }
            }
        }
    }
}

#[test]
fn attention_is_softmax_weighted_values() {
    for mask in [Mask::None, Mask::Causal] {
        attention_is_near_the_real_one::<f32>(mask, 2e-6);
        attention_is_near_the_real_one::<Bf16>(mask, 6e-3);
    }
}

fn a_cache_gives_what_causal_attention_gives<T: Element>() {
    for isa in Isa::tested().into_iter().filter(|&isa| isa != Isa::PORTABLE) {
        for (n, heads, width) in [(1, 1, 1), (5, 2, 4), (33, 2, 24), (130, 3, 72)] {
            let d = heads * width;
            let qkv = matrix::<T>(n, 3 * d, 11);
            let mut whole = Matrix::<T>::new(n, d);
            attention(&qkv, heads, Mask::Causal, isa, &mut whole);
            let mut cache = Cache::new(heads, width, n + 3, isa);
            let mut out = vec![T::default(); d];
            for i in 0..n {
                cache.attend(&qkv, i, &mut out);
                assert_eq!(out, whole.row(i), "{} n {n} heads {heads} token {i}", isa.name());
            }
            assert_eq!(cache.len(), n);
        }
    }
}

#[test]
fn a_cache_gives_every_token_the_bits_that_causal_attention_gives_it() {
    a_cache_gives_what_causal_attention_gives::<f32>();
    a_cache_gives_what_causal_attention_gives::<Bf16>();
}

#[test]
fn scores_far_apart_neither_overflow_nor_vanish() {
    let isa = Isa::detect().unwrap();
    let mut qkv = Matrix::<f32>::new(2, 3);
    qkv.row_mut(0).copy_from_slice(&[1e4, 1e4, 1.0]);
    qkv.row_mut(1).copy_from_slice(&[-1e4, -1e4, 3.0]);
    let mut out = Matrix::new(2, 1);
    attention(&qkv, 1, Mask::None, isa, &mut out);
    assert_eq!(out.to_vec(), [1.0, 3.0]);
}

#[test]
fn a_layer_norm_by_hand() {
    // Mean 2, variance 2/3.
    let mut x = Matrix::new(1, 3);
    x.row_mut(0).copy_from_slice(&[1.0, 2.0, 3.0]);
    let mut out = Matrix::<f32>::new(1, 3);
    layer_norm(&x, &[1.0, 2.0, 1.0], &[0.0, 5.0, 1.0], 0.0, &mut out);
    let unit = 1.5f32.sqrt();
    for (got, expected) in out.row(0).iter().zip([-unit, 5.0, 1.0 + unit]) {
        assert!((got - expected).abs() < 1e-6, "{got} {expected}");
    }
}

/// The arithmetic named "fma": one fused product after the other, the bias last.
fn fused_products_are_one_chain<T: Element>(bf16: bool) {
    for isa in Isa::tested().into_iter().filter(|isa| isa.arithmetic(bf16) == "fma") {
        for (n, d, e) in SHAPES {
            let (x, weight, bias) = (matrix::<T>(n, d, 1), values(e * d, 2), values(e, 3));
            let out = product::<T>(isa, (n, d, e));
            for i in 0..n {
                for j in 0..e {
                    let fuse = |sum, k: usize| x.row(i)[k].widen().mul_add(T::narrow(weight[j * d + k]).widen(), sum);
                    let chain = (0..d).fold(0f32, fuse) + bias[j];
                    assert_eq!(out.row(i)[j].to_bits(), chain.to_bits(), "{} {n}×{d}×{e} at ({i}, {j})", isa.name());
                }
            }
        }
    }
}

#[test]
fn fused_f32_products_are_one_chain() {
    fused_products_are_one_chain::<f32>(false);
}

#[test]
fn fused_bf16_products_are_one_chain() {
    fused_products_are_one_chain::<Bf16>(true);
}
