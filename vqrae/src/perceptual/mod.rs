//! What images are to a network that has learnt to see: LPIPS and the logits of a classifier, in which two images differ, and
//! Inception's features, in which two sets of images do.
//!
//! The first two are terms of the training loss and measures of a reconstruction. Their networks are frozen, and gradients flow to
//! the images alone. Weights are files that this repository does not carry; the scripts beside `weights/README.md` make them.

mod convnext;
mod inception;
mod lpips;

pub use convnext::ConvNext;
pub use inception::{FidInput, Inception};
pub use lpips::{Backbone, Lpips};

use std::path::Path;

use crate::error::{Error, Result};
use crate::weights::Store;

/// Opens a file of weights, or says how to make it.
fn open(path: &Path, how_to_make: &str) -> Result<Store> {
    if !path.exists() {
        return Err(Error::weights(path, format!("there is no such file; make it with {how_to_make}")));
    }
    Store::open_file(path)
}

/// The first dimension of a weight, which says how wide a layer is.
fn width(store: &Store, name: &str) -> Result<usize> {
    let shape = store.shape(name).ok_or_else(|| Error::weights(store.path(), format!("tensor `{name}` is missing")))?;
    shape.first().copied().ok_or_else(|| Error::weights(store.path(), format!("tensor `{name}` is a scalar")))
}
