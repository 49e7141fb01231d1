//! Where a training computes: a rank for every device.

use std::num::NonZeroUsize;

use anyhow::{Result, bail};
use vqrae::Device;

use crate::device::{self, DeviceArgs, Where};

/// Which devices, and how many ranks.
#[derive(clap::Args, Debug)]
pub(super) struct RankArgs {
    #[command(flatten)]
    devices: DeviceArgs,
    /// Ranks among which every step's images are divided: threads on the CPU, one for each card on CUDA
    #[arg(long, value_name = "N")]
    ranks: Option<NonZeroUsize>,
}

impl RankArgs {
    /// The devices, a rank each.
    pub(super) fn open(&self) -> Result<Vec<Device>> {
        let Some(ranks) = self.ranks.map(NonZeroUsize::get) else { return self.devices.device.open_all() };
        match &self.devices.device {
            Where::Auto => Ok(device::auto(ranks)),
            Where::Cpu(1) => Ok(vec![Device::Cpu; ranks]),
            Where::Cpu(named) if *named != ranks => {
                bail!("--ranks is {ranks}, but --device names the CPU {named} times")
            }
            Where::Cuda(cards) if cards.len() != ranks => {
                bail!(
                    "--ranks is {ranks}, but --device names {} cards, and every card is one rank; name the cards and leave \
                     --ranks out",
                    cards.len()
                )
            }
            named => named.open_all(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(device: &str, ranks: usize) -> Result<Vec<Device>> {
        let devices = DeviceArgs { device: device.parse().unwrap() };
        RankArgs { devices, ranks: NonZeroUsize::new(ranks) }.open()
    }

    #[test]
    fn ranks_are_threads_on_the_cpu() {
        let count = |device, ranks| open(device, ranks).unwrap().len();
        assert_eq!((count("cpu", 0), count("cpu", 3), count("cpu,cpu", 0), count("cpu,cpu", 2)), (1, 3, 2, 2));
        assert!(open("cpu,cpu", 3).unwrap_err().to_string().contains("--ranks is 3"));
    }

    #[test]
    fn every_card_is_one_rank() {
        let error = open("cuda:0,1", 3).unwrap_err().to_string();
        assert!(error.contains("--ranks is 3, but --device names 2 cards"), "{error}");
    }
}
