//! Protocols: all that decides a figure beside the images, in one place and in words.
//!
//! Two figures can be compared when they have the same protocol; published ones differ in resize, crop, rounding and the
//! network's input, and the differences are as large as those between methods.

use anyhow::{Result, bail};
use clap::ValueEnum;
use serde::Serialize;
use vqrae::image::{Preprocessor, Resample, ResizeMode, Rgb};
use vqrae::perceptual::FidInput;
use vqrae::{DType, Device, Tensor};

use crate::view::preprocessing;

/// Side of the images of the presets.
const SIDE: usize = 256;

/// Protocols that others publish by.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Preset {
    /// Images as the model takes them, or two folders as they are
    Native,
    /// TiTok's: short side to 256 (bicubic), centre crop, rounded; ImageNet's usual one
    Titok,
    /// RAE's: ADM's centre crop at 256, 8-bit levels cut off instead of rounded
    Rae,
}

/// How pixels become 8-bit levels.
#[derive(Serialize, Debug, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Rounding {
    /// To the nearest level.
    Round,
    /// To the level below.
    Truncate,
}

/// What the figures were measured by, as it is printed beside them.
#[derive(Serialize, Debug, Clone)]
pub(crate) struct Protocol {
    pub(crate) name: &'static str,
    /// What the images are compared with.
    pub(crate) reference: String,
    /// Resize and crop of both.
    pub(crate) resize: String,
    pub(crate) rounding: Rounding,
    pub(crate) data_range: u8,
    pub(crate) ssim: &'static str,
    pub(crate) ms_ssim: &'static str,
    pub(crate) lpips: &'static str,
    pub(crate) fid: &'static str,
    /// What the publications leave open, and what was chosen here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) open: Vec<&'static str>,
    #[serde(skip)]
    pub(crate) fid_input: FidInput,
}

impl Preset {
    /// How the originals are prepared; `None`: by the model or not at all.
    pub(crate) fn preparation(self) -> Option<Preprocessor> {
        let mode = match self {
            Self::Native => return None,
            Self::Titok => ResizeMode::CenterCrop,
            Self::Rae => ResizeMode::AdmCrop,
        };
        Some(Preprocessor { resize_mode: mode, ..Preprocessor::siglip(SIDE, Resample::Bicubic) })
    }

    /// With the FID's input that the words ask for.
    pub(crate) fn protocol(self, resize: String, fid_input: Option<FidInput>) -> Result<Protocol> {
        if self != Self::Native && fid_input.is_some_and(|input| input != FidInput::default()) {
            bail!("--protocol {} has an FID input of its own (tf1); leave --fid-input out", self.name());
        }
        let fid_input = fid_input.unwrap_or_default();
        Ok(Protocol {
            name: self.name(),
            reference: "the originals, prepared as below, in 8 bits".to_string(),
            resize,
            rounding: if self == Self::Rae { Rounding::Truncate } else { Rounding::Round },
            data_range: 255,
            ssim: "8-bit RGB, 11x11 Gaussian window of sigma 1.5 inside the image, population covariance, mean of \
                   channels (skimage's structural_similarity with gaussian_weights)",
            ms_ssim: "five scales, Wang's weights (pytorch-msssim); of images of at least 161 pixels a side",
            lpips: "version 0.1, levels brought to -1..1, spatial mean",
            fid: match fid_input {
                FidInput::TensorFlow => {
                    "Inception v3 of 2015-12-05, 2048 features of the last pooling, TensorFlow 1's bilinear to 299x299 \
                     without antialiasing, (x - 128) / 128 (torch-fidelity); statistics in f64, N - 1"
                }
                FidInput::PyTorch => {
                    "Inception v3 of 2015-12-05, 2048 features of the last pooling, PyTorch's bilinear to 299x299 \
                     without antialiasing, 2 x - 1 (pytorch-fid); statistics in f64, N - 1"
                }
            },
            open: self.open().to_vec(),
            fid_input,
        })
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Titok => "titok",
            Self::Rae => "rae",
        }
    }

    fn open(self) -> &'static [&'static str] {
        match self {
            Self::Native => &[],
            Self::Titok => &[
                "TiTok's evaluator computes rFID, usage and entropy; how papers that cite it computed PSNR and SSIM is \
                 not published: here as above",
                "how a model of another input size than 256 is to be scored is not published: here the 256x256 crop is \
                 resized to the model's size, and what it paints back to 256x256 (bicubic, antialiased)",
            ],
            Self::Rae => &[
                "RAE compares with a stored file of the validation set's ADM crops; here they are made anew, with \
                 Pillow 13's rounding",
                "RAE resizes the crop to its encoder's size on the GPU in floating point; here in 8 bits (bicubic, \
                 antialiased)",
                "RAE takes torchmetrics' SSIM, which has the same window",
            ],
        }
    }
}

impl Protocol {
    /// Field by field, for people.
    pub(crate) fn lines(&self) -> Vec<(&'static str, String)> {
        let rounding = match self.rounding {
            Rounding::Round => "to the nearest of 256 levels",
            Rounding::Truncate => "to the level below, of 256",
        };
        let mut lines = vec![
            ("reference", self.reference.clone()),
            ("resize", self.resize.clone()),
            ("rounding", format!("{rounding}; data range {}", self.data_range)),
            ("ssim", self.ssim.to_string()),
            ("ms-ssim", self.ms_ssim.to_string()),
            ("lpips", self.lpips.to_string()),
            ("fid", self.fid.to_string()),
        ];
        lines.extend(self.open.iter().map(|open| ("open", open.to_string())));
        lines
    }
}

/// A preparation in words, and as manifests have it.
pub(crate) fn words(preprocessor: &Preprocessor) -> String {
    let (height, width) = preprocessor.size;
    let (filter, tag) = (preprocessor.resample, preprocessing(preprocessor));
    let by = format!("{filter}, antialiased");
    let words = match preprocessor.resize_mode {
        _ if !preprocessor.do_resize => "not resized".to_string(),
        ResizeMode::Squash => format!("both sides to {width}x{height} ({by})"),
        ResizeMode::CenterCrop => {
            let short = preprocessor.shortest_edge.unwrap_or(width.max(height));
            format!("short side to {short} ({by}), centre crop {width}x{height}")
        }
        ResizeMode::AdmCrop => {
            format!("ADM's centre crop {width}x{height} (halved by box while it can be, then bicubic, antialiased)")
        }
        ResizeMode::Pad => format!("whole inside {width}x{height} ({by}), centred on white"),
        ResizeMode::Naflex => format!("each image its own size, in whole patches ({by})"),
    };
    format!("{words}; {tag}")
}

/// Decoded pixels `[B, 3, H, W]` as 8-bit images.
pub(crate) fn to_levels(decoded: &Tensor, preprocessor: &Preprocessor, rounding: Rounding) -> Result<Vec<Rgb>> {
    if rounding == Rounding::Round {
        return super::super::to_images(decoded, preprocessor);
    }
    let (b, _, h, w) = decoded.dims4()?;
    let decoded = decoded.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
    let [mean, std] = preprocessor.unit_mean_and_std();
    let image = |i: usize| {
        let chw = decoded.get(i)?.flatten_all()?.to_vec1::<f32>()?;
        // `as` clamps, cuts off, and turns NaN into 0.
        let level = |c: usize, at: usize| (255.0 * (chw[c * h * w + at] * std[c] + mean[c])) as u8;
        let data = (0..h * w).flat_map(|at| [0, 1, 2].map(|c| level(c, at))).collect();
        Ok(Rgb { width: w, height: h, data })
    };
    (0..b).map(image).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_rounded_or_cut_off() {
        // In −1..1: 127.6 / 127.5 − 1 is level 127.6.
        let signed = |level: f32| level / 127.5 - 1.0;
        let values: Vec<f32> = [127.6, 300.0, -20.0].map(signed).to_vec();
        let decoded = Tensor::from_vec(values, (1, 3, 1, 1), &Device::Cpu).expect("a tensor");
        let preprocessor = Preprocessor::siglip(16, Resample::Bicubic);
        let level = |rounding| to_levels(&decoded, &preprocessor, rounding).expect("an image")[0].data.clone();
        assert_eq!(level(Rounding::Round), [128, 255, 0]);
        assert_eq!(level(Rounding::Truncate), [127, 255, 0]);
    }

    #[test]
    fn a_preset_has_its_own_input_of_the_fid() {
        for preset in [Preset::Titok, Preset::Rae] {
            let error = preset.protocol(String::new(), Some(FidInput::PyTorch)).expect_err("a contradiction");
            assert!(error.to_string().contains("leave --fid-input out"), "{error}");
            assert!(preset.protocol(String::new(), Some(FidInput::TensorFlow)).is_ok());
        }
        let own = Preset::Native.protocol(String::new(), Some(FidInput::PyTorch)).expect("a protocol");
        assert!(own.fid.contains("pytorch-fid"));
    }
}
