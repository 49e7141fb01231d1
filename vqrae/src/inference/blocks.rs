//! The parts of a transformer for networks that others build, such as generators of codes.

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use vqrae_kernels::cpu::{Cache, Element, End, Isa, Matrix};

use super::layers::{self, Vit};
use super::narrowed;
use crate::{ops, vit};

/// [`vit::Vit`] with packed weights, in f32 or [`Bf16`](super::Bf16): the same layers and names, for a sequence at a time or, with
/// [`vit::Style::causal`], for a token at a time.
///
/// No sum depends on other sequences or on threads, and a token at a time gives the same bits as all at once (but for
/// processors that the kernels have no instructions for, where sums follow the shape).
///
/// ```
/// use candle_nn::VarBuilder;
/// use vqrae::inference::Blocks;
/// use vqrae::weights::{Fresh, Tensors};
/// use vqrae::{DType, Device, vit};
///
/// let style = vit::Style { causal: true, ..Default::default() };
/// let config = vit::Config { width: 8, depth: 2, heads: 2, mlp_width: 16, layer_norm_eps: 1e-6, style };
/// let tensors = Fresh::new(0, Tensors::new()).make(|vb| vit::Vit::load(vb, &config))?.into_iter().collect();
/// let blocks = Blocks::<f32>::load(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu), &config)?;
///
/// let tokens: Vec<f32> = (0..3 * 8).map(|i| i as f32 / 24.0).collect(); // [N, D]
/// let mut at_once = tokens.clone();
/// blocks.forward(&mut at_once);
///
/// let mut sequence = blocks.sequence(3);
/// for (token, expected) in tokens.chunks(8).zip(at_once.chunks(8)) {
///     let mut x = token.to_vec(); // [1, D]: one sequence
///     blocks.step(&mut x, &mut [&mut sequence]);
///     assert!(x.iter().zip(expected).all(|(x, expected)| (x - expected).abs() < 1e-6));
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Blocks<T> {
    vit: Vit<T>,
    width: usize,
}

/// What the blocks remember of a sequence's tokens: keys and values.
#[derive(Clone)]
pub struct Sequence<T>(Vec<Cache<T>>);

impl<T: Element> Blocks<T> {
    /// Loads `layers.0 ..` from `vb` and packs them for this processor.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape, or `VQRAE_CPU` names instructions that this machine has not.
    pub fn load(vb: VarBuilder, config: &vit::Config) -> Result<Self> {
        Ok(Self { vit: Vit::load(vb, config, isa()?)?, width: config.width })
    }

    /// Every block in turn.
    ///
    /// # Shapes
    /// - x: `[N, D]`, the tokens of one sequence; replaced
    ///
    /// # Panics
    /// When x does not divide into tokens: a bug in the caller, not in the input.
    pub fn forward(&self, x: &mut [f32]) {
        self.with_matrix(x, |x| self.vit.run(x, |_| ()));
    }

    /// A sequence without tokens, with room for `tokens`.
    pub fn sequence(&self, tokens: usize) -> Sequence<T> {
        Sequence(self.vit.caches(tokens))
    }

    /// Every block in turn, on the next token of each of B sequences.
    ///
    /// # Shapes
    /// - x: `[B, D]`; replaced
    ///
    /// # Panics
    /// When x is not a token a sequence, or a sequence is full: a bug in the caller, not in the input.
    pub fn step(&self, x: &mut [f32], sequences: &mut [&mut Sequence<T>]) {
        assert_eq!(x.len(), sequences.len() * self.width, "step: a token a sequence");
        let mut caches: Vec<&mut Vec<Cache<T>>> = sequences.iter_mut().map(|sequence| &mut sequence.0).collect();
        self.with_matrix(x, |x| self.vit.step(x, &mut caches));
    }

    fn with_matrix(&self, x: &mut [f32], run: impl FnOnce(&mut Matrix<f32>)) {
        let mut matrix = matrix(x, self.width);
        run(&mut matrix);
        x.chunks_exact_mut(self.width).enumerate().for_each(|(i, row)| row.copy_from_slice(matrix.row(i)));
    }
}

impl<T: Element> Sequence<T> {
    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.0.first().map_or(0, Cache::len)
    }

    /// Whether there is none yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// `x wᵀ + b` with packed weights.
pub struct Dense<T>(layers::Linear<T>);

impl<T: Element> Dense<T> {
    /// Packs a layer for this processor.
    ///
    /// # Shapes
    /// - weight: `[E, D]`
    /// - bias: `[E]`
    ///
    /// # Errors
    /// If the shapes do not fit, or `VQRAE_CPU` names instructions that this machine has not.
    pub fn new(weight: &Tensor, bias: &Tensor) -> Result<Self> {
        let (e, _) = weight.dims2()?;
        if bias.dims() != [e] {
            candle_core::bail!("dense: weight {:?} and bias {:?}", weight.dims(), bias.dims());
        }
        Ok(Self(layers::Linear::of(weight, Some(bias), isa()?)?))
    }

    /// Packs the parameters of `layer`.
    ///
    /// # Errors
    /// If `VQRAE_CPU` names instructions that this machine has not.
    pub fn of(layer: &ops::Linear) -> Result<Self> {
        Ok(Self(layers::Linear::pack(layer, isa()?)?))
    }

    /// `[N, D]` to `[N, E]`.
    ///
    /// # Panics
    /// When x does not divide into rows: a bug in the caller, not in the input.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        let x = narrowed::<T>(&matrix(x, self.0.inner()));
        let mut out = Matrix::new(x.rows(), self.0.width());
        self.0.run(&x, End::Wide(&mut out));
        out.to_vec()
    }
}

/// A layer norm over the last dimension.
pub struct LayerNorm(layers::Norm, usize);

impl LayerNorm {
    /// Takes the parameters of `norm`.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn new(norm: &ops::LayerNorm) -> Result<Self> {
        let width = norm.weight.elem_count();
        Ok(Self(layers::Norm::of(&ops::Norm::Layer(norm.clone()))?, width))
    }

    /// `[N, D]` to `[N, D]`.
    ///
    /// # Panics
    /// When x does not divide into rows: a bug in the caller, not in the input.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        let x = matrix(x, self.1);
        let mut out = Matrix::<f32>::new(x.rows(), x.columns());
        self.0.run(&x, &mut out);
        out.to_vec()
    }
}

fn isa() -> Result<Isa> {
    Isa::detect().map_err(candle_core::Error::wrap)
}

/// The rows of a plain array.
fn matrix(values: &[f32], width: usize) -> Matrix<f32> {
    assert!(width > 0 && values.len().is_multiple_of(width), "{} values are no rows of {width}", values.len());
    let mut matrix = Matrix::new(values.len() / width, width);
    values.chunks_exact(width).enumerate().for_each(|(i, row)| matrix.set_row(i, row));
    matrix
}
