//! What features are worth to those who want to know what a photo shows.

use std::collections::BTreeMap;

use candle_core::{D, Var};
use candle_nn::{VarBuilder, loss};
use vqrae::ops::Linear;
use vqrae::train::optimizer::{self, AdamW, Gradients};
use vqrae::train::schedule::Rate;
use vqrae::weights::{Fresh, Tensors};
use vqrae::{DType, Device, Tensor};

use crate::classes::Labels;

/// Neighbours that vote.
const NEIGHBOURS: usize = 15;

/// Layers and what moves them.
pub struct Learner<T> {
    /// The layers.
    pub layers: T,
    /// Their tensors.
    pub parameters: BTreeMap<String, Var>,
    optimizer: AdamW,
    rate: Rate,
    steps: usize,
}

impl<T> Learner<T> {
    /// Fresh layers, whose rate rises to `peak` and falls in `steps` steps.
    pub fn new(peak: f64, steps: usize, load: impl Fn(VarBuilder) -> candle_core::Result<T>) -> anyhow::Result<Self> {
        let fresh = Fresh::new(0, Tensors::new()).make(&load)?;
        let var = |(name, tensor): (String, Tensor)| Ok((name, Var::from_tensor(&tensor)?));
        let parameters = fresh.into_iter().map(var).collect::<candle_core::Result<BTreeMap<_, _>>>()?;
        let tracked = parameters.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        let layers = load(VarBuilder::from_tensors(tracked, DType::F32, &Device::Cpu))?;
        let config = optimizer::Config { weight_decay: 0.05, ..optimizer::Config::default() };
        let optimizer = AdamW::new(config, &parameters)?;
        Ok(Self { layers, parameters, optimizer, rate: Rate { peak, ..Rate::FROZEN }, steps })
    }

    /// A step down the cross-entropy of these logits.
    pub fn step(&mut self, step: usize, logits: &Tensor, labels: &Tensor) -> anyhow::Result<f32> {
        let loss = loss::cross_entropy(logits, labels)?;
        let gradients = Gradients::of(&self.parameters, loss.backward()?)?;
        let rate = self.rate.at(step, self.steps / 20, self.steps);
        self.optimizer.step(&self.parameters, &gradients, step, |_| rate)?;
        Ok(loss.to_scalar()?)
    }
}

/// Vectors of length one.
pub fn unit(x: &Tensor) -> candle_core::Result<Tensor> {
    x.broadcast_div(&x.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)
}

/// Mean cosine of features, token by token.
pub fn cosine(a: &Tensor, b: &Tensor) -> candle_core::Result<f32> {
    (unit(a)? * unit(b)?)?.sum(D::Minus1)?.mean_all()?.to_scalar()
}

/// In how many of a hundred photos the vote of the nearest neighbours, each by its cosine, is right.
///
/// # Shapes
/// - gallery, queries: `[M, D]`, a row a photo of `known`, of `asked`
pub fn nearest(gallery: &Tensor, known: &Labels, queries: &Tensor, asked: &Labels) -> anyhow::Result<f64> {
    let similar = unit(queries)?.matmul(&unit(gallery)?.t()?)?.to_vec2::<f32>()?;
    let vote = |row: &Vec<f32>| {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let mut votes = vec![0.0; known.classes];
        order.iter().take(NEIGHBOURS).for_each(|&i| votes[known.numbers[i] as usize] += row[i]);
        votes
    };
    Ok(right(similar.iter().map(vote), asked))
}

/// In how many of a hundred photos a linear layer that was trained on the gallery is right; shapes as in [`nearest`].
pub fn probe(gallery: &Tensor, known: &Labels, queries: &Tensor, asked: &Labels) -> anyhow::Result<f64> {
    const STEPS: usize = 300;
    let (mean, width) = (gallery.mean_keepdim(0)?, gallery.dim(1)?);
    let deviation = gallery.broadcast_sub(&mean)?.sqr()?.mean_keepdim(0)?.sqrt()?;
    let scale = |x: &Tensor| x.broadcast_sub(&mean)?.broadcast_div(&deviation);
    let (gallery, labels) = (scale(gallery)?, Tensor::new(&known.numbers[..], &Device::Cpu)?);
    let mut learner = Learner::new(1e-2, STEPS, |vb| Linear::load(vb, width, known.classes))?;
    for step in 0..STEPS {
        let logits = learner.layers.forward(&gallery)?;
        learner.step(step, &logits, &labels)?;
    }
    let logits = learner.layers.forward(&scale(queries)?)?.to_vec2::<f32>()?;
    Ok(right(logits.into_iter(), asked))
}

/// In how many of a hundred photos the highest score is that of the photo's class.
fn right(scores: impl Iterator<Item = Vec<f32>>, asked: &Labels) -> f64 {
    let best = |scores: &[f32]| (0..scores.len()).max_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    let right = scores.zip(&asked.numbers).filter(|(scores, label)| best(scores) == Some(**label as usize));
    100.0 * right.count() as f64 / asked.numbers.len() as f64
}
