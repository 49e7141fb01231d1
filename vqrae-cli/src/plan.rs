//! Words → checked plan: which files a run reads, and with what settings. Nothing is computed here.

use std::collections::{HashMap, HashSet};
use std::num::NonZeroUsize;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use globset::{GlobBuilder, GlobMatcher};
use vqrae::{Device, Vqrae, codes};
use walkdir::{DirEntry, WalkDir};

use crate::device::DeviceArgs;
use crate::hub;
use crate::pipeline::Pace;

/// What a folder is searched for; a file that is named itself is taken whatever it is called.
const IMAGE_EXTENSIONS: [&str; 8] = ["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"];

/// Which model, and where it computes.
#[derive(Args, Debug)]
pub(crate) struct ModelArgs {
    /// Folder of the model, or OWNER/NAME[@REVISION] on the Hugging Face hub; without it, the model that ships with the
    /// program
    ///
    /// A folder of that name comes first, then the hub's cache, then a download. HF_HOME, HF_TOKEN, HF_ENDPOINT and
    /// HF_HUB_OFFLINE are honoured.
    #[arg(long, value_name = "FOLDER|OWNER/NAME")]
    pub(crate) model: Option<PathBuf>,
    #[command(flatten)]
    devices: DeviceArgs,
    /// Number format to multiply in; sums are f32 and the nearest code is exact in any
    ///
    /// `auto` is bf16 where the processor multiplies bf16 numbers faster than f32 ones (AVX512-BF16, AMX, CUDA), and f32
    /// elsewhere. `f32` is the reference: the same codes on every CPU with AVX2, AVX-512 or NEON. What was used is
    /// recorded with the codes, and a folder is never continued in another. The environment variable VQRAE_CPU forces
    /// the instructions: amx-bf16, avx512-bf16, avx512, avx2, neon or portable.
    #[arg(long, value_enum, default_value_t = Precision::Auto)]
    dtype: Precision,
}

impl ModelArgs {
    /// Opens the model, on one device.
    pub(crate) fn open(&self) -> Result<Vqrae> {
        self.open_on(&self.devices.device.open_one()?)
    }

    /// Opens the model on each of the devices.
    pub(crate) fn open_all(&self) -> Result<Vec<Vqrae>> {
        self.devices.device.open_all()?.iter().map(|device| self.open_on(device)).collect()
    }

    /// The device alone, where no model is wanted.
    pub(crate) fn device(&self) -> Result<Device> {
        self.devices.device.open_one()
    }

    fn open_on(&self, device: &Device) -> Result<Vqrae> {
        let dtype = self.dtype.on(device)?;
        match &self.model {
            Some(word) => Ok(Vqrae::from_pretrained(hub::folder(word)?, device, dtype)?),
            None => shipped(device, dtype),
        }
    }
}

/// The model that ships with the program.
#[cfg(feature = "shipped-model")]
pub(crate) fn shipped(device: &Device, dtype: vqrae::DType) -> Result<Vqrae> {
    Ok(Vqrae::shipped(device, dtype)?)
}

/// The model that ships with the program: not with this build.
#[cfg(not(feature = "shipped-model"))]
pub(crate) fn shipped(_: &Device, _: vqrae::DType) -> Result<Vqrae> {
    bail!("this build carries no model; name one with --model FOLDER, or build with --features shipped-model")
}

#[derive(ValueEnum, Debug, Clone, Copy)]
pub(crate) enum Precision {
    /// bf16 where the processor is faster in it, else f32
    Auto,
    #[value(alias = "fp32", alias = "float32")]
    F32,
    #[value(alias = "bfloat16")]
    Bf16,
    /// On CUDA alone
    #[value(alias = "fp16", alias = "float16")]
    F16,
}

impl Precision {
    /// The number format on a device.
    pub(crate) fn on(self, device: &Device) -> Result<vqrae::DType> {
        Ok(match self {
            Self::Auto => vqrae::auto_dtype(device)?,
            Self::F32 => vqrae::DType::F32,
            Self::Bf16 => vqrae::DType::BF16,
            Self::F16 => vqrae::DType::F16,
        })
    }
}

/// Which files, how they are read, and where results go.
#[derive(Args, Debug)]
pub(crate) struct InputArgs {
    #[command(flatten)]
    pub(crate) files: FileArgs,
    /// Folder to write to
    #[arg(short, long, alias = "output_folder", alias = "output-folder", value_name = "OUT")]
    pub(crate) output: PathBuf,
}

impl InputArgs {
    /// The files to work on, images only or code files too.
    pub(crate) fn find(&self, kind: Kind) -> Result<Inputs> {
        self.files.find(kind, &self.output)
    }

    /// How the files are read.
    pub(crate) fn pace(&self) -> Pace {
        self.files.pace()
    }
}

/// Which files, and how they are read.
#[derive(Args, Debug)]
pub(crate) struct FileArgs {
    /// Folders (searched recursively), files, or quoted globs such as 'photos/**/*.jpg'
    #[arg(required = true, value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// Images that go through the model at once; on the CPU it changes the speed, never the result
    #[arg(long, alias = "batch_size", default_value = "16", value_name = "N")]
    batch_size: NonZeroUsize,
    /// Threads that decode images ahead of the model; by default as many as there are cores
    #[arg(long, alias = "num_workers", value_name = "N")]
    num_workers: Option<NonZeroUsize>,
    /// Give up with exit code 1 once more than N files could not be read; without it, they are only counted
    #[arg(long, alias = "max_errors", value_name = "N", conflicts_with = "strict")]
    max_errors: Option<usize>,
    /// Give up with exit code 1 at the first file that cannot be read
    #[arg(long)]
    strict: bool,
}

impl FileArgs {
    /// The files to work on, images only or code files too; the folder of `output` is not searched.
    pub(crate) fn find(&self, kind: Kind, output: &Path) -> Result<Inputs> {
        find(&self.inputs, kind, output)
    }

    /// How the files are read.
    pub(crate) fn pace(&self) -> Pace {
        let workers = self.num_workers.or_else(|| std::thread::available_parallelism().ok());
        Pace { workers: workers.map_or(1, NonZeroUsize::get), batch_size: self.batch_size.get() }
    }

    /// How many unreadable files a run survives.
    pub(crate) fn max_errors(&self) -> usize {
        if self.strict { 0 } else { self.max_errors.unwrap_or(usize::MAX) }
    }
}

/// What a command works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Images,
    ImagesAndCodes,
    Codes,
}

impl Kind {
    /// Whether a folder's file is one of these.
    fn takes(self, path: &Path) -> bool {
        let extension = path.extension().unwrap_or_default();
        let image = IMAGE_EXTENSIONS.iter().any(|known| extension.eq_ignore_ascii_case(known));
        image && self != Self::Codes || self != Self::Images && codes::Format::of(path).is_some()
    }

    fn plural(self) -> &'static str {
        match self {
            Self::Images => "images",
            Self::ImagesAndCodes => "images or code files",
            Self::Codes => "code files",
        }
    }

    /// What a folder is searched for, in words.
    fn extensions(self) -> String {
        if self == Self::Codes { "safetensors, npy".to_string() } else { IMAGE_EXTENSIONS.join(", ") }
    }
}

/// One file to work on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Input {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// What its output is named after: the path below the folder or the glob that found it.
    pub(crate) relative: PathBuf,
}

impl Input {
    /// The relative path as it is written into files: separated by `/` on every system.
    pub(crate) fn source(&self) -> String {
        let parts: Vec<_> = self.relative.components().map(|part| part.as_os_str().to_string_lossy()).collect();
        parts.join("/")
    }
}

/// The files of a run, in the order of the bytes of their relative paths.
#[derive(Debug, Default)]
pub(crate) struct Inputs {
    /// What there is to read.
    pub(crate) files: Vec<Input>,
    /// Folders and links that could not be followed, and why.
    pub(crate) unreadable: Vec<(Input, String)>,
}

/// The code files that some words name, each once: nothing is written after their names, so these may be the same.
pub(crate) fn find_codes(words: &[PathBuf], output: &Path) -> Result<Inputs> {
    let mut inputs = search(words, Kind::Codes, output)?;
    let mut seen = HashSet::new();
    inputs.files.retain(|file| seen.insert(file.path.canonicalize().unwrap_or_else(|_| file.path.clone())));
    Ok(inputs)
}

/// The images that some words name, beside those of [`FileArgs`].
pub(crate) fn find_images(words: &[PathBuf], output: &Path) -> Result<Inputs> {
    find(words, Kind::Images, output)
}

fn find(words: &[PathBuf], kind: Kind, output: &Path) -> Result<Inputs> {
    let inputs = search(words, kind, output)?;
    refuse_same_names(&inputs.files)?;
    Ok(inputs)
}

fn search(words: &[PathBuf], kind: Kind, output: &Path) -> Result<Inputs> {
    let mut inputs = Inputs::default();
    // An output folder that does not exist yet cannot be met on the way.
    let output = output.canonicalize().ok();
    for word in words {
        find_word(word, kind, output.as_deref(), &mut inputs)?;
    }
    if inputs.files.is_empty() {
        let places: Vec<_> = words.iter().map(|word| word.display().to_string()).collect();
        let (kind, places, extensions) = (kind.plural(), places.join(", "), kind.extensions());
        bail!("no {kind} found under {places} (a folder is searched for {extensions})");
    }
    inputs.files.sort_by(|a, b| key(a).cmp(key(b)));
    inputs.files.dedup();
    Ok(inputs)
}

fn key(input: &Input) -> &[u8] {
    input.relative.as_os_str().as_encoded_bytes()
}

fn find_word(word: &Path, kind: Kind, output: Option<&Path>, inputs: &mut Inputs) -> Result<()> {
    let text = word.to_string_lossy();
    if word.is_dir() {
        if word.canonicalize().ok().as_deref() == output {
            bail!("{text} is also the output folder; choose another folder with --output");
        }
        walk(word, output, |path, _| kind.takes(path), inputs);
        Ok(())
    } else if word.is_file() {
        let relative = word.file_name().map(PathBuf::from).unwrap_or_default();
        inputs.files.push(Input { path: word.to_path_buf(), relative });
        Ok(())
    } else if !word.exists() && text.contains(['*', '?', '[', '{']) {
        let (base, matcher) = split_glob(word).with_context(|| format!("{text} is not a glob"))?;
        walk(&base, output, |_, relative| matcher.is_match(relative), inputs);
        Ok(())
    } else if word.exists() {
        bail!("{text} is neither a file nor a folder")
    } else {
        bail!("{text}: no such file or folder")
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

/// Collects the files below `base` that `takes` accepts by path and relative path, leaving out the output folder.
fn walk(base: &Path, output: Option<&Path>, takes: impl Fn(&Path, &Path) -> bool, inputs: &mut Inputs) {
    let is_output = |entry: &DirEntry| {
        output.is_some() && entry.file_type().is_dir() && entry.path().canonicalize().ok().as_deref() == output
    };
    let below = |path: &Path| Input {
        path: path.to_path_buf(),
        relative: path.strip_prefix(base).unwrap_or(path).to_path_buf(),
    };
    for entry in WalkDir::new(base).follow_links(true).into_iter().filter_entry(|entry| !is_output(entry)) {
        match entry {
            Ok(entry) if entry.file_type().is_file() => {
                let input = below(entry.path());
                if takes(&input.path, &input.relative) {
                    inputs.files.push(input);
                }
            }
            Ok(_) => {}
            Err(error) => {
                let path = error.path().unwrap_or(base);
                let reason = error.io_error().map_or_else(|| error.to_string(), ToString::to_string);
                inputs.unreadable.push((below(path), reason));
            }
        }
    }
}

/// Two files of one relative path would be written to one place.
fn refuse_same_names(files: &[Input]) -> Result<()> {
    let mut seen: HashMap<&Path, &Path> = HashMap::with_capacity(files.len());
    for file in files {
        if let Some(other) = seen.insert(&file.relative, &file.path) {
            let (a, b, name) = (other.display(), file.path.display(), file.relative.display());
            bail!("{a} and {b} would both be written as {name}; give the folder that holds both, or run them apart");
        }
    }
    Ok(())
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

    fn names(inputs: &Inputs) -> Vec<String> {
        inputs.files.iter().map(Input::source).collect()
    }

    #[test]
    fn a_folder_is_searched_for_images_in_the_order_of_bytes() {
        let folder = tempfile::tempdir().expect("a folder");
        touch(folder.path(), &["b.jpg", "a/z.PNG", "a.webp", "notes.txt", "B.tiff", "a/deep/x.gif"]);
        let inputs = find(&[folder.path().to_path_buf()], Kind::Images, Path::new("out")).expect("inputs");
        assert_eq!(names(&inputs), ["B.tiff", "a.webp", "a/deep/x.gif", "a/z.PNG", "b.jpg"]);
    }

    #[test]
    fn a_glob_is_relative_to_its_plain_folders() {
        let folder = tempfile::tempdir().expect("a folder");
        touch(folder.path(), &["a/one.jpg", "a/b/two.jpg", "a/b/three.png", "c/four.jpg"]);
        let inputs = |glob: &str| find(&[folder.path().join(glob)], Kind::Images, Path::new("out"));
        assert_eq!(names(&inputs("a/**/*.jpg").expect("inputs")), ["b/two.jpg", "one.jpg"]);
        assert_eq!(names(&inputs("a/*.jpg").expect("inputs")), ["one.jpg"]);
        assert_eq!(names(&inputs("*/*.jpg").expect("inputs")), ["a/one.jpg", "c/four.jpg"]);
        assert!(inputs("*.webp").expect_err("nothing").to_string().starts_with("no images found under"));
    }

    #[test]
    fn the_output_folder_is_not_an_input() {
        let folder = tempfile::tempdir().expect("a folder");
        touch(folder.path(), &["a.jpg", "out/reconstructions/a.jpg.png"]);
        let find = |output: &Path| find(&[folder.path().to_path_buf()], Kind::Images, output);
        assert_eq!(names(&find(&folder.path().join("out")).expect("inputs")), ["a.jpg"]);
        assert!(find(folder.path()).expect_err("the same folder").to_string().contains("also the output folder"));
    }

    #[test]
    fn two_files_of_one_name_are_refused_and_one_file_twice_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        touch(folder.path(), &["a/x.jpg", "b/x.jpg"]);
        let [a, b] = ["a/x.jpg", "b/x.jpg"].map(|name| folder.path().join(name));
        let error = find(&[a.clone(), b], Kind::Images, Path::new("out")).expect_err("a collision").to_string();
        assert!(error.contains("would both be written as x.jpg"), "{error}");
        assert_eq!(find(&[a.clone(), a], Kind::Images, Path::new("out")).expect("inputs").files.len(), 1);
    }
}
