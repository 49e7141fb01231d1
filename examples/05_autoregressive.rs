//! Codes → a generator that draws them row by row → new images.
//!
//! `cargo run --release --workspace --example 05_autoregressive -- CODES OUT [STEPS]`

use vqrae_examples::generator::{Words, learn};
use vqrae_generators::Kind;
use vqrae_generators::train::Recipe;

fn main() -> anyhow::Result<()> {
    let words = Words::read(4000)?;
    let recipe = Recipe { steps: words.steps, ..Recipe::default() };
    learn(&words, Kind::Autoregressive, &recipe)?;
    Ok(())
}
