//! The entropies that keep every token sure of its code and all codes in use (Yu et al., arXiv 2310.05737, eq. 6).

use candle_core::{D, Result, Tensor};
use serde::{Deserialize, Serialize};

use super::bottleneck::check_cost;
use crate::ops::composed::softmax;

/// An entropy term for a codebook: `w (mean_n H(p(n)) − γ H(mean_n p(n)))` with `p(n) = softmax_k(−‖h_n − c_k‖² / τ)`, h and c
/// of length one where the metric goes by angle (IDEAL, UniTok). Needs memory for a probability of every token and code.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EntropyConfig {
    /// w, the weight of the term.
    pub weight: f64,
    /// τ.
    pub temperature: f64,
    /// γ, the weight of the entropy of the mean.
    pub diversity_gamma: f64,
}

impl Default for EntropyConfig {
    fn default() -> Self {
        Self { weight: 0.1, temperature: 0.01, diversity_gamma: 1.0 }
    }
}

impl EntropyConfig {
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        check_cost("entropy.weight", self.weight)?;
        check_cost("entropy.diversity_gamma", self.diversity_gamma)?;
        if !self.temperature.is_finite() || self.temperature <= 0.0 {
            return Err(format!("quantizer: entropy.temperature is {}, expected: more than 0", self.temperature));
        }
        Ok(())
    }
}

/// `mean_n H(p(n)) − γ H(mean_n p(n))` for `p = softmax(logits)`, logits `[M, K]`.
pub(super) fn entropies(logits: &Tensor, gamma: f64) -> Result<Tensor> {
    let p = softmax(logits)?;
    let of_tokens = entropy(&p)?.mean_all()?;
    of_tokens - (entropy(&p.mean(0)?)? * gamma)?
}

/// −Σ p ln p over the last dimension, where ln sees at least 1e-5.
fn entropy(p: &Tensor) -> Result<Tensor> {
    (p * p.maximum(1e-5)?.log()?)?.sum(D::Minus1)?.neg()
}
