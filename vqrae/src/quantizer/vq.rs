//! VQ (van den Oord et al., arXiv 1711.00937): a codebook that learns by gradient, or as a moving average of the features
//! that chose its codes (its appendix A.1), with the semantics of vector-quantize-pytorch 1.32's `VectorQuantize`.
//!
//! ```text
//! h = norm(z Aᵀ + a)      features D → e                       linear_in, norm
//! i = argmin_k ‖h − C_k‖   (cosine: of h/‖h‖ and C_k/‖C_k‖)     codebook
//! loss = mean‖sg(h) − C_i‖² + β mean‖h − sg(C_i)‖²             (EMA: the second term alone)
//! z' = C_i Bᵀ + b         e → D'                               linear_out
//!
//! n_k ← γ n_k + (1 − γ) #{i = k}                               cluster_size
//! m_k ← γ m_k + (1 − γ) Σ_{i = k} h                            embed_avg
//! C_k ← m_k / (Σn (n_k + ε) / (Σn + K ε))                      codebook; cosine: then of length one
//! ```

use candle_core::{DType, Result, Tensor};
use candle_nn::{Init, VarBuilder};
use serde::{Deserialize, Serialize};

use super::common::{Body, Choices, Metric, Norm, Prepared, is_default};
use super::kmeans::{self, Choose};
use super::{Gradient, Quantized};
use crate::weights::Tensors;

/// The sizes and choices of a VQ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VqConfig {
    /// Number K of codes.
    pub codebook_size: usize,
    /// Width e of a code.
    pub codebook_dim: usize,
    /// What nearest means.
    pub metric: Metric,
    /// β, the weight of the commitment term; van den Oord et al. have 0.25, vector-quantize-pytorch has 1.
    pub commitment_cost: f64,
    /// Codes as moving averages of features; without it they learn by gradient.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema: Option<EmaConfig>,
    /// How a fresh codebook starts.
    pub init: CodebookInit,
    /// Lloyd steps where `init` is `kmeans`.
    pub kmeans_iterations: usize,
    /// How the decoder's gradient passes the choice of a code.
    #[serde(skip_serializing_if = "is_default")]
    pub gradient: Gradient,
    /// What brings features to a fixed scale after `linear_in`.
    #[serde(skip_serializing_if = "is_default")]
    pub norm: Norm,
}

/// The moving averages of an EMA codebook.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmaConfig {
    /// γ, the share of the old average that a step keeps.
    pub decay: f64,
    /// ε of the Laplace smoothing, which keeps codes that nobody chooses finite.
    pub eps: f64,
    /// A code whose average `cluster_size` falls below this becomes a feature of the batch; 0 for never.
    pub threshold_ema_dead_code: f64,
    /// The `cluster_size` of such a code; `null` is the threshold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reset_cluster_size: Option<f64>,
}

/// How a fresh codebook starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CodebookInit {
    /// Uniform within ±√(6/e): PyTorch's `kaiming_uniform_`, vector-quantize-pytorch's.
    #[default]
    KaimingUniform,
    /// Standard normal numbers.
    Normal,
    /// Centres of the features of the first training step; zeros before it.
    Kmeans,
    /// Features of the first training step; zeros before it.
    Data,
}

impl Default for VqConfig {
    fn default() -> Self {
        Self {
            codebook_size: 16_384,
            codebook_dim: 64,
            metric: Metric::default(),
            commitment_cost: 0.25,
            ema: None,
            init: CodebookInit::default(),
            kmeans_iterations: 10,
            gradient: Gradient::default(),
            norm: Norm::default(),
        }
    }
}

impl Default for EmaConfig {
    fn default() -> Self {
        Self { decay: 0.8, eps: 1e-5, threshold_ema_dead_code: 0.0, reset_cluster_size: None }
    }
}

impl VqConfig {
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        self.choices().check(self.codebook_size, self.codebook_dim)?;
        let Some(ema) = self.ema else { return Ok(()) };
        if self.metric == Metric::Hsq {
            return Err("quantizer: metric `hsq` learns codes by gradient; remove ema, or take `cosine`".into());
        }
        if !(0.0..1.0).contains(&ema.decay) {
            return Err(format!("quantizer: ema.decay is {}, expected: 0 or more and less than 1", ema.decay));
        }
        if !(ema.eps.is_finite() && ema.eps > 0.0) {
            return Err(format!("quantizer: ema.eps is {}, expected: more than 0", ema.eps));
        }
        let sizes = [
            ("threshold_ema_dead_code", ema.threshold_ema_dead_code),
            ("reset_cluster_size", ema.reset_cluster_size.unwrap_or(0.0)),
        ];
        match sizes.into_iter().find(|(_, size)| !size.is_finite() || *size < 0.0) {
            Some((name, size)) => Err(format!("quantizer: ema.{name} is {size}, expected: 0 or more")),
            None => Ok(()),
        }
    }

    fn choices(&self) -> Choices {
        let Self { metric, gradient, norm, commitment_cost, .. } = *self;
        Choices { metric, gradient, norm, commitment_cost }
    }

    /// Whether a tensor of this name is a moving average, which no gradient moves.
    pub(super) fn is_average(&self, name: &str) -> bool {
        self.ema.is_some() && [CODEBOOK, CLUSTER_SIZE, EMBED_AVG].contains(&name)
    }
}

const CODEBOOK: &str = "codebook";
const CLUSTER_SIZE: &str = "cluster_size";
const EMBED_AVG: &str = "embed_avg";

/// A VQ with its weights, in f32 whatever the encoder's dtype.
#[derive(Debug, Clone)]
pub struct Vq {
    config: VqConfig,
    pub(crate) body: Body,
    pub(crate) codebook: Tensor,
    averages: Option<Averages>,
}

/// What a moving average of a codebook remembers. A fresh one is all zeros and stands for what vector-quantize-pytorch
/// starts with: a size of one, and the code itself.
#[derive(Debug, Clone)]
struct Averages {
    config: EmaConfig,
    /// n, `[K]`.
    cluster_size: Tensor,
    /// m, `[K, e]`.
    embed_avg: Tensor,
}

impl Vq {
    /// Loads `linear_in`, `codebook`, `linear_out`, `norm` if there is one, and with EMA `cluster_size` and `embed_avg`.
    pub fn load(vb: VarBuilder, config: &VqConfig, width_in: usize, width_out: usize) -> Result<Self> {
        let vb = vb.to_dtype(DType::F32);
        let (k, e) = (config.codebook_size, config.codebook_dim);
        let bound = (6.0 / e as f64).sqrt();
        let init = match config.init {
            CodebookInit::KaimingUniform => Init::Uniform { lo: -bound, up: bound },
            CodebookInit::Normal => Init::Randn { mean: 0.0, stdev: 1.0 },
            CodebookInit::Kmeans | CodebookInit::Data => candle_nn::init::ZERO,
        };
        let codebook = vb.get_with_hints((k, e), CODEBOOK, init)?;
        let averages = |config: EmaConfig| {
            let cluster_size = vb.get_with_hints(k, CLUSTER_SIZE, candle_nn::init::ZERO)?;
            let embed_avg = vb.get_with_hints((k, e), EMBED_AVG, candle_nn::init::ZERO)?;
            Ok::<_, candle_core::Error>(Averages { config, cluster_size, embed_avg })
        };
        let averages = config.ema.map(averages).transpose()?;
        let body = Body::load(&vb, config.choices(), width_in, e, width_out)?;
        Ok(Self { config: config.clone(), body, codebook, averages })
    }

    pub(super) fn quantize(&self, features: &Tensor) -> Result<Quantized> {
        self.body.quantize(features, &self.prepare()?)
    }

    pub(super) fn lookup(&self, indices: &Tensor) -> Result<Tensor> {
        self.body.lookup(indices, &self.prepare()?)
    }

    pub(super) fn loss(&self, quantized: &Quantized) -> Result<Tensor> {
        let commitment = self.body.commitment_loss(quantized)?;
        if self.averages.is_some() {
            return Ok(commitment);
        }
        self.body.codes_loss(quantized, || Ok(self.codes()))? + commitment
    }

    pub(super) fn codebook(&self) -> Result<Tensor> {
        Ok(self.prepare()?.codes)
    }

    /// New values of `codebook`, `cluster_size` and `embed_avg` after a step that quantised `quantized`; none without
    /// EMA. `choose` draws the features that replace dead codes.
    pub(super) fn update(&self, quantized: &Quantized, choose: Choose) -> Result<Tensors> {
        let Some(averages) = &self.averages else { return Ok(Tensors::new()) };
        let mut state = averages.state(&self.codebook, self.config.metric)?;
        let features = quantized.projected.flatten_all()?.to_vec1::<f32>()?;
        state.follow(&features, &quantized.indices.flatten_all()?.to_vec1::<u32>()?);
        state.smooth();
        state.restart(&features, choose);
        state.tensors(&self.codebook)
    }

    /// The first values of `codebook`, and with EMA of `cluster_size` and `embed_avg`, where `init` takes them from
    /// features and the codebook is still all zeros; else none. `choose` draws features.
    ///
    /// # Shapes
    /// - features: `[B, N, D]`
    pub(super) fn first(&self, features: impl FnOnce() -> Result<Tensor>, choose: Choose) -> Result<Tensors> {
        let iterations = match self.config.init {
            CodebookInit::Kmeans => self.config.kmeans_iterations,
            CodebookInit::Data => 0,
            CodebookInit::KaimingUniform | CodebookInit::Normal => return Ok(Tensors::new()),
        };
        if self.codebook.abs()?.max_all()?.to_scalar::<f32>()? > 0.0 {
            return Ok(Tensors::new());
        }
        let points = self.body.project(&features()?)?.flatten_all()?.to_vec1::<f32>()?;
        let (k, e) = self.codebook.dims2()?;
        let ranking = self.config.metric.ranking();
        let made = kmeans::run(&points, e, k, iterations, ranking, choose).map_err(candle_core::Error::wrap)?;
        self.begin(made)
    }

    /// Starts from centres `[K, e]` and their sizes `[K]`.
    fn begin(&self, (centres, sizes): (Vec<f32>, Vec<usize>)) -> Result<Tensors> {
        let Some(averages) = &self.averages else {
            let codebook = Tensor::from_vec(centres, self.codebook.shape(), self.codebook.device())?;
            return Ok(Tensors::from([(CODEBOOK.to_string(), codebook)]));
        };
        let mut state = averages.state(&self.codebook, self.config.metric)?;
        state.sizes = sizes.into_iter().map(|size| size as f32).collect();
        let e = state.e;
        for ((sum, centre), size) in state.sums.chunks_exact_mut(e).zip(centres.chunks_exact(e)).zip(&state.sizes) {
            sum.iter_mut().zip(centre).for_each(|(sum, c)| *sum = c * size);
        }
        state.smooth();
        state.tensors(&self.codebook)
    }

    /// The codebook; no gradient reaches one that is a moving average.
    fn codes(&self) -> Tensor {
        if self.averages.is_some() { self.codebook.detach() } else { self.codebook.clone() }
    }

    fn prepare(&self) -> Result<Prepared> {
        // A moving average is held by a variable as long as it moves.
        self.body.prepare(self.codebook.track_op(), || Ok(self.codes()))
    }
}

impl Averages {
    fn state(&self, codebook: &Tensor, metric: Metric) -> Result<State> {
        let array = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
        let (codes, mut sizes, mut sums) = (array(codebook)?, array(&self.cluster_size)?, array(&self.embed_avg)?);
        if sizes.iter().all(|&size| size == 0.0) {
            sizes.fill(1.0);
            sums.clone_from(&codes);
        }
        Ok(State { config: self.config, cosine: metric == Metric::Cosine, e: codebook.dim(1)?, codes, sizes, sums })
    }
}

/// An EMA codebook in plain arrays, one step of its way.
struct State {
    config: EmaConfig,
    cosine: bool,
    e: usize,
    codes: Vec<f32>,
    sizes: Vec<f32>,
    sums: Vec<f32>,
}

impl State {
    /// Moves sizes and sums towards those of the batch.
    fn follow(&mut self, features: &[f32], indices: &[u32]) {
        let e = self.e;
        let mut sizes = vec![0f64; self.sizes.len()];
        let mut sums = vec![0f64; self.sums.len()];
        for (feature, &k) in features.chunks_exact(e).zip(indices) {
            let k = k as usize;
            sizes[k] += 1.0;
            sums[k * e..][..e].iter_mut().zip(feature).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        let decay = self.config.decay;
        let lerp = |old: &mut f32, new: f64| *old = (decay * f64::from(*old) + (1.0 - decay) * new) as f32;
        self.sizes.iter_mut().zip(sizes).for_each(|(old, new)| lerp(old, new));
        self.sums.iter_mut().zip(sums).for_each(|(old, new)| lerp(old, new));
    }

    /// The codes as sums over Laplace-smoothed sizes.
    fn smooth(&mut self) {
        let total: f64 = self.sizes.iter().map(|&size| f64::from(size)).sum();
        let eps = self.config.eps;
        let scale = total / (total + self.sizes.len() as f64 * eps);
        let e = self.e;
        for ((code, sum), &size) in self.codes.chunks_exact_mut(e).zip(self.sums.chunks_exact(e)).zip(&self.sizes) {
            let smoothed = (f64::from(size) + eps) * scale;
            code.iter_mut().zip(sum).for_each(|(code, &sum)| *code = (f64::from(sum) / smoothed) as f32);
            if self.cosine {
                kmeans::unit(code);
            }
        }
    }

    /// Makes dead codes features of the batch; where there are more than features, some wait for the next step.
    fn restart(&mut self, features: &[f32], choose: Choose) {
        let (e, threshold) = (self.e, self.config.threshold_ema_dead_code);
        let mut dead: Vec<usize> = (0..self.sizes.len()).filter(|&k| f64::from(self.sizes[k]) < threshold).collect();
        let n = features.len() / e;
        if dead.is_empty() || n == 0 {
            return;
        }
        if dead.len() > n {
            let mut chosen = choose(dead.len(), n);
            chosen.sort_unstable();
            dead = chosen.into_iter().map(|i| dead[i]).collect();
        }
        let reset = self.config.reset_cluster_size.unwrap_or(threshold) as f32;
        for (&k, i) in dead.iter().zip(choose(n, dead.len())) {
            let feature = &features[i * e..][..e];
            self.codes[k * e..][..e].copy_from_slice(feature);
            self.sums[k * e..][..e].iter_mut().zip(feature).for_each(|(sum, x)| *sum = x * reset);
            self.sizes[k] = reset;
        }
    }

    fn tensors(self, like: &Tensor) -> Result<Tensors> {
        let (k, e) = like.dims2()?;
        let tensor = |values: Vec<f32>, shape: &[usize]| Tensor::from_vec(values, shape, like.device());
        Ok(Tensors::from([
            (CODEBOOK.to_string(), tensor(self.codes, &[k, e])?),
            (CLUSTER_SIZE.to_string(), tensor(self.sizes, &[k])?),
            (EMBED_AVG.to_string(), tensor(self.sums, &[k, e])?),
        ]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes 0 and 10 on a line, γ = ½, and no smoothing to speak of.
    fn state(threshold: f64) -> State {
        let config = EmaConfig { decay: 0.5, eps: 1e-12, threshold_ema_dead_code: threshold, reset_cluster_size: None };
        State { config, cosine: false, e: 1, codes: vec![0., 10.], sizes: vec![1., 1.], sums: vec![0., 10.] }
    }

    #[test]
    fn a_step_by_hand() {
        let mut state = state(0.0);
        state.follow(&[1., 2., 3.], &[0, 0, 0]);
        state.smooth();
        // n = ½·1 + ½·3 = 2, m = ½·0 + ½·6 = 3; the other: n = ½, m = 5.
        assert_eq!((state.sizes, state.sums, state.codes), (vec![2., 0.5], vec![3., 5.], vec![1.5, 10.]));
    }

    #[test]
    fn smoothing_shrinks_the_codes_that_few_chose() {
        let mut state = state(0.0);
        state.config.eps = 1.0;
        state.sizes = vec![3., 1.];
        state.sums = vec![6., 10.];
        state.smooth();
        // Σn / (Σn + 2ε) = 4/6: sizes (3 + 1)·4/6 and (1 + 1)·4/6.
        assert_eq!(state.codes, [2.25, 7.5]);
    }

    #[test]
    fn a_dead_code_becomes_a_feature() {
        let mut state = state(0.75);
        state.follow(&[1., 2., 3.], &[0, 0, 0]);
        state.smooth();
        state.restart(&[1., 2., 3.], &mut |n, amount| {
            assert_eq!((n, amount), (3, 1));
            vec![2]
        });
        assert_eq!((state.codes, state.sizes, state.sums), (vec![1.5, 3.], vec![2., 0.75], vec![3., 2.25]));
    }

    #[test]
    fn of_more_dead_codes_than_features_some_wait() {
        let mut state = state(100.0);
        state.restart(&[7.], &mut |n, amount| (n - amount..n).collect());
        assert_eq!((state.codes, state.sizes), (vec![0., 7.], vec![1., 100.]));
    }
}
