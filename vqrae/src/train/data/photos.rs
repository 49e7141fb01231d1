//! Where photos are: folders, tars, lists of files, and patterns of these.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::image::{self, Limits, Rgb};
use crate::samples::{IMAGE_ENDINGS, Keys, Tar};

/// Photos of folders, tars and lists, in a fixed order.
#[derive(Debug)]
pub struct Photos {
    /// What was asked for, for messages.
    asked: String,
    entries: Vec<Entry>,
    tars: Vec<(PathBuf, Tar)>,
}

#[derive(Debug)]
enum Entry {
    /// A file of its own.
    File(PathBuf),
    /// A sample of a tar: which tar, and which of its samples.
    Member { tar: usize, sample: usize },
}

fn has_ending(path: &Path, endings: &[&str]) -> bool {
    let ending = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    endings.contains(&ending.as_str())
}

impl Photos {
    /// Lists the photos of every place in turn. A place is
    ///
    /// - a folder, with the folders in it,
    /// - a tar, such as a shard of a WebDataset, of which the images are taken and the rest is left,
    /// - `FILE.txt`, a list: a photo or a tar a line, relative to the list's folder, or
    /// - a pattern of these: `*` and `?` in a file's name, and `{000..127}` and `{a,b}`, as WebDataset writes shards.
    ///
    /// Photos of a folder, and of a tar, come in the order of their names' bytes, those of a list in its own.
    ///
    /// # Errors
    /// A place that is not there or cannot be read, or where there is no photo.
    pub fn list(places: &[PathBuf]) -> Result<Self> {
        let asked: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
        let mut photos = Self { asked: asked.join(", "), entries: Vec::new(), tars: Vec::new() };
        for place in places {
            for path in matches(place)? {
                photos.add(&path)?;
            }
        }
        if photos.entries.is_empty() {
            return Err(Error::Training(format!("no photos under {}", photos.asked)));
        }
        Ok(photos)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
        if metadata.is_dir() {
            let mut names = Vec::new();
            walk(path, path, &mut names)?;
            names.sort_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
            self.entries.extend(names.into_iter().map(|name| Entry::File(path.join(name))));
        } else if has_ending(path, &["txt"]) {
            let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
            let folder = path.parent().unwrap_or(Path::new(""));
            for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
                let listed = folder.join(line);
                match has_ending(&listed, &["tar"]) {
                    true => self.add_tar(&listed)?,
                    // Whether it is there shows when it is its turn: a list may be long, a missing photo is skipped.
                    false => self.entries.push(Entry::File(listed)),
                }
            }
        } else if has_ending(path, &IMAGE_ENDINGS) {
            self.entries.push(Entry::File(path.to_path_buf()));
        } else {
            self.add_tar(path)?;
        }
        Ok(())
    }

    fn add_tar(&mut self, path: &Path) -> Result<()> {
        let tar = Tar::open(path, &Keys::webdataset()).map_err(Error::io(path))?;
        if let Some(damage) = tar.damage() {
            return Err(Error::io(path)(std::io::Error::other(damage)));
        }
        let mut samples: Vec<usize> = (0..tar.len()).collect();
        samples.sort_by(|&a, &b| tar.name(a).as_bytes().cmp(tar.name(b).as_bytes()));
        let number = self.tars.len();
        self.tars.push((path.to_path_buf(), tar));
        self.entries.extend(samples.into_iter().map(|sample| Entry::Member { tar: number, sample }));
        Ok(())
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none; [`Photos::list`] refuses that.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What was asked for.
    pub(super) fn asked(&self) -> &str {
        &self.asked
    }

    /// Reads and decodes one.
    pub fn open(&self, index: usize) -> Result<Rgb> {
        let (tar, sample) = match &self.entries[index] {
            Entry::File(path) => return Ok(image::open(path, &Limits::default())?),
            Entry::Member { tar, sample } => (&self.tars[*tar].1, *sample),
        };
        let read = tar.read(sample).map_err(|reason| Error::io(self.path(index))(std::io::Error::other(reason)))?;
        image::decode(&read.bytes, &Limits::default()).map_err(|kind| self.unusable(index, kind))
    }

    /// A photo's path, that of a tar's member below the tar's.
    pub fn path(&self, index: usize) -> PathBuf {
        match &self.entries[index] {
            Entry::File(path) => path.clone(),
            Entry::Member { tar, sample } => self.tars[*tar].0.join(self.tars[*tar].1.name(*sample)),
        }
    }

    /// The error that names a photo.
    pub(in crate::train) fn unusable(&self, index: usize, kind: image::ErrorKind) -> Error {
        image::Error::Image { path: self.path(index), kind }.into()
    }
}

fn walk(root: &Path, folder: &Path, names: &mut Vec<String>) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if path.is_dir() {
            walk(root, &path, names)?;
        } else if has_ending(&path, &IMAGE_ENDINGS) {
            names.push(path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned());
        }
    }
    Ok(())
}

/// The paths that a place stands for, itself if it is there.
fn matches(place: &Path) -> Result<Vec<PathBuf>> {
    let Some(text) = place.to_str().filter(|text| !place.exists() && text.contains(['*', '?', '{'])) else {
        return Ok(vec![place.to_path_buf()]);
    };
    let mut found = Vec::new();
    for path in braces(text).into_iter().map(PathBuf::from) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.contains(['*', '?']) {
            found.push(path);
            continue;
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // A set, for a folder has no order of its own.
        let mut names = BTreeSet::new();
        for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
            names.insert(entry.map_err(Error::io(folder))?.file_name().to_string_lossy().into_owned());
        }
        found.extend(names.iter().filter(|it| fits(name.as_bytes(), it.as_bytes())).map(|it| folder.join(it)));
    }
    match found.is_empty() {
        true => Err(Error::Training(format!("nothing is called {text}"))),
        false => Ok(found),
    }
}

/// Every text that `{a,b}` and `{000..127}` stand for; the numbers are as wide as the first.
fn braces(text: &str) -> Vec<String> {
    let parts = text.split_once('{').and_then(|(before, rest)| Some((before, rest.split_once('}')?)));
    let Some((before, (inside, after))) = parts else { return vec![text.to_string()] };
    let range = inside.split_once("..").and_then(|(first, last)| {
        let (low, high) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        (high.checked_sub(low)? < 1_000_000).then(|| (low..=high).map(|i| format!("{i:0width$}", width = first.len())))
    });
    let choices: Vec<String> = match range {
        Some(range) => range.collect(),
        None => inside.split(',').map(str::to_string).collect(),
    };
    let after = braces(after);
    choices.iter().flat_map(|choice| after.iter().map(move |after| format!("{before}{choice}{after}"))).collect()
}

/// Whether a name fits a pattern of `*` and `?`.
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.first(), name.first()) {
        (None, None) => true,
        (Some(b'*'), _) => fits(&pattern[1..], name) || (!name.is_empty() && fits(pattern, &name[1..])),
        (Some(b'?'), Some(_)) => fits(&pattern[1..], &name[1..]),
        (Some(a), Some(b)) if a == b => fits(&pattern[1..], &name[1..]),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_are_numbers_or_choices() {
        assert_eq!(braces("a{08..11}.tar"), ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]);
        assert_eq!(braces("{x,y}{1..2}"), ["x1", "x2", "y1", "y2"]);
        assert_eq!(braces("plain"), ["plain"]);
    }

    #[test]
    fn patterns_fit_names() {
        let fits = |pattern: &str, name: &str| fits(pattern.as_bytes(), name.as_bytes());
        assert!(fits("*.tar", "a.tar") && fits("a?c*", "abc") && fits("*", ""));
        assert!(!fits("*.tar", "a.tar.gz") && !fits("a?c", "ac"));
    }
}
