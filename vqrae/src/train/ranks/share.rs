//! What a step's shares become together: everything that a rank has of its own images, made that of the whole batch.

use candle_core::DType;
use rayon::prelude::*;

use super::Ranks;
use crate::error::{Error, Result};
use crate::quantizer::Shares;
use crate::train::config::Run;
use crate::train::trainer::Sum;
use crate::weights::Tensors;

impl Run {
    /// Whether every rank gets as many images as the others, and every part of a rank's as many as its others.
    pub(in crate::train) fn check_ranks(&self, ranks: usize) -> Result<()> {
        let (size, parts) = (self.batch_size, self.accumulate);
        if ranks > 0 && size.is_multiple_of(ranks * parts) {
            return Ok(());
        }
        Err(Error::Training(format!(
            "train.batch_size is {size}, all ranks together, and does not divide into {ranks} ranks with \
             train.accumulate = {parts} parts each; expected: a multiple of {}",
            ranks * parts
        )))
    }
}

impl Sum {
    /// Turns what a rank has of its `parts` parts into means over the parts of all ranks, and its codes into those of the
    /// whole batch.
    pub(in crate::train) fn share(&mut self, ranks: &dyn Ranks, parts: usize) -> Result<()> {
        let parts = parts * ranks.size();
        let mut numbers: Vec<f64> = [self.loss].into_iter().chain(self.terms.values().copied()).collect();
        ranks.add(&mut numbers)?;
        let mut means = numbers.into_iter().map(|sum| sum / parts as f64);
        self.loss = means.next().unwrap_or_default();
        self.terms.values_mut().zip(means).for_each(|(term, mean)| *term = mean);
        self.gradients.sum(ranks)?;
        self.gradients.divide(parts)?;
        self.codes = ranks.codes(std::mem::take(&mut self.codes))?;
        Ok(())
    }
}

/// A step's batch as a quantizer's moving averages see it.
pub(in crate::train) struct Batch<'a>(pub(in crate::train) &'a dyn Ranks);

impl Shares for Batch<'_> {
    fn count(&self) -> usize {
        self.0.size()
    }

    fn index(&self) -> usize {
        self.0.rank()
    }

    fn add(&self, values: &mut [f64]) -> candle_core::Result<()> {
        self.0.add(values).map_err(candle_core::Error::wrap)
    }
}

/// Refuses to go on where ranks hold other tensors than rank 0, f32 ones on the CPU.
pub(in crate::train) fn agree<'a>(ranks: &dyn Ranks, all: impl Iterator<Item = &'a Tensors>) -> Result<()> {
    if ranks.size() == 1 {
        return Ok(());
    }
    let tensors: Vec<_> = all.flatten().collect();
    let hash = |(name, tensor): &(&String, &candle_core::Tensor)| {
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(name.as_bytes());
        for value in values {
            hasher.update(&value.to_le_bytes());
        }
        Ok(*hasher.finalize().as_bytes())
    };
    let hashes = tensors.par_iter().map(hash).collect::<Result<Vec<[u8; 32]>>>()?;
    ranks.agree("weights or moments", blake3::hash(hashes.as_flattened()).as_bytes())
}
