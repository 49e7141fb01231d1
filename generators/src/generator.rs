//! A trained generator on a processor: packed weights, no gradients.

use std::any::Any;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use vqrae::inference::{Bf16, Blocks, Dense, Element, LayerNorm, Sequence};
use vqrae::weights::{Loader, Store, Tensors};
use vqrae::{Error, Result, Vqrae};

use crate::config::Config;
use crate::network::{Network, UNKNOWN};

/// A generator of codes, of a folder with `config.json` and `model.safetensors`.
///
/// What it computes for an image depends on no other image and on no number of threads.
pub struct Generator {
    config: Config,
    layers: Box<dyn Layers>,
    /// Codes as tokens, `[K, D]`.
    table: Vec<f32>,
    unknown: Vec<f32>,
    /// `[N, D]`
    positions: Vec<f32>,
    /// `[C + 1, D]`
    classes: Vec<f32>,
}

/// The tokens of an image that is drawn code after code.
pub struct Drawn {
    /// A [`Sequence`] of the numbers that its generator computes in.
    sequence: Box<dyn Any + Send>,
    tokens: usize,
}

impl Generator {
    /// Opens a folder for a tokenizer, which must be the one whose codes it learnt.
    ///
    /// `dtype` is what products read: f32 or bf16.
    ///
    /// # Errors
    /// A missing, broken or cut file, tensors that are missing, left over or misshapen, or the wrong tokenizer: names it.
    pub fn open(folder: impl AsRef<Path>, tokenizer: &Vqrae, dtype: DType) -> Result<Self> {
        let folder = folder.as_ref();
        let config = Config::read(folder)?;
        let (ours, theirs) = (config.tokenizer.model_id.as_str(), tokenizer.id());
        if ours != theirs {
            return Err(Error::config(
                folder.join(crate::config::FILE),
                format!(
                    "this generator draws codes of the tokenizer {ours}, but the one at hand is {theirs}; name that model with --model"
                ),
            ));
        }
        let store = Store::open(folder)?;
        Self::of_store(config, store, &tokenizer.codebook()?, dtype)
    }

    /// Of tensors that are in memory.
    ///
    /// # Errors
    /// As [`Generator::open`].
    pub fn new(config: Config, tensors: Tensors, codebook: &Tensor, dtype: DType) -> Result<Self> {
        Self::of_store(config, Store::of_tensors(tensors, Path::new("(memory)")), codebook, dtype)
    }

    fn of_store(config: Config, store: Store, codebook: &Tensor, dtype: DType) -> Result<Self> {
        let loader = Loader::new(store);
        let network = load(&config, &loader, codebook)?;
        let vb = loader.builder(DType::F32, &Device::Cpu);
        let layers: Box<dyn Layers> = match dtype {
            DType::F32 => Box::new(Packed::<f32>::new(vb, &config, &network)?),
            DType::BF16 => Box::new(Packed::<Bf16>::new(vb, &config, &network)?),
            other => return Err(Error::Dtype { dtype: other.as_str() }),
        };
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        Ok(Self {
            layers,
            table: values(&network.table()?)?,
            unknown: values(&network.unknown)?,
            positions: values(&network.positions()?)?,
            classes: values(&network.classes)?,
            config,
        })
    }

    /// Its sizes, classes and tokenizer.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// A code's token at a place, for a class.
    fn token(&self, code: u32, place: usize, class: Option<usize>) -> Vec<f32> {
        let d = self.config.width;
        let code = if code == UNKNOWN { &self.unknown } else { &self.table[code as usize * d..][..d] };
        let class = &self.classes[class.unwrap_or(self.config.classes.len()) * d..][..d];
        let position = &self.positions[place * d..][..d];
        code.iter().zip(position).zip(class).map(|((a, b), c)| a + b + c).collect()
    }

    /// Scores of every code at some places, given the whole image's inputs.
    ///
    /// # Shapes
    /// - inputs: up to N codes or [`UNKNOWN`]
    /// - output: `[places, K]`
    ///
    /// # Panics
    /// When a code, a class or a place is beyond the config's: a bug in the caller, not in the input.
    pub fn scores(&self, inputs: &[u32], class: Option<usize>, places: &[usize]) -> Vec<f32> {
        self.layers.scores(&self.tokens(inputs, class, places))
    }

    /// What the blocks make of some places: of these [`Generator::scores_of`] makes scores, as many at a time as memory likes.
    ///
    /// # Shapes
    /// - inputs: up to N codes or [`UNKNOWN`]
    /// - output: `[places, D]`
    ///
    /// # Panics
    /// As [`Generator::scores`].
    pub(crate) fn tokens(&self, inputs: &[u32], class: Option<usize>, places: &[usize]) -> Vec<f32> {
        let mut x: Vec<f32> =
            inputs.iter().enumerate().flat_map(|(place, &code)| self.token(code, place, class)).collect();
        self.layers.forward(&mut x);
        let d = self.config.width;
        places.iter().flat_map(|&place| &x[place * d..][..d]).copied().collect()
    }

    /// Scores of every code, `[M, K]`, of tokens `[M, D]`.
    pub(crate) fn scores_of(&self, tokens: &[f32]) -> Vec<f32> {
        self.layers.scores(tokens)
    }

    /// An image of which no code is drawn yet.
    pub fn begin(&self) -> Drawn {
        Drawn { sequence: self.layers.begin(self.config.tokens()), tokens: 0 }
    }

    /// Scores of every code at each image's next place, after taking in what stands before it: [`UNKNOWN`] before the first.
    ///
    /// # Shapes
    /// - codes: the code before, of B images, each with its class
    /// - output: `[B, K]`
    ///
    /// # Panics
    /// When an image is complete or another generator's, or a code or class is beyond the config's: a bug in the caller, not in the
    /// input.
    pub fn next(&self, codes: &[(u32, Option<usize>)], images: &mut [&mut Drawn]) -> Vec<f32> {
        let token =
            |(&(code, class), image): (&(u32, Option<usize>), &&mut Drawn)| self.token(code, image.len(), class);
        let mut x: Vec<f32> = codes.iter().zip(images.iter()).flat_map(token).collect();
        self.layers.step(&mut x, images);
        images.iter_mut().for_each(|image| image.tokens += 1);
        self.layers.scores(&x)
    }
}

impl Drawn {
    /// Codes taken in.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether there is none yet.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }
}

/// The network of a folder, with gradients nowhere: to compute likelihoods.
///
/// # Errors
/// As [`Generator::open`].
pub fn network(folder: impl AsRef<Path>, codebook: &Tensor) -> Result<(Config, Network)> {
    let config = Config::read(folder.as_ref())?;
    let network = load(&config, &Loader::new(Store::open(folder.as_ref())?), codebook)?;
    Ok((config, network))
}

fn load(config: &Config, loader: &Loader, codebook: &Tensor) -> Result<Network> {
    loader.finish(Network::load(loader.builder(DType::F32, &Device::Cpu), config, codebook))
}

/// What depends on the numbers that products read.
trait Layers: Send + Sync {
    fn forward(&self, x: &mut [f32]);
    fn begin(&self, tokens: usize) -> Box<dyn Any + Send>;
    fn step(&self, x: &mut [f32], images: &mut [&mut Drawn]);
    fn scores(&self, x: &[f32]) -> Vec<f32>;
}

struct Packed<T> {
    blocks: Blocks<T>,
    norm: LayerNorm,
    head: Dense<T>,
    codes: Dense<T>,
}

impl<T: Element> Packed<T> {
    fn new(vb: candle_nn::VarBuilder, config: &Config, network: &Network) -> Result<Self> {
        let Network { codes, norm, head, bias, .. } = network;
        Ok(Self {
            blocks: Blocks::load(vb, &config.blocks())?,
            norm: LayerNorm::new(norm)?,
            head: Dense::of(head)?,
            codes: Dense::new(&codes.all()?, bias)?,
        })
    }
}

impl<T: Element> Layers for Packed<T> {
    fn forward(&self, x: &mut [f32]) {
        self.blocks.forward(x);
    }

    fn begin(&self, tokens: usize) -> Box<dyn Any + Send> {
        Box::new(self.blocks.sequence(tokens))
    }

    fn step(&self, x: &mut [f32], images: &mut [&mut Drawn]) {
        let mut sequences: Vec<&mut Sequence<T>> =
            images.iter_mut().filter_map(|image| image.sequence.downcast_mut()).collect();
        self.blocks.step(x, &mut sequences);
    }

    fn scores(&self, x: &[f32]) -> Vec<f32> {
        self.codes.forward(&self.head.forward(&self.norm.forward(x)))
    }
}
