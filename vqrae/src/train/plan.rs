//! What a run would be, without running it: parameters of each group, memory, schedule.

use std::collections::BTreeMap;
use std::rc::Rc;

use candle_core::Device;

use super::config::{Config, GROUPS, Start, group};
use super::optimizer;
use super::parameters::Fate;
use super::ranks::Alone;
use super::stage::{Stage, Target};
use crate::error::Result;
use crate::model::fresh_tensors;
use crate::vit;
use crate::weights::{Store, Tensors};

/// What a run would be.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The groups by name.
    pub groups: BTreeMap<&'static str, GroupPlan>,
    /// Bytes of a step, by what they hold; an estimate, without a discriminator's activations.
    pub memory: Vec<(&'static str, u64)>,
}

/// One group of parameters.
#[derive(Debug, Clone, Default)]
pub struct GroupPlan {
    /// Values that gradients move.
    pub trained: u64,
    /// Of these, the ones that weight decay applies to.
    pub decayed: u64,
    /// Values that stay, or are moving averages.
    pub untrained: u64,
    /// Learning rates at evenly spread steps, from the first to the last.
    pub rates: Vec<f64>,
}

/// Learning rates of a [`GroupPlan`].
const RATES: usize = 60;

impl Plan {
    /// What `config` asks for.
    ///
    /// # Errors
    /// A model folder that cannot be read or is another model's, or sizes that do not suit the model.
    pub fn of(config: &Config) -> Result<Self> {
        let model = config.model.config();
        let preprocessor = config.preprocessor()?;
        let buckets = config.train.buckets(preprocessor.size, &model)?;
        let mut groups: BTreeMap<&str, GroupPlan> = GROUPS.iter().map(|name| (*name, GroupPlan::default())).collect();
        for (name, shape) in shapes(config)? {
            let count = shape.iter().product::<usize>() as u64;
            let plan = groups.entry(group(&name)).or_default();
            match Fate::of(&name, &config.groups, &model) {
                Fate::Trained if optimizer::decays(&name, shape.len()) => {
                    plan.trained += count;
                    plan.decayed += count;
                }
                Fate::Trained => plan.trained += count,
                Fate::Average | Fate::Frozen => plan.untrained += count,
            }
        }
        let steps = config.train.steps;
        for (name, plan) in &mut groups {
            let rate = config.groups.of(name);
            let step = |i: usize| i * steps.saturating_sub(1) / (RATES - 1);
            plan.rates = (0..RATES).map(|i| rate.at(step(i), config.train.warmup_steps, steps)).collect();
        }
        if let Some(gan) = config.start_gan(&preprocessor, Rc::new(Alone(Device::Cpu)))? {
            let (trained, decayed) = gan.parameter_counts();
            let rates = (0..RATES).map(|i| gan.rate(i * steps.saturating_sub(1) / (RATES - 1))).collect();
            groups.insert("discriminator", GroupPlan { trained, decayed, untrained: 0, rates });
        }
        let grid = buckets
            .iter()
            .map(|sizes| (sizes.input.0 / model.encoder.patch()) * (sizes.input.1 / model.encoder.patch()));
        let tokens = grid.max().unwrap_or_default() * config.train.batch_size / config.train.accumulate;
        let memory = memory(config, &groups, tokens as u64);
        Ok(Self { groups, memory })
    }
}

/// The shapes of all tensors.
fn shapes(config: &Config) -> Result<Vec<(String, Vec<usize>)>> {
    if let Start::Folder { path } = &config.start {
        let store = Store::open(path)?;
        let shape = |name: &String| Some((name.clone(), store.shape(name)?.to_vec()));
        return Ok(store.names().filter_map(shape).collect());
    }
    let tensors = fresh_tensors(&config.model.config(), Tensors::new(), config.train.seed)?;
    Ok(tensors.into_iter().map(|(name, tensor)| (name, tensor.dims().to_vec())).collect())
}

/// In f32: 4 bytes a value.
fn memory(config: &Config, groups: &BTreeMap<&str, GroupPlan>, tokens: u64) -> Vec<(&'static str, u64)> {
    let trained: u64 = groups.values().map(|plan| plan.trained).sum();
    let all: u64 = trained + groups.values().map(|plan| plan.untrained).sum::<u64>();
    let encoder = &groups["encoder"];
    let distils = |wanted: &&super::stage::Distillation| wanted.target == Target::Continuous;
    let teacher = config.stage.as_ref().and_then(Stage::distillation).filter(distils);
    let (model, train) = (config.model.config(), &config.train);
    let sizes = model.decoder.sizes(&model.encoder);
    let mut held = stack(&sizes.vit, tokens, train.checkpoint_blocks);
    if encoder.trained > 0 {
        held += stack(&model.encoder.layout().blocks(), tokens, train.checkpoint_blocks);
    }
    vec![
        ("weights", 4 * all),
        ("gradients", 4 * trained),
        ("moments", 8 * trained),
        ("average of the weights", if train.ema_decay > 0.0 { 4 * trained } else { 0 }),
        ("teacher", if teacher.is_some() { 4 * (encoder.trained + encoder.untrained) } else { 0 }),
        ("activations", 4 * held),
    ]
}

/// Values that a stack of blocks holds for the backward pass of this many tokens: of each block its input, both norms, q, k, v,
/// the attention, its projection, two sums, the MLP's output and a copy of the block's, and the MLP's hidden layer before its
/// activation.
fn stack(blocks: &vit::Config, tokens: u64, checkpoint: bool) -> u64 {
    let block = tokens * (12 * blocks.width as u64 + blocks.mlp_width as u64);
    let depth = blocks.depth as u64;
    if checkpoint { block + depth * tokens * blocks.width as u64 } else { depth * block }
}
