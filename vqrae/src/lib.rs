//! VQRAE (arXiv 2511.23386): a pretrained vision encoder as an image tokenizer.
//!
//! 1. [`image`]: an image file becomes pixels `[3, H, W]`, bit for bit as Pillow and transformers have them
//! 2. [`encoder`]: pixels `[B, 3, H, W]` become continuous features `[B, N, D]`, of one state or, by [`fusion`], of two;
//!    [`latent`] can bring them to mean zero and variance one
//! 3. [`quantizer`]: every feature becomes the index of its nearest code, `[B, h, w]`, or several, `[B, h, w, C]`
//! 4. [`decoder`]: codes become pixels again
//! 5. [`codes`]: codes ⇄ disk
//!
//! [`Vqrae`] is the five in one hand; [`train`] makes a new one of photos, [`init`] of a pretrained encoder. Generators of codes
//! build on [`codes::CodeSet`], [`vit`], [`ops`] and [`inference`].
//!
//! ```
//! # #[cfg(feature = "shipped-model")] {
//! use vqrae::{DType, Device, Tensor, Vqrae};
//!
//! let model = Vqrae::shipped(&Device::Cpu, DType::F32)?; // or Vqrae::from_pretrained("my-model", …)
//! let photo = vqrae::image::open("../examples/photos/chelsea.png".as_ref(), &Default::default())?;
//!
//! let preprocessor = model.preprocessor();
//! let prepared = preprocessor.prepare(&photo)?; // 256×256, 8 bit
//! let pixels = Tensor::from_vec(preprocessor.normalize(&prepared), (1, 3, 256, 256), &Device::Cpu)?;
//!
//! let codes = model.encode_to_indices(&pixels)?; // u32 [B, h, w]
//! assert_eq!(codes.dims(), [1, 16, 16]);
//! let painted = model.decode_from_indices(&codes)?; // f32 [B, 3, H, W]
//!
//! let painted = preprocessor.denormalize_to_rgb(&painted.flatten_all()?.to_vec1::<f32>()?, 256, 256);
//! assert!(vqrae::metrics::psnr(&prepared, &painted) > Some(20.0)); // dB
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Features
//! - `mozjpeg` (default): JPEG decoding bit-exact to Pillow; without it a pure-Rust decoder that is close
//! - `shipped-model` (default): the library carries the model of `weights/vqrae-small`
//! - `cuda`: NVIDIA GPUs, by [`vqrae_kernels`]' kernels and candle's; needs nvcc to build and nothing of CUDA to start

mod cholesky;
pub mod codebook;
pub mod codes;
pub mod convert;
pub mod decoder;
pub mod encoder;
pub mod error;
pub mod files;
pub mod fusion;
pub mod image;
pub mod inference;
mod init;
pub mod latent;
pub mod metrics;
pub mod model;
pub mod ops;
pub mod perceptual;
pub mod quantizer;
mod recipe;
pub mod samples;
pub mod train;
pub mod vit;
pub mod weights;

pub use candle_core::{DType, Device, Tensor};
pub use error::{Error, Result};
pub use init::{EncoderWishes, InitReport, Wishes, init};
pub use model::{Config, Network, Vqrae, auto_dtype};
