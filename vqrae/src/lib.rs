//! VQRAE (arXiv 2511.23386): a pretrained vision encoder as an image tokenizer.
//!
//! 1. [`image`]: an image file becomes pixels `[3, H, W]`, bit for bit as Pillow and transformers have them
//! 2. [`encoder`]: pixels `[B, 3, H, W]` become continuous features `[B, N, D]`
//! 3. [`quantizer`]: every feature becomes the index of its nearest code, `[B, h, w]`
//! 4. [`decoder`]: codes become pixels again
//! 5. [`codes`]: indices ⇄ disk
pub mod codes;
pub mod decoder;
pub mod encoder;
pub mod error;
pub mod image;
pub mod metrics;
pub mod model;
pub mod ops;
pub mod quantizer;
pub mod train;
pub mod vit;
pub mod weights;

pub use candle_core::{DType, Device, Tensor};
pub use error::{Error, Result};
pub use model::{Config, InitReport, Network, Vqrae, init};
