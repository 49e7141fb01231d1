//! A codebook as a moving average of the features that chose its codes (van den Oord et al., arXiv 1711.00937, appendix
//! A.1), with the semantics of vector-quantize-pytorch 1.32.
//!
//! ```text
//! n_k ← γ n_k + (1 − γ) #{i = k}                               cluster_size
//! m_k ← γ m_k + (1 − γ) Σ_{i = k} h                            embed_avg
//! C_k ← m_k / (Σn (n_k + ε) / (Σn + K ε))                      codebook; cosine: then of length one
//! ```

use candle_core::{Result, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use super::Metric;
use super::bottleneck::check_cost;
use super::kmeans::{self, Choose};
use crate::ops::averages::{self, Restart};
use crate::weights::Tensors;

pub(super) const CODEBOOK: &str = "codebook";
const CLUSTER_SIZE: &str = "cluster_size";
const EMBED_AVG: &str = "embed_avg";

/// The equal shares that a batch is divided into where several ranks train together, as moving averages see them.
pub trait Shares {
    /// How many there are.
    fn count(&self) -> usize;

    /// Which one this is, from 0, in the order of the batch.
    fn index(&self) -> usize;

    /// Replaces numbers by their sums over all shares.
    fn add(&self, values: &mut [f64]) -> Result<()>;
}

/// The whole batch in one share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Whole;

impl Shares for Whole {
    fn count(&self) -> usize {
        1
    }

    fn index(&self) -> usize {
        0
    }

    fn add(&self, _: &mut [f64]) -> Result<()> {
        Ok(())
    }
}

/// Whether a tensor of this name, without what stands before its last dot, belongs to a codebook of moving averages.
pub(super) fn is_average(name: &str) -> bool {
    [CODEBOOK, CLUSTER_SIZE, EMBED_AVG].contains(&name)
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

impl Default for EmaConfig {
    fn default() -> Self {
        Self { decay: 0.8, eps: 1e-5, threshold_ema_dead_code: 0.0, reset_cluster_size: None }
    }
}

impl EmaConfig {
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        if !(0.0..1.0).contains(&self.decay) {
            return Err(format!("quantizer: ema.decay is {}, expected: 0 or more and less than 1", self.decay));
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return Err(format!("quantizer: ema.eps is {}, expected: more than 0", self.eps));
        }
        check_cost("ema.threshold_ema_dead_code", self.threshold_ema_dead_code)?;
        check_cost("ema.reset_cluster_size", self.reset_cluster_size.unwrap_or(0.0))
    }

    /// The codes of these sizes that start again, and which of `n` features each becomes.
    fn dead(&self, sizes: &[f32], n: usize, choose: Choose) -> (Vec<usize>, Vec<usize>) {
        let is_dead = |&k: &usize| f64::from(sizes[k]) < self.threshold_ema_dead_code;
        let mut dead: Vec<usize> = (0..sizes.len()).filter(is_dead).collect();
        if dead.is_empty() || n == 0 {
            return (Vec::new(), Vec::new());
        }
        if dead.len() > n {
            let mut chosen = choose(dead.len(), n);
            chosen.sort_unstable();
            dead = chosen.into_iter().map(|i| dead[i]).collect();
        }
        let chosen = choose(n, dead.len());
        (dead, chosen)
    }

    fn reset(&self) -> f32 {
        self.reset_cluster_size.unwrap_or(self.threshold_ema_dead_code) as f32
    }
}

/// What a moving average of a codebook remembers. A fresh one is all zeros and stands for what vector-quantize-pytorch
/// starts with: a size of one, and the code itself.
#[derive(Debug, Clone)]
pub(super) struct Averages {
    config: EmaConfig,
    /// n, `[K]`.
    cluster_size: Tensor,
    /// m, `[K, e]`.
    embed_avg: Tensor,
}

impl Averages {
    /// Loads `cluster_size` and `embed_avg`.
    pub(super) fn load(vb: &VarBuilder, config: EmaConfig, k: usize, e: usize) -> Result<Self> {
        let cluster_size = vb.get_with_hints(k, CLUSTER_SIZE, candle_nn::init::ZERO)?;
        let embed_avg = vb.get_with_hints((k, e), EMBED_AVG, candle_nn::init::ZERO)?;
        Ok(Self { config, cluster_size, embed_avg })
    }

    /// New values of all three tensors after a step. `batches` are what chose of this codebook, each `[B, N, e]` as it met
    /// the codes with its indices `[B, N]`: one batch, or one a level where levels share the codebook. They are this share's,
    /// the new values are those of all shares.
    pub(super) fn update(
        &self,
        codebook: &Tensor,
        metric: Metric,
        batches: &[(Tensor, Tensor)],
        shares: &dyn Shares,
        choose: Choose,
    ) -> Result<Tensors> {
        if shares.count() == 1 && averages::serves(codebook) {
            return self.update_on_gpu(codebook, metric, batches, choose);
        }
        let mut state = self.state(codebook, metric)?;
        for (features, indices) in batches {
            state.follow(&array(features)?, &indices.flatten_all()?.to_vec1::<u32>()?, shares)?;
        }
        state.smooth();
        let features: Vec<&Tensor> = batches.iter().map(|(features, _)| features).collect();
        // Token by token, as the library has them: what is drawn depends on the order.
        state.restart(&array(&Tensor::stack(&features, 2)?)?, shares, choose)?;
        state.tensors(codebook)
    }

    /// [`Averages::update`] of the whole batch where it is, on a GPU.
    fn update_on_gpu(
        &self,
        codebook: &Tensor,
        metric: Metric,
        batches: &[(Tensor, Tensor)],
        choose: Choose,
    ) -> Result<Tensors> {
        let config = &self.config;
        let step = averages::Step {
            codes: codebook,
            sizes: &self.cluster_size,
            sums: &self.embed_avg,
            batches,
            decay: config.decay,
            eps: config.eps,
            shortest: (metric == Metric::Cosine).then_some(kmeans::SHORTEST),
            reset: config.reset(),
        };
        let [codes, sizes, sums] = step.take(|sizes, features| {
            let (dead, chosen) = config.dead(sizes, features, choose);
            Restart { dead, chosen }
        })?;
        let named = [(CODEBOOK, codes), (CLUSTER_SIZE, sizes), (EMBED_AVG, sums)];
        Ok(named.map(|(name, tensor)| (name.to_string(), tensor)).into())
    }

    /// The three tensors of centres `[K, e]` and their sizes `[K]`.
    pub(super) fn begin(&self, codebook: &Tensor, metric: Metric, centres: &[f32], sizes: &[usize]) -> Result<Tensors> {
        let mut state = self.state(codebook, metric)?;
        state.sizes = sizes.iter().map(|&size| size as f32).collect();
        let e = state.e;
        for ((sum, centre), size) in state.sums.chunks_exact_mut(e).zip(centres.chunks_exact(e)).zip(&state.sizes) {
            sum.iter_mut().zip(centre).for_each(|(sum, c)| *sum = c * size);
        }
        state.smooth();
        state.tensors(codebook)
    }

    fn state(&self, codebook: &Tensor, metric: Metric) -> Result<State> {
        let (codes, mut sizes, mut sums) = (array(codebook)?, array(&self.cluster_size)?, array(&self.embed_avg)?);
        if sizes.iter().all(|&size| size == 0.0) {
            sizes.fill(1.0);
            sums.clone_from(&codes);
        }
        Ok(State { config: self.config, cosine: metric == Metric::Cosine, e: codebook.dim(1)?, codes, sizes, sums })
    }
}

fn array(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1::<f32>()
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
    fn follow(&mut self, features: &[f32], indices: &[u32], shares: &dyn Shares) -> Result<()> {
        let e = self.e;
        let mut counted = vec![0f64; self.sizes.len() + self.sums.len()];
        let (sizes, sums) = counted.split_at_mut(self.sizes.len());
        for (feature, &k) in features.chunks_exact(e).zip(indices) {
            let k = k as usize;
            sizes[k] += 1.0;
            sums[k * e..][..e].iter_mut().zip(feature).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        shares.add(&mut counted)?;
        let decay = self.config.decay;
        let lerp = |(old, new): (&mut f32, f64)| *old = (decay * f64::from(*old) + (1.0 - decay) * new) as f32;
        self.sizes.iter_mut().chain(&mut self.sums).zip(counted).for_each(lerp);
        Ok(())
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
    fn restart(&mut self, features: &[f32], shares: &dyn Shares, choose: Choose) -> Result<()> {
        let e = self.e;
        let own = features.len() / e;
        let (dead, drawn) = self.config.dead(&self.sizes, own * shares.count(), choose);
        if dead.is_empty() {
            return Ok(());
        }
        // Every share has the features that are its own, and zeros for the others'.
        let mut chosen = vec![0f64; dead.len() * e];
        for (chosen, i) in chosen.chunks_exact_mut(e).zip(drawn) {
            if let Some(at) = i.checked_sub(shares.index() * own).filter(|&at| at < own) {
                chosen.iter_mut().zip(&features[at * e..][..e]).for_each(|(chosen, &x)| *chosen = f64::from(x));
            }
        }
        shares.add(&mut chosen)?;
        let reset = self.config.reset();
        for (&k, feature) in dead.iter().zip(chosen.chunks_exact(e)) {
            let row = self.codes[k * e..][..e].iter_mut().zip(&mut self.sums[k * e..][..e]);
            row.zip(feature).for_each(|((code, sum), &x)| (*code, *sum) = (x as f32, x as f32 * reset));
            self.sizes[k] = reset;
        }
        Ok(())
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
        state.follow(&[1., 2., 3.], &[0, 0, 0], &Whole).unwrap();
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
        state.follow(&[1., 2., 3.], &[0, 0, 0], &Whole).unwrap();
        state.smooth();
        let mut last = |n, amount| {
            assert_eq!((n, amount), (3, 1));
            vec![2]
        };
        state.restart(&[1., 2., 3.], &Whole, &mut last).unwrap();
        assert_eq!((state.codes, state.sizes, state.sums), (vec![1.5, 3.], vec![2., 0.75], vec![3., 2.25]));
    }

    #[test]
    fn of_more_dead_codes_than_features_some_wait() {
        let mut state = state(100.0);
        state.restart(&[7.], &Whole, &mut |n, amount| (n - amount..n).collect()).unwrap();
        assert_eq!((state.codes, state.sizes), (vec![0., 7.], vec![1., 100.]));
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_gpu_has_the_averages_of_the_cpu_bit_for_bit() {
        use candle_core::Device;

        let Some(gpu) = crate::ops::cuda::test_device() else { return };
        let wave = |shape: &[usize], phase: f32, device: &Device| {
            let values =
                (0..shape.iter().product()).map(|i: usize| (i as f32 * 0.7 + phase).sin() * 1.5f32.powi(i as i32 % 40));
            Tensor::from_vec(values.collect::<Vec<f32>>(), shape, device).unwrap()
        };
        for (metric, begun, levels) in
            [(Metric::Euclidean, true, 1), (Metric::Cosine, true, 2), (Metric::Euclidean, false, 1)]
        {
            let run = |device: &Device| {
                let (k, e) = (7, 5);
                let config =
                    EmaConfig { threshold_ema_dead_code: 0.3, reset_cluster_size: Some(0.7), ..EmaConfig::default() };
                let sizes = wave(&[k], 2.0, device).abs().unwrap();
                let (cluster_size, embed_avg) = match begun {
                    true => (sizes, wave(&[k, e], 3.0, device)),
                    false => (sizes.zeros_like().unwrap(), wave(&[k, e], 3.0, device).zeros_like().unwrap()),
                };
                let averages = Averages { config, cluster_size, embed_avg };
                let batch = |level: usize| {
                    let indices: Vec<u32> = (0..12).map(|i| (i * i + level as u32) % 5).collect();
                    (wave(&[2, 6, e], level as f32, device), Tensor::from_vec(indices, (2, 6), device).unwrap())
                };
                let batches: Vec<_> = (0..levels).map(batch).collect();
                let mut drawn = Vec::new();
                let mut last = |n: usize, amount: usize| {
                    drawn.push((n, amount));
                    (n - amount..n).collect()
                };
                let codebook = wave(&[k, e], 4.0, device);
                let tensors = averages.update(&codebook, metric, &batches, &Whole, &mut last).unwrap();
                let bits = |x: &Tensor| array(x).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>();
                (tensors.iter().map(|(name, x)| (name.clone(), bits(x))).collect::<Vec<_>>(), drawn)
            };
            let (here, expected) = (run(&gpu), run(&Device::Cpu));
            assert_eq!(here, expected, "{metric:?} {begun} {levels}");
        }
    }
}
