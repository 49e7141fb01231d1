//! What a run is worth so far: reconstructions of photos that it does not train on, and the model folder of the best.

use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;

use super::data::{Photos, Sizes, Views};
use super::log::{Event, Observer, ValidationLog};
use super::trainer::{Trainer, no_codes};
use crate::error::Result;
use crate::image::{Preprocessor, ResizeMode, Rgb};
use crate::metrics;
use crate::model::{self, Network};
use crate::weights::Tensors;

impl Trainer<'_> {
    /// Reconstructs the validation photos; the best model so far is written to `model/`.
    pub(super) fn validate(&mut self, photos: Option<&Photos>, tell: Observer) -> Result<()> {
        let Some(photos) = photos else { return self.export() };
        let sizes = Sizes::of(self.preprocessor.size, &self.config.model.config())?;
        let centre =
            Preprocessor { resize_mode: ResizeMode::CenterCrop, size: sizes.crop(), ..self.preprocessor.clone() };
        let ((h, w), target) = (sizes.input, sizes.target);
        let mut codes = no_codes(&self.config.model.quantizer);
        let (mut sum, mut count, mut shown) = (0.0, 0, Vec::new());
        let network = self.untracked()?;
        for index in 0..photos.len() {
            let views = |image: Rgb| sizes.views(centre.prepare(&image)?, &centre);
            let prepare = |image: Rgb| views(image).map_err(|kind| photos.unusable(index, kind));
            let Views { input, target: original } = match photos.open(index).and_then(prepare) {
                Ok(views) => views,
                Err(error) => {
                    let _ = tell(Event::Note(&format!("skipped {error}")));
                    continue;
                }
            };
            let pixels = Tensor::from_vec(centre.normalize(&input), (1, 3, h, w), self.ranks.device())?;
            let quantized = network.quantize(&pixels)?;
            let painted = network.paint(&quantized.tokens, network.grid(h, w)?, DType::F32)?;
            codes.add(&quantized.indices.flatten_all()?.to_vec1::<u32>()?);
            let painted = centre.denormalize_to_rgb(&painted.flatten_all()?.to_vec1::<f32>()?, target.0, target.1);
            sum += metrics::psnr(&original, &painted).unwrap_or_default().min(100.0);
            count += 1;
            if index % photos.len().div_ceil(self.config.train.sheet_images.max(1)) == 0 {
                shown.push((original, painted));
            }
        }
        let log = ValidationLog {
            step: self.state.step,
            validation_psnr: sum / f64::from(count.max(1)),
            validation_usage: codes.usage(),
            validation_perplexity: codes.perplexity(),
        };
        if let Some(journal) = &mut self.journal {
            journal.append(&log)?;
        }
        let _ = tell(Event::Validation(&log, &shown));
        if self.state.best.is_none_or(|(best, _)| log.validation_psnr > best) {
            self.state.best = Some((log.validation_psnr, self.state.step));
            self.export()?;
        }
        Ok(())
    }

    /// The network of what is written, without gradients.
    fn untracked(&self) -> Result<Network> {
        let all = self.written()?.into_iter().collect();
        let model = &self.config.model;
        Ok(Network::load(VarBuilder::from_tensors(all, DType::F32, self.ranks.device()), &model.config())?)
    }

    /// The model's tensors, with the average of the weights in their place if the run keeps one.
    fn written(&self) -> Result<Tensors> {
        let mut tensors = self.parameters.tensors()?;
        if let Some(average) = &self.average {
            tensors.extend(average.tensors(&self.parameters.trained)?);
        }
        Ok(tensors)
    }

    /// Writes `model/`, in the dtype that the config asks for.
    fn export(&self) -> Result<()> {
        let dtype = self.config.train.save_dtype()?;
        // Sums of many features may lie beyond the range of f16, and variances below it.
        let wide = |name: &str| self.parameters.averages.contains_key(name) || name.starts_with("latent.");
        let of = |name: &str| if wide(name) { DType::F32 } else { dtype };
        let cast = |(name, tensor): (String, Tensor)| {
            let tensor = tensor.to_dtype(of(&name))?;
            Ok((name, tensor))
        };
        let tensors = self.written()?.into_iter().map(cast).collect::<Result<Tensors>>()?;
        model::save(&self.output.join("model"), &self.config.model.config(), &self.preprocessor, &tensors)
    }
}
