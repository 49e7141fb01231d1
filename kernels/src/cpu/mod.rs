//! The transformer on a processor: products against packed weights, and what stands between them.
//!
//! Inference alone, without gradients: weights are packed once for the instructions at hand ([`Isa`]), activations live in
//! [`Matrix`]es of f32 or [`Bf16`] that are used again and again, and bias, GELU and residual are added where a block of a
//! product has just been computed. Sums are f32 throughout; [`Bf16`] rounds only what products read.
//!
//! The rows of a matrix are the N tokens of one image. No result depends on other images or on the number of threads.

mod attention;
pub mod dense;
mod isa;
mod linear;
mod matrix;
mod norm;
mod pieces;
pub(crate) mod product;
#[cfg(test)]
mod tests;

pub use attention::{Cache, Mask, attention};
pub use isa::{Isa, VARIABLE};
pub use linear::{End, linear, swiglu};
pub use matrix::{Bf16, Element, Matrix};
pub use norm::{layer_norm, rms_norm, rms_norm_columns};
pub use product::Packed;
#[doc(hidden)]
pub use product::{Block, Kernel};
