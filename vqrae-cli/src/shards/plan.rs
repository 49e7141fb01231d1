//! Which shards there are: contiguous runs of the sorted files, numbered, then a shard for every tar and parquet file, named after it.
//!
//! `OUT/plan.jsonl` keeps that, so that any number of processes work on one list: a line for the whole and a line a shard, of
//! which a process reads its own.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vqrae::Error;
use vqrae::codes::numbered;

use crate::inputs::{About, Archive, Found, Input, Listing, source};

/// The version of the file.
const FORMAT: &str = "vqrae-plan-1";

/// Where labels of files come from.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Labels {
    /// The first folder, if every file is in one and no list says otherwise
    Auto,
    /// The first folder, as torchvision's ImageFolder: label i is the i-th name in the order of bytes
    Folders,
    /// Only what lists, tars and parquet files say
    None,
}

/// What the whole is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Whole {
    format: String,
    /// What it was made from.
    pub(crate) words: Vec<String>,
    pub(crate) samples_per_shard: usize,
    /// Shards in all.
    pub(crate) shards: usize,
    /// Those that are numbered.
    pub(crate) numbered: usize,
    /// Images that are files of their own.
    pub(crate) images: usize,
    pub(crate) roots: Vec<PathBuf>,
    /// Label i is the i-th.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) classes: Vec<String>,
}

/// All shards.
pub(crate) struct Plan {
    pub(crate) whole: Whole,
    from: From,
}

enum From {
    Listing {
        listing: Listing,
        labels: HashMap<String, Arc<About>>,
    },
    /// Where each shard's line begins.
    File {
        path: PathBuf,
        lines: Vec<u64>,
    },
}

/// One shard.
#[derive(Debug, Clone)]
pub(crate) struct Shard {
    pub(crate) name: String,
    /// How many numbered shards there are, if this is one.
    pub(crate) numbered: Option<usize>,
    /// Hash of what it is made of.
    pub(crate) inputs: String,
    pub(crate) work: Work,
}

/// What a shard is made of.
#[derive(Debug, Clone)]
pub(crate) enum Work {
    Files(Vec<Input>),
    Archive(Archive),
}

/// A shard's line.
#[derive(Serialize, Deserialize)]
struct Line {
    shard: String,
    inputs: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    files: Vec<FileEntry>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    archive: Option<(PathBuf, PathBuf)>,
}

#[derive(Serialize, Deserialize)]
struct FileEntry(u32, PathBuf, #[serde(default)] Option<About>);

impl Plan {
    /// Of what was found.
    ///
    /// # Errors
    /// If two shards would have one name, or two files one name.
    pub(crate) fn of(listing: Listing, words: Vec<String>, samples_per_shard: usize, labels: Labels) -> Result<Self> {
        listing.refuse_same_names()?;
        let classes = if by_folder(&listing, labels) { classes(&listing.files) } else { Vec::new() };
        let numbered = listing.files.len().div_ceil(samples_per_shard);
        let whole = Whole {
            format: FORMAT.to_string(),
            words,
            samples_per_shard,
            shards: numbered + listing.archives.len(),
            numbered,
            images: listing.files.len(),
            roots: listing.roots.clone(),
            classes,
        };
        let about = |(i, class): (usize, &String)| {
            (class.clone(), Arc::new(About { class: Some(class.clone()), label: Some(i as i64), caption: None }))
        };
        let labels = whole.classes.iter().enumerate().map(about).collect();
        let plan = Self { whole, from: From::Listing { listing, labels } };
        plan.refuse_same_names()?;
        Ok(plan)
    }

    fn refuse_same_names(&self) -> Result<()> {
        let From::Listing { listing, .. } = &self.from else { return Ok(()) };
        let mut seen: HashMap<String, String> =
            (0..self.whole.numbered).map(|i| (numbered(i), format!("shard {i} of the files"))).collect();
        for archive in &listing.archives {
            let (name, shown) = (name_of(archive)?, archive.path.display().to_string());
            if let Some(other) = seen.insert(name.clone(), shown.clone()) {
                bail!("{other} and {shown} would both be written as {name}; run them into different folders");
            }
        }
        Ok(())
    }

    /// Shards in all.
    pub(crate) fn len(&self) -> usize {
        self.whole.shards
    }

    /// A shard.
    ///
    /// # Errors
    /// If the plan's file went away or is damaged, or an archive is not there.
    pub(crate) fn shard(&self, i: usize) -> Result<Shard> {
        let line = match &self.from {
            From::Listing { listing, labels } => self.line(listing, labels, i)?,
            From::File { path, lines } => read_line(path, lines, i).with_context(|| path.display().to_string())?,
        };
        check_name(&line.shard)?;
        let work = match line.archive {
            Some((path, relative)) => Work::Archive(Archive { path, relative }),
            None => Work::Files(self.inputs(line.files)?),
        };
        let numbered = (i < self.whole.numbered).then_some(self.whole.numbered);
        Ok(Shard { name: line.shard, numbered, inputs: line.inputs, work })
    }

    fn inputs(&self, files: Vec<FileEntry>) -> Result<Vec<Input>> {
        let input = |FileEntry(root, relative, about): FileEntry| {
            let root = self.whole.roots.get(root as usize).context("the plan names no such folder")?;
            let path = if root == Path::new(".") { relative.clone() } else { root.join(&relative) };
            Ok(Input::file(path, relative).about(about.map(Arc::new)))
        };
        files.into_iter().map(input).collect()
    }

    /// What the plan's file has of a shard.
    fn line(&self, listing: &Listing, labels: &HashMap<String, Arc<About>>, i: usize) -> Result<Line> {
        if let Some(archive) = i.checked_sub(self.whole.numbered).and_then(|i| listing.archives.get(i)) {
            let (path, relative) = (archive.path.clone(), archive.relative.clone());
            let inputs = hash_of([json!([source(&relative), archive.bytes()?])]);
            return Ok(Line { shard: name_of(archive)?, inputs, files: Vec::new(), archive: Some((path, relative)) });
        }
        let per_shard = self.whole.samples_per_shard;
        let files = listing.files.chunks(per_shard).nth(i).context("no such shard")?;
        let about = |found: &Found| {
            let folder = labels.get(class_of(&found.relative).unwrap_or_default());
            match (found.about.as_deref(), folder) {
                (Some(about), Some(folder)) if about.label.is_none() && about.class.is_none() => {
                    Some(About { caption: about.caption.clone(), ..About::clone(folder) })
                }
                (Some(about), _) => Some(about.clone()),
                (None, folder) => folder.map(|folder| About::clone(folder)),
            }
        };
        let entry = |found: &Found| FileEntry(found.root, found.relative.to_path_buf(), about(found));
        let files: Vec<FileEntry> = files.iter().map(entry).collect();
        let inputs = hash_of(files.iter().map(|FileEntry(_, relative, about)| json!([source(relative), about])));
        Ok(Line { shard: numbered(i), inputs, files, archive: None })
    }

    /// Where the plan of a folder is.
    pub(crate) fn path(folder: &Path) -> PathBuf {
        folder.join("plan.jsonl")
    }

    /// Writes the plan of a folder, whole or not at all.
    ///
    /// # Errors
    /// What the system says, or a file's name that is no text.
    pub(crate) fn write(&self, folder: &Path) -> Result<PathBuf> {
        let From::Listing { listing, labels } = &self.from else { bail!("a plan that was read is not written again") };
        if listing.archives.iter().any(Archive::is_stdin) {
            bail!("standard input cannot be planned; name files");
        }
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let path = Self::path(folder);
        let write = || -> Result<()> {
            use std::io::Write as _;
            let temporary = vqrae::files::temporary_in(folder)?;
            let mut out = std::io::BufWriter::new(temporary.as_file());
            serde_json::to_writer(&mut out, &self.whole)?;
            for i in 0..self.len() {
                let line = self.line(listing, labels, i)?;
                out.write_all(b"\n")?;
                serde_json::to_writer(&mut out, &line).context("a file's name is no text (UTF-8); rename it")?;
            }
            out.write_all(b"\n")?;
            out.flush()?;
            drop(out);
            temporary.persist(&path)?;
            Ok(())
        };
        write().with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// The plan of a folder; `None` if it has none.
    ///
    /// # Errors
    /// If it is damaged.
    pub(crate) fn read(folder: &Path) -> Result<Option<Self>> {
        let path = Self::path(folder);
        if !path.exists() {
            return Ok(None);
        }
        let (whole, lines) = read_whole(&path).with_context(|| path.display().to_string())?;
        Ok(Some(Self { whole, from: From::File { path, lines } }))
    }
}

fn read_whole(path: &Path) -> Result<(Whole, Vec<u64>)> {
    let mut file = BufReader::new(File::open(path)?);
    let mut line = Vec::new();
    let mut at = file.read_until(b'\n', &mut line)? as u64;
    let damaged = "not a plan, or a damaged one; delete it and plan again with --plan";
    let whole: Whole = serde_json::from_slice(&line).context(damaged)?;
    if whole.format != FORMAT {
        bail!("a plan of format {}, expected: {FORMAT}; plan again with --plan", whole.format);
    }
    let mut lines = Vec::new();
    loop {
        let length = file.skip_until(b'\n')? as u64;
        if length == 0 {
            break;
        }
        lines.push(at);
        at += length;
    }
    if lines.len() != whole.shards || whole.numbered > whole.shards || whole.samples_per_shard == 0 {
        bail!("{damaged}");
    }
    Ok((whole, lines))
}

fn read_line(path: &Path, lines: &[u64], i: usize) -> Result<Line> {
    let at = lines.get(i).context("no such shard")?;
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(*at))?;
    let mut line = Vec::new();
    BufReader::new(file).read_until(b'\n', &mut line)?;
    serde_json::from_slice(&line).context("damaged; delete it and plan again with --plan")
}

/// What a shard of files is made of, as a hash: names and what is known about them.
fn hash_of(parts: impl IntoIterator<Item = Value>) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part.to_string().as_bytes());
        hasher.update(b"\n");
    }
    hasher.finalize().to_hex()[..32].to_string()
}

/// Refuses a name that would not stay in the folder.
fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\']) {
        bail!("{name:?} cannot be the name of a shard");
    }
    Ok(())
}

/// The name of an archive's shard: the file's own without its ending, whatever folder it is in.
fn name_of(archive: &Archive) -> Result<String> {
    let stem = archive.relative.with_extension("");
    let name = source(&stem).replace('/', "_");
    check_name(&name)?;
    Ok(name)
}

/// Whether folders are classes.
fn by_folder(listing: &Listing, labels: Labels) -> bool {
    match labels {
        Labels::Folders => true,
        Labels::None => false,
        Labels::Auto => listing.files.iter().all(|found| {
            let said = found.about.as_deref().is_some_and(|about| about.label.is_some() || about.class.is_some());
            !said && class_of(&found.relative).is_some()
        }),
    }
}

/// The first folder of a path.
fn class_of(relative: &Path) -> Option<&str> {
    let mut parts = relative.components();
    let first = parts.next()?;
    parts.next().and_then(|_| first.as_os_str().to_str())
}

fn classes(files: &[Found]) -> Vec<String> {
    let names: BTreeSet<&str> = files.iter().filter_map(|found| class_of(&found.relative)).collect();
    names.into_iter().map(str::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(files: &[&str], archives: &[&str]) -> Listing {
        let found = |name: &&str| Found { root: 0, relative: PathBuf::from(name).into_boxed_path(), about: None };
        let archive = |name: &&str| Archive { path: PathBuf::from(name), relative: PathBuf::from(name) };
        Listing {
            roots: vec!["photos".into()],
            files: files.iter().map(found).collect(),
            archives: archives.iter().map(archive).collect(),
            unreadable: Vec::new(),
        }
    }

    fn plan(files: &[&str], labels: Labels) -> Plan {
        Plan::of(listing(files, &[]), vec!["photos".into()], 2, labels).unwrap()
    }

    fn shown(shard: &Shard) -> Vec<(String, Option<i64>)> {
        let Work::Files(files) = &shard.work else { return Vec::new() };
        let label = |input: &Input| input.known().and_then(|about| about.label);
        files.iter().map(|input| (input.path.display().to_string(), label(input))).collect()
    }

    #[test]
    fn shards_are_contiguous_runs_of_the_files() {
        let plan = plan(&["a.jpg", "b.jpg", "c.jpg"], Labels::Auto);
        assert_eq!((plan.len(), plan.whole.images), (2, 3));
        assert_eq!(shown(&plan.shard(0).unwrap()), [("photos/a.jpg".into(), None), ("photos/b.jpg".into(), None)]);
        let last = plan.shard(1).unwrap();
        assert_eq!((last.name.as_str(), last.numbered, shown(&last).len()), ("00001", Some(2), 1));
        assert!(plan.shard(2).is_err());
    }

    #[test]
    fn folders_are_classes_as_in_imagefolder() {
        let files = ["cat/1.jpg", "cat/old/2.jpg", "dog/1.jpg"];
        let auto = plan(&files, Labels::Auto);
        assert_eq!(auto.whole.classes, ["cat", "dog"]);
        let labels: Vec<_> = (0..2).flat_map(|i| shown(&auto.shard(i).unwrap())).map(|(_, label)| label).collect();
        assert_eq!(labels, [Some(0), Some(0), Some(1)]);
        assert!(plan(&["cat/1.jpg", "x.jpg"], Labels::Auto).whole.classes.is_empty());
        assert_eq!(plan(&["cat/1.jpg", "x.jpg"], Labels::Folders).whole.classes, ["cat"]);
        assert!(plan(&files, Labels::None).whole.classes.is_empty());
    }

    #[test]
    fn what_a_shard_is_made_of_decides_its_hash() {
        let hash = |files: &[&str], labels| plan(files, labels).shard(0).unwrap().inputs;
        let first = hash(&["a/1.jpg", "a/2.jpg", "b/1.jpg"], Labels::None);
        assert_eq!(first, hash(&["a/1.jpg", "a/2.jpg", "c/1.jpg", "d/1.jpg"], Labels::None));
        assert_ne!(first, hash(&["a/1.jpg", "a/3.jpg"], Labels::None));
        // A class that comes before moves every label.
        assert_ne!(hash(&["b/1.jpg"], Labels::Folders), hash(&["b/1.jpg", "b/2.jpg", "a/1.jpg"], Labels::Folders));
    }

    #[test]
    fn a_plan_that_is_written_is_the_same_when_read() {
        let folder = tempfile::tempdir().unwrap();
        let written = plan(&["cat/1.jpg", "cat/2.jpg", "dog/1.jpg"], Labels::Auto);
        let path = written.write(folder.path()).unwrap();
        let read = Plan::read(folder.path()).unwrap().unwrap();
        assert_eq!(read.whole, written.whole);
        for i in 0..2 {
            let [a, b] = [&written, &read].map(|plan| plan.shard(i).unwrap());
            assert_eq!((&a.name, &a.inputs, a.numbered, shown(&a)), (&b.name, &b.inputs, b.numbered, shown(&b)));
        }
        let bytes = std::fs::read(&path).unwrap();
        for damaged in [&bytes[..10], &bytes[..bytes.len() / 2], b"", b"{}\n"] {
            std::fs::write(&path, damaged).unwrap();
            let outcome = Plan::read(folder.path()).and_then(|plan| plan.unwrap().shard(1));
            assert!(outcome.is_err(), "{}", String::from_utf8_lossy(damaged));
        }
    }

    #[test]
    fn archives_are_shards_of_their_own_names() {
        let folder = tempfile::tempdir().unwrap();
        let tar = folder.path().join("00007.tar");
        std::fs::write(&tar, "12345").unwrap();
        let mut found = listing(&[], &[]);
        found.archives.push(Archive { path: tar, relative: "data/00007.tar".into() });
        let plan = Plan::of(found, Vec::new(), 2, Labels::Auto).unwrap();
        let shard = plan.shard(0).unwrap();
        assert_eq!((shard.name.as_str(), shard.numbered), ("data_00007", None));
        let error = Plan::of(listing(&["a.jpg"], &["00000.tar"]), Vec::new(), 2, Labels::Auto).err().unwrap();
        assert!(error.to_string().contains("would both be written as 00000"), "{error}");
    }
}
