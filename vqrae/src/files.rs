//! Files that appear whole or not at all.
//!
//! What is being written has a name of its own, `.tmp` and six letters, and a lock. Where the process was killed, the file stays
//! and the lock does not: [`sweep`] removes such files, and none that somebody still writes.

use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::path::Path;

use tempfile::NamedTempFile;

/// Writes `bytes` to a temporary sibling, then renames it to `path`. The folder must exist.
///
/// # Errors
/// What the system says; `path` is then as it was before.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = temporary_in(folder)?;
    file.write_all(bytes)?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// A file to be written and then renamed by [`NamedTempFile::persist`]; dropped, it is gone.
///
/// # Errors
/// What the system says.
pub fn temporary_in(folder: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // tempfile's own default is 0600, which other users of a data set could not read; the umask still applies.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    loop {
        let file = builder.tempfile_in(folder)?;
        match file.as_file().try_lock() {
            // Somebody who sweeps was quicker than the lock: is about to remove the file, or has.
            Err(TryLockError::WouldBlock) => {}
            Ok(()) if !file.path().exists() => {}
            // Without locks on this file system nothing is swept either.
            Ok(()) | Err(TryLockError::Error(_)) => return Ok(file),
        }
    }
}

/// Removes a file that [`temporary_in`] has made, unless somebody still writes it. Tells whether it had such a name.
pub fn sweep(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let letters = name.strip_prefix(".tmp").unwrap_or_default();
    let temporary = letters.len() == 6 && letters.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if temporary
        && let Ok(file) = File::open(path)
        && file.try_lock().is_ok()
    {
        // One that cannot be removed does no harm.
        let _ = std::fs::remove_file(path);
    }
    temporary
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_lost_to_who_sweeps_meanwhile() {
        let folder = tempfile::tempdir().unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    for entry in std::fs::read_dir(folder.path()).unwrap().flatten() {
                        sweep(&entry.path());
                    }
                }
            });
            for i in 0..2000 {
                let written = write_whole(&folder.path().join("file"), i.to_string().as_bytes());
                if let Err(error) = written {
                    done.store(true, std::sync::atomic::Ordering::Relaxed);
                    panic!("write {i}: {error}");
                }
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(std::fs::read(folder.path().join("file")).unwrap(), b"1999");
    }

    #[test]
    fn what_nobody_writes_is_swept() {
        let folder = tempfile::tempdir().unwrap();
        let written = temporary_in(folder.path()).unwrap();
        assert!(sweep(written.path()) && written.path().exists());
        let left = folder.path().join(".tmpAbc123");
        std::fs::write(&left, "half").unwrap();
        assert!(sweep(&left) && !left.exists());
        for name in ["plain", ".tmp", ".tmpAbc12", ".tmpAbc-23", "tmpAbc123"] {
            let other = folder.path().join(name);
            std::fs::write(&other, "whole").unwrap();
            assert!(!sweep(&other) && other.exists(), "{name}");
        }
    }
}
