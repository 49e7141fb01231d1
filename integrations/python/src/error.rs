//! What fails in the library, as Python exceptions.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::PyErr;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use vqrae::image;

pyo3::create_exception!(
    vqrae,
    Error,
    PyValueError,
    "What was asked for cannot be done with this image, these codes, this model or this device: the message says why."
);

/// What failed, and what it was.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The library's own error.
    Library(vqrae::Error),
    /// An image that has no path.
    Image(image::ErrorKind),
    /// A wish that cannot be met.
    Refused(String),
    /// A panic: a bug.
    Bug(String),
}

/// A wish that cannot be met, in words.
pub(crate) fn refuse<T>(reason: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Refused(reason.into()))
}

/// What `work` returns; a panic in it is a failure too.
pub(crate) fn guard<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
        Err(Failure::Bug(text.to_string()))
    })
}

impl From<vqrae::Error> for Failure {
    fn from(error: vqrae::Error) -> Self {
        Self::Library(error)
    }
}

impl From<candle_core::Error> for Failure {
    fn from(error: candle_core::Error) -> Self {
        Self::Library(error.into())
    }
}

impl From<image::Error> for Failure {
    fn from(error: image::Error) -> Self {
        Self::Library(error.into())
    }
}

impl From<image::ErrorKind> for Failure {
    fn from(kind: image::ErrorKind) -> Self {
        Self::Image(kind)
    }
}

impl From<Failure> for PyErr {
    /// A file that cannot be read is an `OSError` of its kind, what the arithmetic says a `RuntimeError`, the rest
    /// [`Error`], which is a `ValueError`.
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Library(error) => of_library(&error),
            Failure::Image(kind) => Error::new_err(kind.to_string()),
            Failure::Refused(reason) => Error::new_err(reason),
            Failure::Bug(reason) => {
                PyRuntimeError::new_err(format!("a bug in vqrae, please report it with what led to it: {reason}"))
            }
        }
    }
}

fn of_library(error: &vqrae::Error) -> PyErr {
    let message = error.to_string();
    match error {
        vqrae::Error::Io { source, .. }
        | vqrae::Error::Image(image::Error::Unreadable { source, .. } | image::Error::Unwritable { source, .. }) => {
            std::io::Error::new(source.kind(), message).into()
        }
        vqrae::Error::Candle(_) | vqrae::Error::Kernel(_) => {
            PyRuntimeError::new_err(message.lines().next().unwrap_or_default().to_string())
        }
        _ => Error::new_err(message),
    }
}
