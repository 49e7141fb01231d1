//! See the numbered files beside this one; here is what they lean on.

pub mod classes;
pub mod generator;
pub mod understanding;
