//! Every fused op against its plain sibling in f64: values and gradients, in shapes that fill no block evenly.

use candle_core::{Result, Var};
use vqrae::ops::{self, Mask, Precision, Window, composed};
use vqrae::{DType, Tensor};

use crate::compare::{PARITY, Tolerance, assert_close, assert_same_bits, noise, say};

const CLOSE: Tolerance = Tolerance { relative: 1e-5, absolute: 1e-6 };

/// Runs `fused` in f32 and `plain` in f64 on the same inputs; compares the outputs and the gradient of every input.
fn assert_siblings(
    what: &str,
    inputs: &[(&str, Tensor)],
    fused: impl Fn(&[Tensor]) -> Result<Tensor>,
    plain: impl Fn(&[Tensor]) -> Result<Tensor>,
) {
    let run = |op: &dyn Fn(&[Tensor]) -> Result<Tensor>, dtype: DType| -> Result<(Tensor, Vec<Tensor>)> {
        let vars = inputs.iter().map(|(_, x)| Var::from_tensor(x)).collect::<Result<Vec<_>>>()?;
        let cast = vars.iter().map(|x| x.to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
        let out = op(&cast)?;
        let upstream = noise("upstream", out.dims()).to_dtype(dtype)?;
        let grads = (&out * &upstream)?.sum_all()?.backward()?;
        let of = |var: &Var| grads.get(var).cloned().unwrap_or_else(|| panic!("{what}: an input has no gradient"));
        Ok((out, vars.iter().map(of).collect()))
    };
    let (out, grads) = run(&fused, DType::F32).unwrap();
    let (expected, expected_grads) = run(&plain, DType::F64).unwrap();
    let mut worst = assert_close(&format!("{what}: output"), &out, &expected, CLOSE);
    for (((name, _), grad), expected) in inputs.iter().zip(&grads).zip(&expected_grads) {
        worst = worst.max(assert_close(&format!("{what}: gradient of {name}"), grad, expected, CLOSE));
    }
    say(&format!("{what}: {worst:.1e}"));
}

#[test]
fn linear_equals_its_plain_sibling() {
    for (shape, e) in
        [(vec![1, 1, 1], 1), (vec![2, 7, 5], 3), (vec![3, 65, 72], 33), (vec![1, 300, 17], 130), (vec![70, 9], 4)]
    {
        let d = *shape.last().unwrap();
        let inputs = [("x", noise("x", &shape)), ("weight", noise("w", &[e, d])), ("bias", noise("b", &[e]))];
        assert_siblings(
            &format!("linear {shape:?} to {e}"),
            &inputs,
            |x| ops::linear(Precision::F32, &x[0], &x[1], &x[2]),
            |x| composed::linear(Precision::F32, &x[0], &x[1], &x[2]),
        );
    }
}

#[test]
fn linear_takes_a_transposed_input() {
    let inputs = [("x", noise("x", &[2, 5, 67])), ("weight", noise("w", &[3, 5])), ("bias", noise("b", &[3]))];
    assert_siblings(
        "linear of a transposed input",
        &inputs,
        |x| ops::linear(Precision::F32, &x[0].transpose(1, 2)?, &x[1], &x[2]),
        |x| composed::linear(Precision::F32, &x[0].transpose(1, 2)?, &x[1], &x[2]),
    );
}

#[test]
fn conv2d_equals_its_plain_sibling() {
    // x, weight, stride, padding: one and several pieces, one and several blocks of channels, every way back.
    for (x, weight, stride, padding) in [
        ([1, 1, 1, 1], [1, 1, 1, 1], 1, 0),
        ([2, 3, 7, 9], [5, 3, 3, 3], 1, 1),
        ([2, 60, 40, 30], [6, 60, 3, 3], 1, 1),
        ([1, 2, 6, 5], [3, 2, 5, 5], 1, 2),
        ([2, 7, 30, 31], [4, 7, 1, 1], 1, 0),
        ([1, 3, 6, 6], [2, 3, 1, 1], 1, 1),
        ([2, 3, 35, 35], [5, 3, 11, 11], 4, 2),
        ([2, 5, 12, 12], [6, 5, 4, 4], 4, 0),
        ([1, 4, 9, 9], [3, 4, 2, 2], 2, 0),
        ([1, 3, 8, 8], [2, 3, 4, 4], 2, 1),
        ([1, 2, 3, 600], [2, 2, 3, 3], 1, 1),
    ] {
        let inputs = [("x", noise("x", &x)), ("weight", noise("w", &weight)), ("bias", noise("b", &weight[..1]))];
        let window = Window { stride, padding };
        assert_siblings(
            &format!("conv2d {x:?} by {weight:?}, {window:?}"),
            &inputs,
            |x| ops::conv2d(&x[0], &x[1], Some(&x[2]), window),
            |x| composed::conv2d(&x[0], &x[1], Some(&x[2]), window),
        );
    }
}

#[test]
fn conv2d_relu_equals_its_plain_sibling() {
    let window = Window { stride: 1, padding: 1 };
    assert_siblings(
        "conv2d_relu",
        &[("x", noise("x", &[2, 3, 12, 9])), ("weight", noise("w", &[5, 3, 3, 3])), ("bias", noise("b", &[5]))],
        |x| ops::conv2d_relu(&x[0], &x[1], Some(&x[2]), window),
        |x| composed::conv2d(&x[0], &x[1], Some(&x[2]), window)?.relu(),
    );
}

#[test]
fn depthwise_conv2d_equals_its_plain_sibling() {
    for (x, kernel, stride, padding) in
        [([2, 5, 9, 11], 7, 1, 3), ([1, 3, 3, 2], 7, 1, 3), ([2, 4, 17, 17], 4, 2, 1), ([1, 2, 40, 40], 3, 1, 0)]
    {
        let weight = noise("w", &[x[1], 1, kernel, kernel]);
        let window = Window { stride, padding };
        assert_siblings(
            &format!("depthwise_conv2d {x:?} by {kernel}, {window:?}"),
            &[("x", noise("x", &x)), ("weight", weight), ("bias", noise("b", &x[1..2]))],
            |x| ops::depthwise_conv2d(&x[0], &x[1], Some(&x[2]), window),
            |x| composed::depthwise_conv2d(&x[0], &x[1], Some(&x[2]), window),
        );
    }
}

#[test]
fn unit_distance_equals_its_plain_sibling() {
    const EPS: f64 = 1e-10;
    let weight = noise("w", &[5]).abs().unwrap();
    for shape in [[1, 5, 1, 1], [2, 5, 7, 9], [2, 5, 40, 53]] {
        assert_siblings(
            &format!("unit_distance {shape:?}"),
            &[("x", noise("x", &shape)), ("y", noise("y", &shape))],
            |x| ops::unit_distance(&x[0], &x[1], &weight, EPS),
            |x| composed::unit_distance(&x[0], &x[1], &weight.to_dtype(x[0].dtype())?, EPS),
        );
    }
}

#[test]
fn a_pixel_of_zeros_has_no_gradient_rather_than_not_a_number() {
    let (weight, y) = (noise("w", &[3]).abs().unwrap(), noise("y", &[1, 3, 2, 2]));
    for op in [ops::unit_distance, composed::unit_distance] {
        let x = Var::zeros((1, 3, 2, 2), DType::F32, &vqrae::Device::Cpu).unwrap();
        let grads = op(&x, &x, &weight, 1e-10).unwrap().backward().unwrap();
        assert_same_bits("gradient", grads.get(&x).unwrap(), &x.zeros_like().unwrap());
        let grads = op(&x, &y, &weight, 1e-10).unwrap().backward().unwrap();
        assert_same_bits("gradient", grads.get(&x).unwrap(), &x.zeros_like().unwrap());
    }
}

#[test]
fn conv2d_gives_an_image_the_same_bits_alone_and_in_a_batch() {
    let (x, weight) = (noise("x", &[3, 20, 33, 29]), noise("w", &[9, 20, 3, 3]));
    for (stride, padding) in [(1, 1), (2, 1)] {
        let run = |x: &Tensor| {
            let x = Var::from_tensor(x).unwrap();
            let out = ops::conv2d(&x, &weight, None, Window { stride, padding }).unwrap();
            let grads = out.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            (out, grads.get(&x).unwrap().clone())
        };
        let (out, grad) = run(&x);
        for i in 0..3 {
            let (alone, alone_grad) = run(&x.narrow(0, i, 1).unwrap());
            assert_same_bits("output", &out.narrow(0, i, 1).unwrap(), &alone);
            assert_same_bits("gradient", &grad.narrow(0, i, 1).unwrap(), &alone_grad);
        }
    }
}

#[test]
fn max_pool2d_equals_its_plain_sibling() {
    for (shape, kernel, stride) in
        [([1, 1, 1, 1], 1, 1), ([2, 3, 8, 6], 2, 2), ([2, 3, 9, 7], 2, 2), ([1, 2, 13, 12], 3, 2), ([1, 2, 5, 5], 3, 1)]
    {
        assert_siblings(
            &format!("max_pool2d {shape:?}, {kernel} pixels at a stride of {stride}"),
            &[("x", noise("x", &shape))],
            |x| ops::max_pool2d(&x[0], kernel, stride),
            |x| composed::max_pool2d(&x[0], kernel, stride),
        );
    }
}

#[test]
fn layer_norm_equals_its_plain_sibling() {
    const EPS: f64 = 1e-6;
    for shape in [[1, 1, 3], [2, 7, 5], [1, 130, 33], [3, 65, 72]] {
        let d = shape[2];
        let offset = (noise("x", &shape) + 3.0).unwrap();
        let inputs = [("x", offset), ("weight", noise("w", &[d])), ("bias", noise("b", &[d]))];
        assert_siblings(
            &format!("layer_norm {shape:?}"),
            &inputs,
            |x| ops::layer_norm(&x[0], &x[1], &x[2], EPS),
            |x| composed::layer_norm(&x[0], &x[1], &x[2], EPS),
        );
    }
}

#[test]
fn gelu_equals_its_plain_sibling() {
    const MORE_THAN_TWO_PIECES: usize = 2 * 16_384 + 5;
    for (shape, spread) in [(vec![1], 1.0), (vec![3, 7, 5], 1.0), (vec![MORE_THAN_TWO_PIECES], 6.0)] {
        let inputs = [("x", (noise("x", &shape) * spread).unwrap())];
        assert_siblings(&format!("gelu {shape:?}"), &inputs, |x| ops::gelu(&x[0]), |x| composed::gelu(&x[0]));
    }
}

#[test]
fn gelu_erf_equals_its_plain_sibling() {
    let inputs = [("x", (noise("x", &[3, 7, 500]) * 2.0).unwrap())];
    assert_siblings("gelu_erf", &inputs, |x| ops::gelu_erf(&x[0]), |x| x[0].gelu_erf());
}

#[test]
fn gelu_is_zero_or_its_input_far_from_zero() {
    let x = Tensor::new(&[-1e4f32, -30., 0., 30., 1e4], &vqrae::Device::Cpu).unwrap();
    let expected = Tensor::new(&[0f32, 0., 0., 30., 1e4], &vqrae::Device::Cpu).unwrap();
    let nearly_nothing = Tolerance { relative: 0.0, absolute: 1e-30 };
    assert_close("gelu", &ops::gelu(&x).unwrap(), &expected, nearly_nothing);
}

#[test]
fn attention_equals_its_plain_sibling() {
    // One query block holds 128: 300 tokens make three, the last one partial.
    for (n, heads, head_width) in
        [(1, 2, 8), (5, 1, 3), (63, 3, 8), (65, 2, 72), (128, 1, 8), (130, 2, 72), (300, 3, 8), (300, 1, 72)]
    {
        let shape = [2, n, heads * head_width];
        let inputs = ["q", "k", "v"].map(|name| (name, noise(name, &shape)));
        for mask in [Mask::None, Mask::Causal] {
            assert_siblings(
                &format!("attention of {n} tokens, {heads} heads of {head_width}, {mask:?}"),
                &inputs,
                |x| ops::attention(Precision::F32, mask, &x[0], &x[1], &x[2], heads),
                |x| composed::attention(Precision::F32, mask, &x[0], &x[1], &x[2], heads),
            );
        }
    }
}

#[test]
fn linear_cross_entropy_equals_its_plain_sibling() {
    // A piece holds 512 tokens: 530 make two. Weights are those of a loss, and some are zero.
    for (m, e, k) in [(1, 1, 1), (3, 5, 7), (40, 12, 33), (530, 8, 50)] {
        let inputs = [("x", noise("x", &[m, e])), ("codes", noise("codes", &[k, e])), ("bias", noise("bias", &[k]))];
        let targets: Vec<u32> = (0..m).map(|i| (i * 7 % k) as u32).collect();
        let weights: Vec<f32> = (0..m).map(|i| (i % 3) as f32 / m as f32).collect();
        assert_siblings(
            &format!("cross-entropy of {m} tokens, {k} codes of {e}"),
            &inputs,
            |x| ops::linear_cross_entropy(Precision::F32, &x[0], &x[1], &x[2], &targets, &weights),
            |x| composed::linear_cross_entropy(Precision::F32, &x[0], &x[1], &x[2], &targets, &weights),
        );
    }
}

#[test]
fn cross_entropy_by_hand() {
    // Scores ln 1 and ln 3: probabilities 1/4 and 3/4.
    let (x, codes) = (Tensor::ones((1, 1), DType::F32, &vqrae::Device::Cpu).unwrap(), noise("codes", &[2, 1]));
    let bias = (Tensor::new(&[0f32, 3f32.ln()], x.device()).unwrap() - codes.squeeze(1).unwrap()).unwrap();
    for (target, expected) in [(0, 4f32.ln()), (1, (4f32 / 3.0).ln())] {
        let loss = ops::linear_cross_entropy(Precision::F32, &x, &codes, &bias, &[target], &[2.0]).unwrap();
        let off = (loss.to_scalar::<f32>().unwrap() - 2.0 * expected).abs();
        assert!(off < 1e-6, "{off:e}");
    }
}

#[test]
fn attention_survives_scores_that_overflow_exp() {
    // q·(k + c) = q·k + q·c: every score of a query is hundreds off zero, and the weights are as before.
    let [q, k, v] = ["q", "k", "v"].map(|name| noise(name, &[1, 9, 8]));
    let far = (&k + 300.0).unwrap();
    let got = ops::attention(Precision::F32, Mask::None, &q, &far, &v, 1).unwrap();
    let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
    let expected = composed::attention(Precision::F32, Mask::None, &wide(&q), &wide(&far), &wide(&v), 1).unwrap();
    let worst = assert_close("attention with large scores", &got, &expected, PARITY);
    say(&format!("attention with scores of hundreds: {worst:.1e}"));
}

#[test]
fn ops_refuse_shapes_that_do_not_fit() {
    let x = noise("x", &[2, 4, 6]);
    let image = noise("image", &[1, 3, 5, 5]);
    let refused = [
        ops::linear(Precision::F32, &x, &noise("w", &[3, 5]), &noise("b", &[3])),
        ops::linear(Precision::F32, &x, &noise("w", &[3, 6]), &noise("b", &[4])),
        ops::layer_norm(&x, &noise("w", &[5]), &noise("b", &[5]), 1e-6),
        ops::layer_norm(&x, &noise("w", &[6]), &noise("b", &[5]), 1e-6),
        ops::attention(Precision::F32, Mask::None, &x, &x, &x, 4),
        ops::attention(Precision::F32, Mask::None, &x, &x, &x, 0),
        ops::attention(Precision::F32, Mask::None, &x, &noise("k", &[2, 5, 6]), &x, 2),
        ops::conv2d(&image, &noise("w", &[2, 4, 3, 3]), None, Window::default()),
        ops::conv2d(&image, &noise("w", &[2, 3, 6, 6]), None, Window::default()),
        ops::conv2d(&image, &noise("w", &[2, 3, 3, 3]), Some(&noise("b", &[3])), Window::default()),
        ops::conv2d(&image, &noise("w", &[2, 3, 3, 3]), None, Window { stride: 0, padding: 1 }),
        ops::depthwise_conv2d(&image, &noise("w", &[2, 1, 3, 3]), None, Window::default()),
        ops::depthwise_conv2d(&image, &noise("w", &[3, 3, 3, 3]), None, Window::default()),
        ops::unit_distance(&image, &noise("y", &[1, 3, 5, 4]), &noise("w", &[3]), 1e-10),
        ops::unit_distance(&image, &image, &noise("w", &[4]), 1e-10),
        ops::linear_cross_entropy(
            Precision::F32,
            &noise("x", &[2, 3]),
            &noise("c", &[4, 3]),
            &noise("b", &[4]),
            &[1, 4],
            &[1.0; 2],
        ),
        ops::linear_cross_entropy(
            Precision::F32,
            &noise("x", &[2, 3]),
            &noise("c", &[4, 2]),
            &noise("b", &[4]),
            &[1, 0],
            &[1.0; 2],
        ),
        ops::linear_cross_entropy(
            Precision::F32,
            &noise("x", &[2, 3]),
            &noise("c", &[4, 3]),
            &noise("b", &[4]),
            &[1],
            &[1.0; 2],
        ),
        ops::max_pool2d(&image, 6, 1),
        ops::max_pool2d(&image, 0, 1),
        ops::max_pool2d(&image, 2, 0),
    ];
    for (i, result) in refused.into_iter().enumerate() {
        assert!(result.is_err(), "case {i} was accepted");
    }
}

/// bf16 has 8 bits of mantissa, so a product of n numbers is off by about 2⁻⁸ of its terms, and not by more.
#[test]
fn products_of_bf16_are_rounded_products() {
    const ROUNDED: Tolerance = Tolerance { relative: 1.5e-2, absolute: 1e-6 };
    let run = |precision: Precision, op: &dyn Fn(Precision, &[Tensor]) -> Result<Tensor>, inputs: &[Tensor]| {
        let vars = inputs.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>().unwrap();
        let tensors: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let out = op(precision, &tensors).unwrap();
        let upstream = noise("upstream", out.dims());
        let grads = (&out * &upstream).unwrap().sum_all().unwrap().backward().unwrap();
        let of = |var: &Var| grads.get(var).unwrap().clone();
        std::iter::once(out).chain(vars.iter().map(of)).collect::<Vec<_>>()
    };
    let linear = |precision, x: &[Tensor]| ops::linear(precision, &x[0], &x[1], &x[2]);
    let attention = |precision, x: &[Tensor]| ops::attention(precision, Mask::None, &x[0], &x[1], &x[2], 3);
    let inputs = [noise("x", &[2, 65, 72]), noise("w", &[33, 72]), noise("b", &[33])];
    let tokens = ["q", "k", "v"].map(|name| noise(name, &[2, 150, 72]));
    for (what, op, inputs) in [
        ("linear", &linear as &dyn Fn(Precision, &[Tensor]) -> Result<Tensor>, &inputs),
        ("attention", &attention, &tokens),
    ] {
        let (rounded, exact) = (run(Precision::Bf16, op, inputs), run(Precision::F32, op, inputs));
        for (i, (rounded, exact)) in rounded.iter().zip(&exact).enumerate() {
            let off = assert_close(&format!("{what} in bf16, {i}"), rounded, exact, ROUNDED);
            let is_sum_of_rows = what == "linear" && i == 3;
            assert_eq!(off > 1e-5, !is_sum_of_rows, "{what}, {i}: {off:e}, and bf16 rounds to 4e-3");
        }
    }
    // The plain sibling, which other devices run, rounds the same numbers.
    let plain = |precision, x: &[Tensor]| composed::linear(precision, &x[0], &x[1], &x[2]);
    let (ours, plain) = (run(Precision::Bf16, &linear, &inputs), run(Precision::Bf16, &plain, &inputs));
    // Its result is bf16 too, the ends of a sum in f32 are not.
    assert_close(
        "linear in bf16 beside its plain sibling",
        &ours[0],
        &plain[0],
        Tolerance { relative: 4e-3, absolute: 0.0 },
    );
}
