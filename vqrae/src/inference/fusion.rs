//! [`crate::fusion`] with packed weights.

use candle_core::Result;
use candle_nn::VarBuilder;
use vqrae_kernels::cpu::{Element, End, Isa, Mask, Matrix, attention};

use super::layers::{Linear, Norm};
use crate::encoder::{By, Fuse};
use crate::fusion;

/// Two states of an image to one.
pub(super) struct Fusion<T> {
    shallow_norm: Norm,
    parts: Parts<T>,
}

enum Parts<T> {
    Linear(Linear<T>),
    Attention(Box<Cross<T>>),
}

struct Cross<T> {
    query_norm: Norm,
    kv_norm: Norm,
    q: Linear<T>,
    kv: Linear<T>,
    out: Linear<T>,
    ffn_norm: Norm,
    fc1: Linear<T>,
    fc2: Linear<T>,
    isa: Isa,
}

impl<T: Element> Cross<T> {
    fn pack(cross: &fusion::Cross, isa: Isa) -> Result<Self> {
        let fusion::Cross { query_norm, kv_norm, attn, ffn_norm, ffn } = cross;
        Ok(Self {
            query_norm: Norm::of(query_norm)?,
            kv_norm: Norm::of(kv_norm)?,
            q: Linear::pack(&attn.q_proj, isa)?,
            kv: Linear::stack(&[&attn.k_proj, &attn.v_proj], isa)?,
            out: Linear::pack(&attn.out_proj, isa)?,
            ffn_norm: Norm::of(ffn_norm)?,
            fc1: Linear::pack(&ffn.fc1, isa)?,
            fc2: Linear::pack(&ffn.fc2, isa)?,
            isa,
        })
    }

    /// Adds what the shallow state has to the deep one.
    fn run(&self, shallow: &Matrix<f32>, mut x: Matrix<f32>) -> Matrix<f32> {
        let (n, d) = (x.rows(), x.columns());
        let mut normed = Matrix::<T>::new(n, d);
        let (mut q, mut kv) = (Matrix::new(n, d), Matrix::new(n, 2 * d));
        self.query_norm.run(&x, &mut normed);
        self.q.run(&normed, End::Store(&mut q));
        self.kv_norm.run(shallow, &mut normed);
        self.kv.run(&normed, End::Store(&mut kv));
        let mut qkv = Matrix::<T>::new(n, 3 * d);
        for i in 0..n {
            let (to_q, to_kv) = qkv.row_mut(i).split_at_mut(d);
            to_q.copy_from_slice(q.row(i));
            to_kv.copy_from_slice(kv.row(i));
        }
        attention(&qkv, By::HEADS, Mask::None, self.isa, &mut normed);
        self.out.run(&normed, End::Add(&mut x));
        self.ffn_norm.run(&x, &mut normed);
        let mut hidden = Matrix::new(n, self.fc1.width());
        self.fc1.run(&normed, End::GeluErf(&mut hidden));
        self.fc2.run(&hidden, End::Add(&mut x));
        x
    }
}

impl<T: Element> Fusion<T> {
    pub(super) fn load(vb: VarBuilder, fuse: Fuse, width: usize, isa: Isa) -> Result<Self> {
        let fusion = fusion::Fusion::load(vb, fuse, width)?;
        let parts = match &fusion.parts {
            fusion::Parts::Linear(linear) => Parts::Linear(Linear::pack(linear, isa)?),
            fusion::Parts::Attention(cross) => Parts::Attention(Box::new(Cross::pack(cross, isa)?)),
        };
        Ok(Self { shallow_norm: Norm::of(&fusion.shallow_norm)?, parts })
    }

    /// The features `[N, D]` of one image's shallow and deep state, `[N, D]` each.
    pub(super) fn run(&self, shallow: &Matrix<f32>, deep: Matrix<f32>) -> Matrix<f32> {
        let (n, d) = (deep.rows(), deep.columns());
        let mut normed = Matrix::<f32>::new(n, d);
        self.shallow_norm.run(shallow, &mut normed);
        match &self.parts {
            Parts::Attention(cross) => cross.run(&normed, deep),
            Parts::Linear(linear) => {
                let mut both = Matrix::<T>::new(n, 2 * d);
                (0..n).for_each(|i| both.set_row(i, &[normed.row(i), deep.row(i)].concat()));
                let mut fused = Matrix::new(n, d);
                linear.run(&both, End::Wide(&mut fused));
                fused
            }
        }
    }
}
