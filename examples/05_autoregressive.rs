//! Codes → a generator that draws them row by row → new images.
//!
//! `cargo run --release --workspace --example 05_autoregressive -- CODES OUT [STEPS]`
//!
//! CODES: `vqrae-cli tokenize PHOTOS --labels folders --ten-crop -o CODES`. Afterwards `vqrae-cli generate OUT -o IMAGES`.

use vqrae_examples::generator::{Words, learn};
use vqrae_generators::Kind;
use vqrae_generators::train::Recipe;

fn main() -> anyhow::Result<()> {
    let words = Words::read(2600)?;
    let recipe = Recipe { steps: words.steps, ..Recipe::default() };
    learn(&words, Kind::Autoregressive, &recipe)
}
