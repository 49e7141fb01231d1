//! What a quantizer is between its projections, and what all of them say of codes and indices.

use candle_core::{D, Device, Result, Tensor};
use candle_nn::VarBuilder;

use super::average::Shares;
use super::kmeans::Choose;
use super::{Norm, Quantized, Table};
use crate::weights::Tensors;

/// Stands in the place of the index of a level that quantize dropout left out; vector-quantize-pytorch has −1 there.
/// Its code is zero.
pub const DROPPED: u32 = u32::MAX;

/// The most codes that a code file's i32 can tell apart.
const MOST_CODES: usize = 1 << 31;

/// The most numbers of an implicit codebook that are written out.
const MOST_LISTED: usize = 1 << 26;

/// What a quantizer's section of `config.json` says.
pub trait Settings {
    /// Number K of codes; with several codes a token, of each of them.
    fn codebook_size(&self) -> usize;

    /// Width e of what stands between `linear_in` and `linear_out`.
    fn width(&self) -> usize;

    /// Number C of codes a token.
    fn codes_per_token(&self) -> usize {
        1
    }

    /// What follows `linear_in`.
    fn norm(&self) -> Norm;

    /// Whether the sizes make sense; the error names the field.
    fn check(&self) -> std::result::Result<(), String>;

    /// Whether a tensor, by its name below the quantizer's, never changes in training.
    fn is_frozen(&self, _name: &str) -> bool {
        false
    }

    /// Whether a tensor, by its name below the quantizer's, is moved by no gradient, but as a moving average by
    /// [`Bottleneck::update`], or once by [`Bottleneck::first`].
    fn is_average(&self, _name: &str) -> bool {
        false
    }

    /// The quantizer with its weights, in f32.
    fn load(&self, vb: VarBuilder) -> Result<Box<dyn Bottleneck>>;
}

/// What stands between `linear_in` and `linear_out`: e-wide vectors to codes and back.
pub trait Bottleneck: std::fmt::Debug + Send + Sync {
    /// The codes of projected features; [`Quantized::tokens`] is then `[B, N, e]`, what `linear_out` is to see.
    ///
    /// # Shapes
    /// - h: f32 `[B, N, e]`
    /// - dropout: in training the seed of what is drawn at random, else `None`
    fn quantize(&self, h: &Tensor, dropout: Option<u64>) -> Result<Quantized>;

    /// What `linear_out` is to see for given codes: bit for bit the tokens of [`Bottleneck::quantize`].
    ///
    /// # Shapes
    /// - indices: u32 `[B, N]`, with C > 1 codes a token `[B, N, C]`
    /// - output: f32 `[B, N, e]`
    fn lookup(&self, indices: &Tensor) -> Result<Tensor>;

    /// The training loss, a scalar.
    fn loss(&self, quantized: &Quantized) -> Result<Tensor>;

    /// All code vectors: `[K, e]`, with several codebooks one below the other.
    fn codebook(&self) -> Result<Tensor>;

    /// The one codebook that is searched, if that is all there is: inference then does without tensors.
    fn table(&self) -> Option<&Table> {
        None
    }

    /// New values, by name, of the moving averages after a step that quantised `quantized`, of which it is one of `shares`;
    /// empty without any. `choose` draws features of the whole batch that replace dead codes.
    fn update(&self, _quantized: &Quantized, _shares: &dyn Shares, _choose: Choose) -> Result<Tensors> {
        Ok(Tensors::new())
    }

    /// Whether the first training step's features make codes, which they have not made yet.
    fn waits(&self) -> Result<bool> {
        Ok(false)
    }

    /// First values, by name, of what [waits](Bottleneck::waits) for features `h` `[B, N, e]`; `choose` draws of them.
    fn first(&self, _h: &Tensor, _choose: Choose) -> Result<Tensors> {
        Ok(Tensors::new())
    }
}

/// The value of `codes`, bit for bit, with the gradient of `x`: `x − sg(x)` is exactly zero.
pub(super) fn straight_through(x: &Tensor, codes: &Tensor) -> Result<Tensor> {
    if !x.track_op() {
        return Ok(codes.clone());
    }
    codes.detach() + (x - x.detach())?
}

/// The values of features `[B, N, e]`, all of them finite.
pub(super) fn finite(x: &Tensor) -> Result<Vec<f32>> {
    let e = x.dim(D::Minus1)?.max(1);
    let values = x.flatten_all()?.to_vec1::<f32>()?;
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => candle_core::bail!("token {} holds {}, which has no code", at / e, values[at]),
        None => Ok(values),
    }
}

/// The columns u32 `[B, N]` of indices, of which a token has `count`.
pub(super) fn columns(indices: &Tensor, count: usize) -> Result<Vec<Tensor>> {
    match *indices.dims() {
        [_, _] if count == 1 => Ok(vec![indices.clone()]),
        [_, _, c] if count > 1 && c == count => (0..c).map(|i| indices.narrow(2, i, 1)?.squeeze(2)).collect(),
        ref dims => {
            let expected = if count == 1 { "[B, N]".to_string() } else { format!("[B, N, {count}]") };
            candle_core::bail!(
                "the indices have the shape {dims:?}, expected: {expected}, for this model has {count} codes a token; \
                 decode with the model that made the codes"
            )
        }
    }
}

/// [`columns`] the other way round.
pub(super) fn join(columns: &[Tensor]) -> Result<Tensor> {
    match columns {
        [one] => Ok(one.clone()),
        many => Tensor::stack(many, 2),
    }
}

/// Refuses indices that a codebook of `k` codes has not.
pub(super) fn check_range(indices: impl Iterator<Item = u32>, k: usize) -> Result<()> {
    match indices.max() {
        Some(largest) if largest as usize >= k => candle_core::bail!(
            "code {largest} is outside the codebook of {k} codes; decode with the model that made the codes"
        ),
        _ => Ok(()),
    }
}

/// A size in the config.
pub(super) fn check_size(name: &str, size: usize, limit: usize) -> std::result::Result<(), String> {
    if size == 0 || size > limit {
        return Err(format!("quantizer: {name} is {size}, expected: 1 to {limit}"));
    }
    Ok(())
}

/// A weight or cost in the config.
pub(super) fn check_cost(name: &str, cost: f64) -> std::result::Result<(), String> {
    if !cost.is_finite() || cost < 0.0 {
        return Err(format!("quantizer: {name} is {cost}, expected: 0 or more"));
    }
    Ok(())
}

/// A learned factor before something that only goes by direction.
pub(super) fn check_scale(norm: Norm, by_direction: bool, key: &str) -> std::result::Result<(), String> {
    if norm == Norm::Scale && by_direction {
        return Err(format!("quantizer: norm `scale` changes nothing where {key}; remove it"));
    }
    Ok(())
}

/// The number of codes that `levels` values per dimension make, if a code file can hold them; `what` to change if not.
pub(super) fn implicit_size(levels: impl IntoIterator<Item = usize>, what: &str) -> std::result::Result<usize, String> {
    let product = levels
        .into_iter()
        .try_fold(1usize, |product, levels| product.checked_mul(levels).filter(|&product| product <= MOST_CODES));
    product.ok_or_else(|| {
        format!(
            "quantizer: more than {MOST_CODES} codes do not fit the i32 of a code file; {what}, or take several codes \
             a token with type \"residual\" or \"product\""
        )
    })
}

/// Refuses to write out an implicit codebook that would fill the memory.
pub(super) fn check_listing(k: usize, e: usize) -> Result<()> {
    if k.saturating_mul(e) > MOST_LISTED {
        candle_core::bail!("a codebook of {k} codes of width {e} is too large to list; look up the codes in question");
    }
    Ok(())
}

/// All codes 0 to k − 1 as indices `[1, k]`.
pub(super) fn every(k: usize) -> Result<Tensor> {
    Tensor::arange(0u32, k as u32, &Device::Cpu)?.unsqueeze(0)
}
