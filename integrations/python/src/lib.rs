//! The extension module `vqrae._vqrae` of the Python package `vqrae`.
//!
//! Bytes and sizes come in and go out; that they are arrays is the Python side's matter (`python/vqrae`). Nothing here
//! prints, and no panic gets out: what fails is a Python exception.

#[cfg(feature = "extension")]
mod device;
#[cfg(feature = "extension")]
mod error;
#[cfg(feature = "extension")]
mod images;
#[cfg(feature = "extension")]
mod model;
#[cfg(feature = "extension")]
mod threads;

/// The module's contents.
#[cfg(feature = "extension")]
#[pyo3::pymodule]
fn _vqrae(module: &pyo3::Bound<'_, pyo3::types::PyModule>) -> pyo3::PyResult<()> {
    use pyo3::types::PyModuleMethods;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("Error", module.py().get_type::<error::Error>())?;
    module.add_class::<model::Model>()
}
