//! The `[gan]` section of a run's config.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Loss, augment, dino, nlayer};

/// Which discriminator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// TiTok's convolutions, trained from scratch: VQRAE's.
    NLayer,
    /// RAE's heads on a frozen DINO.
    Dino,
}

/// The adversarial part of training. Its learning rate is `groups.discriminator`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Which discriminator.
    pub discriminator: Kind,
    /// The frozen DINO of `dino`: safetensors, or a file of PyTorch's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<PathBuf>,
    /// What the two minimise.
    #[serde(default)]
    pub loss: Loss,
    /// Of the model's adversarial loss.
    #[serde(default = "default_weight")]
    pub weight: f64,
    /// Whether the weight is multiplied by what makes the adversarial gradient at the decoder's last layer as long as that
    /// of the other losses.
    #[serde(default)]
    pub adaptive: bool,
    /// First step, counted from 0, in which the model minimises the adversarial loss; not before `discriminator_start`.
    #[serde(default)]
    pub generator_start: usize,
    /// First step in which the discriminator learns.
    #[serde(default)]
    pub discriminator_start: usize,
    /// Weight of LeCam's regulariser; 0 for none.
    #[serde(default = "default_lecam")]
    pub lecam: f64,
    /// Augmentation of what the discriminator sees. Where it is not said, `dino` has RAE's and `nlayer` none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub augment: Option<augment::Config>,
    /// Sizes of `nlayer`.
    #[serde(default)]
    pub nlayer: nlayer::Config,
    /// Heads of `dino`.
    #[serde(default)]
    pub dino: dino::Config,
}

fn default_weight() -> f64 {
    0.1
}

fn default_lecam() -> f64 {
    0.001
}

impl Config {
    /// With defaults.
    pub fn new(discriminator: Kind) -> Self {
        Self {
            discriminator,
            weights: None,
            loss: Loss::default(),
            weight: default_weight(),
            adaptive: false,
            generator_start: 0,
            discriminator_start: 0,
            lecam: default_lecam(),
            augment: None,
            nlayer: nlayer::Config::default(),
            dino: dino::Config::default(),
        }
    }

    /// The augmentation in force.
    pub fn augment(&self) -> augment::Config {
        let default = match self.discriminator {
            Kind::NLayer => augment::Config::NONE,
            Kind::Dino => augment::Config::default(),
        };
        self.augment.unwrap_or(default)
    }

    /// Whether the settings make sense; the error names the field.
    pub fn check(&self) -> std::result::Result<(), String> {
        for (name, weight) in [("weight", self.weight), ("lecam", self.lecam)] {
            if !(weight.is_finite() && weight >= 0.0) {
                return Err(format!("gan.{name} is {weight}, expected: 0 or more"));
            }
        }
        if self.generator_start < self.discriminator_start {
            return Err(format!(
                "gan.generator_start is {}, expected: at least gan.discriminator_start, {}, since an untrained \
                 discriminator has nothing to say",
                self.generator_start, self.discriminator_start
            ));
        }
        match self.discriminator {
            Kind::Dino => dino::weights_of(self.weights.as_ref()).map(|_| ()),
            Kind::NLayer if self.weights.is_some() => {
                Err("gan.weights is for gan.discriminator = \"dino\"; `nlayer` is trained from scratch".to_string())
            }
            Kind::NLayer => Ok(()),
        }?;
        self.augment().check()?;
        self.nlayer.check()?;
        self.dino.check()
    }
}
