//! The Python package `vqrae`.
