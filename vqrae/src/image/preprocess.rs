//! `preprocessor_config.json` as code: what transformers' torchvision backend does, bit for bit.

use std::path::Path;

use serde_json::{Value, json};

use super::config::{ConfigError, Keys};
use super::pillow::{self, Filter};
use super::resize::{affordable, crop, pad, resize};
use super::{Error, ErrorKind, JPEG_DECODER, Naflex, Resample, ResizeMode, Rgb};

/// How pixels become the encoder's input. Fields carry the names of their Hugging Face keys.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocessor {
    /// Height and width of the result, in pixels; in naflex mode of the result of a square image.
    pub size: (usize, usize),
    /// Interpolation of the resize.
    pub resample: Resample,
    /// How any shape comes to `size`. Not a Hugging Face key, except that `do_center_crop` means center-crop.
    pub resize_mode: ResizeMode,
    /// What center-crop resizes the short side to before it cuts `size` out, in pixels. `None`: the longer side of
    /// `size`. Ignored by the other modes.
    pub shortest_edge: Option<usize>,
    /// The budget of naflex mode, which needs it. Ignored by the other modes.
    pub naflex: Option<Naflex>,
    /// Without it an image must come in the right size (for center-crop: at least that size; for naflex: in whole
    /// patches).
    pub do_resize: bool,
    /// Whether values are multiplied by `rescale_factor`.
    pub do_rescale: bool,
    /// From 0..255 to the range of `image_mean`; 1/255 as a rule.
    pub rescale_factor: f64,
    /// Whether `image_mean` and `image_std` are applied.
    pub do_normalize: bool,
    /// Subtracted, by channel.
    pub image_mean: [f32; 3],
    /// Divided by, by channel.
    pub image_std: [f32; 3],
}

impl Preprocessor {
    /// SigLIP's: squash to a square, values in −1..1. SigLIP takes bicubic, SigLIP 2 bilinear:
    /// <https://huggingface.co/google/siglip-base-patch16-224/blob/main/preprocessor_config.json>
    pub fn siglip(side: usize, resample: Resample) -> Self {
        Self {
            size: (side, side),
            resample,
            resize_mode: ResizeMode::Squash,
            shortest_edge: None,
            naflex: None,
            do_resize: true,
            do_rescale: true,
            rescale_factor: 1.0 / 255.0,
            do_normalize: true,
            image_mean: [0.5; 3],
            image_std: [0.5; 3],
        }
    }

    /// Reads a `preprocessor_config.json`.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let read = || Self::from_json(&std::fs::read_to_string(path)?);
        read().map_err(|source| Error::Config { path: path.into(), source })
    }

    /// Reads the text of a `preprocessor_config.json`. Keys that do not change pixels are ignored.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let config = Keys(serde_json::from_str(text)?);
        config.refuse_what_we_lack()?;
        let naflex = config.naflex()?;
        let (size, shortest_edge, resize_mode) = match naflex {
            Some(naflex) => (naflex.square(), None, ResizeMode::Naflex),
            None => config.geometry()?,
        };
        let do_resize = config.flag("do_resize", true)?;
        let do_normalize = config.flag("do_normalize", true)?;
        Ok(Self {
            size,
            resample: config.resample(do_resize)?,
            resize_mode,
            shortest_edge,
            naflex,
            do_resize,
            do_rescale: config.flag("do_rescale", true)?,
            rescale_factor: config.rescale_factor()?,
            do_normalize,
            image_mean: config.channels("image_mean", do_normalize, 0.0)?,
            image_std: config.image_std(do_normalize)?,
        })
    }

    /// The config as Hugging Face writes it, so that transformers reads it too; with `resize_mode` unless it is squash.
    pub fn to_json(&self) -> Value {
        let (height, width) = self.size;
        let mut config = json!({
            "image_processor_type": "SiglipImageProcessor",
            "do_convert_rgb": true,
            "do_resize": self.do_resize,
            "size": {"height": height, "width": width},
            "resample": self.resample,
            "do_rescale": self.do_rescale,
            "rescale_factor": self.rescale_factor,
            "do_normalize": self.do_normalize,
            "image_mean": self.image_mean.map(shortest_decimal),
            "image_std": self.image_std.map(shortest_decimal),
        });
        if self.resize_mode == ResizeMode::CenterCrop {
            config["image_processor_type"] = json!("CLIPImageProcessor");
            config["do_center_crop"] = json!(true);
            config["size"] = json!({"shortest_edge": self.short_side()});
            config["crop_size"] = json!({"height": height, "width": width});
        }
        if let (ResizeMode::Naflex, Some(naflex)) = (self.resize_mode, self.naflex) {
            config["image_processor_type"] = json!("Siglip2ImageProcessor");
            config.as_object_mut().and_then(|config| config.remove("size"));
            config["patch_size"] = json!(naflex.patch_size);
            config["max_num_patches"] = json!(naflex.max_num_patches);
        } else if self.resize_mode != ResizeMode::Squash {
            config["resize_mode"] = json!(self.resize_mode);
        }
        config
    }

    /// The same by another mode. Naflex gets a budget, if there is none, of as many patches of side `patch` as the size
    /// holds.
    #[must_use]
    pub fn by(self, resize_mode: ResizeMode, patch: usize) -> Self {
        let naflex = match resize_mode {
            ResizeMode::Naflex => Some(self.naflex.unwrap_or_else(|| Naflex::of(self.size, patch))),
            _ => self.naflex,
        };
        Self { resize_mode, naflex, ..self }
    }

    /// The same view of an image at another size (height, width): what center-crop cuts from grows with it, and naflex's
    /// budget becomes as many patches as the size holds.
    #[must_use]
    pub fn at(&self, size: (usize, usize)) -> Self {
        let longer = |(h, w): (usize, usize)| h.max(w);
        let scaled = |short: usize| (short * longer(size)).div_ceil(longer(self.size).max(1));
        let naflex = self.naflex.map(|naflex| Naflex::of(size, naflex.patch_size));
        Self {
            size: match (self.resize_mode, naflex) {
                (ResizeMode::Naflex, Some(naflex)) => naflex.square(),
                _ => size,
            },
            shortest_edge: self.shortest_edge.map(scaled),
            naflex,
            ..self.clone()
        }
    }

    /// Brings an image to exactly `size`, in naflex mode to its own size, still in 8 bits.
    pub fn prepare(&self, image: &Rgb) -> Result<Rgb, ErrorKind> {
        image.check()?;
        let prepared = match self.resize_mode {
            _ if !self.do_resize => self.take_as_is(image),
            ResizeMode::Squash => resize(image, self.size.1, self.size.0, self.resample),
            ResizeMode::CenterCrop => self.center_crop(image),
            ResizeMode::AdmCrop => self.adm_crop(image),
            ResizeMode::Pad => self.fit_and_pad(image),
            ResizeMode::Naflex => self.fill_budget(image),
        };
        prepared.map_err(|reason| ErrorKind::Resize { size: self.size, mode: self.resize_mode, reason })
    }

    /// The view that [`prepare`](Self::prepare) takes of an image, brought to exactly `size` (height, width): what a
    /// reconstruction of another size is compared with, where the decoder's patch is not the encoder's.
    pub fn prepare_at(&self, image: &Rgb, size: (usize, usize)) -> Result<Rgb, ErrorKind> {
        let squash = Self { size, resize_mode: ResizeMode::Squash, do_resize: true, ..self.clone() };
        match self.resize_mode {
            _ if !self.do_resize => squash.prepare(&self.prepare(image)?),
            ResizeMode::Naflex => squash.prepare(image),
            _ => self.at(size).prepare(image),
        }
    }

    /// `((x − mean / factor) / (std / factor))` in `f32`: transformers folds the rescaling into mean and std, and the
    /// order of its operations is kept here.
    ///
    /// # Shapes
    /// H×W pixels → `[3, H, W]`, row-major
    pub fn normalize(&self, image: &Rgb) -> Vec<f32> {
        let (pixels, _) = image.data.as_chunks::<3>();
        let mut chw = Vec::with_capacity(image.data.len());
        for c in 0..3 {
            let levels = self.levels(c);
            chw.extend(pixels.iter().map(|pixel| levels[usize::from(pixel[c])]));
        }
        chw
    }

    /// The way back from [`normalize`](Self::normalize): clamped to 0..255 and rounded to the nearest level. A value
    /// that is not a number becomes 0.
    ///
    /// # Shapes
    /// `[3, h, w]`, row-major → h×w pixels
    ///
    /// # Panics
    /// If `chw` does not hold `3 · h · w` values.
    pub fn denormalize_to_rgb(&self, chw: &[f32], h: usize, w: usize) -> Rgb {
        assert_eq!(chw.len(), 3 * h * w, "a [3, {h}, {w}] image");
        let mut data = vec![0; chw.len()];
        for (c, plane) in chw.chunks_exact((h * w).max(1)).enumerate() {
            let (mean, std) = self.mean_and_std(c);
            for (pixel, &value) in data.as_chunks_mut::<3>().0.iter_mut().zip(plane) {
                // `as` clamps, and turns NaN into 0.
                pixel[c] = (value * std + mean).round() as u8;
            }
        }
        Rgb { width: w, height: h, data }
    }

    /// Everything that decides the 8-bit pixels, for a manifest: `squash-bicubic-torchvision/mozjpeg`.
    pub fn tag(&self) -> String {
        let (mode, resample) = (self.resize_mode, self.resample);
        match mode {
            _ if !self.do_resize => format!("unresized/{JPEG_DECODER}"),
            ResizeMode::Naflex => {
                let Naflex { patch_size, max_num_patches } = self.naflex.unwrap_or_default();
                format!("{mode}-{max_num_patches}-of-{patch_size}-{resample}-torchvision/{JPEG_DECODER}")
            }
            ResizeMode::AdmCrop => format!("{mode}-{}-pillow13/{JPEG_DECODER}", Resample::Bicubic),
            ResizeMode::CenterCrop if self.short_side() != self.size.0.max(self.size.1) => {
                format!("{mode}-from-{}-{resample}-torchvision/{JPEG_DECODER}", self.short_side())
            }
            _ => format!("{mode}-{resample}-torchvision/{JPEG_DECODER}"),
        }
    }

    fn short_side(&self) -> usize {
        self.shortest_edge.unwrap_or(self.size.0.max(self.size.1))
    }

    fn take_as_is(&self, image: &Rgb) -> Result<Rgb, String> {
        let (height, width) = self.size;
        if self.resize_mode == ResizeMode::Naflex {
            let p = self.budget()?.patch_size;
            return match image.width.is_multiple_of(p) && image.height.is_multiple_of(p) {
                true => Ok(image.clone()),
                false => Err(format!(
                    "the image is {}x{}, which are no whole patches of {p}, and do_resize is false",
                    image.width, image.height
                )),
            };
        }
        let crops = self.resize_mode == ResizeMode::CenterCrop && image.width >= width && image.height >= height;
        if crops || (image.width, image.height) == (width, height) {
            return self.cut_centre(image);
        }
        Err(format!("the image is {}x{} and do_resize is false", image.width, image.height))
    }

    /// torchvision's sizes: the long side is cut down to a whole pixel.
    fn center_crop(&self, image: &Rgb) -> Result<Rgb, String> {
        let short = self.short_side();
        let (width, height) = if image.width <= image.height {
            (short, short * image.height / image.width)
        } else {
            (short * image.width / image.height, short)
        };
        self.cut_centre(&resize(image, width, height, self.resample)?)
    }

    /// `center_crop_arr` of guided-diffusion.
    fn adm_crop(&self, image: &Rgb) -> Result<Rgb, String> {
        let (side, width) = self.size;
        if side != width {
            return Err("adm-crop needs a square size".to_owned());
        }
        let mut halved = image.clone();
        while halved.width.min(halved.height) >= 2 * side {
            halved = pillow::resize(&halved, halved.width / 2, halved.height / 2, Filter::Box);
        }
        let scale = side as f64 / halved.width.min(halved.height) as f64;
        let scaled = |n: usize| (n as f64 * scale).round_ties_even() as usize;
        let (width, height) = (scaled(halved.width), scaled(halved.height));
        affordable(&halved, width, height)?;
        self.cut_centre(&pillow::resize(&halved, width, height, Filter::Bicubic))
    }

    fn fit_and_pad(&self, image: &Rgb) -> Result<Rgb, String> {
        let (height, width) = self.size;
        let share = |n: usize, part: usize, whole: usize| ((2 * n * part + whole) / (2 * whole)).max(1);
        let (fitted_width, fitted_height) = if width * image.height <= height * image.width {
            (width, share(image.height, width, image.width))
        } else {
            (share(image.width, height, image.height), height)
        };
        Ok(pad(&resize(image, fitted_width, fitted_height, self.resample)?, width, height))
    }

    fn budget(&self) -> Result<Naflex, String> {
        let naflex = self.naflex.filter(|naflex| naflex.patch_size > 0);
        naflex.ok_or_else(|| "naflex mode needs a patch_size and max_num_patches".to_owned())
    }

    fn fill_budget(&self, image: &Rgb) -> Result<Rgb, String> {
        let (height, width) = self.budget()?.size_of(image.height, image.width);
        resize(image, width, height, self.resample)
    }

    fn cut_centre(&self, image: &Rgb) -> Result<Rgb, String> {
        let (height, width) = self.size;
        match (image.width.checked_sub(width), image.height.checked_sub(height)) {
            (Some(across), Some(down)) => Ok(crop(image, across / 2, down / 2, width, height)),
            _ => Err(format!("the short side is resized to only {} pixels", self.short_side())),
        }
    }

    /// The normalised value of each of the 256 levels.
    fn levels(&self, channel: usize) -> [f32; 256] {
        let (mean, std) = self.mean_and_std(channel);
        std::array::from_fn(|level| {
            let level = level as f32;
            match (self.do_normalize, self.do_rescale) {
                (true, _) => (level - mean) / std,
                (false, true) => level * self.rescale_factor as f32,
                (false, false) => level,
            }
        })
    }

    /// What a normalised value is multiplied by (the second) and then added to (the first) to lie in 0..1, by channel.
    pub fn unit_mean_and_std(&self) -> [[f32; 3]; 2] {
        let of = |c| self.mean_and_std(c);
        [[0, 1, 2].map(|c| of(c).0 / 255.0), [0, 1, 2].map(|c| of(c).1 / 255.0)]
    }

    /// Mean and standard deviation on the scale of 0..255.
    fn mean_and_std(&self, channel: usize) -> (f32, f32) {
        let whole = if self.do_rescale { (1.0 / self.rescale_factor) as f32 } else { 1.0 };
        match self.do_normalize {
            true => (self.image_mean[channel] * whole, self.image_std[channel] * whole),
            false => (0.0, whole),
        }
    }
}

/// The `f64` with the fewest digits that is this `f32`: 0.1, not 0.10000000149011612.
fn shortest_decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}
