//! The output of an export: a folder that appears whole or not at all. It is written beside its place under a name that starts with
//! `.export-` and locked, and renamed when all of it is there. Where the process was killed, what it wrote stays and the lock does not:
//! the next export beside it removes that.

use std::fs::{self, File, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;
use vqrae::Error;

use super::{FORMAT, RECORD};

/// The folder while it is written; dropped, it leaves nothing behind.
pub(crate) struct Draft {
    /// As the user names it.
    shown: PathBuf,
    /// The same, links followed.
    place: PathBuf,
    temporary: TempDir,
    /// Held, not read.
    _lock: Option<File>,
}

/// What the names of folders begin with that are being written; six letters follow.
const PREFIX: &str = ".export-";

impl Draft {
    /// Begins the folder that will be at `place`; one that is there already is replaced with `overwrite`, if it is an export.
    pub(crate) fn new(place: &Path, overwrite: bool) -> Result<Self> {
        check(place, overwrite)?;
        let shown = place.to_path_buf();
        let place = place.canonicalize().unwrap_or_else(|_| shown.clone());
        let parent = place.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(Error::io(parent))?;
        sweep(parent);
        let (temporary, lock) = temporary_in(parent).map_err(Error::io(parent))?;
        Ok(Self { place, shown, temporary, _lock: lock })
    }

    /// Where a file of the folder is for now.
    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.temporary.path().join(name)
    }

    /// Where it will be: its name in messages.
    pub(crate) fn shown(&self, name: impl AsRef<Path>) -> PathBuf {
        self.shown.join(name)
    }

    /// Begins a file of the folder, which must not have it yet.
    pub(crate) fn create(&self, name: impl AsRef<Path>) -> Result<OutFile> {
        let shown = self.shown(&name);
        let file = File::create_new(self.path(&name)).map_err(Error::io(&shown))?;
        Ok(OutFile { shown, file: BufWriter::with_capacity(1 << 16, file) })
    }

    /// Makes a folder in the folder.
    pub(crate) fn create_folder(&self, name: &str) -> Result<()> {
        Ok(fs::create_dir(self.path(name)).map_err(Error::io(self.shown(name)))?)
    }

    /// Writes a whole file.
    pub(crate) fn write(&self, name: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
        let mut file = self.create(name)?;
        file.put(bytes)?;
        file.finish()
    }

    /// Puts the folder in its place.
    pub(crate) fn publish(self) -> Result<()> {
        let place = &self.place;
        let old = place.exists().then(|| self.temporary.path().with_extension("old"));
        if let Some(old) = &old {
            fs::rename(place, old).map_err(Error::io(place))?;
        }
        // From here on the folder is no longer temporary.
        let whole = self.temporary.keep();
        fs::rename(&whole, place).map_err(Error::io(place))?;
        match old {
            Some(old) => Ok(fs::remove_dir_all(&old).map_err(Error::io(&old))?),
            None => Ok(()),
        }
    }
}

/// A locked folder to write to.
fn temporary_in(parent: &Path) -> io::Result<(TempDir, Option<File>)> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // tempfile's own default is 0700, which other users of a data set could not enter; the umask still applies.
        builder.permissions(fs::Permissions::from_mode(0o777));
    }
    loop {
        let temporary = builder.tempdir_in(parent)?;
        // Where folders cannot be opened or locked, none is swept either.
        let Ok(folder) = File::open(temporary.path()) else { return Ok((temporary, None)) };
        match folder.try_lock() {
            // Somebody who sweeps was quicker than the lock, and is about to remove it.
            Err(TryLockError::WouldBlock) => {}
            Ok(()) | Err(TryLockError::Error(_)) => return Ok((temporary, Some(folder))),
        }
    }
}

/// Removes what killed exports have left.
fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let letters = name.strip_prefix(PREFIX).unwrap_or_default();
        if letters.len() == 6
            && letters.bytes().all(|byte| byte.is_ascii_alphanumeric())
            && let Ok(folder) = File::open(&path)
            && folder.try_lock().is_ok()
        {
            // One that cannot be removed does no harm.
            let _ = fs::remove_dir_all(&path);
        }
    }
}

/// Refuses a place that is taken; what is replaced must be an export or empty, so that a slip of the pen deletes nothing else.
fn check(place: &Path, overwrite: bool) -> Result<()> {
    let shown = place.display();
    if place.symlink_metadata().is_err() {
        return Ok(());
    }
    let is_empty = place.is_dir() && fs::read_dir(place).map_err(Error::io(place))?.next().is_none();
    if is_empty {
        return Ok(());
    }
    let record = fs::read(place.join(RECORD)).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    match record.is_some_and(|record| record["format"] == FORMAT) {
        true if overwrite => Ok(()),
        true => bail!("{shown} exists; pass --overwrite to replace that export, or choose another --output"),
        false => bail!("{shown} exists and is no export; choose another --output"),
    }
}

/// A file that is being written, whose errors name it.
pub(crate) struct OutFile {
    shown: PathBuf,
    file: BufWriter<File>,
}

impl OutFile {
    /// Adds bytes.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.file.write_all(bytes).map_err(Error::io(&self.shown))?)
    }

    /// Adds a value as a line of JSON.
    pub(crate) fn put_line(&mut self, value: &impl serde::Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(value).with_context(|| self.shown.display().to_string())?;
        line.push(b'\n');
        self.put(&line)
    }

    /// Hands over what is still held back.
    pub(crate) fn finish(mut self) -> Result<()> {
        Ok(self.file.flush().map_err(Error::io(&self.shown))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_writes_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let written = Draft::new(&folder.path().join("a"), false).unwrap();
        let left = folder.path().join(".export-Abc123");
        let others = [".export-", ".export-Abc123.old", ".export-Abc-23", "export-Abc123"];
        for name in [".export-Abc123"].iter().chain(&others) {
            fs::create_dir_all(folder.path().join(name).join("codes")).unwrap();
        }
        drop(Draft::new(&folder.path().join("b"), false).unwrap());
        assert!(!left.exists() && written.path("").exists());
        others.iter().for_each(|name| assert!(folder.path().join(name).exists(), "{name}"));
        written.publish().unwrap();
        assert!(folder.path().join("a").exists());
    }
}
