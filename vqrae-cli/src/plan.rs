//! Words → checked plan: which files a run reads, and with what settings. Nothing is computed here.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::Result;
#[cfg(not(feature = "shipped-model"))]
use anyhow::bail;
use clap::{Args, ValueEnum};
use vqrae::samples::Keys;
use vqrae::{Device, Vqrae};

use crate::device::DeviceArgs;
use crate::hub;
use crate::inputs::{Format, ImageKeys, Inputs, Kind, Listing, Search, each_once};
use crate::pipeline::Pace;

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
    /// Folders (searched recursively), files, quoted globs such as 'photos/**/*.jpg', tars of WebDataset, parquet files with a
    /// column of images; `-` is a tar on standard input
    #[arg(required_unless_present = "files_from", alias = "data-path", value_name = "INPUT")]
    pub(crate) inputs: Vec<PathBuf>,
    /// Read paths from a file, one a line, `-` for standard input; a line may be a JSON object with `path`, `caption` and
    /// `label`. Relative paths start from the current folder
    #[arg(long, alias = "files_from", value_name = "FILE|-")]
    pub(crate) files_from: Option<PathBuf>,
    /// Entries of --files-from end with NUL, as `find -print0` writes them
    #[arg(short = '0', long, requires = "files_from")]
    null: bool,
    /// What the inputs are; a folder is searched for that
    #[arg(long, alias = "input_format", value_enum, default_value_t = Format::Auto)]
    pub(crate) input_format: Format,
    /// Image of a sample: endings of a tar's members, or names of a parquet file's columns
    #[arg(long, alias = "image_key", alias = "wds_image_key", value_name = "NAME", value_delimiter = ',')]
    image_key: Vec<String>,
    /// Caption of a sample [default: txt in tars, caption or text in parquet files]
    #[arg(long, alias = "caption_key", alias = "wds_caption_key", value_name = "NAME", value_delimiter = ',')]
    caption_key: Vec<String>,
    /// Label of a sample [default: cls in tars, label in parquet files]
    #[arg(long, alias = "label_key", value_name = "NAME", value_delimiter = ',')]
    label_key: Vec<String>,
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
        let listing = self.list(kind, output)?;
        listing.refuse_same_names()?;
        listing.expand(kind, &self.keys(), &std::env::temp_dir())
    }

    /// What the words name; see [`Listing::refuse_same_names`].
    pub(crate) fn list(&self, kind: Kind, output: &Path) -> Result<Listing> {
        let files_from = self.files_from.as_deref();
        let (words, format) = (self.inputs.as_slice(), self.input_format);
        Listing::of(&Search { words, files_from, nul: self.null, format, kind, output })
    }

    /// What members of tars and columns of parquet files are called.
    pub(crate) fn keys(&self) -> ImageKeys {
        let given = |keys: Keys| Keys {
            image: if self.image_key.is_empty() { keys.image } else { self.image_key.clone() },
            caption: if self.caption_key.is_empty() { keys.caption } else { self.caption_key.clone() },
            label: if self.label_key.is_empty() { keys.label } else { self.label_key.clone() },
        };
        let ImageKeys { tar, table } = ImageKeys::default();
        ImageKeys { tar: given(tar), table: given(table) }
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

/// The code files that some words name, each once.
pub(crate) fn find_codes(words: &[PathBuf], output: &Path) -> Result<Inputs> {
    let (format, kind) = (Format::Auto, Kind::Codes);
    let listing = Listing::of(&Search { words, files_from: None, nul: false, format, kind, output })?;
    let mut inputs = listing.expand(kind, &ImageKeys::default(), output)?;
    each_once(&mut inputs);
    Ok(inputs)
}

/// The images that some words name, beside those of [`FileArgs`].
pub(crate) fn find_images(words: &[PathBuf], output: &Path) -> Result<Inputs> {
    let (format, kind) = (Format::Auto, Kind::Images);
    let listing = Listing::of(&Search { words, files_from: None, nul: false, format, kind, output })?;
    listing.refuse_same_names()?;
    listing.expand(kind, &ImageKeys::default(), &std::env::temp_dir())
}
