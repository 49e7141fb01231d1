//! The training loop: batch, loss, step, log; whatever it draws at random follows from (seed, step), so a killed run goes on to the
//! same bits.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use vqrae::ops::Precision;
use vqrae::train::averaging::WeightAverage;
use vqrae::train::optimizer::{self, AdamW, Gradients};
use vqrae::train::schedule::Rate;
use vqrae::weights::{self, Fresh, Tensors};
use vqrae::{Error, Result, files};

use crate::config::Config;
use crate::data::Sequences;
use crate::network::Network;
use crate::objective::{Examples, Schedule};
use crate::{config, likelihood};

/// Counts of codes are raised by this before their logarithm is where scores begin.
const PRIOR: f64 = 0.5;

/// How a generator is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Steps of the run.
    pub steps: usize,
    /// Sequences of a step, B.
    pub batch: usize,
    /// Highest learning rate; rises over the first twentieth of the steps, then falls along a cosine.
    pub rate: f64,
    /// AdamW's weight decay of matrices.
    pub weight_decay: f64,
    /// Share of the sequences that are shown without their class, for guidance.
    pub class_dropout: f64,
    /// What is masked, where codes are.
    pub schedule: Schedule,
    /// γ of the moving average of the weights, which is what is validated and written.
    pub average: f64,
    /// What products read.
    pub precision: Precision,
    /// What everything random follows from.
    pub seed: u64,
    /// Steps from one validation and checkpoint to the next.
    pub every: usize,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            steps: 4000,
            batch: 16,
            rate: 1e-3,
            weight_decay: 0.05,
            class_dropout: 0.1,
            schedule: Schedule::Elbo,
            average: 0.999,
            precision: Precision::Bf16,
            seed: 0,
            every: 250,
        }
    }
}

impl Recipe {
    /// Whether the numbers make sense.
    ///
    /// # Errors
    /// The first that does not.
    pub fn check(&self) -> std::result::Result<(), String> {
        let shares = [("class_dropout", self.class_dropout), ("average", self.average)];
        if let Some((name, share)) = shares.into_iter().find(|(_, share)| !(0.0..=1.0).contains(share)) {
            return Err(format!("{name} is {share}, expected: 0 to 1"));
        }
        let rates = [("rate", self.rate), ("weight_decay", self.weight_decay)];
        if let Some((name, rate)) = rates.into_iter().find(|(_, rate)| !rate.is_finite() || *rate < 0.0) {
            return Err(format!("{name} is {rate}, expected: 0 or more"));
        }
        match self.batch == 0 || self.every == 0 {
            true => Err("batch and every are at least 1".to_string()),
            false => Ok(()),
        }
    }
}

/// Where a run is.
#[derive(Debug, Clone, Serialize)]
pub struct Log {
    /// Steps done.
    pub step: usize,
    /// Mean loss since the last line, bits a code.
    pub train: f64,
    /// Of sequences kept apart, with averaged weights, bits a code; for a masked generator a bound.
    pub validation: f64,
    /// Of as many of those trained on, the same way.
    pub seen: f64,
    /// Sequences a second.
    pub rate: f64,
}

/// Trains a generator into `folder`, or goes on with what a killed run of the same recipe left there; `tell` hears of every
/// validation. The folder is a model from the first validation on.
///
/// # Errors
/// If the recipe makes no sense or the config is not of these codes, files cannot be read or written, the checkpoint is another
/// recipe's, or the loss is no number.
pub fn run(
    folder: &Path,
    config: &Config,
    recipe: &Recipe,
    codebook: &Tensor,
    [train, apart]: [&Sequences; 2],
    mut tell: impl FnMut(&Log),
) -> Result<()> {
    recipe.check().map_err(Error::Training)?;
    config.check().map_err(Error::Training)?;
    if config.tokenizer != train.tokenizer || train.classes.len() != config.classes.len() {
        return Err(Error::Training("the config's tokenizer and classes are not those of the codes".to_string()));
    }
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let mut state = State::load(folder, config, recipe, codebook, train)?;
    let network = state.network(config, codebook)?.multiplied_in(recipe.precision);
    let rate = Rate { peak: recipe.rate, end: recipe.rate / 50.0, ..Rate::FROZEN };
    let (mut sum, mut count, mut begin) = (0.0, 0, Instant::now());
    while state.step < recipe.steps {
        let step = state.step;
        let mut random = ChaCha8Rng::seed_from_u64(recipe.seed ^ 0x67_656e);
        random.set_stream(step as u64);
        let batch = train.batch(recipe.seed, step, recipe.batch);
        let sequences: Vec<&[u32]> = batch.iter().map(|&i| train.codes(i)).collect();
        let none = config.classes.len() as u32;
        let class = |&i: &usize| if random.random_bool(recipe.class_dropout) { none } else { train.label(i) };
        let classes: Vec<u32> = batch.iter().map(class).collect();
        let examples = Examples::new(config.kind, recipe.schedule, &sequences, &mut random);

        let loss = loss(&network, &examples, &classes)?;
        let nats = loss.to_scalar::<f32>()?;
        if !nats.is_finite() {
            return Err(Error::Training(format!("the loss of step {step} is {nats}; lower the rate")));
        }
        let gradients = Gradients::of(&state.parameters, loss.backward()?)?;
        let now = rate.at(step, recipe.steps / 20, recipe.steps);
        state.optimizer.step(&state.parameters, &gradients, step, |_| now)?;
        state.follow(recipe.average)?;
        (state.step, sum, count) = (step + 1, sum + f64::from(nats), count + 1);

        if state.step % recipe.every == 0 || state.step == recipe.steps {
            let rate = (count * recipe.batch) as f64 / begin.elapsed().as_secs_f64();
            state.save(folder, config, recipe)?;
            let averaged = state.averaged(config, codebook)?.multiplied_in(recipe.precision);
            let of = |sequences| likelihood::of_network(&averaged, config.kind, sequences, likelihood::QUICK);
            let log = Log {
                step: state.step,
                train: sum / count as f64 * std::f64::consts::LOG2_E,
                validation: of(apart)?,
                seen: of(train)?,
                rate,
            };
            state.log(folder, &log)?;
            tell(&log);
            (sum, count, begin) = (0.0, 0, Instant::now());
        }
    }
    Ok(())
}

/// The loss of a batch.
fn loss(network: &Network, examples: &Examples, classes: &[u32]) -> Result<Tensor> {
    let places = Tensor::new(&examples.places[..], &Device::Cpu)?;
    let tokens = network.forward(&examples.inputs, classes)?.index_select(&places, 0)?;
    Ok(network.loss(&tokens, &examples.targets, &examples.weights)?)
}

/// What moves in a run.
struct State {
    step: usize,
    parameters: BTreeMap<String, Var>,
    optimizer: AdamW,
    average: WeightAverage,
}

/// What a checkpoint says of itself.
#[derive(Debug, Serialize, Deserialize)]
struct Progress {
    step: usize,
    recipe: Recipe,
    config: Config,
}

impl State {
    /// The checkpoint's, if there is one; else fresh.
    fn load(folder: &Path, config: &Config, recipe: &Recipe, codebook: &Tensor, train: &Sequences) -> Result<Self> {
        let mut fresh = Fresh::new(recipe.seed, Tensors::new()).make(|vb| Network::load(vb, config, codebook))?;
        let path = checkpoint(folder);
        if !path.exists() {
            let counts = train.counts();
            let all: f64 = counts.iter().map(|&count| f64::from(count) + PRIOR).sum();
            let bias: Vec<f32> = counts.iter().map(|&count| ((f64::from(count) + PRIOR) / all).ln() as f32).collect();
            fresh.insert("bias".to_string(), Tensor::new(bias, &Device::Cpu)?);
            return Self::of(fresh, recipe);
        }
        let wrong = |reason: String| Error::weights(&path, reason);
        let mut tensors = weights::read_file(&path)?;
        let mut take = |name: &str| tensors.remove(name).ok_or_else(|| wrong(format!("tensor `{name}` is missing")));
        let text = take(PROGRESS)?.flatten_all()?.to_vec1::<u8>()?;
        let said: Progress = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        // The length of a run may change, and how often it is validated.
        let alike = Recipe { steps: recipe.steps, every: recipe.every, ..said.recipe } == *recipe;
        if !alike || said.config != *config {
            return Err(wrong(
                "is of a run with another recipe; go on with that one, or take another folder".to_string(),
            ));
        }
        let (mut moments, mut averages) = (Tensors::new(), Tensors::new());
        for (name, weight) in &mut fresh {
            let kept = take(&format!("weight.{name}"))?;
            if kept.shape() != weight.shape() {
                let (got, expected) = (kept.dims(), weight.dims());
                return Err(wrong(format!("tensor `weight.{name}` has shape {got:?}, expected: {expected:?}")));
            }
            *weight = kept;
            for part in ["first", "second"] {
                moments.insert(format!("{part}.{name}"), take(&format!("{part}.{name}"))?);
            }
            averages.insert(name.clone(), take(&format!("average.{name}"))?);
        }
        let mut state = Self::of(fresh, recipe)?;
        state.optimizer.load_state(moments).map_err(|error| wrong(error.to_string()))?;
        state.average.load(averages).map_err(|error| wrong(error.to_string()))?;
        state.step = said.step;
        Ok(state)
    }

    fn of(tensors: Tensors, recipe: &Recipe) -> Result<Self> {
        let var = |(name, tensor): (String, Tensor)| Ok((name, Var::from_tensor(&tensor)?));
        let parameters = tensors.into_iter().map(var).collect::<Result<BTreeMap<_, _>>>()?;
        let constants =
            optimizer::Config { weight_decay: recipe.weight_decay, beta2: 0.98, ..optimizer::Config::default() };
        let (optimizer, average) = (AdamW::new(constants, &parameters)?, WeightAverage::new(&parameters)?);
        Ok(Self { step: 0, parameters, optimizer, average })
    }

    /// The network of the weights that are trained.
    fn network(&self, config: &Config, codebook: &Tensor) -> Result<Network> {
        let tensors = self.parameters.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        Ok(Network::load(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu), config, codebook)?)
    }

    /// The network of their averages.
    fn averaged(&self, config: &Config, codebook: &Tensor) -> Result<Network> {
        let tensors = self.averages()?.into_iter().collect();
        Ok(Network::load(VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu), config, codebook)?)
    }

    fn averages(&self) -> Result<Tensors> {
        self.average.tensors(&self.parameters)
    }

    /// The averages follow the weights; more slowly the longer a run is, so that a short one does not keep its start.
    fn follow(&mut self, decay: f64) -> Result<()> {
        let decay = decay.min((1.0 + self.step as f64) / (10.0 + self.step as f64));
        self.average.follow(&self.parameters, decay)
    }

    /// Writes the model and what a run goes on from.
    fn save(&self, folder: &Path, config: &Config, recipe: &Recipe) -> Result<()> {
        write_model(folder, config, &self.averages()?)?;
        let mut tensors = self.optimizer.state()?;
        for (name, average) in self.averages()? {
            tensors.insert(format!("average.{name}"), average);
        }
        for (name, var) in &self.parameters {
            tensors.insert(format!("weight.{name}"), var.as_detached_tensor());
        }
        let progress = Progress { step: self.step, recipe: recipe.clone(), config: config.clone() };
        let path = checkpoint(folder);
        let text = serde_json::to_vec(&progress).map_err(|error| Error::config(&path, error))?;
        let length = text.len();
        // In the same file, which appears whole: a step and the weights of another would be no checkpoint.
        tensors.insert(PROGRESS.to_string(), Tensor::from_vec(text, length, &Device::Cpu)?);
        weights::write(&path, &tensors, HashMap::new())
    }

    fn log(&self, folder: &Path, log: &Log) -> Result<()> {
        let path = folder.join("log.jsonl");
        let line = serde_json::to_string(log).map_err(|error| Error::config(&path, error))? + "\n";
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io(&path))?;
        file.write_all(line.as_bytes()).map_err(Error::io(&path))
    }
}

/// What of a checkpoint says how far it is, and of which run: JSON, as bytes.
const PROGRESS: &str = "progress";

fn checkpoint(folder: &Path) -> PathBuf {
    folder.join("checkpoint.safetensors")
}

/// Writes a generator's folder: `config.json` and `model.safetensors`, matrices in f16, vectors in f32.
///
/// # Errors
/// What the system says.
pub fn write_model(folder: &Path, config: &Config, tensors: &Tensors) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let narrow = |(name, tensor): (&String, &Tensor)| {
        let dtype = if tensor.rank() > 1 { DType::F16 } else { DType::F32 };
        Ok((name.clone(), tensor.to_dtype(dtype)?))
    };
    let tensors = tensors.iter().map(narrow).collect::<Result<Tensors>>()?;
    weights::write(&folder.join(weights::FILE), &tensors, HashMap::new())?;
    let path = folder.join(config::FILE);
    files::write_whole(&path, config.to_json()?.as_bytes()).map_err(Error::io(&path))
}
