//! Which part of the shards is this process's: from flags, or from what torchrun, Slurm and Kubernetes tell their processes.

use std::ops::Range;

use anyhow::{Context, Result, bail};
use clap::Args;

/// Which part of the work is this process's.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct RankArgs {
    /// Number of this process among --num-shards that share the work, from 0; each takes a contiguous part of the shards
    ///
    /// Without the two flags they come, in this order, from RANK and WORLD_SIZE (torchrun), SLURM_ARRAY_TASK_ID and
    /// SLURM_ARRAY_TASK_COUNT, times SLURM_PROCID and SLURM_NTASKS under srun, or JOB_COMPLETION_INDEX (an indexed Job of
    /// Kubernetes, which needs --num-shards beside it). What was chosen is said. The files are the same for any number.
    #[arg(long, alias = "shard_index", value_name = "I")]
    shard_index: Option<usize>,
    /// How many processes share the work
    #[arg(long, alias = "num_shards", value_name = "N")]
    num_shards: Option<usize>,
}

impl RankArgs {
    /// Whether a flag is.
    pub(crate) fn is_given(&self) -> bool {
        self.shard_index.is_some() || self.num_shards.is_some()
    }
}

/// One of several processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rank {
    pub(crate) index: usize,
    pub(crate) count: usize,
    /// What said so; nothing where there is one process.
    pub(crate) said_by: Option<String>,
}

impl Rank {
    /// Of the flags, else of the environment.
    ///
    /// # Errors
    /// If one of two numbers is missing, or they make no sense.
    pub(crate) fn of(args: &RankArgs) -> Result<Self> {
        Self::from(args, |name| std::env::var(name).ok())
    }

    fn from(args: &RankArgs, env: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = env(name).filter(|text| !text.is_empty()) else { return Ok(None) };
            Ok(Some(text.parse().with_context(|| format!("{name}={text} is not a number"))?))
        };
        let rank = |index, count, said_by: &str| Self { index, count, said_by: Some(said_by.to_string()) };
        let found = match (args.shard_index, args.num_shards) {
            (Some(index), Some(count)) => rank(index, count, "--shard-index and --num-shards"),
            (Some(_), None) => bail!("--shard-index needs --num-shards beside it"),
            (None, Some(1)) => Self { index: 0, count: 1, said_by: None },
            (None, Some(count)) => match Self::said_by_environment(&number)? {
                Some((index, _, name)) => rank(index, count, &format!("--num-shards and {name}")),
                None => bail!(
                    "--num-shards {count} needs --shard-index beside it, or a launcher that numbers its processes"
                ),
            },
            (None, None) => match Self::said_by_environment(&number)? {
                Some((index, Some(count), name)) if count > 1 => rank(index, count, &name),
                Some((_, Some(_), _)) | None => Self { index: 0, count: 1, said_by: None },
                Some((_, None, name)) => bail!("{name} is set, but not how many there are; pass --num-shards"),
            },
        };
        if found.index >= found.count {
            let said_by = found.said_by.unwrap_or_default();
            bail!("number {} of {} processes, counted from 0 ({said_by})", found.index, found.count);
        }
        Ok(found)
    }

    /// Number, count if it is told, and the variables.
    fn said_by_environment(
        number: &impl Fn(&str) -> Result<Option<usize>>,
    ) -> Result<Option<(usize, Option<usize>, String)>> {
        if let (Some(index), Some(count)) = (number("RANK")?, number("WORLD_SIZE")?) {
            return Ok(Some((index, Some(count), "RANK and WORLD_SIZE".into())));
        }
        let first = number("SLURM_ARRAY_TASK_MIN")?.unwrap_or(0);
        let array = match (number("SLURM_ARRAY_TASK_ID")?, number("SLURM_ARRAY_TASK_COUNT")?) {
            (Some(id), Some(count)) => Some((id.saturating_sub(first), count)),
            _ => None,
        };
        let tasks = match (number("SLURM_PROCID")?, number("SLURM_NTASKS")?) {
            (Some(id), Some(count)) => Some((id, count)),
            _ => None,
        };
        Ok(match (array, tasks) {
            (Some((i, n)), Some((j, m))) if m > 1 => {
                Some((i * m + j, Some(n * m), "SLURM_ARRAY_TASK_ID and SLURM_PROCID".into()))
            }
            (Some((i, n)), _) => Some((i, Some(n), "SLURM_ARRAY_TASK_ID".into())),
            (None, Some((j, m))) => Some((j, Some(m), "SLURM_PROCID and SLURM_NTASKS".into())),
            (None, None) => number("JOB_COMPLETION_INDEX")?.map(|i| (i, None, "JOB_COMPLETION_INDEX".into())),
        })
    }

    /// This process's part of so many shards.
    pub(crate) fn part(&self, shards: usize) -> Range<usize> {
        // In 128 bits: no number of shards is too large.
        let cut = |i: usize| (i as u128 * shards as u128 / self.count as u128) as usize;
        cut(self.index)..cut(self.index + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rank(flags: (Option<usize>, Option<usize>), env: &[(&str, &str)]) -> Result<(usize, usize)> {
        let args = RankArgs { shard_index: flags.0, num_shards: flags.1 };
        let get = |name: &str| env.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string());
        Rank::from(&args, get).map(|rank| (rank.index, rank.count))
    }

    #[test]
    fn flags_come_before_the_environment() {
        let torchrun = [("RANK", "1"), ("WORLD_SIZE", "4")];
        assert_eq!(rank((None, None), &[]).unwrap(), (0, 1));
        assert_eq!(rank((Some(2), Some(3)), &torchrun).unwrap(), (2, 3));
        assert_eq!(rank((None, None), &torchrun).unwrap(), (1, 4));
        assert_eq!(rank((None, Some(1)), &torchrun).unwrap(), (0, 1));
        assert_eq!(rank((None, Some(8)), &torchrun).unwrap(), (1, 8));
        assert!(rank((Some(0), None), &torchrun).is_err());
        assert!(rank((Some(3), Some(3)), &[]).unwrap_err().to_string().contains("number 3 of 3"));
        assert!(rank((None, Some(3)), &[]).is_err());
        assert!(
            rank((None, None), &[("RANK", "one"), ("WORLD_SIZE", "2")]).unwrap_err().to_string().contains("RANK=one")
        );
    }

    #[test]
    fn slurm_has_arrays_tasks_and_both() {
        let array = [("SLURM_ARRAY_TASK_ID", "12"), ("SLURM_ARRAY_TASK_MIN", "10"), ("SLURM_ARRAY_TASK_COUNT", "5")];
        let tasks = [("SLURM_PROCID", "1"), ("SLURM_NTASKS", "3")];
        assert_eq!(rank((None, None), &array).unwrap(), (2, 5));
        assert_eq!(rank((None, None), &tasks).unwrap(), (1, 3));
        assert_eq!(rank((None, None), &[array.as_slice(), &tasks].concat()).unwrap(), (7, 15));
        // A batch script is the one task of itself.
        assert_eq!(rank((None, None), &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1")]).unwrap(), (0, 1));
    }

    #[test]
    fn kubernetes_does_not_tell_the_number_of_its_pods() {
        let pod = [("JOB_COMPLETION_INDEX", "2")];
        assert_eq!(rank((None, Some(4)), &pod).unwrap(), (2, 4));
        assert!(rank((None, None), &pod).unwrap_err().to_string().contains("--num-shards"));
    }

    #[test]
    fn parts_are_contiguous_and_cover_all() {
        for (shards, count) in [(0, 3), (1, 3), (10, 3), (7, 7), (100, 8)] {
            let parts: Vec<_> = (0..count).map(|index| Rank { index, count, said_by: None }.part(shards)).collect();
            assert!(parts.iter().all(|part| part.len().abs_diff(shards / count) <= 1));
            assert_eq!(parts.into_iter().flatten().collect::<Vec<_>>(), (0..shards).collect::<Vec<_>>());
        }
    }
}
