//! Codes → a generator that draws many of them at a time → new images.
//!
//! `cargo run --release --workspace --example 04_masked_diffusion -- CODES OUT [STEPS]`

use vqrae_examples::generator::{Words, learn};
use vqrae_generators::Kind;
use vqrae_generators::train::Recipe;

fn main() -> anyhow::Result<()> {
    let words = Words::read(4000)?;
    let recipe = Recipe { steps: words.steps, ..Recipe::default() };
    learn(&words, Kind::Masked, &recipe)?;
    Ok(())
}
