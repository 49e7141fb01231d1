//! The keys of a `preprocessor_config.json`, read one by one.

use serde_json::{Map, Value, json};

use super::{Naflex, Resample, ResizeMode};

/// A `preprocessor_config.json` that cannot be used. Each message names the key.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot be read: {0}")]
    Unreadable(#[from] std::io::Error),
    /// The text is not a JSON object.
    #[error("not a JSON object: {0}")]
    NotJson(#[from] serde_json::Error),
    /// A key without which the numbers would be a guess.
    #[error("`{key}` is missing")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A value of the wrong kind.
    #[error("`{key}` is wrong, expected: {expected}, got: {got}")]
    Wrong {
        /// The key.
        key: &'static str,
        /// What would be right.
        expected: &'static str,
        /// The value found.
        got: String,
    },
    /// A value with a meaning that this program does not have.
    #[error("`{key}` is not supported: {reason}")]
    Unsupported {
        /// The key.
        key: &'static str,
        /// Why.
        reason: &'static str,
    },
}

/// Height and width, in pixels.
type Size = (usize, usize);

/// The keys of a `preprocessor_config.json`. A key that is null counts as absent.
pub(super) struct Keys(pub(super) Map<String, Value>);

impl Keys {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn refuse_what_we_lack(&self) -> Result<(), ConfigError> {
        if self.flag("do_pad", false)? {
            let reason = "use \"resize_mode\": \"pad\", which centres on white";
            return Err(ConfigError::Unsupported { key: "do_pad", reason });
        }
        Ok(())
    }

    pub(super) fn flag(&self, key: &'static str, default: bool) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| wrong(key, "true or false", value)),
        }
    }

    pub(super) fn resample(&self, required: bool) -> Result<Resample, ConfigError> {
        match self.get("resample") {
            None if required => Err(ConfigError::Missing { key: "resample" }),
            None => Ok(Resample::Bicubic),
            Some(value) => {
                let known = value.as_u64().and_then(|number| Resample::try_from(number).ok());
                known.ok_or_else(|| wrong("resample", "2 (bilinear) or 3 (bicubic)", value))
            }
        }
    }

    pub(super) fn rescale_factor(&self) -> Result<f64, ConfigError> {
        let Some(value) = self.get("rescale_factor") else {
            return Ok(1.0 / 255.0);
        };
        let positive = value.as_f64().filter(|factor| *factor > 0.0);
        positive.ok_or_else(|| wrong("rescale_factor", "a positive number", value))
    }

    pub(super) fn channels(&self, key: &'static str, required: bool, default: f32) -> Result<[f32; 3], ConfigError> {
        match self.get(key) {
            None if required => Err(ConfigError::Missing { key }),
            None => Ok([default; 3]),
            Some(value) => serde_json::from_value(value.clone()).map_err(|_| wrong(key, "three numbers", value)),
        }
    }

    pub(super) fn image_std(&self, required: bool) -> Result<[f32; 3], ConfigError> {
        let std = self.channels("image_std", required, 1.0)?;
        if std.iter().all(|channel| *channel > 0.0) {
            return Ok(std);
        }
        Err(wrong("image_std", "three positive numbers", &json!(std)))
    }

    /// The budget where the images keep their aspect ratio: `Siglip2ImageProcessor`, unless `resize_mode` says otherwise.
    pub(super) fn naflex(&self) -> Result<Option<Naflex>, ConfigError> {
        let processor = self.get("image_processor_type").and_then(Value::as_str).unwrap_or_default();
        let is_naflex = processor.starts_with("Siglip2ImageProcessor") || self.get("max_num_patches").is_some();
        let default = if is_naflex { ResizeMode::Naflex } else { ResizeMode::Squash };
        if self.resize_mode(default)? != ResizeMode::Naflex {
            return Ok(None);
        }
        let count = |key, default, most, expected| match self.get(key) {
            None => Ok(default),
            Some(value) => {
                let count = value.as_u64().filter(|count| (1..=most).contains(count));
                count.map(|count| count as usize).ok_or_else(|| wrong(key, expected, value))
            }
        };
        let Naflex { patch_size, max_num_patches } = Naflex::default();
        Ok(Some(Naflex {
            patch_size: count("patch_size", patch_size, 256, "1 to 256")?,
            max_num_patches: count("max_num_patches", max_num_patches, 1 << 20, "1 to 1048576")?,
        }))
    }

    /// Size of the result, `shortest_edge` and mode out of `size`, `do_center_crop`, `crop_size` and `resize_mode`.
    pub(super) fn geometry(&self) -> Result<(Size, Option<usize>, ResizeMode), ConfigError> {
        let size = self.get("size").ok_or(ConfigError::Missing { key: "size" })?;
        if self.flag("do_center_crop", false)? {
            let (crop, short) = self.crop(size)?;
            let default = if short.is_some() { ResizeMode::CenterCrop } else { ResizeMode::Squash };
            return Ok((crop, short, self.resize_mode(default)?));
        }
        if size.get("shortest_edge").is_some() {
            let reason = "with shortest_edge alone the result has no fixed size; add do_center_crop and crop_size";
            return Err(ConfigError::Unsupported { key: "size", reason });
        }
        Ok((height_and_width("size", size)?, None, self.resize_mode(ResizeMode::Squash)?))
    }

    /// The crop's size, and the short side that it is cut from. A `size` of height and width that the crop only
    /// repeats is a squash.
    fn crop(&self, size: &Value) -> Result<(Size, Option<usize>), ConfigError> {
        let crop = self.get("crop_size").map(|value| height_and_width("crop_size", value)).transpose()?;
        let Some(short) = size.get("shortest_edge").or(size.is_number().then_some(size)) else {
            let size = height_and_width("size", size)?;
            if crop.is_some_and(|crop| crop != size) {
                let reason = "with do_center_crop a size of height and width must equal it; use shortest_edge";
                return Err(ConfigError::Unsupported { key: "crop_size", reason });
            }
            return Ok((size, None));
        };
        let short = pixels("size", short)?;
        let crop = crop.unwrap_or((short, short));
        if crop.0.max(crop.1) > short {
            let reason = "it is larger than size.shortest_edge";
            return Err(ConfigError::Unsupported { key: "crop_size", reason });
        }
        Ok((crop, Some(short)))
    }

    fn resize_mode(&self, default: ResizeMode) -> Result<ResizeMode, ConfigError> {
        self.get("resize_mode").map_or(Ok(default), |value| {
            serde_json::from_value(value.clone()).map_err(|_| wrong("resize_mode", ResizeMode::NAMES, value))
        })
    }
}

/// `{"height": …, "width": …}`, or one number for both.
fn height_and_width(key: &'static str, value: &Value) -> Result<Size, ConfigError> {
    match (value.get("height"), value.get("width")) {
        (Some(height), Some(width)) => Ok((pixels(key, height)?, pixels(key, width)?)),
        _ => pixels(key, value).map(|side| (side, side)),
    }
}

fn pixels(key: &'static str, value: &Value) -> Result<usize, ConfigError> {
    const MOST: u64 = 16_384;
    let side = value.as_u64().filter(|side| (1..=MOST).contains(side));
    let expected = "pixels (1 to 16384), as a number or {\"height\", \"width\"}";
    side.map(|side| side as usize).ok_or_else(|| wrong(key, expected, value))
}

fn wrong(key: &'static str, expected: &'static str, got: &Value) -> ConfigError {
    ConfigError::Wrong { key, expected, got: got.to_string() }
}
