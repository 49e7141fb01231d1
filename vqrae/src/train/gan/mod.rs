//! The adversarial part of training: a discriminator that learns to tell photos from what is painted, and the loss by
//! which the model learns to deceive it.
//!
//! [`Gan`] is all that the training loop calls, twice a step: [`Gan::generator_term`] for what the model minimises besides
//! its other losses, and [`Gan::discriminator_step`] after the model's own step. Nothing of it is part of a model folder.

pub mod augment;
mod config;
pub mod dino;
mod layers;
pub mod loss;
pub mod nlayer;
mod resample;

pub use config::{Config, Kind};
pub use dino::Dino;
pub use loss::Loss;
pub use nlayer::NLayer;

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;

use super::data;
use super::optimizer::{self, AdamW, Gradients};
use super::ranks::{Alone, Ranks};
use super::schedule::Rate;
use crate::error::{Error, Result};
use crate::weights::{Fresh, Tensors};
use augment::Draws;

/// A discriminator of either kind, over tensors that are variables or are not.
#[derive(Debug, Clone)]
enum Discriminator {
    NLayer(NLayer),
    Dino(Box<Dino>),
}

impl Discriminator {
    fn load(vb: VarBuilder, config: &Config, backbone: Option<&dino::Backbone>) -> candle_core::Result<Self> {
        match backbone {
            None => Ok(Self::NLayer(NLayer::load(vb, &config.nlayer)?)),
            Some(backbone) => Ok(Self::Dino(Box::new(Dino::load(vb, backbone.clone(), &config.dino)?))),
        }
    }

    /// Logits, in one shape or another, of images `[B, 3, H, W]` in [−1, 1].
    fn logits(&self, images: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::NLayer(nlayer) => nlayer.forward(&images.affine(0.5, 0.5)?),
            Self::Dino(dino) => dino.forward(images),
        }
    }
}

/// What of a run, besides its `gan` section, the adversarial part needs to know.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Steps of the whole run.
    pub steps: usize,
    /// Steps in which the discriminator's learning rate rises, from where it starts.
    pub warmup_steps: usize,
    /// The discriminator's learning rate.
    pub rate: Rate,
    /// AdamW's constants.
    pub optimizer: optimizer::Config,
    /// Seed of fresh weights and of augmentation.
    pub seed: u64,
    /// What was subtracted from pixels in [0, 1], by channel.
    pub mean: [f32; 3],
    /// What they were divided by then.
    pub std: [f32; 3],
}

/// The decoder's last layer by itself, which the adaptive weight compares gradients at.
#[derive(Debug)]
pub struct LastLayer<'a> {
    /// Its weight.
    pub weight: &'a Var,
    /// What it paints, `[B, 3, H, W]`; what it is given has no gradient.
    pub painted: Tensor,
    /// The loss of that without the adversarial and the quantizer's terms, a scalar.
    pub reconstruction: Tensor,
}

/// What the model is to minimise besides its other losses.
#[derive(Debug)]
pub struct GeneratorTerm {
    /// A scalar, weighted. Its gradient goes to the painted images.
    pub term: Tensor,
    /// The loss without its weight.
    pub loss: f64,
    /// What it was multiplied by.
    pub weight: f64,
}

/// What a step of the discriminator tells.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DiscriminatorLog {
    /// What it minimises besides LeCam's term.
    pub loss: f64,
    /// LeCam's term, weighted.
    pub lecam: f64,
    /// Mean logit of real images.
    pub logits_real: f64,
    /// Mean logit of painted ones.
    pub logits_fake: f64,
    /// Norm of its gradients before clipping.
    pub gradient_norm: f64,
}

/// The adversarial part of a run: discriminator, its optimizer, its moving averages.
#[derive(Debug)]
pub struct Gan {
    ranks: Rc<dyn Ranks>,
    config: Config,
    settings: Settings,
    /// What is trained, by name.
    parameters: BTreeMap<String, Var>,
    /// What changes without a gradient: LeCam's averages, vectors of spectral norms.
    averages: BTreeMap<String, Var>,
    /// Over variables.
    learning: Discriminator,
    /// Over the same storage without gradients, for the model's term.
    judging: Discriminator,
    optimizer: AdamW,
    /// Steps that the discriminator has learnt.
    taken: usize,
}

const TAKEN: &str = "taken";
const REAL: &str = "lecam.real";
const FAKE: &str = "lecam.fake";

impl Gan {
    /// A fresh one, from the seed, on the CPU.
    ///
    /// # Errors
    /// Of a DINO's weights that cannot be read.
    pub fn new(config: &Config, settings: Settings) -> Result<Self> {
        Self::among(Rc::new(Alone(Device::Cpu)), config, settings)
    }

    /// A fresh one, from the seed, of ranks that each see their share of a step's batch: every one of them learns what one
    /// of the whole batch would.
    ///
    /// # Errors
    /// As [`Gan::new`]'s.
    pub fn among(ranks: Rc<dyn Ranks>, config: &Config, settings: Settings) -> Result<Self> {
        let device = ranks.device().clone();
        let backbone = match config.discriminator {
            Kind::NLayer => None,
            Kind::Dino => {
                let path = dino::weights_of(config.weights.as_ref()).map_err(Error::Training)?;
                Some(dino::Backbone::read(path, &config.dino, &device)?)
            }
        };
        let fresh = Fresh::new(settings.seed, Tensors::new());
        let mut tensors = fresh.make(|vb| Discriminator::load(vb.pp("discriminator"), config, backbone.as_ref()))?;
        dino::normalize_vectors(&mut tensors)?;
        for name in [REAL, FAKE] {
            tensors.insert(name.to_string(), Tensor::zeros((), DType::F32, &Device::Cpu)?);
        }
        let (mut parameters, mut averages) = (BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in tensors {
            let is_average = dino::is_vector(&name) || name == REAL || name == FAKE;
            (if is_average { &mut averages } else { &mut parameters })
                .insert(name, Var::from_tensor(&tensor.to_device(&device)?)?);
        }
        let load = |of: fn(&Var) -> Tensor| {
            let trained = parameters.iter().map(|(name, var)| (name.clone(), of(var)));
            let others = averages.iter().map(|(name, var): (&String, &Var)| (name.clone(), var.as_detached_tensor()));
            let all: HashMap<String, Tensor> = trained.chain(others).collect();
            let vb = VarBuilder::from_tensors(all, DType::F32, &device);
            Discriminator::load(vb.pp("discriminator"), config, backbone.as_ref())
        };
        let (learning, judging) = (load(|var| var.as_tensor().clone())?, load(Var::as_detached_tensor)?);
        let optimizer = AdamW::new(settings.optimizer, &parameters)?;
        let config = config.clone();
        Ok(Self { ranks, config, settings, parameters, averages, learning, judging, optimizer, taken: 0 })
    }

    /// How many numbers the discriminator learns, and to how many of them weight decay applies.
    pub fn parameter_counts(&self) -> (u64, u64) {
        let count = |decayed: bool| {
            let parameters =
                self.parameters.iter().filter(|(name, var)| !decayed || optimizer::decays(name, var.rank()));
            parameters.map(|(_, var)| var.elem_count() as u64).sum()
        };
        (count(false), count(true))
    }

    /// What the model is to minimise besides its other losses at `step`; nothing before `generator_start`.
    ///
    /// Where the weight is adaptive, `last_layer` is asked for. `first` images of the step's batch stand before these: other
    /// ranks', and earlier parts where gradients are accumulated. An adaptive weight is each part's own, and one for the part
    /// of all ranks.
    ///
    /// # Shapes
    /// - painted: `[B, 3, H, W]`, normalised
    pub fn generator_term<'a>(
        &self,
        painted: &Tensor,
        step: usize,
        first: usize,
        last_layer: impl FnOnce() -> Result<LastLayer<'a>>,
    ) -> Result<Option<GeneratorTerm>> {
        if step < self.config.generator_start || self.config.weight == 0.0 {
            return Ok(None);
        }
        // The discriminator's graph ends at the painted images and is given back before the model's own backward pass.
        let leaf = Var::from_tensor(&painted.detach())?;
        let images = self.augmented(&self.signed(leaf.as_tensor())?, "augment generator", step, first)?;
        let loss = self.config.loss.generator(&self.judging.logits(&images)?)?;
        let gradient = loss.backward()?.remove(leaf.as_tensor()).ok_or_else(|| no_gradient("the painted images"))?;
        let mut weight = self.config.weight;
        if self.config.adaptive {
            let LastLayer { weight: last, painted, reconstruction } = last_layer()?;
            let at = |loss: &Tensor| {
                let gradient = loss.backward()?.remove(last.as_tensor());
                let gradient = gradient.ok_or_else(|| no_gradient("the decoder's last layer"))?;
                Ok::<_, Error>((self.ranks.sum(&gradient)? * (1.0 / self.ranks.size() as f64))?)
            };
            weight *= loss::adaptive_weight(&at(&reconstruction)?, &at(&(painted * &gradient)?.sum_all()?)?)?;
        }
        // Of the value of the loss, and with its gradient.
        let linear = (painted * gradient)?.sum_all()?;
        let term = ((loss.detach() + (&linear - linear.detach())?)? * weight)?;
        Ok(Some(GeneratorTerm { term, loss: scalar(&loss)?, weight }))
    }

    /// Trains the discriminator on a batch, or on this rank's share of one; nothing before `discriminator_start`.
    ///
    /// # Shapes
    /// - real, fake: `[B, 3, H, W]`, normalised; neither gets a gradient
    ///
    /// # Errors
    /// If the loss or its gradient is not finite; nothing has changed then but moving averages.
    pub fn discriminator_step(
        &mut self,
        real: &Tensor,
        fake: &Tensor,
        step: usize,
    ) -> Result<Option<DiscriminatorLog>> {
        if step < self.config.discriminator_start {
            return Ok(None);
        }
        let mut fake = self.signed(&fake.detach())?;
        if self.config.discriminator == Kind::Dino {
            fake = in_8_bits(&fake)?;
        }
        let first = self.ranks.rank() * real.dim(0)?;
        let fake = self.augmented(&fake, "augment fake", step, first)?;
        let real = self.augmented(&self.signed(&real.detach())?, "augment real", step, first)?;
        // Each pass follows the spectral norms by one iteration, the painted images first, as RAE's do.
        let logits = |images: &Tensor| {
            dino::iterate(&self.parameters, &self.averages)?;
            self.learning.logits(images)
        };
        let (fake, real) = (logits(&fake)?, logits(&real)?);
        let loss = self.config.loss.discriminator(&real, &fake)?;
        let (real, fake) = (self.mean_of_all(&real)?, self.mean_of_all(&fake)?);
        let lecam = self.lecam(&real, &fake)?;
        let mut gradients = Gradients::of(&self.parameters, (&loss + &lecam)?.backward()?)?;
        gradients.sum(&*self.ranks)?;
        gradients.divide(self.ranks.size())?;
        let log = DiscriminatorLog {
            loss: scalar(&self.mean_of_all(&loss)?)?,
            lecam: scalar(&lecam)?,
            logits_real: scalar(&real)?,
            logits_fake: scalar(&fake)?,
            gradient_norm: gradients.norm()?,
        };
        if !(log.gradient_norm.is_finite() && (log.loss + log.lecam).is_finite()) {
            return Err(Error::Training(format!(
                "step {}: the discriminator's loss is {} and its gradients' norm {}; the last checkpoint is good, go on from \
                 it with a lower groups.discriminator",
                step + 1,
                log.loss,
                log.gradient_norm
            )));
        }
        let rate = self.rate(step);
        self.optimizer.step(&self.parameters, &gradients, self.taken, |_| rate)?;
        self.taken += 1;
        Ok(Some(log))
    }

    /// The discriminator's learning rate at `step`; its schedule begins where it does.
    pub fn rate(&self, step: usize) -> f64 {
        let Settings { rate, warmup_steps, steps, .. } = self.settings;
        let start = self.config.discriminator_start;
        step.checked_sub(start).map_or(0.0, |step| rate.at(step, warmup_steps, steps.saturating_sub(start)))
    }

    /// The mean of a tensor's values over all ranks, a scalar, with the gradient of this rank's: the mean of that over the
    /// ranks is the whole's.
    fn mean_of_all(&self, values: &Tensor) -> Result<Tensor> {
        let own = values.mean_all()?;
        if self.ranks.size() == 1 {
            return Ok(own);
        }
        let mut mean = [scalar(&own)?];
        self.ranks.add(&mut mean)?;
        let mean = Tensor::new((mean[0] / self.ranks.size() as f64) as f32, own.device())?;
        Ok((mean + (&own - own.detach())?)?)
    }

    /// LeCam's term, weighted; moves its averages.
    fn lecam(&self, real: &Tensor, fake: &Tensor) -> Result<Tensor> {
        const DECAY: f64 = 0.999;
        if self.config.lecam == 0.0 {
            return Ok(real.zeros_like()?);
        }
        let average =
            |name: &str| self.averages.get(name).ok_or_else(|| Error::Training(format!("`{name}` is missing")));
        let (of_real, of_fake) = (average(REAL)?, average(FAKE)?);
        // Copies, since the averages move before the backward pass.
        let term =
            loss::lecam(real, fake, &of_real.as_detached_tensor().copy()?, &of_fake.as_detached_tensor().copy()?)?;
        for (average, new) in [(of_real, real), (of_fake, fake)] {
            average.set(&((average.as_detached_tensor() * DECAY)? + (new.detach() * (1.0 - DECAY))?)?)?;
        }
        Ok((term * self.config.lecam)?)
    }

    /// Normalised pixels to [−1, 1].
    fn signed(&self, images: &Tensor) -> Result<Tensor> {
        let by_channel = |of: [f32; 3]| Tensor::new(&of, images.device())?.reshape((1, 3, 1, 1));
        let Settings { mean, std, .. } = self.settings;
        let scaled = images.broadcast_mul(&by_channel(std.map(|std| 2.0 * std))?)?;
        Ok(scaled.broadcast_add(&by_channel(mean.map(|mean| 2.0 * mean - 1.0))?)?)
    }

    /// Augmented by what (seed, purpose, step) draws, so a resumed run draws the same.
    fn augmented(&self, images: &Tensor, purpose: &str, step: usize, first: usize) -> Result<Tensor> {
        let config = self.config.augment();
        let mut random = data::generator(self.settings.seed, purpose, step);
        Ok(config.apply(images, &Draws::new(&config, first..first + images.dim(0)?, &mut random))?)
    }

    /// All that a resumed run needs, on the CPU: weights and averages as `discriminator.…` and `lecam.…`, moments as
    /// `first.…` and `second.…`.
    pub fn state(&self) -> Result<Tensors> {
        let mut state = self.optimizer.state()?;
        state.insert(TAKEN.to_string(), Tensor::new(self.taken as i64, &Device::Cpu)?);
        let all = self.parameters.iter().chain(&self.averages);
        for (name, var) in all {
            state.insert(name.clone(), var.as_detached_tensor().copy()?.to_device(&Device::Cpu)?);
        }
        Ok(state)
    }

    /// Takes back what [`Gan::state`] gave, of the same config.
    ///
    /// # Errors
    /// If a tensor is missing, misshapen or left over.
    pub fn load_state(&mut self, mut state: Tensors) -> Result<()> {
        let wrong = |reason: String| {
            Error::Training(format!("the checkpoint's discriminator does not fit the config: {reason}"))
        };
        for (name, var) in self.parameters.iter().chain(&self.averages) {
            let tensor = state.remove(name).ok_or_else(|| wrong(format!("`{name}` is missing")))?;
            if tensor.shape() != var.shape() {
                return Err(wrong(format!("`{name}` has shape {:?}, expected: {:?}", tensor.dims(), var.dims())));
            }
            var.set(&tensor.to_dtype(DType::F32)?.to_device(self.ranks.device())?)?;
        }
        let taken = state.remove(TAKEN).ok_or_else(|| wrong(format!("`{TAKEN}` is missing")))?;
        self.taken = taken.to_scalar::<i64>()? as usize;
        self.optimizer.load_state(state)
    }
}

fn scalar(tensor: &Tensor) -> Result<f64> {
    Ok(f64::from(tensor.to_scalar::<f32>()?))
}

fn no_gradient(what: &str) -> Error {
    Error::Training(format!("the adversarial loss gives {what} no gradient"))
}

/// What 8 bits a channel keep of images in [−1, 1]: photos come in such steps, and their absence would give the painted
/// ones away.
fn in_8_bits(images: &Tensor) -> Result<Tensor> {
    let step = |x: &f32| ((x.clamp(-1.0, 1.0) + 1.0) * 127.5).round_ties_even() / 127.5 - 1.0;
    let values: Vec<f32> = images.flatten_all()?.to_vec1::<f32>()?.iter().map(step).collect();
    Ok(Tensor::from_vec(values, images.shape(), images.device())?)
}
