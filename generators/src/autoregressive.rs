//! Drawing with an autoregressive generator: a code after the other, row by row.

use rand::Rng;

use crate::generator::{Drawn, Generator};
use crate::network::UNKNOWN;
use crate::sampling::Sampling;

/// An image at work.
pub struct Image<'a, R> {
    /// Its class, if any.
    pub class: Option<usize>,
    /// N codes; those that are [`UNKNOWN`] are drawn, the others stay and are seen by those after them.
    pub codes: &'a mut [u32],
    /// What it draws from.
    pub random: R,
}

/// Draws the unknown codes of several images at a time, keeping keys and values; how many makes no difference to any.
///
/// # Panics
/// When there are not N codes, or a code or class is beyond the config's: a bug in the caller, not in the input.
pub fn draw<R: Rng + Send>(generator: &Generator, images: &mut [Image<R>], sampling: &Sampling) {
    // On a thread of the pool: from outside, each of a token's products would wait for a thread to wake.
    rayon::scope(|_| draw_here(generator, images, sampling));
}

fn draw_here<R: Rng>(generator: &Generator, images: &mut [Image<R>], sampling: &Sampling) {
    let (n, guided) = (generator.config().tokens(), sampling.is_guided());
    assert!(images.iter().all(|image| image.codes.len() == n), "draw: a code a place");
    let mut drawn: Vec<Drawn> = images.iter().map(|_| generator.begin()).collect();
    // Those without their class, for guidance.
    let mut free: Vec<Drawn> = images.iter().filter(|_| guided).map(|_| generator.begin()).collect();
    for place in 0..n {
        let before = |image: &Image<R>| if place == 0 { UNKNOWN } else { image.codes[place - 1] };
        let with = images.iter().map(|image| (before(image), image.class));
        let without = images.iter().filter(|_| guided).map(|image| (before(image), None));
        let inputs: Vec<_> = with.chain(without).collect();
        let mut sequences: Vec<&mut Drawn> = drawn.iter_mut().chain(&mut free).collect();
        let mut scores = generator.next(&inputs, &mut sequences);
        let k = scores.len() / inputs.len();
        let (scores, free) = scores.split_at_mut(images.len() * k);
        for (i, (image, scores)) in images.iter_mut().zip(scores.chunks_exact_mut(k)).enumerate() {
            if guided {
                sampling.guide(scores, &free[i * k..][..k]);
            }
            settle(image, place, scores, sampling);
        }
    }
}

/// [`draw`] without keys and values kept, each code by a pass over all before it: the same codes, more slowly. For tests and
/// benchmarks.
pub fn draw_uncached<R: Rng + Send>(generator: &Generator, image: &mut Image<R>, sampling: &Sampling) {
    rayon::scope(|_| {
        let mut inputs = vec![UNKNOWN];
        for place in 0..image.codes.len() {
            let mut scores = generator.scores(&inputs, image.class, &[place]);
            if sampling.is_guided() {
                sampling.guide(&mut scores, &generator.scores(&inputs, None, &[place]));
            }
            settle(image, place, &mut scores, sampling);
            inputs.push(image.codes[place]);
        }
    });
}

/// Draws the code of a place; one that is known costs its draw all the same, so that what follows is the same.
fn settle<R: Rng>(image: &mut Image<R>, place: usize, scores: &mut [f32], sampling: &Sampling) {
    let (code, _) = sampling.draw(scores, &mut image.random);
    if image.codes[place] == UNKNOWN {
        image.codes[place] = code;
    }
}
