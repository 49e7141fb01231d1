//! Multi-head attention without the N×N matrix in memory: a block of queries at a time, forwards and backwards.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use vqrae_kernels::matrix::{Into, View, multiply};
use vqrae_kernels::vector::{exp, max, sum};
use vqrae_kernels::vectorised;

/// Queries whose scores are held at a time.
const QUERIES: usize = 128;

/// `softmax(q kᵀ / √d) v` for each of `heads` heads, every token seeing every token of its image.
///
/// The gradient computes the weights again rather than keeping them (Dao et al., arXiv 2205.14135).
///
/// # Shapes
/// - q, k, v and output: `[B, N, D]`, head h in the columns `h·D/heads ..`
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, d) = q.dims3()?;
    if heads == 0 || !d.is_multiple_of(heads) || k.dims() != [b, n, d] || v.dims() != [b, n, d] {
        candle_core::bail!("attention: q {:?}, k {:?}, v {:?}, {heads} heads", q.dims(), k.dims(), v.dims());
    }
    if !super::fused(q) || n == 0 {
        return super::composed::attention(q, k, v, heads);
    }
    let out = q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, Attention { heads })?; // [B,heads,N,D/heads]
    out.transpose(1, 2)?.reshape((b, n, d))
}

struct Attention {
    heads: usize,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sizes = Sizes::new(q_layout.shape(), self.heads)?;
        let q = super::f32_slice(q, q_layout)?;
        let k = super::f32_slice(k, k_layout)?;
        let v = super::f32_slice(v, v_layout)?;
        let mut out = vec![0f32; q.len()];
        out.par_chunks_mut(sizes.head_len()).enumerate().for_each(|(index, out)| {
            sizes.forward(out, sizes.head(q, index), sizes.head(k, index), sizes.head(v, index));
        });
        Ok((CpuStorage::F32(out), Shape::from((sizes.b, sizes.heads, sizes.n, sizes.head_width))))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (b, n, d) = q.dims3()?;
        let grad = grad.transpose(1, 2)?.reshape((b, n, d))?.contiguous()?;
        let stacked = Tensor::stack(&[&q.detach(), &k.detach(), &v.detach(), &grad.detach()], 0)?; // [4,B,N,D]
        let grads = stacked.apply_op1_no_bwd(&AttentionGradient { heads: self.heads })?; // [3,B,heads,N,D/heads]
        let part = |i: usize| grads.get(i)?.transpose(1, 2)?.reshape((b, n, d)).map(Some);
        Ok((part(0)?, part(1)?, part(2)?))
    }
}

/// The gradients of q, k, v from q, k, v and the output's gradient.
struct AttentionGradient {
    heads: usize,
}

impl CustomOp1 for AttentionGradient {
    fn name(&self) -> &'static str {
        "attention-gradient"
    }

    fn cpu_fwd(&self, stacked: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, b, n, d) = layout.shape().dims4()?;
        let sizes = Sizes::new(&Shape::from((b, n, d)), self.heads)?;
        let stacked = super::f32_slice(stacked, layout)?;
        let len = stacked.len() / 4;
        let part = |i: usize| &stacked[i * len..][..len];
        let (q, k, v, grad) = (part(0), part(1), part(2), part(3));
        let mut out = vec![0f32; 3 * len];
        let (q_grad, rest) = out.split_at_mut(len);
        let (k_grad, v_grad) = rest.split_at_mut(len);
        let size = sizes.head_len();
        let heads = q_grad.par_chunks_mut(size).zip(k_grad.par_chunks_mut(size)).zip(v_grad.par_chunks_mut(size));
        heads.enumerate().for_each(|(index, ((q_grad, k_grad), v_grad))| {
            let inputs = [q, k, v, grad].map(|x| sizes.head(x, index));
            sizes.backward([q_grad, k_grad, v_grad], inputs);
        });
        Ok((CpuStorage::F32(out), Shape::from(vec![3, b, self.heads, n, sizes.head_width])))
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    n: usize,
    heads: usize,
    head_width: usize,
}

impl Sizes {
    fn new(shape: &Shape, heads: usize) -> Result<Self> {
        let (b, n, d) = shape.dims3()?;
        Ok(Self { b, n, heads, head_width: d / heads })
    }

    fn head_len(&self) -> usize {
        self.n * self.head_width
    }

    fn width(&self) -> usize {
        self.heads * self.head_width
    }

    /// The columns of one head of one image, from its first row on.
    fn head<'a>(&self, x: &'a [f32], index: usize) -> &'a [f32] {
        &x[index / self.heads * self.n * self.width() + index % self.heads * self.head_width..]
    }

    /// Rows `first .. first + rows` of one head.
    fn view<'a>(&self, head: &'a [f32], first: usize, rows: usize) -> View<'a> {
        View::new(&head[first * self.width()..], rows, self.head_width, self.width())
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_width as f32).sqrt()
    }

    /// The attention weights of a block of queries, into `weights` `[rows, N]`.
    fn weights(&self, weights: &mut [f32], q: &[f32], k: &[f32], first: usize, rows: usize) {
        let (queries, keys) = (self.view(q, first, rows), self.view(k, 0, self.n));
        multiply(weights, self.n, queries, keys.t(), self.scale(), Into::Replace);
        weights.chunks_exact_mut(self.n).for_each(softmax_row);
    }

    fn forward(&self, out: &mut [f32], q: &[f32], k: &[f32], v: &[f32]) {
        let mut scratch = vec![0f32; QUERIES.min(self.n) * self.n];
        for (block, out) in out.chunks_mut(QUERIES * self.head_width).enumerate() {
            let rows = out.len() / self.head_width;
            let weights = &mut scratch[..rows * self.n];
            self.weights(weights, q, k, block * QUERIES, rows);
            let weights = View::new(weights, rows, self.n, self.n);
            multiply(out, self.head_width, weights, self.view(v, 0, self.n), 1.0, Into::Replace);
        }
    }

    fn backward(&self, [q_grad, k_grad, v_grad]: [&mut [f32]; 3], [q, k, v, grad]: [&[f32]; 4]) {
        let (n, width) = (self.n, self.head_width);
        let mut weights_scratch = vec![0f32; QUERIES.min(n) * n];
        let mut scores_scratch = weights_scratch.clone();
        for (block, q_grad) in q_grad.chunks_mut(QUERIES * width).enumerate() {
            let (first, rows) = (block * QUERIES, q_grad.len() / width);
            let weights = &mut weights_scratch[..rows * n];
            let scores = &mut scores_scratch[..rows * n];
            self.weights(weights, q, k, first, rows);
            let out_grad = self.view(grad, first, rows);
            multiply(v_grad, width, View::new(weights, rows, n, n).t(), out_grad, 1.0, Into::Add);
            multiply(scores, n, out_grad, self.view(v, 0, n).t(), 1.0, Into::Replace);
            for (scores, weights) in scores.chunks_exact_mut(n).zip(weights.chunks_exact(n)) {
                softmax_row_gradient(scores, weights);
            }
            let scores = View::new(scores, rows, n, n);
            multiply(q_grad, width, scores, self.view(k, 0, n), self.scale(), Into::Replace);
            multiply(k_grad, width, scores.t(), self.view(q, first, rows), self.scale(), Into::Add);
        }
    }
}

vectorised! {
    fn softmax_row(row: &mut [f32]) {
        let largest = max(row);
        for x in row.iter_mut() {
            *x = exp(*x - largest);
        }
        let scale = 1.0 / sum(row, row, |x, _| x);
        for x in row.iter_mut() {
            *x *= scale;
        }
    }

    /// From the gradient of the weights to that of the scores: `w (g − Σ g w)`.
    fn softmax_row_gradient(grad: &mut [f32], weights: &[f32]) {
        let mean = sum(grad, weights, |g, w| g * w);
        for (g, &w) in grad.iter_mut().zip(weights) {
            *g = w * (*g - mean);
        }
    }
}
