//! Where tensors are: in files mapped into memory, in the program itself, or made.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{TensorInfo, TensorView};

use super::{FILE, Tensors};
use crate::error::{Error, Result};

/// The file that tells which shard holds which tensor, where there is more than one.
pub const INDEX: &str = "model.safetensors.index.json";

/// Tensors by name, read when they are asked for.
///
/// Files are mapped into memory, and the pages of a tensor are let go once it was read: a model needs the memory of what
/// it makes of its tensors, not of the file besides. A file must not be cut short while it is in use; the system ends a
/// program that reads beyond the end of a mapped file.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    files: Vec<(PathBuf, Bytes)>,
    tensors: BTreeMap<String, Place>,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

#[derive(Debug)]
enum Place {
    Made(Tensor),
    /// `info`'s offsets count from the start of the file.
    File {
        file: usize,
        info: TensorInfo,
    },
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }

    /// Tells the system that a part will not be needed soon.
    fn let_go(&self, start: usize, end: usize) {
        #[cfg(unix)]
        if let Self::Mapped(map) = self {
            // SAFETY: the map is of a file and only read, so dropped pages come back as they were. Advice that the system
            // does not take costs memory alone.
            let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
        }
        #[cfg(not(unix))]
        let _ = (start, end);
    }
}

impl Store {
    /// `model.safetensors`, or the shards that `model.safetensors.index.json` lists, of a folder.
    ///
    /// # Errors
    /// If there is neither, or a file is not whole.
    pub fn open(folder: &Path) -> Result<Self> {
        let single = folder.join(FILE);
        if single.exists() {
            return Self::open_file(&single);
        }
        let index = folder.join(INDEX);
        if !index.exists() {
            return Err(Error::weights(folder, format!("neither {FILE} nor {INDEX} is in this folder")));
        }
        let mut store = Self { path: folder.to_path_buf(), files: Vec::new(), tensors: BTreeMap::new() };
        for shard in shards(&index)? {
            store.add(&folder.join(shard))?;
        }
        Ok(store)
    }

    /// One safetensors file.
    ///
    /// # Errors
    /// If it cannot be read or is not whole.
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut store = Self { path: path.to_path_buf(), files: Vec::new(), tensors: BTreeMap::new() };
        store.add(path)?;
        Ok(store)
    }

    /// A safetensors file that is part of the program; `path` is for messages.
    ///
    /// # Errors
    /// If it is not whole.
    pub fn of_bytes(bytes: &'static [u8], path: &Path) -> Result<Self> {
        let mut store = Self { path: path.to_path_buf(), files: Vec::new(), tensors: BTreeMap::new() };
        store.add_bytes(path, Bytes::Static(bytes))?;
        Ok(store)
    }

    /// Tensors that are in memory; `path` is where they came from, for messages.
    pub fn of_tensors(tensors: Tensors, path: &Path) -> Self {
        let tensors = tensors.into_iter().map(|(name, tensor)| (name, Place::Made(tensor))).collect();
        Self { path: path.to_path_buf(), files: Vec::new(), tensors }
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is only read. Should another program cut the file short meanwhile, reading beyond its end ends
        // this program, as the type's documentation says.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        self.add_bytes(path, Bytes::Mapped(map))
    }

    fn add_bytes(&mut self, path: &Path, bytes: Bytes) -> Result<()> {
        let broken = |e: &dyn std::fmt::Display| {
            Error::weights(path, format!("not a whole safetensors file: {e}; fetch or copy it again"))
        };
        // `deserialize` checks what `read_metadata` alone does not: that the offsets meet the end of the file.
        SafeTensors::deserialize(bytes.as_slice()).map_err(|e| broken(&e))?;
        let (header, metadata) = SafeTensors::read_metadata(bytes.as_slice()).map_err(|e| broken(&e))?;
        let start = size_of::<u64>() + header;
        for (name, info) in metadata.tensors() {
            let mut info = info.clone();
            info.data_offsets = (start + info.data_offsets.0, start + info.data_offsets.1);
            DType::try_from(info.dtype).map_err(|e| Error::weights(path, format!("tensor `{name}`: {e}")))?;
            self.tensors.insert(name, Place::File { file: self.files.len(), info });
        }
        self.files.push((path.to_path_buf(), bytes));
        Ok(())
    }

    /// Where the tensors came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors' names, in their order.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.tensors.keys()
    }

    /// The shape of a tensor, if there is one of this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(match self.tensors.get(name)? {
            Place::Made(tensor) => tensor.dims(),
            Place::File { info, .. } => &info.shape,
        })
    }

    /// Number of elements of all tensors.
    pub fn parameters(&self) -> usize {
        self.names().filter_map(|name| self.shape(name)).map(|shape| shape.iter().product::<usize>()).sum()
    }

    /// Reads one tensor.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let wrong = |path: &Path, e: &dyn std::fmt::Display| Error::weights(path, format!("tensor `{name}`: {e}"));
        match self.tensors.get(name) {
            None => Err(wrong(&self.path, &"is missing")),
            Some(Place::Made(tensor)) => Ok(tensor.clone()),
            Some(Place::File { file, info }) => {
                let (path, bytes) = &self.files[*file];
                let (start, end) = info.data_offsets;
                let data = &bytes.as_slice()[start..end];
                let view = TensorView::new(info.dtype, info.shape.clone(), data).map_err(|e| wrong(path, &e))?;
                let tensor = view.load(&Device::Cpu).map_err(|e| wrong(path, &e))?;
                bytes.let_go(start, end);
                Ok(tensor)
            }
        }
    }

    /// Reads all tensors.
    ///
    /// # Errors
    /// As [`Store::tensor`].
    pub fn read(&self) -> Result<Tensors> {
        self.names().map(|name| Ok((name.clone(), self.tensor(name)?))).collect()
    }

    /// A hash of a text and of every tensor's name, dtype, shape and bits.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub fn id(&self, text: &str) -> Result<String> {
        /// From how many bytes on several threads are faster; the hash is the same.
        const ALONE: usize = 128 << 10;
        let mut hasher = blake3::Hasher::new();
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            if bytes.len() < ALONE {
                hasher.update(bytes);
            } else {
                hasher.update_rayon(bytes);
            }
        };
        part(text.as_bytes());
        for (name, place) in &self.tensors {
            part(name.as_bytes());
            match place {
                Place::Made(tensor) => {
                    part(format!("{:?} {:?}", tensor.dtype(), tensor.dims()).as_bytes());
                    part(&bits(tensor));
                }
                Place::File { file, info } => {
                    let (path, bytes) = &self.files[*file];
                    let dtype = DType::try_from(info.dtype).map_err(|e| Error::weights(path, e))?;
                    part(format!("{dtype:?} {:?}", info.shape).as_bytes());
                    let (start, end) = info.data_offsets;
                    part(&bytes.as_slice()[start..end]);
                    bytes.let_go(start, end);
                }
            }
        }
        Ok(hasher.finalize().to_hex()[..32].to_string())
    }
}

fn bits(tensor: &Tensor) -> Cow<'_, [u8]> {
    use safetensors::View;
    tensor.data()
}

/// The shards that an index file lists, all of them names of files beside it.
///
/// # Errors
/// If it cannot be read, or lists something else.
pub fn shards(index: &Path) -> Result<BTreeSet<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(index).map_err(Error::io(index))?;
    let parsed: Index = serde_json::from_str(&text).map_err(|e| Error::weights(index, e))?;
    let shards: BTreeSet<String> = parsed.weight_map.into_values().collect();
    match shards.iter().find(|shard| Path::new(shard).components().count() != 1 || shard.starts_with('.')) {
        Some(shard) => Err(Error::weights(index, format!("shard `{shard}` is not a file of this folder"))),
        None => Ok(shards),
    }
}
