//! How the decoder's gradient passes the choice of a code, which has none.
//!
//! Every estimator gives tokens whose value is the code's, bit for bit, as `sg(code) + (path − sg(path))`: the bracket is
//! exactly zero and carries the path's gradient. Looking a code up therefore gives what quantising gave.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};
use vqrae_kernels as kernels;

use super::table::{Metric, unit_above};
use crate::ops::composed::softmax;

/// How the decoder's gradient reaches features (and, for IBQ, codes).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gradient {
    /// As if the code were the feature (van den Oord et al., arXiv 1711.00937).
    #[default]
    StraightThrough,
    /// Turned and stretched as the feature must be to become its code (Fifty et al., arXiv 2410.06424).
    Rotation,
    /// Straight through, times how near the feature is to its code compared with the nearest feature of the batch
    /// (StableVQ, arXiv 2609.26774).
    DynamicSte,
    /// To all codes through the softmax of their scores, and to the features through these (IBQ, Shi et al.,
    /// arXiv 2412.02692). Needs memory for a score of every token and code.
    Ibq,
}

impl Gradient {
    /// The chosen codes with a gradient to the features.
    ///
    /// # Shapes
    /// - projected: what was quantised, `[B, N, e]`
    /// - indices: u32 `[B, N]`
    /// - codes: theirs, `[B, N, e]`
    /// - all: every code, `[K, e]`
    /// - output: `[B, N, e]`, the value of the codes
    pub(super) fn pass(
        self,
        projected: &Tensor,
        indices: &Tensor,
        codes: &Tensor,
        all: &Tensor,
        metric: Metric,
    ) -> Result<Tensor> {
        if self == Self::Ibq && (projected.track_op() || codes.track_op()) {
            return codes + zero(&soft_codes(projected, all, metric)?)?;
        }
        let codes = codes.detach();
        if !projected.track_op() {
            return Ok(codes);
        }
        let path = match self {
            Self::StraightThrough | Self::Ibq => projected.clone(),
            Self::Rotation => rotated(projected, &codes)?,
            Self::DynamicSte => projected.broadcast_mul(&nearness(&projected.detach(), indices, all)?)?,
        };
        codes + zero(&path)?
    }
}

/// Exactly zero, with the gradient of `path`.
fn zero(path: &Tensor) -> Result<Tensor> {
    path - path.detach()
}

/// `(h − 2 (h·w) w + 2 (h·u) q̂) ‖q‖/‖h‖` with u = h/‖h‖, q̂ = q/‖q‖, w = (u + q̂)/‖u + q̂‖, all of them constants
/// (§4.2 of the paper): the turn that carries h to q. Lengths are bounded as in vector-quantize-pytorch.
fn rotated(h: &Tensor, codes: &Tensor) -> Result<Tensor> {
    const SMALLEST: f64 = 1e-6;
    let fixed = h.detach();
    let length = |x: &Tensor| x.sqr()?.sum_keepdim(2)?.sqrt();
    let (u, q) = (unit_above(&fixed, SMALLEST)?, unit_above(codes, SMALLEST)?); // [B,N,e]
    let w = unit_above(&(&u + &q)?, SMALLEST)?;
    let along = |axis: &Tensor| (h * axis)?.sum_keepdim(2); // [B,N,1]
    let mirrored = (h - (w.broadcast_mul(&along(&w)?)? * 2.0)?)?;
    let turned = (mirrored + (q.broadcast_mul(&along(&u)?)? * 2.0)?)?;
    turned.broadcast_mul(&(length(codes)? / length(&fixed)?.maximum(SMALLEST)?)?)
}

/// w = d*_k / ‖h − c_k‖² in (0, 1], `[B, N, 1]`, where d*_k is the smallest squared distance of any feature of the batch
/// to the code k of h; 1 for a feature that is its code.
fn nearness(h: &Tensor, indices: &Tensor, codes: &Tensor) -> Result<Tensor> {
    let (b, n, e) = h.dims3()?;
    let features = h.flatten_all()?.to_vec1::<f32>()?;
    let chosen = indices.flatten_all()?.to_vec1::<u32>()?;
    let mut active = chosen.clone();
    active.sort_unstable();
    active.dedup();
    let ids = Tensor::from_slice(&active, active.len(), codes.device())?;
    let rows = codes.detach().index_select(&ids, 0)?.flatten_all()?.to_vec1::<f32>()?; // [A,e]
    // The roles change here: the features are searched for the one that is nearest to a code.
    let search = kernels::Codebook::new(features.clone(), e, kernels::Metric::Euclidean);
    let nearest = search.and_then(|search| search.nearest(&rows)).map_err(candle_core::Error::wrap)?;
    let distance = |feature: usize, a: usize| distance(&features[feature * e..][..e], &rows[a * e..][..e]);
    let least: Vec<f64> = nearest.iter().enumerate().map(|(a, &i)| distance(i as usize, a)).collect();
    let weights = chosen.iter().enumerate().map(|(i, code)| {
        let a = active.partition_point(|active| active < code);
        let own = distance(i, a);
        if own > 0.0 { (least[a] / own).min(1.0) as f32 } else { 1.0 }
    });
    Tensor::from_vec(weights.collect::<Vec<f32>>(), (b, n, 1), h.device())
}

fn distance(x: &[f32], c: &[f32]) -> f64 {
    x.iter().zip(c).map(|(&x, &c)| (f64::from(x) - f64::from(c)).powi(2)).sum()
}

/// Codes weighed by the softmax of their [scores](Metric::scores); the gradient reaches them through the scores alone.
fn soft_codes(h: &Tensor, codes: &Tensor, metric: Metric) -> Result<Tensor> {
    let (b, n, e) = h.dims3()?;
    let scores = metric.scores(&h.reshape((b * n, e))?, codes)?;
    softmax(&scores)?.matmul(&codes.detach())?.reshape((b, n, e))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::super::table::{Choices, Table};
    use super::*;

    fn vector(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Value and gradient of Σ g·token for features and codes in the plane.
    fn pass<const M: usize, const K: usize>(
        gradient: Gradient,
        features: &[[f32; 2]; M],
        codes: &[[f32; 2]; K],
        g: [f32; 2],
    ) -> (Vec<f32>, Vec<f32>) {
        let features = Var::new(features, &Device::Cpu).unwrap();
        let codes = Tensor::new(codes, &Device::Cpu).unwrap();
        let (metric, entropy) = (Metric::Euclidean, None);
        let choices = Choices { metric, gradient, learns: true, codebook_cost: 1.0, commitment_cost: 1.0, entropy };
        let tokens = Table::new(codes, None, choices).choose(&features.unsqueeze(0).unwrap()).unwrap().tokens;
        let g = Tensor::new(&[[g]], &Device::Cpu).unwrap();
        let grads = tokens.broadcast_mul(&g).unwrap().sum_all().unwrap().backward().unwrap();
        (vector(&tokens), vector(grads.get(&features).unwrap()))
    }

    #[test]
    fn a_quarter_turn_by_hand() {
        // (1, 0) to (0, 2): a turn of 90° and twice the length. Its transpose takes (0, 1) to (2, 0).
        let (tokens, gradient) = pass(Gradient::Rotation, &[[1., 0.]], &[[0., 2.]], [0., 1.]);
        assert_eq!(tokens, [0., 2.]);
        assert!((gradient[0] - 2.0).abs() < 1e-6 && gradient[1].abs() < 1e-6, "{gradient:?}");
    }

    #[test]
    fn dynamic_weights_by_hand() {
        // Squared distances to the one code are 1 and 4, so the second feature's gradient is a quarter.
        let (tokens, gradient) = pass(Gradient::DynamicSte, &[[1., 0.], [0., 2.]], &[[0., 0.]], [3., 1.]);
        assert_eq!(tokens, [0.; 4]);
        assert_eq!(gradient, [3., 1., 0.75, 0.25]);
        // A feature that is its code has weight one, though its distance is zero; another of that code has none left.
        let (_, gradient) = pass(Gradient::DynamicSte, &[[1., 1.], [1., 2.]], &[[1., 1.]], [1., 1.]);
        assert_eq!(gradient, [1., 1., 0., 0.]);
    }

    #[test]
    fn ibq_of_two_codes_by_hand() {
        // Codes ±(1, 0), feature 0: both have probability 1/2, and d token/dh = Σ p c cᵀ = diag(1, 0).
        let (tokens, gradient) = pass(Gradient::Ibq, &[[0., 0.]], &[[1., 0.], [-1., 0.]], [1., 5.]);
        assert_eq!(tokens, [1., 0.]);
        assert_eq!(gradient, [1., 0.]);
    }

    #[test]
    fn straight_through_is_the_codes_gradient() {
        let (tokens, gradient) = pass(Gradient::StraightThrough, &[[0.3, 0.1]], &[[1., 0.]], [1., 5.]);
        assert_eq!((tokens, gradient), (vec![1., 0.], vec![1., 5.]));
    }
}
