//! What the quantizers share: the layers around them, codebooks that are searched, and exact straight-through.

use std::sync::{Arc, OnceLock};

use candle_core::{D, Device, Result, Tensor};
use candle_nn::VarBuilder;
use vqrae_kernels as kernels;

use super::{Metric, Quantized};
use crate::ops::Linear;

/// Stands in the place of the index of a level that quantize dropout left out; vector-quantize-pytorch has −1 there.
/// Its code is zero.
pub const DROPPED: u32 = u32::MAX;

/// The most codes that a code file's i32 can tell apart.
const MOST_CODES: usize = 1 << 31;

/// The most numbers of an implicit codebook that are written out.
const MOST_LISTED: usize = 1 << 26;

/// What stands between `linear_in` and `linear_out`: e-wide vectors to codes and back.
pub trait Bottleneck {
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
}

/// A bottleneck with its projections, in f32 whatever the encoder's dtype.
#[derive(Debug, Clone)]
pub struct Between<Q> {
    pub(crate) linear_in: Linear,
    pub(crate) inner: Q,
    pub(crate) linear_out: Linear,
}

impl<Q> Between<Q> {
    /// Loads `linear_in` (D → e) and `linear_out` (e → D') around `inner`.
    pub(super) fn load(vb: &VarBuilder, inner: Q, e: usize, width_in: usize, width_out: usize) -> Result<Self> {
        let linear_in = Linear::load(vb.pp("linear_in"), width_in, e)?;
        Ok(Self { linear_in, inner, linear_out: Linear::load(vb.pp("linear_out"), e, width_out)? })
    }

    /// The bottleneck itself.
    pub fn inner(&self) -> &Q {
        &self.inner
    }
}

/// K codes of width d and what searches them, which is kept while the codes are not trained.
#[derive(Debug, Clone)]
pub(super) struct Table {
    codes: Tensor,
    metric: Metric,
    prepared: Arc<OnceLock<Prepared>>,
}

#[derive(Debug, Clone)]
struct Prepared {
    codes: Tensor,
    search: Arc<kernels::Codebook>,
}

/// What a table finds for vectors `[B, N, d]`.
pub(super) struct Nearest {
    /// What was compared: the vectors, of length one where the metric is cosine.
    pub(super) compared: Tensor,
    /// u32 `[B, N]`.
    pub(super) indices: Tensor,
    /// `[B, N, d]`.
    pub(super) codes: Tensor,
}

impl Table {
    /// Of codes `[K, d]`.
    pub(super) fn new(codes: Tensor, metric: Metric) -> Self {
        Self { codes, metric, prepared: Arc::default() }
    }

    /// The nearest code of every vector of `x`, `[B, N, d]`.
    pub(super) fn nearest(&self, x: &Tensor) -> Result<Nearest> {
        let (b, n, _) = x.dims3()?;
        let compared = compared(x, self.metric)?;
        let prepared = self.prepare()?;
        let flat = compared.flatten_all()?.to_vec1::<f32>()?;
        let indices = prepared.search.nearest(&flat).map_err(candle_core::Error::wrap)?;
        let indices = Tensor::from_vec(indices, (b, n), x.device())?;
        let codes = gather(&prepared.codes, &indices)?;
        Ok(Nearest { compared, indices, codes })
    }

    /// The codes `[B, N, d]` of indices u32 `[B, N]`; those of [`DROPPED`], where it is allowed, are zero.
    pub(super) fn lookup(&self, indices: &Tensor, may_be_dropped: bool) -> Result<Tensor> {
        let codes = self.codes()?;
        let flat = indices.flatten_all()?.to_vec1::<u32>()?;
        let is_dropped = |index: u32| may_be_dropped && index == DROPPED;
        check_range(flat.iter().copied().filter(|&index| !is_dropped(index)), codes.dim(0)?)?;
        if !flat.iter().any(|&index| is_dropped(index)) {
            return gather(&codes, indices);
        }
        let (rows, mask): (Vec<u32>, Vec<f32>) =
            flat.iter().map(|&index| if is_dropped(index) { (0, 0.0) } else { (index, 1.0) }).unzip();
        let rows = Tensor::from_vec(rows, indices.shape(), indices.device())?;
        let mask = Tensor::from_vec(mask, indices.shape(), indices.device())?.unsqueeze(D::Minus1)?;
        gather(&codes, &rows)?.broadcast_mul(&mask)
    }

    /// `[K, d]`, of length one where the metric is cosine.
    pub(super) fn codes(&self) -> Result<Tensor> {
        Ok(self.prepare()?.codes)
    }

    fn prepare(&self) -> Result<Prepared> {
        if self.codes.track_op() {
            return self.prepare_anew();
        }
        if let Some(prepared) = self.prepared.get() {
            return Ok(prepared.clone());
        }
        let prepared = self.prepare_anew()?;
        Ok(self.prepared.get_or_init(|| prepared).clone())
    }

    fn prepare_anew(&self) -> Result<Prepared> {
        let codes = compared(&self.codes, self.metric)?;
        let metric = match self.metric {
            Metric::Euclidean => kernels::Metric::Euclidean,
            Metric::Cosine => kernels::Metric::Cosine,
        };
        let rows = codes.flatten_all()?.to_vec1::<f32>()?;
        let search = kernels::Codebook::new(rows, codes.dim(1)?, metric).map_err(candle_core::Error::wrap)?;
        Ok(Prepared { codes, search: Arc::new(search) })
    }
}

/// Vectors as the metric compares them.
pub(super) fn compared(x: &Tensor, metric: Metric) -> Result<Tensor> {
    match metric {
        Metric::Euclidean => Ok(x.clone()),
        Metric::Cosine => unit(x),
    }
}

/// Rows of `codes` `[K, e]` by indices `[B, N]`: `[B, N, e]`.
pub(super) fn gather(codes: &Tensor, indices: &Tensor) -> Result<Tensor> {
    let (b, n) = indices.dims2()?;
    codes.index_select(&indices.flatten_all()?, 0)?.reshape((b, n, codes.dim(1)?))
}

/// The value of `codes`, bit for bit, with the gradient of `x`: `x − sg(x)` is exactly zero.
pub(super) fn straight_through(x: &Tensor, codes: &Tensor) -> Result<Tensor> {
    if !x.track_op() {
        return Ok(codes.clone());
    }
    codes.detach() + (x - x.detach())?
}

/// Rows divided by their length; a zero row stays zero. The bound stands under the root, whose gradient at zero is
/// infinite.
pub(super) fn unit(x: &Tensor) -> Result<Tensor> {
    const SMALLEST: f64 = 1e-12;
    let square = x.sqr()?.sum_keepdim(D::Minus1)?.maximum(SMALLEST * SMALLEST)?;
    x.broadcast_div(&square.sqrt()?)
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
