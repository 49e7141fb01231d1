//! Encoder, quantizer and decoder together: the only place where the stages meet.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde::{Deserialize, Serialize};

use crate::decoder::{self, Decoder};
use crate::encoder::{self, Encoder};
use crate::error::{Error, Result};
use crate::files;
use crate::fusion::Fusion;
use crate::image::Preprocessor;
use crate::inference::{self, Inference};
use crate::latent::{self, Latent};
use crate::ops::Precision;
use crate::quantizer::{self, Quantized, Quantizer};
use crate::vit::RunBlock;
use crate::weights::{self, Fresh, Loader, Store, Tensors};
use vqrae_kernels::cpu::{Bf16, Isa};

/// The file that a model folder keeps its [`Config`] in.
const CONFIG: &str = "config.json";
/// The file that a model folder keeps its [`Preprocessor`] in.
pub(crate) const PREPROCESSOR: &str = "preprocessor_config.json";
/// The version of the model folder's layout that this library reads and writes.
const FORMAT: u32 = 1;

/// What a model is: `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `vqrae`.
    pub model_type: String,
    /// The version of the folder's layout.
    pub format: u32,
    /// The encoder.
    pub encoder: encoder::Config,
    /// The quantizer.
    pub quantizer: quantizer::Config,
    /// The decoder; what is not said mirrors the encoder.
    #[serde(default)]
    pub decoder: decoder::Config,
    /// The normalisation of features before the quantizer, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latent: Option<latent::Config>,
}

impl Config {
    /// A config of the three parts, without a normalisation of latents.
    pub fn new(encoder: encoder::Config, quantizer: quantizer::Config, decoder: decoder::Config) -> Self {
        Self { model_type: "vqrae".to_string(), format: FORMAT, encoder, quantizer, decoder, latent: None }
    }

    /// Parses `config.json`; `path` is for messages.
    pub fn from_json(text: &str, path: &Path) -> Result<Self> {
        let config: Self = serde_json::from_str(text).map_err(|e| Error::config(path, e))?;
        config.check().map_err(|reason| Error::config(path, reason))?;
        Ok(config)
    }

    /// As `config.json` has it.
    pub fn to_json(&self) -> Result<String> {
        serde_json::to_string_pretty(self).map_err(|e| Error::config(CONFIG, e))
    }

    /// Whether the parts make sense; the error names the field.
    pub fn check(&self) -> std::result::Result<(), String> {
        if self.model_type != "vqrae" {
            return Err(format!("model_type is `{}`, expected: `vqrae`", self.model_type));
        }
        if self.format != FORMAT {
            return Err(format!("format is {}, expected: {FORMAT}; this version cannot read it", self.format));
        }
        self.encoder.check()?;
        self.quantizer.check()?;
        self.decoder.sizes(&self.encoder).check()?;
        self.latent.map_or(Ok(()), |latent| latent.check(self.encoder.width(), self.width_out()))
    }

    /// Width D' of the quantizer's output, the decoder's input.
    pub(crate) fn width_out(&self) -> usize {
        self.decoder.sizes(&self.encoder).width_in()
    }
}

/// The three stages with their weights. What is trained and what is frozen is decided by the [`VarBuilder`].
#[derive(Debug, Clone)]
pub struct Network {
    /// Pixels to features.
    pub encoder: Encoder,
    /// Two states of the encoder to one, where its features are such.
    pub fusion: Option<Fusion>,
    /// The normalisation of features before the quantizer, if there is one.
    pub latent: Option<Latent>,
    /// Features to codes and back.
    pub quantizer: Quantizer,
    /// Codes to pixels.
    pub decoder: Decoder,
    patch: usize,
}

impl Network {
    /// Loads `encoder.…`, `quantizer.…`, `decoder.…` and, where the config has them, `fusion.…` and `latent.…`.
    pub fn load(vb: VarBuilder, config: &Config) -> candle_core::Result<Self> {
        let sizes = config.decoder.sizes(&config.encoder);
        let (width_in, width_out) = (config.encoder.width(), config.width_out());
        let fusion = |fuse| Fusion::load(vb.pp("fusion"), fuse, width_in);
        let latent = |latent| Latent::load(vb.pp("latent"), latent, config.encoder.grid(), width_in);
        Ok(Self {
            encoder: Encoder::load(vb.pp("encoder"), &config.encoder)?,
            fusion: config.encoder.features().fuse().map(fusion).transpose()?,
            latent: config.latent.map(latent).transpose()?,
            quantizer: Quantizer::load(vb.pp("quantizer"), &config.quantizer, width_in, width_out)?,
            decoder: Decoder::load(vb.pp("decoder"), &sizes)?,
            patch: config.encoder.patch(),
        })
    }

    /// Normalised pixels `[B, 3, H, W]` to features `[B, N, D]`, of one state of the encoder or of two that became one.
    pub fn features(&self, pixels: &Tensor) -> candle_core::Result<Tensor> {
        self.fuse(&self.encoder.forward(pixels)?)
    }

    /// The encoder's output `[B, N, D]`, or two states side by side, `[B, N, 2·D]`, to features `[B, N, D]`.
    pub(crate) fn fuse(&self, states: &Tensor) -> candle_core::Result<Tensor> {
        self.fusion.as_ref().map_or_else(|| Ok(states.clone()), |fusion| fusion.forward(states))
    }

    /// Has the blocks of encoder and decoder run by `runner`.
    pub(crate) fn run_by(&mut self, runner: &Arc<dyn RunBlock>) {
        self.encoder.run_by(runner.clone());
        self.decoder.run_by(runner.clone());
    }

    /// Has the products of the blocks read numbers of `precision`. Patches, quantizer and head, where rounding would show in
    /// the codes or the pixels themselves, stay as they are.
    pub(crate) fn multiply_in(&mut self, precision: Precision) {
        self.encoder.multiply_in(precision);
        self.decoder.multiply_in(precision);
    }

    /// Normalised pixels `[B, 3, H, W]` to what the quantizer sees, `[B, N, D]`: the features, normalised if the config
    /// says so.
    pub fn latents(&self, pixels: &Tensor) -> candle_core::Result<Tensor> {
        let (_, _, height, width) = pixels.dims4()?;
        self.latents_of(&self.features(pixels)?, self.grid(height, width)?)
    }

    /// Features `[B, h·w, D]` of a grid (h, w) to what the quantizer sees, as [`Network::latents`].
    pub(crate) fn latents_of(&self, features: &Tensor, grid: (usize, usize)) -> candle_core::Result<Tensor> {
        if let Some(latent) = &self.latent {
            latent.check_grid(grid)?;
        }
        self.normalize(features)
    }

    fn normalize(&self, features: &Tensor) -> candle_core::Result<Tensor> {
        self.latent.as_ref().map_or_else(|| Ok(features.clone()), |latent| latent.normalize(features))
    }

    /// Features `[B, N, D]` to codes and the quantizer's output; normalising them, if the config says so, is part of it.
    pub fn quantize_features(&self, features: &Tensor) -> candle_core::Result<Quantized> {
        self.quantizer.quantize(&self.normalize(features)?)
    }

    /// Normalised pixels `[B, 3, H, W]` to their codes, with all that training needs of them.
    pub fn quantize(&self, pixels: &Tensor) -> candle_core::Result<Quantized> {
        self.quantizer.quantize(&self.latents(pixels)?)
    }

    /// The quantizer's output `[B, h·w, D']` to normalised pixels `[B, 3, h·P', w·P']`; undoing the normalisation of
    /// latents, if the config says so, is part of it.
    pub fn paint(&self, tokens: &Tensor, grid: (usize, usize), dtype: DType) -> candle_core::Result<Tensor> {
        self.decoder.head(&self.hidden(tokens, grid, dtype)?, grid)
    }

    /// What the decoder's head is given for the quantizer's output: [`Network::paint`] without its last layer.
    pub fn hidden(&self, tokens: &Tensor, grid: (usize, usize), dtype: DType) -> candle_core::Result<Tensor> {
        match self.latent.as_ref().filter(|latent| latent.denormalizes()) {
            Some(latent) => {
                latent.check_grid(grid)?;
                self.decoder.hidden(&latent.denormalize(tokens)?.to_dtype(dtype)?, grid)
            }
            None => self.decoder.hidden(&tokens.to_dtype(dtype)?, grid),
        }
    }

    /// The grid (h, w) of an image of `height` × `width` pixels.
    pub fn grid(&self, height: usize, width: usize) -> candle_core::Result<(usize, usize)> {
        crate::vit::grid(height, width, self.patch)
    }
}

/// A VQRAE, ready to turn images into codes and codes into images.
#[derive(Clone)]
pub struct Vqrae {
    stages: Stages,
    config: Config,
    preprocessor: Preprocessor,
    id: String,
    parameters: usize,
    device: Device,
    dtype: DType,
    precision: String,
}

/// What computes.
#[derive(Clone)]
enum Stages {
    /// Packed weights on the CPU.
    Packed(Arc<dyn Inference>),
    /// Tensor operations: any device, and candle-transformers' encoder.
    Tensors(Arc<Network>),
}

impl std::fmt::Debug for Vqrae {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vqrae").field("id", &self.id).field("precision", &self.precision).finish_non_exhaustive()
    }
}

/// The number format that suits a device: bf16 where its instructions multiply bf16 numbers faster than f32 ones (a CUDA
/// device; a CPU with AVX512-BF16 or AMX), f32 elsewhere.
///
/// # Errors
/// If the environment variable `VQRAE_CPU` names instructions that this machine has not.
pub fn auto_dtype(device: &Device) -> Result<DType> {
    let fast = !device.is_cpu() || Isa::detect()?.has_bf16();
    Ok(if fast { DType::BF16 } else { DType::F32 })
}

impl Vqrae {
    /// Loads a model folder: `config.json`, `preprocessor_config.json`, `model.safetensors`.
    ///
    /// `dtype` is what products are computed in, f32 or bf16 ([`auto_dtype`] suggests one); sums are always f32, and the
    /// search for the nearest code is exact. Weights are mapped into memory; what a stage is not asked for is not loaded.
    ///
    /// # Errors
    /// A missing or broken file, a config that makes no sense, or tensors that are missing, left over or misshapen: the
    /// error names the file and the key or tensor.
    pub fn from_pretrained(folder: impl AsRef<Path>, device: &Device, dtype: DType) -> Result<Self> {
        let folder = folder.as_ref();
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read_to_string(&path).map_err(Error::io(&path))
        };
        let config = Config::from_json(&read(CONFIG)?, &folder.join(CONFIG))?;
        let preprocessor = Preprocessor::from_file(&folder.join(PREPROCESSOR))?;
        Self::of_store(config, preprocessor, Store::open(folder)?, device, dtype)
    }

    /// The model that ships with this library; see `weights/README.md` for what it is and what it is not.
    #[cfg(feature = "shipped-model")]
    pub fn shipped(device: &Device, dtype: DType) -> Result<Self> {
        const FOLDER: &str = "weights/vqrae-small";
        let path = |name: &str| Path::new(FOLDER).join(name);
        let config = include_str!("../../weights/vqrae-small/config.json");
        let preprocessor = include_str!("../../weights/vqrae-small/preprocessor_config.json");
        let tensors = include_bytes!("../../weights/vqrae-small/model.safetensors");
        Self::of_store(
            Config::from_json(config, &path(CONFIG))?,
            Preprocessor::from_json(preprocessor).map_err(|e| Error::config(path(PREPROCESSOR), e))?,
            Store::of_bytes(tensors, &path(weights::FILE))?,
            device,
            dtype,
        )
    }

    /// A model of given tensors; `path` is where they came from, for messages.
    pub fn new(
        config: Config,
        preprocessor: Preprocessor,
        tensors: Tensors,
        path: &Path,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        Self::of_store(config, preprocessor, Store::of_tensors(tensors, path), device, dtype)
    }

    fn of_store(
        config: Config,
        preprocessor: Preprocessor,
        store: Store,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        let id = id(&config, &preprocessor, &store)?;
        let parameters = store.parameters();
        let loader = Loader::new(store);
        // Names and shapes are checked as a whole before any tensor is read.
        loader.finish(Network::load(loader.shapes(dtype, device), &config))?;
        let (stages, precision) = Stages::new(loader, &config, device, dtype)?;
        Ok(Self { stages, config, preprocessor, id, parameters, device: device.clone(), dtype, precision })
    }

    /// Normalised pixels to continuous features: the encoder's own, for understanding as for quantising. Two states that
    /// become one do so here; a normalisation of latents is [`Vqrae::quantize`]'s.
    ///
    /// # Shapes
    /// - pixels: `[B, 3, H, W]`, H and W multiples of the patch
    /// - output: `[B, N, D]`, N = h·w in raster order
    pub fn encode(&self, pixels: &Tensor) -> candle_core::Result<Tensor> {
        match &self.stages {
            Stages::Packed(stages) => stages.encode(pixels),
            Stages::Tensors(network) => network.features(&pixels.to_device(&self.device)?),
        }
    }

    /// The patch embeddings, positions added, and the output of every block of the model, as transformers'
    /// `hidden_states`. Blocks that the features do not need are no part of the model.
    ///
    /// # Shapes
    /// - pixels: `[B, 3, H, W]`, H and W multiples of the patch
    /// - output: one tensor `[B, P + N, D]` more than blocks, P tokens of the encoder's own (class token, registers) in front
    ///
    /// # Errors
    /// Also where the encoder is candle-transformers', which does not show them.
    pub fn hidden_states(&self, pixels: &Tensor) -> candle_core::Result<Vec<Tensor>> {
        match &self.stages {
            Stages::Packed(stages) => stages.hidden_states(pixels),
            Stages::Tensors(network) => network.encoder.hidden_states(&pixels.to_device(&self.device)?),
        }
    }

    /// Features `[B, N, D]`, as [`Vqrae::encode`] gives them, to codes and the decoder's tokens. Where the config has a
    /// `latent` section, they are normalised first.
    pub fn quantize(&self, features: &Tensor) -> candle_core::Result<Quantized> {
        match &self.stages {
            Stages::Packed(stages) => stages.quantize(features),
            Stages::Tensors(network) => network.quantize_features(features),
        }
    }

    /// Normalised pixels to codes: the encoder, then the exactly nearest code of every feature.
    ///
    /// # Shapes
    /// - pixels: `[B, 3, H, W]`, H and W multiples of the patch
    /// - output: u32 `[B, h, w]`, with C > 1 [codes a token](Vqrae::codes_per_token) `[B, h, w, C]`
    pub fn encode_to_indices(&self, pixels: &Tensor) -> candle_core::Result<Tensor> {
        let (b, _, height, width) = pixels.dims4()?;
        let (h, w) = self.grid_of(height, width)?;
        let indices = match &self.stages {
            Stages::Packed(stages) => stages.encode_to_indices(pixels)?,
            Stages::Tensors(network) => network.quantize(&pixels.to_device(&self.device)?)?.indices,
        };
        match self.codes_per_token() {
            1 => indices.reshape((b, h, w)),
            c => indices.reshape((b, h, w, c)),
        }
    }

    /// Codes to pixels in the normalised range of the encoder's input; [`Preprocessor::denormalize_to_rgb`] makes an
    /// image of them.
    ///
    /// # Shapes
    /// - indices: u32 `[B, h, w]`, with C > 1 [codes a token](Vqrae::codes_per_token) `[B, h, w, C]`; a residual
    ///   quantizer trained with quantize dropout takes its first levels alone too
    /// - output: f32 `[B, 3, h·P', w·P']`
    ///
    /// # Errors
    /// If a code is outside the codebook, or a token has another number of codes than the model's.
    pub fn decode_from_indices(&self, indices: &Tensor) -> candle_core::Result<Tensor> {
        let (grid, tokens) = match (indices.dims(), self.codes_per_token()) {
            (&[b, h, w], _) => ((h, w), indices.reshape((b, h * w))?),
            (&[b, h, w, c], expected) if expected > 1 => ((h, w), indices.reshape((b, h * w, c))?),
            (dims, expected) => candle_core::bail!(
                "the indices have the shape {dims:?}, expected: [B, h, w] and {expected} codes a token; decode with the \
                 model that made the codes"
            ),
        };
        match &self.stages {
            Stages::Packed(stages) => stages.decode_from_indices(&tokens, grid),
            Stages::Tensors(network) => self.decode(&network.quantizer.lookup(&tokens.to_device(&self.device)?)?, grid),
        }
    }

    /// The decoder's tokens `[B, h·w, D']`, as [`Vqrae::quantize`] gives them, to pixels, f32 `[B, 3, h·P', w·P']`. Where
    /// `latent.denormalize` is set, the normalisation is undone first.
    pub fn decode(&self, tokens: &Tensor, grid: (usize, usize)) -> candle_core::Result<Tensor> {
        match &self.stages {
            Stages::Packed(stages) => stages.decode(tokens, grid),
            Stages::Tensors(network) => network.paint(tokens, grid, self.dtype)?.to_dtype(DType::F32),
        }
    }

    /// The vectors that features are compared with, f32 `[K, e]`; several codebooks stand one below the other.
    pub fn codebook(&self) -> candle_core::Result<Tensor> {
        match &self.stages {
            Stages::Packed(stages) => stages.codebook(),
            Stages::Tensors(network) => network.quantizer.codebook(),
        }
    }

    /// Number K of codes; with several codes a token, of each of them.
    pub fn codebook_size(&self) -> usize {
        self.config.quantizer.codebook_size()
    }

    /// Number C of codes a token: 1, or the last dimension of the indices.
    pub fn codes_per_token(&self) -> usize {
        self.config.quantizer.codes_per_token()
    }

    /// The grid (h, w) of codes of an image of `height` × `width` pixels.
    pub fn grid_of(&self, height: usize, width: usize) -> candle_core::Result<(usize, usize)> {
        crate::vit::grid(height, width, self.config.encoder.patch())
    }

    /// The hash of config, preprocessing and weights that codes are stamped with.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What the model is.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// How images become its input.
    pub fn preprocessor(&self) -> &Preprocessor {
        &self.preprocessor
    }

    /// Number of weights, the frozen codebook included.
    pub fn parameters(&self) -> usize {
        self.parameters
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What products are computed in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether an image gives the same bits in any batch, as it does on the CPU but for candle-transformers' encoder.
    pub fn is_batch_invariant(&self) -> bool {
        matches!(self.stages, Stages::Packed(_))
    }

    /// The number format and, where sums could differ, the arithmetic: models of one precision give the same bits.
    ///
    /// `f32` is one arithmetic on every CPU with AVX2, AVX-512 or NEON. The bf16 instructions of AVX-512 and of AMX round
    /// in ways of their own (`bf16/avx512-bf16`, `bf16/amx-bf16`), unlike bf16 numbers multiplied as f32 (`bf16/fma`). GPUs
    /// of one compute capability share a name (`bf16/cuda-9.0`).
    pub fn precision(&self) -> &str {
        &self.precision
    }
}

impl Stages {
    /// The stages, and the precision that they compute in.
    fn new(loader: Loader, config: &Config, device: &Device, dtype: DType) -> Result<(Self, String)> {
        if !device.is_cpu() || config.encoder.is_stock() {
            let network = Network::load(loader.builder(dtype, device), config)?;
            let precision = format!("{}/{}", dtype.as_str(), crate::ops::arithmetic(device)?);
            return Ok((Self::Tensors(Arc::new(network)), precision));
        }
        let isa = Isa::detect()?;
        let config = config.clone();
        let (stages, bf16): (Arc<dyn Inference>, bool) = match dtype {
            DType::F32 => (Arc::new(inference::Network::<f32>::new(loader, config, isa)), false),
            DType::BF16 => (Arc::new(inference::Network::<Bf16>::new(loader, config, isa)), true),
            other => return Err(Error::Dtype { dtype: other.as_str() }),
        };
        let precision = match isa.arithmetic(bf16) {
            "fma" if !bf16 => dtype.as_str().to_string(),
            arithmetic => format!("{}/{arithmetic}", dtype.as_str()),
        };
        Ok((Self::Packed(stages), precision))
    }
}

/// The id of a model: another config, preprocessing or weight makes another id.
pub(crate) fn id(config: &Config, preprocessor: &Preprocessor, store: &Store) -> Result<String> {
    store.id(&format!("{}\n{}", config.to_json()?, preprocessor.to_json()))
}

/// The tensors of a new model: those `given` (all of a stage, or none of it), the others fresh from `seed`.
pub fn fresh_tensors(config: &Config, given: Tensors, seed: u64) -> candle_core::Result<Tensors> {
    Fresh::new(seed, given).make(|vb| Network::load(vb, config))
}

/// Writes a model folder; `model.safetensors` comes last, so a folder that has it is whole.
pub fn save(folder: &Path, config: &Config, preprocessor: &Preprocessor, tensors: &Tensors) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let config = config.to_json()?;
    let preprocessor = format!("{:#}", preprocessor.to_json());
    for (name, text) in [(CONFIG, config), (PREPROCESSOR, preprocessor)] {
        let path = folder.join(name);
        files::write_whole(&path, (text + "\n").as_bytes()).map_err(Error::io(&path))?;
    }
    let metadata = HashMap::from([("format".to_string(), "vqrae".to_string())]);
    weights::write(&folder.join(weights::FILE), tensors, metadata)
}
