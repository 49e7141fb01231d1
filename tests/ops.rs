//! Every fused op against its plain sibling in f64: values and gradients, in shapes that fill no block evenly.

use candle_core::{Result, Var};
use vqrae::ops::{self, composed};
use vqrae::{DType, Tensor};

use crate::compare::{PARITY, Tolerance, assert_close, noise, say};

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
            |x| ops::linear(&x[0], &x[1], &x[2]),
            |x| composed::linear(&x[0], &x[1], &x[2]),
        );
    }
}

#[test]
fn linear_takes_a_transposed_input() {
    let inputs = [("x", noise("x", &[2, 5, 67])), ("weight", noise("w", &[3, 5])), ("bias", noise("b", &[3]))];
    assert_siblings(
        "linear of a transposed input",
        &inputs,
        |x| ops::linear(&x[0].transpose(1, 2)?, &x[1], &x[2]),
        |x| composed::linear(&x[0].transpose(1, 2)?, &x[1], &x[2]),
    );
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
        assert_siblings(
            &format!("attention of {n} tokens, {heads} heads of {head_width}"),
            &inputs,
            |x| ops::attention(&x[0], &x[1], &x[2], heads),
            |x| composed::attention(&x[0], &x[1], &x[2], heads),
        );
    }
}

#[test]
fn attention_survives_scores_that_overflow_exp() {
    // q·(k + c) = q·k + q·c: every score of a query is hundreds off zero, and the weights are as before.
    let [q, k, v] = ["q", "k", "v"].map(|name| noise(name, &[1, 9, 8]));
    let far = (&k + 300.0).unwrap();
    let got = ops::attention(&q, &far, &v, 1).unwrap();
    let wide = |x: &Tensor| x.to_dtype(DType::F64).unwrap();
    let expected = composed::attention(&wide(&q), &wide(&far), &wide(&v), 1).unwrap();
    let worst = assert_close("attention with large scores", &got, &expected, PARITY);
    say(&format!("attention with scores of hundreds: {worst:.1e}"));
}

#[test]
fn ops_refuse_shapes_that_do_not_fit() {
    let x = noise("x", &[2, 4, 6]);
    let refused = [
        ops::linear(&x, &noise("w", &[3, 5]), &noise("b", &[3])),
        ops::linear(&x, &noise("w", &[3, 6]), &noise("b", &[4])),
        ops::layer_norm(&x, &noise("w", &[5]), &noise("b", &[5]), 1e-6),
        ops::layer_norm(&x, &noise("w", &[6]), &noise("b", &[5]), 1e-6),
        ops::attention(&x, &x, &x, 4),
        ops::attention(&x, &x, &x, 0),
        ops::attention(&x, &noise("k", &[2, 5, 6]), &x, 2),
    ];
    for (i, result) in refused.into_iter().enumerate() {
        assert!(result.is_err(), "case {i} was accepted");
    }
}
