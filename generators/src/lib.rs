//! Generators of codes: new images from what a tokenizer makes of photos.
//!
//! 1. [`data`]: shards of codes ([`vqrae::codes::CodeSet`]) become sequences, some kept apart
//! 2. [`objective`]: what a step asks: each code by those before it, or masked codes by the rest
//! 3. [`network`]: the library's transformer ([`vqrae::vit`]) between codes and scores of codes, with gradients
//! 4. [`mod@train`]: the loop; [`likelihood`]: bits a code, beside what counting expects
//! 5. [`generator`]: the same network packed for a processor; [`mod@draw`] draws with it, [`masked`] or [`autoregressive`], by
//!    [`sampling`]
//!
//! Everything here is built on what `vqrae` shows to all: it is what a generator of your own would start from.
//!
//! ```no_run
//! use vqrae::{DType, Device, Vqrae};
//! use vqrae_generators::draw::{Wish, draw};
//! use vqrae_generators::{Generator, masked::Plan};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let tokenizer = Vqrae::shipped(&Device::Cpu, DType::F32)?;
//! let generator = Generator::open("generator", &tokenizer, DType::F32)?;
//! let (h, w) = generator.config().tokenizer.grid;
//!
//! let (class, seed) = (Some(0), 1);
//! let mut images: Vec<Wish> = (0..4).map(|number| Wish::new(&generator, class, seed, number)).collect();
//! draw(&generator, &mut images, &Plan::default())?;
//! let codes = vqrae::Tensor::new(&images[0].codes[..], &Device::Cpu)?.reshape((1, h, w))?;
//! let painted = tokenizer.decode_from_indices(&codes)?; // f32 [1, 3, H, W]
//! # Ok(()) }
//! ```

pub mod autoregressive;
pub mod config;
pub mod data;
pub mod draw;
pub mod generator;
pub mod likelihood;
pub mod masked;
pub mod network;
pub mod objective;
pub mod sampling;
pub mod train;

pub use config::{Config, Kind};
pub use generator::Generator;
