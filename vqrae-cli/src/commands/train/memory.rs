//! A step that a device's memory does not hold: in how many parts it would.

use anyhow::{Error, Result, anyhow};
use vqrae::Device;
use vqrae::train::Config;
use vqrae::train::plan::Plan;

use crate::{device, memory};

/// A training's error; where a device's memory was full, with what to do about it.
pub(super) fn explained(error: Error, config: &Config, devices: &[Device]) -> Error {
    if !memory::is_full(&error) {
        return error;
    }
    let place = devices.first().map_or_else(|| "the device".to_string(), memory::place);
    let total = devices.iter().filter_map(device::memory_mib).map(|(_, total)| total).min();
    let estimate = |parts: usize| {
        let mut config = config.clone();
        // What one rank sees of a step.
        config.train.batch_size /= devices.len().max(1);
        config.train.accumulate = parts;
        Ok(Plan::of(&config)?.memory.iter().map(|(_, bytes)| bytes >> 20).sum())
    };
    let (images, parts) = (config.train.batch_size, config.train.accumulate);
    let advice = match parts_that_fit(images, devices.len(), parts, total, estimate) {
        Some(parts) => format!(
            "by the estimate of --dry-run {parts} parts of {} images do: pass --set train.accumulate={parts}, which keeps the \
             step what it is",
            images / parts / devices.len().max(1)
        ),
        None => {
            "an image a part is the least; pass --set train.checkpoint_blocks=true, or take a smaller model".to_string()
        }
    };
    anyhow!(
        "a step of {images} images in {parts} part(s) does not fit in the memory of {place}; {advice} ({})",
        memory::cause(&error)
    )
}

/// The fewest parts, more than `parts`, whose estimate in MiB a device of `total` MiB holds. Where the total is not known, or
/// the estimate is too low to help, the next number of parts that divides the step; `None` where there is no other.
fn parts_that_fit(
    images: usize,
    ranks: usize,
    parts: usize,
    total: Option<u64>,
    estimate: impl Fn(usize) -> Result<u64>,
) -> Option<usize> {
    let divides = |parts: &usize| images.is_multiple_of(parts * ranks.max(1));
    let mut more = (parts + 1..=images).filter(divides);
    let next = more.next()?;
    let holds = |parts: &usize| Some(estimate(*parts).ok()? <= total?);
    std::iter::once(next).chain(more).find(|parts| holds(parts) == Some(true)).or(Some(next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_divide_the_step_and_fit_by_the_estimate() {
        // 100 MiB of weights, and 10 MiB an image.
        let estimate = |parts: usize| Ok(100 + 10 * (48 / parts) as u64);
        assert_eq!(parts_that_fit(48, 1, 1, Some(200), estimate), Some(6));
        assert_eq!(parts_that_fit(48, 1, 1, Some(400), estimate), Some(2));
        assert_eq!(parts_that_fit(48, 2, 1, Some(200), estimate), Some(6));
        assert_eq!(parts_that_fit(48, 16, 1, Some(200), estimate), Some(3));
        // What is wrong or not known moves on by one step.
        assert_eq!(parts_that_fit(48, 1, 2, Some(50), estimate), Some(3));
        assert_eq!(parts_that_fit(48, 1, 2, None, estimate), Some(3));
        assert_eq!(parts_that_fit(48, 1, 2, Some(500), |_| Err(anyhow!("no folder"))), Some(3));
        assert_eq!(parts_that_fit(48, 1, 48, Some(200), estimate), None);
        assert_eq!(parts_that_fit(48, 48, 1, Some(200), estimate), None);
    }
}
