//! Codes → a generator that draws many of them at a time → new images.
//!
//! `cargo run --release --workspace --example 04_masked_diffusion -- CODES OUT [STEPS] [elbo|cosine]`
//!
//! CODES: `vqrae-cli tokenize PHOTOS --labels folders --ten-crop -o CODES`. Afterwards `vqrae-cli generate OUT -o IMAGES`.
//! One network, two schedules of what a step masks: `elbo` is MDLM's, whose loss bounds the likelihood, `cosine` MaskGIT's, whose
//! steps are more like those of drawing. What it draws in, MaskGIT's order or the diffusion's, is `generate`'s choice.

use vqrae_examples::generator::{Words, learn};
use vqrae_generators::Kind;
use vqrae_generators::objective::Schedule;
use vqrae_generators::train::Recipe;

fn main() -> anyhow::Result<()> {
    let words = Words::read(2200)?;
    let schedule = match words.more.as_deref() {
        None | Some("elbo") => Schedule::Elbo,
        Some("cosine") => Schedule::Cosine,
        Some(other) => anyhow::bail!("there is no schedule `{other}`; there are elbo and cosine"),
    };
    let recipe = Recipe { steps: words.steps, schedule, ..Recipe::default() };
    learn(&words, Kind::Masked, &recipe)
}
