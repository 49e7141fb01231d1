//! Where a training computes: a rank for every device.

use std::num::NonZeroUsize;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use vqrae::Device;

/// Which devices, and how many ranks.
#[derive(clap::Args, Debug)]
pub(super) struct DeviceArgs {
    /// Where to compute: cpu, cuda, cuda:1 for the second card, or cuda:0,1 for several, among which every step's images
    /// are divided
    #[arg(long, default_value = "cpu", value_name = "cpu|cuda|cuda:0,1")]
    device: Where,
    /// Ranks among which every step's images are divided: threads on the CPU, one for each card on CUDA
    #[arg(long, value_name = "N")]
    ranks: Option<NonZeroUsize>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Where {
    Cpu,
    Cuda(Vec<usize>),
}

impl FromStr for Where {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(vec![0])),
            Some(("cuda", numbers)) => {
                let card = |word: &str| word.parse().map_err(|_| format!("{word:?} is not a card's number"));
                let cards: Vec<usize> = numbers.split(',').map(card).collect::<Result<_, _>>()?;
                match cards.iter().enumerate().find(|(i, card)| cards[..*i].contains(card)) {
                    Some((_, card)) => Err(format!("card {card} is named twice")),
                    None => Ok(Self::Cuda(cards)),
                }
            }
            _ => Err("expected: cpu, cuda, cuda:N or cuda:N,M".to_string()),
        }
    }
}

impl DeviceArgs {
    /// The devices, a rank each.
    pub(super) fn open(&self) -> Result<Vec<Device>> {
        let ranks = self.ranks.map(NonZeroUsize::get);
        match &self.device {
            Where::Cpu => Ok(vec![Device::Cpu; ranks.unwrap_or(1)]),
            Where::Cuda(_) if !cfg!(feature = "cuda") => {
                bail!("this build has no CUDA; build with --features cuda, or pass --device cpu")
            }
            Where::Cuda(cards) if ranks.is_some_and(|ranks| ranks != cards.len()) => {
                bail!(
                    "--ranks is {}, but --device names {} cards, and every card is one rank; name the cards and leave --ranks \
                     out",
                    ranks.unwrap_or_default(),
                    cards.len()
                )
            }
            // With a stream of its own, since the default one is each thread's, and a rank has several.
            Where::Cuda(cards) => cards.iter().map(|&card| cuda(card)).collect(),
        }
    }
}

fn cuda(card: usize) -> Result<Device> {
    Device::new_cuda_with_stream(card).with_context(|| format!("cuda:{card} could not be used"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_devices() {
        let parse = |text: &str| text.parse::<Where>();
        assert_eq!(parse("cpu"), Ok(Where::Cpu));
        assert_eq!(parse("cuda"), Ok(Where::Cuda(vec![0])));
        assert_eq!(parse("cuda:3,1"), Ok(Where::Cuda(vec![3, 1])));
        assert!(parse("cuda:1,1").unwrap_err().contains("card 1 is named twice"));
        assert!(parse("cuda:1,").unwrap_err().contains("not a card's number"));
        assert!(parse("cpu:2").unwrap_err().contains("expected: cpu"));
    }

    #[test]
    fn ranks_are_threads_on_the_cpu() {
        let open = |ranks| DeviceArgs { device: Where::Cpu, ranks: NonZeroUsize::new(ranks) }.open().unwrap().len();
        assert_eq!((open(0), open(3)), (1, 3));
    }
}
