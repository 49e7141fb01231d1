//! The folder that shards go to: what it holds already, and whether that is of the same making.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use vqrae::Error;
use vqrae::codes::shard::{self, Stats};
use vqrae::codes::{CodeSet, Manifest};

use super::journal::sweep;
use super::plan::Shard;
use crate::output::{IfExists, Origin, as_before};

/// A folder of shards, which any number of processes may write to.
pub(crate) struct Folder {
    pub(crate) path: PathBuf,
    pub(crate) manifest: Manifest,
    if_exists: IfExists,
    /// Shards with errors are done again.
    retry_errors: bool,
}

impl Folder {
    /// Makes or enters the folder, and refuses one that holds another model's work.
    ///
    /// # Errors
    /// Names what differs, and how to go on.
    pub(crate) fn open(path: &Path, manifest: Manifest, if_exists: IfExists, retry_errors: bool) -> Result<Self> {
        std::fs::create_dir_all(path).map_err(Error::io(path))?;
        let folder = Self { path: path.to_path_buf(), manifest, if_exists, retry_errors };
        folder.check_manifest()?;
        sweep(path)?;
        Ok(folder)
    }

    fn check_manifest(&self) -> Result<()> {
        let shown = Manifest::path(&self.path).display().to_string();
        let next_step = "choose another --output, or pass --if-exists overwrite to do it again";
        let there = match Manifest::read(&self.path) {
            _ if self.if_exists == IfExists::Overwrite => None,
            Ok(there) => there,
            Err(error) => bail!("{error}; {next_step}"),
        };
        let Some(there) = there else { return Ok(self.manifest.write(&self.path)?) };
        if self.if_exists == IfExists::Error {
            bail!("{shown} exists; pass --if-exists skip to keep what is there, or --if-exists overwrite");
        }
        let ours = &self.manifest;
        if there.header != ours.header {
            let [theirs, wanted] = [&there, ours].map(|manifest| Origin::of(&manifest.header));
            let hint = as_before(&theirs, &wanted);
            bail!("{shown}: this folder holds the work of {theirs}, but this run is {wanted}; {hint}{next_step}");
        }
        let differing = [
            ("--output-format", format!("{:?}", there.layout), format!("{:?}", ours.layout)),
            ("--samples-per-shard", there.samples_per_shard.to_string(), ours.samples_per_shard.to_string()),
            ("--batch-size", format!("{:?}", there.batch_shape), format!("{:?}", ours.batch_shape)),
            ("the kind of device", there.device_kind.clone(), ours.device_kind.clone()),
            ("augmentations", format!("{:?}", there.augmentations), format!("{:?}", ours.augmentations)),
        ];
        if let Some((what, theirs, wanted)) = differing.into_iter().find(|(_, theirs, wanted)| theirs != wanted) {
            bail!("{shown}: {what} was {theirs} in this folder, but is {wanted} in this run; {next_step}");
        }
        // The list of classes may have grown.
        if there == *ours { Ok(()) } else { Ok(ours.write(&self.path)?) }
    }

    /// Refuses numbered shards of an earlier, longer list, which would stay beside those of this one.
    ///
    /// # Errors
    /// Names the first.
    pub(crate) fn check_rest(&self, numbered: usize) -> Result<()> {
        let set = CodeSet::open(&self.path);
        let Ok(set) = set else { return Ok(()) };
        let beyond = |stats: &&Stats| {
            stats.shards.is_some() && stats.shard.parse::<usize>().is_ok_and(|number| number >= numbered)
        };
        for stats in set.shards().iter().filter(beyond) {
            let file = set.file(stats);
            if self.if_exists != IfExists::Overwrite {
                bail!(
                    "{}: a shard of a longer list than this run's, which ends before {numbered:05}; delete it and its \
                     _stats.json, choose another --output, or pass --if-exists overwrite",
                    file.display()
                );
            }
            let stats = Stats::path(&self.path, &stats.shard);
            std::fs::remove_file(&stats).map_err(Error::io(&stats))?;
            std::fs::remove_file(&file).map_err(Error::io(&file))?;
        }
        Ok(())
    }

    /// The statistics of a shard that an earlier run has finished.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn done(&self, planned: &Shard) -> Result<Option<Stats>> {
        if self.if_exists == IfExists::Overwrite {
            return Ok(None);
        }
        // Damaged statistics say nothing: the shard is made again.
        let Ok(Some(mut stats)) = Stats::read(&self.path, &planned.name) else { return Ok(None) };
        let file = shard::file(&self.path, &planned.name, self.manifest.layout);
        let whole = std::fs::metadata(&file).is_ok_and(|metadata| metadata.len() == stats.bytes);
        let same = stats.inputs == planned.inputs && stats.layout == self.manifest.layout;
        if !whole || !same || self.retry_errors && stats.errors > 0 {
            return Ok(None);
        }
        if stats.shards != planned.numbered {
            // The list has grown behind this shard.
            stats.shards = planned.numbered;
            stats.write(&self.path)?;
        }
        Ok(Some(stats))
    }
}
