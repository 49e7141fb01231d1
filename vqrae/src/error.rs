//! What can go wrong when files are touched: every variant names the file, key or tensor at fault.
//!
//! Pure tensor code (`vit`, `ops`, `encoder`, `quantizer`, `decoder`) returns [`candle_core::Result`]; whatever
//! opens, reads or writes something returns [`Result`].

use std::path::{Path, PathBuf};

/// The library's result.
pub type Result<T> = std::result::Result<T, Error>;

/// The library's error.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder at fault.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An image could not be decoded, prepared or written.
    #[error(transparent)]
    Image(#[from] crate::image::Error),
    /// A JSON or TOML file does not say what it should.
    #[error("{path}: {reason}")]
    Config {
        /// The file at fault.
        path: PathBuf,
        /// The key and what is wrong with it.
        reason: String,
    },
    /// A weights file is broken, or its tensors are not those that the config asks for.
    #[error("{path}: {reason}")]
    Weights {
        /// The file or folder at fault.
        path: PathBuf,
        /// The tensors at fault, with the expected and the found shapes.
        reason: String,
    },
    /// A code file is broken or lies about itself.
    #[error("{path}: {reason}")]
    Codes {
        /// The file at fault.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The codes were made by another model than the one that is to decode them.
    #[error(
        "{path}: these codes were made by model {codes}, but the model at hand is {model}; decode them with the model that made them"
    )]
    OtherModel {
        /// The code file.
        path: PathBuf,
        /// The id of the model that made the codes.
        codes: String,
        /// The id of the model that was asked to decode them.
        model: String,
    },
    /// The CPU computes in f32 and bf16 alone.
    #[error("{dtype} is not a number format that the CPU computes in; use f32 or bf16")]
    Dtype {
        /// The format asked for.
        dtype: &'static str,
    },
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A kernel refused its input.
    #[error(transparent)]
    Kernel(#[from] vqrae_kernels::Error),
    /// Training cannot go on.
    #[error("training: {0}")]
    Training(String),
}

impl Error {
    /// For `map_err`: adds the path where the file was opened.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// A config file at `path` is wrong, because of `reason`.
    pub fn config(path: impl AsRef<Path>, reason: impl ToString) -> Self {
        Self::Config { path: path.as_ref().to_path_buf(), reason: reason.to_string() }
    }

    /// A weights file at `path` is wrong, because of `reason`.
    pub fn weights(path: impl AsRef<Path>, reason: impl ToString) -> Self {
        Self::Weights { path: path.as_ref().to_path_buf(), reason: reason.to_string() }
    }

    /// A code file at `path` is wrong, because of `reason`.
    pub fn codes(path: impl AsRef<Path>, reason: impl ToString) -> Self {
        Self::Codes { path: path.as_ref().to_path_buf(), reason: reason.to_string() }
    }
}
