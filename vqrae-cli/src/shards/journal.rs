//! What of a shard is done so far: its rows, a JSON object a line, in `.NAME.part` beside the shards.
//!
//! A run that was killed leaves it behind, and the next one goes on after its last whole line. The first line says what the shard is
//! made of; where that has changed, all is done again. The file is locked by who writes it: another process at the same
//! shard works on a file without a name, and writes the same bytes.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use vqrae::Error;
use vqrae::codes::shard::{self, Layout, Stats, Tally, Writer};
use vqrae::codes::{Header, Row};
use vqrae::files;

/// The rows of a shard that are done.
pub(crate) struct Journal {
    /// For messages, and to remove it; none where it has no name.
    path: Option<PathBuf>,
    folder: PathBuf,
    file: File,
    /// Where rows begin.
    start: u64,
    rows: usize,
}

/// What a shard is, beside its rows.
#[derive(Debug, Clone)]
pub(crate) struct Identity {
    pub(crate) name: String,
    /// Hash of what it is made of.
    pub(crate) inputs: String,
    /// How many numbered shards there are.
    pub(crate) shards: Option<usize>,
    /// Whether the reconstruction of every row is written before it.
    pub(crate) pictures: bool,
    pub(crate) header: Header,
    pub(crate) layout: Layout,
}

impl Journal {
    /// Opens the journal of a shard, empty or as an earlier run has left it. `fits` tells whether a row is the one of that
    /// number; rows after the first that does not are dropped, and so are those of a group of `group` that is not whole.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn open(
        folder: &Path,
        identity: &Identity,
        group: usize,
        fits: impl Fn(usize, &Row) -> bool,
    ) -> Result<Self> {
        let path = folder.join(format!(".{}.part", identity.name));
        let Identity { inputs, pictures, header, .. } = identity;
        let first = format!("{}\n", json!({ "inputs": inputs, "pictures": pictures, "codes": header }));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(Error::io(&path))?;
        let own = match file.try_lock() {
            Ok(()) => true,
            // A file system without locks: it is the user's care that one process at a time is at a shard.
            Err(TryLockError::Error(_)) => true,
            Err(TryLockError::WouldBlock) => false,
        };
        let (path, file) =
            if own { (Some(path), file) } else { (None, tempfile::tempfile_in(folder).map_err(Error::io(folder))?) };
        let mut journal = Self { path, folder: folder.to_path_buf(), file, start: first.len() as u64, rows: 0 };
        journal.recover(&first, group.max(1), fits).with_context(|| journal.shown())?;
        Ok(journal)
    }

    /// Finds the rows that count, and cuts off what follows them.
    fn recover(&mut self, first: &str, group: usize, fits: impl Fn(usize, &Row) -> bool) -> std::io::Result<()> {
        let mut reader = BufReader::new(&self.file);
        let mut line = Vec::new();
        let mut end = 0;
        reader.by_ref().take(1 << 20).read_until(b'\n', &mut line)?;
        if line == first.as_bytes() {
            end = self.start;
            let (mut at, mut count) = (end, 0);
            loop {
                line.clear();
                at += reader.read_until(b'\n', &mut line)? as u64;
                let whole = line.last() == Some(&b'\n');
                let row = serde_json::from_slice::<Row>(&line).ok().filter(|row| whole && fits(count, row));
                if row.is_none() {
                    break;
                }
                count += 1;
                if count % group == 0 {
                    (end, self.rows) = (at, count);
                }
            }
        }
        self.file.set_len(end)?;
        self.file.seek(SeekFrom::Start(end))?;
        if end == 0 {
            self.file.write_all(first.as_bytes())?;
        }
        Ok(())
    }

    fn shown(&self) -> String {
        let path = self.path.as_deref().unwrap_or(&self.folder);
        path.display().to_string()
    }

    /// Rows that are done.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Adds rows: they are done.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn append(&mut self, rows: &[Row]) -> Result<()> {
        let mut lines = Vec::new();
        for row in rows {
            serde_json::to_writer(&mut lines, row)?;
            lines.push(b'\n');
        }
        // At once: a reader of what a killed process left finds whole lines, but for the last.
        self.file.write_all(&lines).with_context(|| self.shown())?;
        self.rows += rows.len();
        Ok(())
    }

    /// Makes the shard of the rows, which are all there are, then its statistics, and removes the journal.
    ///
    /// # Errors
    /// What the system says; the shard is then as it was before.
    pub(crate) fn finish(mut self, identity: &Identity) -> Result<Stats> {
        let path = shard::file(&self.folder, &identity.name, identity.layout);
        let (file, tally) = self.write_shard(identity).with_context(|| path.display().to_string())?;
        let stats = tally.stats(&identity.name, identity.layout, &identity.inputs, identity.shards, file);
        stats.write(&self.folder)?;
        if let Some(path) = &self.path {
            // One that cannot be removed does no harm.
            let _ = std::fs::remove_file(path);
        }
        Ok(stats)
    }

    /// The shard's file, whole; its length and hash, and what was counted on the way.
    fn write_shard(&mut self, identity: &Identity) -> Result<((u64, String), Tally)> {
        let path = shard::file(&self.folder, &identity.name, identity.layout);
        let temporary = files::temporary_in(&self.folder)?;
        let mut tally = Tally::new(&identity.header);
        let out = BufWriter::with_capacity(
            1 << 20,
            Hashing { file: temporary.as_file(), hasher: blake3::Hasher::new(), bytes: 0 },
        );
        let mut writer = Writer::new(out, &identity.header, identity.layout).map_err(anyhow::Error::msg)?;
        self.file.seek(SeekFrom::Start(self.start))?;
        for line in BufReader::with_capacity(1 << 20, &self.file).lines() {
            let row: Row = serde_json::from_str(&line?)?;
            tally.add(&row);
            writer.write(&row).map_err(anyhow::Error::msg)?;
        }
        let out = writer.finish().map_err(anyhow::Error::msg)?;
        let hashed = out.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        let file = (hashed.bytes, hashed.hasher.finalize().to_hex().to_string());
        // The statistics say that the shard is whole: not before the disk has it.
        temporary.as_file().sync_all()?;
        temporary.persist(&path)?;
        Ok((file, tally))
    }
}

/// A file whose bytes are hashed while they are written.
struct Hashing<'a> {
    file: &'a File,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// Removes what killed runs have left in a folder of shards: temporary files that nobody writes any more, and the journals of
/// shards that are done.
pub(crate) fn sweep(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let Ok(entry) = entry else { continue };
        let name = entry.file_name();
        let shard = name.to_str().and_then(|name| name.strip_prefix('.')?.strip_suffix(".part"));
        let done = shard.is_some_and(|shard| Stats::path(folder, shard).exists());
        let idle = || File::open(entry.path()).is_ok_and(|file| file.try_lock().is_ok());
        if !files::sweep(&entry.path()) && done && idle() {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    for entry in walkdir::WalkDir::new(folder.join("reconstructions")).into_iter().filter_map(Result::ok) {
        files::sweep(entry.path());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(name: &str) -> Identity {
        let header = Header {
            model_id: "0f".into(),
            preprocessing: "squash".into(),
            dtype: "f32".into(),
            codebook_size: 16,
            codes_per_token: 1,
            grid: Some((1, 2)),
        };
        Identity {
            name: name.into(),
            inputs: "i".into(),
            shards: Some(1),
            pictures: false,
            header,
            layout: Layout::Jsonl,
        }
    }

    fn row(i: usize) -> Row {
        Row {
            key: i.to_string(),
            path: format!("{i}.jpg"),
            codes: Some(vec![i as u32, 1]),
            h: 1,
            w: 2,
            ..Row::default()
        }
    }

    fn open(folder: &Path, group: usize) -> Journal {
        Journal::open(folder, &identity("00000"), group, |i, row| row.key == i.to_string()).unwrap()
    }

    fn listed(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_journal_goes_on_after_its_last_whole_line() {
        let folder = tempfile::tempdir().unwrap();
        let mut undisturbed = open(folder.path(), 1);
        undisturbed.append(&[row(0), row(1), row(2)]).unwrap();
        undisturbed.finish(&identity("00000")).unwrap();
        let expected = std::fs::read(folder.path().join("00000.jsonl")).unwrap();
        let stats = std::fs::read(folder.path().join("00000_stats.json")).unwrap();
        assert_eq!(listed(folder.path()), ["00000.jsonl", "00000_stats.json"]);
        let lines = {
            let mut journal = open(folder.path(), 1);
            journal.append(&[row(0), row(1), row(2)]).unwrap();
            std::fs::read(folder.path().join(".00000.part")).unwrap()
        };
        for cut in 0..=lines.len() {
            std::fs::write(folder.path().join(".00000.part"), &lines[..cut]).unwrap();
            let mut journal = open(folder.path(), 1);
            let rows: Vec<Row> = (journal.rows()..3).map(row).collect();
            journal.append(&rows).unwrap();
            journal.finish(&identity("00000")).unwrap();
            assert_eq!(std::fs::read(folder.path().join("00000.jsonl")).unwrap(), expected, "cut at {cut}");
            assert_eq!(std::fs::read(folder.path().join("00000_stats.json")).unwrap(), stats);
        }
    }

    #[test]
    fn a_journal_of_something_else_is_begun_again() {
        let folder = tempfile::tempdir().unwrap();
        open(folder.path(), 1).append(&[row(0), row(1)]).unwrap();
        assert_eq!(open(folder.path(), 1).rows(), 2);
        let other = Identity { inputs: "j".into(), ..identity("00000") };
        assert_eq!(Journal::open(folder.path(), &other, 1, |_, _| true).unwrap().rows(), 0);
        open(folder.path(), 2).append(&[row(0), row(1), row(2)]).unwrap();
        // A group that is not whole is done again.
        assert_eq!(open(folder.path(), 2).rows(), 2);
        open(folder.path(), 1).append(&[row(7)]).unwrap();
        assert_eq!(open(folder.path(), 1).rows(), 2);
    }

    #[test]
    fn two_at_one_shard_write_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let [mut a, mut b] = [open(folder.path(), 1), open(folder.path(), 1)];
        a.append(&[row(0)]).unwrap();
        assert_eq!(b.rows(), 0);
        b.append(&[row(0), row(1)]).unwrap();
        let second = b.finish(&identity("00000")).unwrap();
        a.append(&[row(1)]).unwrap();
        assert_eq!(a.finish(&identity("00000")).unwrap(), second);
        assert_eq!(listed(folder.path()), ["00000.jsonl", "00000_stats.json"]);
    }

    #[test]
    fn what_a_killed_run_left_is_swept_and_what_is_written_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let busy = open(folder.path(), 1);
        std::fs::write(folder.path().join(".tmpAbc123"), "half").unwrap();
        std::fs::write(folder.path().join(".00001.part"), "not done").unwrap();
        std::fs::write(folder.path().join(".00002.part"), "done").unwrap();
        std::fs::write(folder.path().join("00002_stats.json"), "{}").unwrap();
        let held = File::create(folder.path().join(".tmpXyz789")).unwrap();
        held.try_lock().unwrap();
        sweep(folder.path()).unwrap();
        assert_eq!(listed(folder.path()), [".00000.part", ".00001.part", ".tmpXyz789", "00002_stats.json"]);
        drop(busy);
    }
}
