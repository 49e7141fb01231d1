//! The tests stand in `all.rs` and the files it names.
