//! Multi-head attention without the N×N matrix in memory: a block of queries at a time, forwards and backwards.

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use vqrae_kernels::cpu::dense::Worker;
use vqrae_kernels::cpu::{Bf16, Element, Isa, Mask};
use vqrae_kernels::matrix::{Into, View};
use vqrae_kernels::vector::{exp, max, sum};
use vqrae_kernels::vectorised;

use super::Precision;

/// Queries whose scores are held at a time.
const QUERIES: usize = 128;

/// `softmax(q kᵀ / √d) v` for each of `heads` heads, over the tokens of its image that the mask lets a token see.
///
/// The gradient computes the weights again rather than keeping them (Dao et al., arXiv 2205.14135).
///
/// # Shapes
/// - q, k, v and output: `[B, N, D]`, head h in the columns `h·D/heads ..`
pub fn attention(precision: Precision, mask: Mask, q: &Tensor, k: &Tensor, v: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, n, d) = q.dims3()?;
    if heads == 0 || !d.is_multiple_of(heads) || k.dims() != [b, n, d] || v.dims() != [b, n, d] {
        candle_core::bail!("attention: q {:?}, k {:?}, v {:?}, {heads} heads", q.dims(), k.dims(), v.dims());
    }
    #[cfg(feature = "cuda")]
    if mask == Mask::None && super::untracked::serves(q, &[k, v]) && super::untracked::attends(q.dtype(), d, heads) {
        return super::untracked::attention(q, k, v, heads);
    }
    if !super::fused(q) || n == 0 {
        return super::composed::attention(precision, mask, q, k, v, heads);
    }
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, Attention { heads, mask, precision })
}

/// [`attention`] of q, k and v side by side, `[B, N, 3·D]`.
pub(crate) fn attention_of_all(precision: Precision, mask: Mask, qkv: &Tensor, heads: usize) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if mask == Mask::None
        && super::untracked::serves(qkv, &[])
        && super::untracked::attends(qkv.dtype(), qkv.dim(2)? / 3, heads)
    {
        return super::untracked::attention_of_all(qkv, heads);
    }
    let parts = qkv.chunk(3, candle_core::D::Minus1)?;
    attention(precision, mask, &parts[0], &parts[1], &parts[2], heads)
}

struct Attention {
    heads: usize,
    mask: Mask,
    precision: Precision,
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
        let sizes = Sizes::new(q_layout.shape(), self.heads, self.mask)?;
        let q = super::f32_slice(q, q_layout)?;
        let k = super::f32_slice(k, k_layout)?;
        let v = super::f32_slice(v, v_layout)?;
        let mut out = vec![0f32; q.len()];
        let inputs = [q, k, v];
        match self.precision {
            Precision::F32 => sizes.forward_heads::<f32>(&mut out, inputs, super::isa()?),
            Precision::Bf16 => sizes.forward_heads::<Bf16>(&mut out, inputs, super::isa()?),
        }
        Ok((CpuStorage::F32(sizes.side_by_side(&out)), q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let stacked = Tensor::stack(&[&q.detach(), &k.detach(), &v.detach(), &grad.detach()], 0)?; // [4,B,N,D]
        let grads = stacked.apply_op1_no_bwd(&AttentionGradient {
            heads: self.heads,
            mask: self.mask,
            precision: self.precision,
        })?; // [3,B,N,D]
        let part = |i: usize| grads.get(i).map(Some);
        Ok((part(0)?, part(1)?, part(2)?))
    }
}

/// The gradients of q, k, v from q, k, v and the output's gradient.
struct AttentionGradient {
    heads: usize,
    mask: Mask,
    precision: Precision,
}

impl CustomOp1 for AttentionGradient {
    fn name(&self) -> &'static str {
        "attention-gradient"
    }

    fn cpu_fwd(&self, stacked: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, b, n, d) = layout.shape().dims4()?;
        let sizes = Sizes::new(&Shape::from((b, n, d)), self.heads, self.mask)?;
        let stacked = super::f32_slice(stacked, layout)?;
        let len = stacked.len() / 4;
        let part = |i: usize| &stacked[i * len..][..len];
        let inputs = [part(0), part(1), part(2), part(3)];
        let mut out = vec![0f32; 3 * len];
        match self.precision {
            Precision::F32 => sizes.backward_heads::<f32>(&mut out, inputs, super::isa()?),
            Precision::Bf16 => sizes.backward_heads::<Bf16>(&mut out, inputs, super::isa()?),
        }
        Ok((CpuStorage::F32(sizes.side_by_side(&out)), Shape::from((3, b, n, d))))
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    n: usize,
    heads: usize,
    head_width: usize,
    mask: Mask,
}

impl Sizes {
    fn new(shape: &Shape, heads: usize, mask: Mask) -> Result<Self> {
        let (_, n, d) = shape.dims3()?;
        Ok(Self { n, heads, head_width: d / heads, mask })
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

    /// `[…, heads, N, D/heads]`, as heads are computed, to `[…, N, D]`.
    fn side_by_side(&self, heads: &[f32]) -> Vec<f32> {
        let mut out = vec![0f32; heads.len()];
        let (image, width) = (self.n * self.width(), self.head_width);
        out.par_chunks_mut(image).zip(heads.par_chunks(image)).for_each(|(out, heads)| {
            for (head, values) in heads.chunks_exact(self.head_len()).enumerate() {
                for (out, values) in out.chunks_exact_mut(self.width()).zip(values.chunks_exact(width)) {
                    out[head * width..][..width].copy_from_slice(values);
                }
            }
        });
        out
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_width as f32).sqrt()
    }

    fn forward_heads<T: Element>(&self, out: &mut [f32], inputs: [&[f32]; 3], isa: Isa) {
        out.par_chunks_mut(self.head_len()).enumerate().for_each_init(
            || Scratch::<T>::new(*self, isa),
            |scratch, (index, out)| scratch.forward(out, inputs.map(|x| self.head(x, index))),
        );
    }

    /// The gradients of q, k and v, one after the other.
    fn backward_heads<T: Element>(&self, out: &mut [f32], inputs: [&[f32]; 4], isa: Isa) {
        let (len, size) = (out.len() / 3, self.head_len());
        let (q_grad, rest) = out.split_at_mut(len);
        let (k_grad, v_grad) = rest.split_at_mut(len);
        let heads = q_grad.par_chunks_mut(size).zip(k_grad.par_chunks_mut(size)).zip(v_grad.par_chunks_mut(size));
        heads.enumerate().for_each_init(
            || Scratch::<T>::new(*self, isa),
            |scratch, (index, ((q_grad, k_grad), v_grad))| {
                scratch.backward([q_grad, k_grad, v_grad], inputs.map(|x| self.head(x, index)));
            },
        );
    }
}

/// One thread's memory, and how its products are computed.
struct Scratch<T> {
    sizes: Sizes,
    worker: Worker<T>,
    isa: Isa,
    /// The attention weights of a block of queries, `[QUERIES, N]`, and in the backward pass their gradients.
    weights: Vec<f32>,
    scores: Vec<f32>,
}

impl<T: Element> Scratch<T> {
    fn new(sizes: Sizes, isa: Isa) -> Self {
        let weights = vec![0f32; QUERIES.min(sizes.n) * sizes.n];
        Self { sizes, worker: Worker::default(), isa, scores: Vec::new(), weights }
    }

    /// The attention weights of queries `first .. first + rows`.
    fn weigh(&mut self, q: &[f32], k: &[f32], first: usize, rows: usize) {
        let sizes = self.sizes;
        let weights = &mut self.weights[..rows * sizes.n];
        let (queries, keys) = (sizes.view(q, first, rows), sizes.view(k, 0, sizes.n).t());
        self.worker.multiply(weights, sizes.n, queries, keys, sizes.scale(), Into::Replace, self.isa);
        for (i, weights) in weights.chunks_exact_mut(sizes.n).enumerate() {
            let (seen, hidden) = weights.split_at_mut(sizes.mask.seen(first + i, sizes.n));
            softmax_row(seen);
            hidden.fill(0.0);
        }
    }

    fn forward(&mut self, out: &mut [f32], [q, k, v]: [&[f32]; 3]) {
        let (n, width) = (self.sizes.n, self.sizes.head_width);
        for (block, out) in out.chunks_mut(QUERIES * width).enumerate() {
            let rows = out.len() / width;
            self.weigh(q, k, block * QUERIES, rows);
            let weights = View::new(&self.weights[..rows * n], rows, n, n);
            self.worker.multiply(out, width, weights, self.sizes.view(v, 0, n), 1.0, Into::Replace, self.isa);
        }
    }

    fn backward(&mut self, [q_grad, k_grad, v_grad]: [&mut [f32]; 3], [q, k, v, grad]: [&[f32]; 4]) {
        let Sizes { n, head_width: width, .. } = self.sizes;
        let (sizes, scale, isa) = (self.sizes, self.sizes.scale(), self.isa);
        self.scores.resize(QUERIES.min(n) * n, 0.0);
        for (block, q_grad) in q_grad.chunks_mut(QUERIES * width).enumerate() {
            let (first, rows) = (block * QUERIES, q_grad.len() / width);
            self.weigh(q, k, first, rows);
            let (weights, scores) = (&self.weights[..rows * n], &mut self.scores[..rows * n]);
            let out_grad = sizes.view(grad, first, rows);
            self.worker.multiply(v_grad, width, View::new(weights, rows, n, n).t(), out_grad, 1.0, Into::Add, isa);
            self.worker.multiply(scores, n, out_grad, sizes.view(v, 0, n).t(), 1.0, Into::Replace, isa);
            for (scores, weights) in scores.chunks_exact_mut(n).zip(weights.chunks_exact(n)) {
                softmax_row_gradient(scores, weights);
            }
            let scores = View::new(scores, rows, n, n);
            self.worker.multiply(q_grad, width, scores, sizes.view(k, 0, n), scale, Into::Replace, isa);
            self.worker.multiply(k_grad, width, scores.t(), sizes.view(q, first, rows), scale, Into::Add, isa);
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
