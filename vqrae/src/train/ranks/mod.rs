//! Data parallel: the ranks of a run, each with a device and its share of every step's images, and what they say to each
//! other. A step is its images, whatever the number of ranks: gradients, losses, codes, moving averages and the adversarial
//! part are those of the whole batch, and the weights of all ranks stay the same bits.
//!
//! | backend | ranks | sums |
//! |---|---|---|
//! | [`Alone`] | one | nothing to do |
//! | [`Threads`] | threads of one process, on any devices | in the host's memory, in the order of the ranks |
//! | `Nccl` (feature `nccl`) | such threads, a GPU each | of tensors by NCCL on the device's stream, else as threads |
//!
//! All ranks make the same calls in the same order. A rank that ends leaves none waiting: whoever meets the others after
//! that gets an error.

#[cfg(feature = "nccl")]
mod nccl;
pub(super) mod share;
mod threads;

pub use threads::Threads;

use std::fmt::Debug;
use std::rc::Rc;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};

/// One rank of a run, and its way to the others.
pub trait Ranks: Debug {
    /// Which one, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// Where this one computes.
    fn device(&self) -> &Device;

    /// What every rank gives, in the order of the ranks. Ranks wait here for each other.
    ///
    /// # Errors
    /// If a rank has ended, or does something else than this one.
    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Arc<Vec<u8>>>>;

    /// The sum over the ranks of an f32 tensor on the rank's device, the same bits on all of them; every rank gives the same
    /// shape.
    ///
    /// # Errors
    /// As [`Ranks::gather`]'s.
    fn sum(&self, tensor: &Tensor) -> Result<Tensor>;

    /// Whether this one speaks for all: it validates, logs and writes.
    fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Replaces numbers by their sums over the ranks, added up in the order of the ranks.
    ///
    /// # Errors
    /// As [`Ranks::gather`]'s.
    fn add(&self, values: &mut [f64]) -> Result<()> {
        if self.size() == 1 {
            return Ok(());
        }
        let all = self.gather(values.iter().flat_map(|value| value.to_le_bytes()).collect())?;
        values.fill(0.0);
        for bytes in all {
            let given = bytes.as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes));
            values.iter_mut().zip(given).for_each(|(sum, value)| *sum += value);
        }
        Ok(())
    }

    /// The codes of all ranks, one rank's behind the other's.
    ///
    /// # Errors
    /// As [`Ranks::gather`]'s.
    fn codes(&self, codes: Vec<u32>) -> Result<Vec<u32>> {
        if self.size() == 1 {
            return Ok(codes);
        }
        let all = self.gather(codes.iter().flat_map(|code| code.to_le_bytes()).collect())?;
        let of_rank = |bytes: &Arc<Vec<u8>>| bytes.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
        Ok(all.iter().map(of_rank).collect::<Vec<Vec<u32>>>().concat())
    }

    /// The lines of all ranks.
    ///
    /// # Errors
    /// As [`Ranks::gather`]'s.
    fn lines(&self, lines: Vec<String>) -> Result<Vec<String>> {
        if self.size() == 1 {
            return Ok(lines);
        }
        let all = self.gather(lines.iter().map(|line| line.replace('\n', " ") + "\n").collect::<String>().into())?;
        let of_rank =
            |bytes: &Arc<Vec<u8>>| String::from_utf8_lossy(bytes).lines().map(String::from).collect::<Vec<_>>();
        Ok(all.iter().flat_map(of_rank).collect())
    }

    /// Whether any rank says so.
    ///
    /// # Errors
    /// As [`Ranks::gather`]'s.
    fn any(&self, flag: bool) -> Result<bool> {
        let mut count = [f64::from(u8::from(flag))];
        self.add(&mut count)?;
        Ok(count[0] > 0.0)
    }

    /// f32 tensors of all ranks, along the first dimension: the whole batch of the ranks' shares.
    ///
    /// # Errors
    /// As [`Ranks::gather`]'s.
    fn join(&self, tensor: &Tensor) -> Result<Tensor> {
        if self.size() == 1 {
            return Ok(tensor.clone());
        }
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        let all = self.gather(values.iter().flat_map(|value| value.to_le_bytes()).collect())?;
        let of_rank = |bytes: &Arc<Vec<u8>>| {
            let values = bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect::<Vec<f32>>();
            Tensor::from_vec(values, tensor.shape(), tensor.device())
        };
        Ok(Tensor::cat(&all.iter().map(of_rank).collect::<candle_core::Result<Vec<_>>>()?, 0)?)
    }

    /// Refuses to go on where ranks hold different values of `what`, given by a hash.
    ///
    /// # Errors
    /// The rank whose hash is not that of rank 0; and as [`Ranks::gather`]'s.
    fn agree(&self, what: &str, hash: &[u8]) -> Result<()> {
        let all = self.gather(hash.to_vec())?;
        match all.iter().position(|other| *other != all[0]) {
            None => Ok(()),
            Some(rank) => Err(Error::Training(format!(
                "the {what} of rank {rank} are no longer those of rank 0; the last checkpoint is good, go on from it"
            ))),
        }
    }
}

/// The one rank of a run that has no others.
#[derive(Debug, Clone)]
pub struct Alone(pub Device);

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn device(&self) -> &Device {
        &self.0
    }

    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Arc<Vec<u8>>>> {
        Ok(vec![Arc::new(bytes)])
    }

    fn sum(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.clone())
    }
}

/// Runs one rank on each device: `first` is rank 0, in the caller's thread, `other` all the rest, in threads of their own.
///
/// # Errors
/// That of the rank which failed first: what becomes of the others follows from it. A rank that panics has failed.
pub fn each(
    devices: &[Device],
    first: impl FnOnce(Rc<dyn Ranks>) -> Result<()>,
    other: impl Fn(Rc<dyn Ranks>) -> Result<()> + Sync,
) -> Result<()> {
    if let [device] = devices {
        return first(Rc::new(Alone(device.clone())));
    }
    let way = Way::of(devices)?;
    let mut ranks = Threads::new(devices).into_iter();
    let Some(own) = ranks.next() else { return Err(Error::Training("there is no device to train on".into())) };
    let meeting = own.meeting();
    let mut ends = std::thread::scope(|scope| {
        let (other, way) = (&other, &way);
        let others: Vec<_> = ranks.map(|rank| scope.spawn(move || other(way.connect(rank)?))).collect();
        let mut ends = vec![way.connect(own).and_then(first)];
        ends.extend(others.into_iter().enumerate().map(|(i, other)| other.join().unwrap_or_else(|_| panicked(i + 1))));
        ends
    });
    match meeting.first_to_end().filter(|&rank| ends[rank].is_err()) {
        Some(rank) => ends.swap_remove(rank),
        None => ends.into_iter().collect(),
    }
}

fn panicked(rank: usize) -> Result<()> {
    Err(Error::Training(format!("rank {rank} came to an end that is a bug of this program; what it said stands above")))
}

/// How ranks that are threads sum tensors.
enum Way {
    /// In the host's memory.
    Host,
    #[cfg(feature = "nccl")]
    Nccl(nccl::Id),
}

impl Way {
    #[cfg(feature = "nccl")]
    fn of(devices: &[Device]) -> Result<Self> {
        if devices.iter().all(Device::is_cuda) { nccl::Id::new().map(Self::Nccl) } else { Ok(Self::Host) }
    }

    #[cfg(not(feature = "nccl"))]
    fn of(_: &[Device]) -> Result<Self> {
        Ok(Self::Host)
    }

    fn connect(&self, rank: Threads) -> Result<Rc<dyn Ranks>> {
        match self {
            Self::Host => Ok(Rc::new(rank)),
            #[cfg(feature = "nccl")]
            Self::Nccl(id) => Ok(Rc::new(nccl::Nccl::new(rank, *id)?)),
        }
    }
}
