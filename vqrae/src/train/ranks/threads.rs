//! Ranks as threads of one process, which meet in memory.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::Ranks;
use crate::error::{Error, Result};

/// One of several ranks that are threads of this process. Sums are made in the order of the ranks, so they do not depend on
/// who comes first.
#[derive(Debug)]
pub struct Threads {
    meeting: Arc<Meeting>,
    rank: usize,
    device: Device,
}

/// Where ranks meet: all give something, then all take what was made of it.
#[derive(Debug)]
pub(super) struct Meeting {
    size: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Meetings that are over.
    round: u64,
    /// What ranks have given to the one at hand.
    given: Vec<Option<Given>>,
    /// What was made of the last one. A rank takes it before it gives to the next, so it stays until all have taken it.
    made: Option<Made>,
    /// The first rank that ended.
    ended: Option<usize>,
}

#[derive(Debug)]
enum Given {
    Bytes(Vec<u8>),
    Values(Vec<f32>),
}

#[derive(Debug, Clone)]
enum Made {
    Gathered(Vec<Arc<Vec<u8>>>),
    Sum(Arc<Vec<f32>>),
    /// Ranks have given what does not belong together.
    Nothing,
}

impl Threads {
    /// The ranks, one a device; each is to go to a thread of its own.
    pub fn new(devices: &[Device]) -> Vec<Self> {
        let size = devices.len();
        let state = Mutex::new(State { given: (0..size).map(|_| None).collect(), ..State::default() });
        let meeting = Arc::new(Meeting { size, state, changed: Condvar::new() });
        let rank = |(rank, device): (usize, &Device)| Self { meeting: meeting.clone(), rank, device: device.clone() };
        devices.iter().enumerate().map(rank).collect()
    }

    pub(super) fn meeting(&self) -> Arc<Meeting> {
        self.meeting.clone()
    }
}

impl Drop for Threads {
    /// Nobody waits for a rank that has ended, well or not.
    fn drop(&mut self) {
        self.meeting.state().ended.get_or_insert(self.rank);
        self.meeting.changed.notify_all();
    }
}

impl Meeting {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn first_to_end(&self) -> Option<usize> {
        self.state().ended
    }

    fn meet(&self, rank: usize, given: Given) -> Result<Made> {
        let mut state = self.state();
        let round = state.round;
        state.given[rank] = Some(given);
        if state.given.iter().all(Option::is_some) {
            let given = state.given.iter_mut().filter_map(Option::take).collect();
            state.made = Some(made(given));
            state.round += 1;
            self.changed.notify_all();
        }
        while state.round == round {
            if let Some(ended) = state.ended {
                return Err(Error::Training(format!(
                    "rank {ended} of {} has ended, and rank {rank} with it",
                    self.size
                )));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(state.made.clone().unwrap_or(Made::Nothing))
    }
}

/// What comes of what all ranks have given.
fn made(given: Vec<Given>) -> Made {
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    for given in given {
        match given {
            Given::Bytes(given) => bytes.push(Arc::new(given)),
            Given::Values(given) => values.push(given),
        }
    }
    let same = |values: &[Vec<f32>]| values.windows(2).all(|pair| pair[0].len() == pair[1].len());
    match (bytes.is_empty(), values.is_empty()) {
        (false, true) => Made::Gathered(bytes),
        (true, false) if same(&values) => Made::Sum(Arc::new(sum(values))),
        _ => Made::Nothing,
    }
}

/// Element by element, in the order of the ranks.
fn sum(values: Vec<Vec<f32>>) -> Vec<f32> {
    /// Elements that one piece of work covers.
    const PIECE: usize = 16_384;
    let mut values = values.into_iter();
    let mut sum = values.next().unwrap_or_default();
    for other in values {
        sum.par_chunks_mut(PIECE).zip(other.par_chunks(PIECE)).for_each(|(sum, other)| {
            sum.iter_mut().zip(other).for_each(|(sum, other)| *sum += other);
        });
    }
    sum
}

fn unlike(rank: usize) -> Error {
    Error::Training(format!("rank {rank} does something else than the others, which is a bug of this program"))
}

impl Ranks for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.meeting.size
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn gather(&self, bytes: Vec<u8>) -> Result<Vec<Arc<Vec<u8>>>> {
        match self.meeting.meet(self.rank, Given::Bytes(bytes))? {
            Made::Gathered(all) => Ok(all),
            _ => Err(unlike(self.rank)),
        }
    }

    fn sum(&self, tensor: &Tensor) -> Result<Tensor> {
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        match self.meeting.meet(self.rank, Given::Values(values))? {
            Made::Sum(sum) => Ok(Tensor::from_slice(&sum, tensor.shape(), tensor.device())?),
            _ => Err(unlike(self.rank)),
        }
    }
}
