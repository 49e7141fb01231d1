//! Codes of new images, whatever the kind of the generator.

use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use crate::config::Kind;
use crate::generator::Generator;
use crate::masked::Plan;
use crate::network::UNKNOWN;
use crate::{autoregressive, masked, sampling};

/// An image to draw.
#[derive(Debug, Clone)]
pub struct Wish {
    /// The number of its class; none: of any.
    pub class: Option<usize>,
    /// N codes: those that are [`UNKNOWN`] are drawn, the others stay.
    pub codes: Vec<u32>,
    /// What it draws from, of a seed and of the image's number: the same codes alone and among others.
    pub random: ChaCha8Rng,
}

impl Wish {
    /// Image `number` of a seed, of which nothing is known.
    pub fn new(generator: &Generator, class: Option<usize>, seed: u64, number: u64) -> Self {
        let codes = vec![UNKNOWN; generator.config().tokens()];
        Self { class, codes, random: sampling::random(seed, number) }
    }
}

/// Draws the unknown codes of several images side by side.
///
/// # Errors
/// If a wish does not fit the generator: says how.
pub fn draw(generator: &Generator, wishes: &mut [Wish], plan: &Plan) -> Result<(), String> {
    let config = generator.config();
    let (n, k, classes) = (config.tokens(), config.tokenizer.codebook_size, config.classes.len());
    plan.sampling.check()?;
    for wish in wishes.iter() {
        if wish.codes.len() != n {
            return Err(format!("an image has {} codes, expected: {n}", wish.codes.len()));
        }
        if let Some(code) = wish.codes.iter().find(|&&code| code != UNKNOWN && code as usize >= k) {
            return Err(format!("the code {code} is not among {k}"));
        }
        if let Some(class) = wish.class.filter(|&class| class >= classes) {
            return Err(format!("the class {class} is not among {classes}"));
        }
    }
    match config.kind {
        Kind::Masked => wishes.par_iter_mut().for_each(|Wish { class, codes, random }| {
            masked::draw(generator, *class, codes, plan, random);
        }),
        Kind::Autoregressive => {
            let images = wishes.iter_mut();
            let mut images: Vec<_> = images
                .map(|Wish { class, codes, random }| autoregressive::Image { class: *class, codes, random })
                .collect();
            autoregressive::draw(generator, &mut images, &plan.sampling);
        }
    }
    Ok(())
}
