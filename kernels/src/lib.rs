//! Nearest-code search for vector quantization: given N token vectors and a codebook, the index of each
//! token's best code, exactly.
//!
//! One [contract](nearest) says what the answer is: scores summed in binary64 in a fixed order, the largest
//! wins, the lowest index wins ties. Every path returns that answer bit for bit, so a code depends on the
//! token and the codebook alone: not on the batch it came in, the thread count or the machine.
//!
//! 1. [`Codebook::new`] checks and prepares the codes, once.
//! 2. [`Codebook::nearest`] screens all K codes in bf16 or f32 with a proven error bound and scores only the
//!    few survivors in binary64. The N × K score matrix never exists.
//! 3. [`Codebook::nearest_reference`] is the contract as a plain loop; every test compares with it.
//!
//! [`cpu`] is the transformer for inference on a processor: products against packed weights in bf16 or f32 on the best
//! instructions at hand. [`matrix`] is the plain matrix product of everything else, and [`vector`] its loops.
//!
//! The crate works on slices. It knows nothing of tensors, devices, models or gradients.
//!
//! # Shapes
//! Letters used throughout: N tokens, D width, K codes; all arrays are row-major.
//!
//! ```
//! use vqrae_kernels::{Codebook, Metric};
//!
//! // K = 3 codes of width D = 2.
//! let codes = vec![0.0, 0.0, 1.0, 0.0, 0.0, 2.0];
//! let codebook = Codebook::new(codes, 2, Metric::Euclidean)?;
//!
//! // N = 2 tokens; the second is as far from code 0 as from code 1, and the lower index wins.
//! let tokens = [0.1, 1.8, 0.5, 0.0];
//! assert_eq!(codebook.nearest(&tokens)?, [2, 0]);
//! assert_eq!(codebook.nearest_reference(&tokens)?, [2, 0]);
//! # Ok::<(), vqrae_kernels::Error>(())
//! ```

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
pub mod matrix;
pub mod nearest;
pub mod vector;

pub use error::Error;
pub use nearest::{Codebook, Metric, Stats};
