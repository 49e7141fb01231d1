//! Words of the command line → which files a run reads, in the order of the bytes of their relative paths: never in that of a
//! folder's listing.

use std::collections::HashSet;
use std::fs::File;
use std::io::Seek;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use globset::{GlobBuilder, GlobMatcher};
use vqrae::codes::shard::Layout;
use vqrae::codes::{self, CodeSet};
#[cfg(feature = "parquet")]
use vqrae::samples::Table;
use vqrae::samples::{IMAGE_ENDINGS, Keys, Tar};
use walkdir::{DirEntry, WalkDir};

use super::{About, Input, Inputs, Shard, list};

/// What a command works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Images,
    ImagesAndCodes,
    Codes,
}

/// What words name.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Format {
    /// Files by their endings; a folder is searched for images
    #[default]
    Auto,
    /// Images, one a file
    Files,
    /// Tars; a folder is searched for them
    #[value(alias = "wds", alias = "tar")]
    Webdataset,
    /// Parquet files with a column of images; a folder is searched for them
    #[value(alias = "hf")]
    Parquet,
}

/// What is searched for, and where.
#[derive(Debug, Clone)]
pub(crate) struct Search<'a> {
    pub(crate) words: &'a [PathBuf],
    pub(crate) files_from: Option<&'a Path>,
    /// Entries of the list are separated by NUL.
    pub(crate) nul: bool,
    pub(crate) format: Format,
    pub(crate) kind: Kind,
    /// Left out of the search.
    pub(crate) output: &'a Path,
}

/// An image or code file that was found, as few bytes as may be: there may be millions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// Number of the folder that `relative` is below.
    pub(crate) root: u32,
    pub(crate) relative: Box<Path>,
    pub(crate) about: Option<Arc<About>>,
}

/// A file of many images or of many codes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Archive {
    pub(crate) path: PathBuf,
    pub(crate) relative: PathBuf,
}

/// All that words name.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    pub(crate) roots: Vec<PathBuf>,
    pub(crate) files: Vec<Found>,
    pub(crate) archives: Vec<Archive>,
    pub(crate) unreadable: Vec<(Input, String)>,
}

impl Kind {
    fn plural(self) -> &'static str {
        match self {
            Self::Images => "images",
            Self::ImagesAndCodes => "images or code files",
            Self::Codes => "code files",
        }
    }

    /// What a folder is searched for, in words.
    fn endings(self) -> String {
        match self {
            Self::Codes => "safetensors, npy, parquet".to_string(),
            _ => IMAGE_ENDINGS.join(", "),
        }
    }
}

fn has_ending(path: &Path, endings: &[&str]) -> bool {
    let ending = path.extension().unwrap_or_default();
    endings.iter().any(|known| ending.eq_ignore_ascii_case(known))
}

impl Archive {
    /// Whether a file of this name is one.
    fn is(path: &Path, kind: Kind) -> bool {
        match kind {
            Kind::Images => has_ending(path, &["tar", "parquet"]),
            Kind::ImagesAndCodes => has_ending(path, &["tar", "parquet", "jsonl"]),
            Kind::Codes => has_ending(path, &["parquet", "jsonl"]),
        }
    }

    /// Standard input, which is a tar.
    pub(crate) fn is_stdin(&self) -> bool {
        self.path == Path::new("-")
    }

    /// Length in bytes; 0 of standard input.
    pub(crate) fn bytes(&self) -> Result<u64> {
        if self.is_stdin() {
            return Ok(0);
        }
        Ok(std::fs::metadata(&self.path).map_err(vqrae::Error::io(&self.path))?.len())
    }

    /// The images in it. Standard input is put aside first, in a file of `spool` that has no name.
    ///
    /// # Errors
    /// If it cannot be opened; where it is damaged, one of the inputs says so.
    pub(crate) fn open(&self, keys: &ImageKeys, spool: &Path) -> Result<Vec<Input>> {
        let io = |error| vqrae::Error::io(&self.path)(error);
        if self.is_stdin() {
            let mut file = tempfile::tempfile_in(spool).map_err(vqrae::Error::io(spool))?;
            std::io::copy(&mut std::io::stdin().lock(), &mut file).map_err(vqrae::Error::io(spool))?;
            file.rewind().map_err(io)?;
            return Ok(Input::of_tar(Tar::of(file, &keys.tar).map_err(io)?, Path::new("stdin"), &self.relative));
        }
        if !has_ending(&self.path, &["parquet"]) {
            let tar = Tar::open(&self.path, &keys.tar).map_err(io)?;
            return Ok(Input::of_tar(tar, &self.path, &self.relative));
        }
        // Whether it can be opened at all is the system's matter, what is in it that of this image file.
        File::open(&self.path).map_err(io)?;
        self.open_table(keys)
    }

    #[cfg(feature = "parquet")]
    fn open_table(&self, keys: &ImageKeys) -> Result<Vec<Input>> {
        Ok(match Table::open(&self.path, &keys.table) {
            Ok(table) => Input::of_table(table, &self.path, &self.relative),
            Err(reason) => vec![Input::broken(&self.path, &self.relative, &reason)],
        })
    }

    #[cfg(not(feature = "parquet"))]
    fn open_table(&self, _: &ImageKeys) -> Result<Vec<Input>> {
        bail!("{}: this build cannot read parquet; build with --features parquet", self.path.display())
    }

    /// The rows with codes, or why it is no shard of codes.
    fn open_codes(&self) -> Result<Vec<Input>> {
        let shard = Shard::open(&self.path)?;
        let rows = shard.rows()?;
        let with_codes = rows.iter().enumerate().filter(|(_, row)| row.codes.is_some());
        let name = |row: &codes::Row| match &row.view {
            Some(view) => PathBuf::from(format!("{}@{}", row.path, view.replace('/', "-"))),
            None => PathBuf::from(&row.path),
        };
        Ok(with_codes.map(|(i, row)| Input::of_codes(shard.clone(), i, safe(&name(row)))).collect())
    }
}

/// A path that stays below the folder that it is joined to: rows may come from anywhere.
pub(super) fn safe(path: &Path) -> PathBuf {
    path.components().filter(|part| matches!(part, Component::Normal(_))).collect()
}

/// What the members of tars and the columns of tables are called.
#[derive(Debug, Clone)]
pub(crate) struct ImageKeys {
    pub(crate) tar: Keys,
    pub(crate) table: Keys,
}

/// What files are sorted by.
fn bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_encoded_bytes()
}

impl Default for ImageKeys {
    fn default() -> Self {
        Self { tar: Keys::webdataset(), table: Keys::table() }
    }
}

impl Listing {
    /// Searches.
    ///
    /// # Errors
    /// A word that names nothing, or two files that would be written to one place.
    pub(crate) fn of(search: &Search<'_>) -> Result<Self> {
        let mut listing = Self::default();
        // An output folder that does not exist yet cannot be met on the way.
        let output = search.output.canonicalize().ok();
        for word in search.words {
            listing.add_word(word, search, output.as_deref())?;
        }
        if let Some(list) = search.files_from {
            listing.add_list(list, search)?;
        }
        if listing.files.is_empty() && listing.archives.is_empty() {
            let list = search.files_from.map(|list| list.display().to_string());
            let places: Vec<_> = search.words.iter().map(|word| word.display().to_string()).chain(list).collect();
            let (kind, places, endings) = (search.kind.plural(), places.join(", "), search.kind.endings());
            let archives = match search.kind {
                Kind::Codes => "",
                _ => "; tars and parquet files are named themselves, or with --input-format",
            };
            bail!("no {kind} found under {places} (a folder is searched for {endings}{archives})");
        }
        listing.sort();
        Ok(listing)
    }

    fn sort(&mut self) {
        self.files.sort_by(|a, b| bytes(&a.relative).cmp(bytes(&b.relative)));
        let roots = &self.roots;
        let path = |found: &Found| roots[found.root as usize].join(&found.relative);
        self.files.dedup_by(|a, b| a.relative == b.relative && path(a) == path(b));
        self.archives.sort_by(|a, b| bytes(&a.relative).cmp(bytes(&b.relative)));
        self.archives.dedup();
    }

    /// Two files of one relative path would be written to one place.
    ///
    /// # Errors
    /// Names both.
    pub(crate) fn refuse_same_names(&self) -> Result<()> {
        let same = self.files.windows(2).find(|pair| pair[0].relative == pair[1].relative);
        let Some([a, b]) = same else { return Ok(()) };
        let [one, other] = [a, b].map(|found| self.path(found));
        let (one, other, name) = (one.display(), other.display(), a.relative.display());
        bail!("{one} and {other} would both be written as {name}; give the folder that holds both, or run them apart")
    }

    /// Where a file is.
    pub(crate) fn path(&self, found: &Found) -> PathBuf {
        match self.roots[found.root as usize].as_path() {
            root if root == Path::new(".") => found.relative.to_path_buf(),
            root => root.join(&found.relative),
        }
    }

    /// A file as an input.
    pub(crate) fn input(&self, found: &Found) -> Input {
        Input::file(self.path(found), found.relative.to_path_buf()).about(found.about.clone())
    }

    /// Everything as inputs, the images of archives included.
    ///
    /// # Errors
    /// If standard input cannot be put aside.
    pub(crate) fn expand(self, kind: Kind, keys: &ImageKeys, spool: &Path) -> Result<Inputs> {
        let mut inputs =
            Inputs { files: self.files.iter().map(|found| self.input(found)).collect(), unreadable: vec![] };
        for archive in &self.archives {
            let opened = match kind {
                Kind::Codes => archive.open_codes(),
                Kind::Images => archive.open(keys, spool),
                Kind::ImagesAndCodes if archive.is_stdin() || has_ending(&archive.path, &["tar"]) => {
                    archive.open(keys, spool)
                }
                Kind::ImagesAndCodes => archive.open_codes().or_else(|not_codes| match archive.open(keys, spool) {
                    Ok(inputs) if inputs.iter().any(|input| !input.is_broken()) => Ok(inputs),
                    _ => Err(not_codes),
                }),
            };
            match opened {
                Ok(opened) => inputs.files.extend(opened),
                Err(error) => {
                    let input = Input::file(archive.path.clone(), archive.relative.clone());
                    inputs.unreadable.push((input, error.to_string()));
                }
            }
        }
        inputs.unreadable.extend(self.unreadable);
        inputs.files.sort_by(|a, b| bytes(&a.relative).cmp(bytes(&b.relative)));
        Ok(inputs)
    }

    fn root(&mut self, root: &Path) -> u32 {
        let known = self.roots.iter().rposition(|known| known == root);
        known.unwrap_or_else(|| {
            self.roots.push(root.to_path_buf());
            self.roots.len() - 1
        }) as u32
    }

    fn add_word(&mut self, word: &Path, search: &Search<'_>, output: Option<&Path>) -> Result<()> {
        let text = word.to_string_lossy();
        if word == Path::new("-") && search.kind != Kind::Codes {
            self.archives.push(Archive { path: "-".into(), relative: "stdin".into() });
            Ok(())
        } else if word.is_dir() {
            if word.canonicalize().ok().as_deref() == output && search.kind == Kind::Images {
                bail!("{text} is also the output folder; choose another folder with --output");
            }
            if search.kind != Kind::Images && CodeSet::is(word) {
                return self.add_set(word);
            }
            self.walk(word, output, search, |path, _| takes(search, path));
            Ok(())
        } else if word.is_file() {
            let relative = word.file_name().map(PathBuf::from).unwrap_or_default();
            self.add(search, word.parent().unwrap_or(Path::new("")), relative, None);
            Ok(())
        } else if !word.exists() && text.contains(['*', '?', '[', '{']) {
            let (base, matcher) = split_glob(word).with_context(|| format!("{text} is not a glob"))?;
            self.walk(&base, output, search, |_, relative| matcher.is_match(relative));
            Ok(())
        } else if word.exists() {
            bail!("{text} is neither a file nor a folder")
        } else {
            bail!("{text}: no such file or folder")
        }
    }

    /// Adds the finished shards of a set, and nothing else that its folder holds.
    fn add_set(&mut self, folder: &Path) -> Result<()> {
        let set = CodeSet::open(folder)?;
        for stats in set.shards() {
            let path = set.file(stats);
            let relative = path.strip_prefix(folder).unwrap_or(&path).to_path_buf();
            self.archives.push(Archive { path, relative });
        }
        Ok(())
    }

    fn add_list(&mut self, list: &Path, search: &Search<'_>) -> Result<()> {
        for line in list::read(list, search.nul)? {
            let (root, relative) = list::split(&line.path)?;
            self.add(search, &root, relative, line.about.map(Arc::new));
        }
        Ok(())
    }

    /// Adds a file, whatever it is called.
    fn add(&mut self, search: &Search<'_>, root: &Path, relative: PathBuf, about: Option<Arc<About>>) {
        let as_archive = match search.format {
            Format::Auto => Archive::is(&relative, search.kind),
            Format::Files => false,
            Format::Webdataset | Format::Parquet => true,
        };
        if as_archive {
            self.archives.push(Archive { path: root.join(&relative), relative });
        } else {
            let root = self.root(root);
            self.files.push(Found { root, relative: relative.into_boxed_path(), about });
        }
    }

    /// Collects the files below `base` that `takes` accepts by path and relative path, leaving out the output folder.
    fn walk(&mut self, base: &Path, output: Option<&Path>, search: &Search<'_>, takes: impl Fn(&Path, &Path) -> bool) {
        let is_output = |entry: &DirEntry| {
            entry.depth() > 0
                && output.is_some()
                && entry.file_type().is_dir()
                && entry.path().canonicalize().ok().as_deref() == output
        };
        let below = |path: &Path| path.strip_prefix(base).unwrap_or(path).to_path_buf();
        for entry in WalkDir::new(base).follow_links(true).into_iter().filter_entry(|entry| !is_output(entry)) {
            match entry {
                Ok(entry) if entry.file_type().is_file() => {
                    let relative = below(entry.path());
                    if takes(entry.path(), &relative) {
                        self.add(search, base, relative, None);
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    let path = error.path().unwrap_or(base);
                    let reason = error.io_error().map_or_else(|| error.to_string(), ToString::to_string);
                    self.unreadable.push((Input::file(path.to_path_buf(), below(path)), reason));
                }
            }
        }
    }
}

/// Whether a folder's file is one of those searched for.
fn takes(search: &Search<'_>, path: &Path) -> bool {
    let image = search.kind != Kind::Codes && has_ending(path, &IMAGE_ENDINGS);
    let codes =
        search.kind != Kind::Images && (codes::Format::of(path).is_some() || Layout::of(path) == Some(Layout::Parquet));
    match search.format {
        Format::Auto => image || codes,
        Format::Files => image,
        Format::Webdataset => has_ending(path, &["tar"]),
        Format::Parquet => has_ending(path, &["parquet"]),
    }
}

/// A glob's leading folders that are plain names, and the matcher for what lies below them.
fn split_glob(pattern: &Path) -> Result<(PathBuf, GlobMatcher)> {
    let special = |part: &Component<'_>| part.as_os_str().to_string_lossy().contains(['*', '?', '[', '{']);
    let plain = pattern.components().take_while(|part| !special(part)).count();
    let base: PathBuf = pattern.components().take(plain).collect();
    let rest: PathBuf = pattern.components().skip(plain).collect();
    let matcher = GlobBuilder::new(&rest.to_string_lossy()).literal_separator(true).build()?.compile_matcher();
    Ok((if base.as_os_str().is_empty() { PathBuf::from(".") } else { base }, matcher))
}

/// The code files that some words name, each once: nothing is written after their names, so these may be the same.
pub(crate) fn each_once(inputs: &mut Inputs) {
    let mut seen = HashSet::new();
    inputs.files.retain(|file| {
        let place = file.path.canonicalize().unwrap_or_else(|_| file.path.clone());
        seen.insert(place)
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(folder: &Path, files: &[&str]) {
        for file in files {
            let path = folder.join(file);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            std::fs::write(path, "").expect("a file");
        }
    }

    fn find(words: &[PathBuf], output: &Path) -> Result<Listing> {
        let (format, kind) = (Format::Auto, Kind::Images);
        let listing = Listing::of(&Search { words, files_from: None, nul: false, format, kind, output })?;
        listing.refuse_same_names().map(|()| listing)
    }

    fn names(listing: &Listing) -> Vec<String> {
        listing.files.iter().map(|found| super::super::source(&found.relative)).collect()
    }

    #[test]
    fn a_folder_is_searched_for_images_in_the_order_of_bytes() {
        let folder = tempfile::tempdir().expect("a folder");
        touch(folder.path(), &["b.jpg", "a/z.PNG", "a.webp", "notes.txt", "B.tiff", "a/deep/x.gif"]);
        let listing = find(&[folder.path().to_path_buf()], Path::new("out")).expect("inputs");
        assert_eq!(names(&listing), ["B.tiff", "a.webp", "a/deep/x.gif", "a/z.PNG", "b.jpg"]);
    }

    #[test]
    fn a_glob_is_relative_to_its_plain_folders() {
        let folder = tempfile::tempdir().expect("a folder");
        touch(folder.path(), &["a/one.jpg", "a/b/two.jpg", "a/b/three.png", "c/four.jpg"]);
        let inputs = |glob: &str| find(&[folder.path().join(glob)], Path::new("out"));
        assert_eq!(names(&inputs("a/**/*.jpg").expect("inputs")), ["b/two.jpg", "one.jpg"]);
        assert_eq!(names(&inputs("a/*.jpg").expect("inputs")), ["one.jpg"]);
        assert_eq!(names(&inputs("*/*.jpg").expect("inputs")), ["a/one.jpg", "c/four.jpg"]);
        assert!(inputs("*.webp").expect_err("nothing").to_string().starts_with("no images found under"));
    }

    #[test]
    fn tars_and_tables_are_archives() {
        let folder = tempfile::tempdir().expect("a folder");
        touch(folder.path(), &["b.tar", "a.parquet", "x.jpg"]);
        let words = ["b.tar", "a.parquet", "x.jpg"].map(|name| folder.path().join(name));
        let listing = find(&words, Path::new("out")).expect("inputs");
        let archives: Vec<_> = listing.archives.iter().map(|archive| archive.relative.display().to_string()).collect();
        assert_eq!((archives, names(&listing)), (vec!["a.parquet".into(), "b.tar".into()], vec!["x.jpg".into()]));
        // A folder is searched for images alone, unless it is said otherwise.
        assert!(find(&[folder.path().to_path_buf()], Path::new("out")).expect("inputs").archives.is_empty());
    }

    #[test]
    fn the_output_folder_is_not_an_input() {
        let folder = tempfile::tempdir().expect("a folder");
        touch(folder.path(), &["a.jpg", "out/reconstructions/a.jpg.png"]);
        let find = |output: &Path| find(&[folder.path().to_path_buf()], output);
        assert_eq!(names(&find(&folder.path().join("out")).expect("inputs")), ["a.jpg"]);
        assert!(find(folder.path()).expect_err("the same folder").to_string().contains("also the output folder"));
    }

    #[test]
    fn two_files_of_one_name_are_refused_and_one_file_twice_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        touch(folder.path(), &["a/x.jpg", "b/x.jpg"]);
        let [a, b] = ["a/x.jpg", "b/x.jpg"].map(|name| folder.path().join(name));
        let error = find(&[a.clone(), b], Path::new("out")).expect_err("a collision").to_string();
        assert!(error.contains("would both be written as x.jpg"), "{error}");
        assert_eq!(find(&[a.clone(), a], Path::new("out")).expect("inputs").files.len(), 1);
    }
}
