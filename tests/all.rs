//! One integration binary, so that candle is linked once.

mod codes;
mod compare;
mod convert;
mod encoders;
mod features;
mod folders;
mod gan;
mod generators;
#[cfg(feature = "cuda")]
mod gpu;
mod gradients;
mod image;
mod inference;
mod invariance;
mod metrics;
mod model;
mod ops;
mod pairs;
mod parity;
mod perceptual;
mod quantizers;
mod ranks;
mod simvq;
mod steps;
mod usage;
mod vq;
