use half::{bf16, f16};

use super::*;
use crate::cuda::reference::{Rounded, assert_near, down, up, values};
use crate::cuda::test_gpu;

/// One query of one head in binary64, with what roundings may change: of scores in f32, of weights and of the output in T.
fn query<T: Rounded>(q: &[T], keys: &[&[T]], values: &[&[T]]) -> Vec<(f64, f64)> {
    let scale = 1.0 / (q.len() as f64).sqrt();
    let dot = |k: &[T], f: fn(f64) -> f64| q.iter().zip(k).map(|(q, k)| f(q.wide() * k.wide())).sum::<f64>() * scale;
    let scores: Vec<f64> = keys.iter().map(|k| dot(k, |x| x)).collect();
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let size = keys.iter().map(|k| dot(k, f64::abs)).fold(0.0, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
    let total: f64 = weights.iter().sum();
    let of_scores = (q.len() + 4) as f64 * size / f64::from(1 << 22);
    let of_sums = (keys.len() + 16) as f64 / f64::from(1 << 23);
    (0..q.len())
        .map(|i| {
            let sum = |f: fn(f64) -> f64| {
                weights.iter().zip(values).map(|(weight, v)| weight / total * f(v[i].wide())).sum::<f64>()
            };
            let (value, sizes) = (sum(|x| x), sum(f64::abs));
            // A weight that T has no digits for is off by TINY.
            let lost: f64 = values.iter().map(|v| T::TINY * v[i].wide().abs()).sum();
            (value, T::HALF * value.abs() + (T::HALF + 2.0 * of_scores + of_sums) * sizes + lost + T::TINY)
        })
        .collect()
}

/// All of attention from fused rows `[B, N, 3·heads·H]`.
fn expected<T: Rounded>(qkv: &[T], images: usize, tokens: usize, heads: usize, width: usize) -> Vec<(f64, f64)> {
    let d = heads * width;
    let mut out = vec![(0.0, 0.0); images * tokens * d];
    for (image, head) in (0..images).flat_map(|image| (0..heads).map(move |head| (image, head))) {
        let at = |part: usize, n: usize| {
            let start = (image * tokens + n) * 3 * d + part * d + head * width;
            &qkv[start..start + width]
        };
        let keys: Vec<_> = (0..tokens).map(|n| at(1, n)).collect();
        let values: Vec<_> = (0..tokens).map(|n| at(2, n)).collect();
        for n in 0..tokens {
            let start = (image * tokens + n) * d + head * width;
            out[start..start + width].copy_from_slice(&query(at(0, n), &keys, &values));
        }
    }
    out
}

fn every_shape<T: Half + Rounded>() {
    let Some(gpu) = test_gpu() else { return };
    for (images, tokens, heads, width) in [
        (2, 17, 3, 64),
        (1, 1, 1, 72),
        (1, 257, 2, 72),
        (2, 130, 1, 80),
        (1, 64, 2, 32),
        (3, 33, 1, 48),
        (1, 65, 1, 96),
        (1, 129, 2, 128),
        (1, 729, 1, 72),
        (1, 1024, 1, 64),
        (2, 256, 2, 64),
        (1, 96, 2, 80),
    ] {
        let qkv: Vec<T> = values(tokens as u64, images * tokens * 3 * heads * width, 1.0);
        let out = fused_attention(&gpu, &up(&gpu, &qkv).as_view(), images, tokens, heads, width).unwrap();
        let expected = expected(&qkv, images, tokens, heads, width);
        let what = format!("{:?}, B {images}, N {tokens}, {heads} heads of {width}", T::KIND);
        assert_near(&what, &down(&gpu, &out), &expected);
    }
}

#[test]
fn f16_is_as_near_binary64_as_its_roundings_allow() {
    every_shape::<f16>();
}

#[test]
fn bf16_is_as_near_binary64_as_its_roundings_allow() {
    every_shape::<bf16>();
}

#[test]
fn one_query_may_see_another_number_of_keys_in_rows_of_their_own() {
    let Some(gpu) = test_gpu() else { return };
    let (images, keys, heads, width) = (3, 200, 2, 72);
    let d = heads * width;
    let q: Vec<bf16> = values(1, images * d, 1.0);
    let kv: Vec<bf16> = values(2, images * keys * 2 * d, 1.0);
    let (q_up, kv_up) = (up(&gpu, &q), up(&gpu, &kv));
    let (q_rows, kv_rows) = (Strides { image: d, token: d }, Strides { image: keys * 2 * d, token: 2 * d });
    let sizes = Sizes { images, queries: 1, keys, heads, width };
    let out = attention(&gpu, &q_up.as_view(), &kv_up.as_view(), &kv_up.slice(d..), q_rows, kv_rows, sizes).unwrap();
    let mut expected = Vec::new();
    for (image, head) in (0..images).flat_map(|image| (0..heads).map(move |head| (image, head))) {
        let at = |part: usize, n: usize| {
            let start = (image * keys + n) * 2 * d + part * d + head * width;
            &kv[start..start + width]
        };
        let start = image * d + head * width;
        let [k, v] = [0, 1].map(|part| (0..keys).map(|n| at(part, n)).collect::<Vec<_>>());
        expected.extend(query(&q[start..start + width], &k, &v));
    }
    assert_near("pooling", &down(&gpu, &out), &expected);
}

/// Scores of ±10⁴ make one weight of 1 of each row; nothing overflows.
fn large_scores<T: Half + Rounded>() {
    let Some(gpu) = test_gpu() else { return };
    let (tokens, width) = (150, 64);
    let mut qkv: Vec<T> = values(5, tokens * 3 * width, 100.0);
    for (i, value) in qkv.iter_mut().enumerate().filter(|(i, _)| i % (3 * width) >= 2 * width) {
        *value = T::round((i % 97) as f64 - 40.0);
    }
    let out = down(&gpu, &fused_attention(&gpu, &up(&gpu, &qkv).as_view(), 1, tokens, 1, width).unwrap());
    let part = |part: usize, n: usize| &qkv[(3 * n + part) * width..][..width];
    let mut met = 0;
    for n in 0..tokens {
        let score = |k: usize| part(0, n).iter().zip(part(1, k)).map(|(q, k)| q.wide() * k.wide()).sum::<f64>() / 8.0;
        let mut scores: Vec<_> = (0..tokens).map(|k| (score(k), k)).collect();
        scores.sort_by(|a, b| b.0.total_cmp(&a.0));
        assert!(scores[0].0 > 1e4, "the test's scores are large");
        let got = &out[n * width..][..width];
        assert!(got.iter().all(|x| x.wide().is_finite()), "query {n}: {got:?}");
        if scores[0].0 - scores[1].0 > 50.0 {
            let of = |v: &T| (v.wide(), 2.01 * T::HALF * v.wide().abs() + 1e-12);
            assert_near("the one key", got, &part(2, scores[0].1).iter().map(of).collect::<Vec<_>>());
            met += 1;
        }
    }
    assert!(met > tokens / 2, "{met} queries have one key");
}

#[test]
fn large_scores_overflow_nothing() {
    large_scores::<f16>();
    large_scores::<bf16>();
}

#[test]
fn equal_keys_give_the_mean_of_all_values() {
    let Some(gpu) = test_gpu() else { return };
    let (tokens, width) = (77, 80);
    let mut qkv: Vec<f16> = values(6, tokens * 3 * width, 1.0);
    for n in 1..tokens {
        qkv.copy_within(width..2 * width, (3 * n + 1) * width);
    }
    let mean = |i: usize| (0..tokens).map(|n| qkv[(3 * n + 2) * width + i].to_f64()).sum::<f64>() / tokens as f64;
    let expected: Vec<_> = (0..tokens * width).map(|i| (mean(i % width), 2e-3)).collect();
    let out = fused_attention(&gpu, &up(&gpu, &qkv).as_view(), 1, tokens, 1, width).unwrap();
    assert_near("mean", &down(&gpu, &out), &expected);
}

#[test]
fn an_image_has_the_same_bits_alone_and_in_a_batch_beside_one_that_is_no_number() {
    let Some(gpu) = test_gpu() else { return };
    for (tokens, heads, width) in [(50, 2, 72), (70, 1, 64)] {
        let alone: Vec<bf16> = values(7, tokens * 3 * heads * width, 2.0);
        let bad = vec![bf16::NAN; alone.len()];
        let batch = [&bad[..], &alone, &bad].concat();
        let one = down(&gpu, &fused_attention(&gpu, &up(&gpu, &alone).as_view(), 1, tokens, heads, width).unwrap());
        let all = down(&gpu, &fused_attention(&gpu, &up(&gpu, &batch).as_view(), 3, tokens, heads, width).unwrap());
        assert!(all[one.len()..2 * one.len()] == one[..], "{tokens} tokens of {width}");
        assert!(all[..one.len()].iter().all(|x| x.is_nan()));
    }
}

#[test]
fn what_does_not_fit_is_refused_with_its_numbers() {
    let Some(gpu) = test_gpu() else { return };
    let array = up(&gpu, &vec![bf16::ZERO; 10 * 64]);
    let sizes = Sizes { images: 1, queries: 10, keys: 10, heads: 1, width: 64 };
    let rows = Strides { image: 640, token: 64 };
    let (view, short) = (array.as_view(), array.slice(..639));
    let message = |q, q_rows, sizes| attention(&gpu, q, &view, &view, q_rows, rows, sizes).unwrap_err().to_string();
    assert!(message(&view, rows, Sizes { width: 65, ..sizes }).contains("got: 65"));
    assert!(message(&view, rows, Sizes { queries: 0, ..sizes }).contains("queries: 0"));
    assert!(message(&short, rows, sizes).contains("got: 639"));
    assert!(message(&view, Strides { token: 60, ..rows }, sizes).contains("token: 60"));
    assert!(message(&view, Strides { token: usize::MAX, ..rows }, sizes).contains("values of q"));
    assert!(message(&view, rows, Sizes { images: usize::MAX, ..sizes }).contains("values of q"));
    assert!(message(&array.slice(4..), Strides { token: 56, ..rows }, sizes).contains("16-byte"));
    assert!(fused_attention(&gpu, &view, 1, 10, 1, 64).unwrap_err().to_string().contains("got: 640"));
    assert!(serves(72) && !serves(40));
}
