//! See the numbered files beside this one.
