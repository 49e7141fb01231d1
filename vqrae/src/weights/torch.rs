//! Tensors of PyTorch's own files (.pt, .pth, .bin, .ckpt): a ZIP archive of a pickle and of the storages that its tensors
//! look into. Nothing in the pickle is run.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Cursor;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use zip::{CompressionMethod, ZipArchive};

use super::pickle::{Id, Pickle};
use crate::error::{Error, Result};

/// Under which keys training code keeps its weights, the best first.
const KEYS: [&str; 8] =
    ["ema", "model_ema", "ema_model", "model", "state_dict", "model_state_dict", "module", "weights"];

/// An expanded tensor may be larger than its storage, but not without bound.
const MOST_EXPANDED: usize = 1 << 24;

/// The tensors of a file, read when they are asked for.
#[derive(Debug)]
pub struct TorchFile {
    path: PathBuf,
    map: Mmap,
    key: Option<String>,
    tensors: BTreeMap<String, Place>,
}

/// Where a tensor lies.
#[derive(Debug)]
struct Place {
    /// `FloatStorage`, or `float8_e4m3fn` and the like.
    kind: String,
    /// Bytes of the file.
    storage: Range<usize>,
    /// In elements.
    offset: usize,
    shape: Vec<usize>,
    stride: Vec<usize>,
}

/// The names of an archive's files, and where their bytes are.
type Files = BTreeMap<String, Range<usize>>;

impl TorchFile {
    /// The tensors of the dict under `key` (of dicts in dicts: `OUTER/INNER`). Without a key those of the file itself or,
    /// where it is a training checkpoint, of the best of `ema`, `model`, `state_dict` and the like.
    ///
    /// # Errors
    /// If the file is not a whole one of `torch.save`, holds no such tensors, or one of them lies about itself.
    pub fn open(path: &Path, key: Option<&str>) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is only read. Should another program cut the file short meanwhile, reading beyond its end ends
        // this program, as with `Store`.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let (key, tensors) = Self::index(&map, key).map_err(|reason| Error::weights(path, reason))?;
        Ok(Self { path: path.to_path_buf(), map, key, tensors })
    }

    fn index(
        bytes: &[u8],
        key: Option<&str>,
    ) -> std::result::Result<(Option<String>, BTreeMap<String, Place>), String> {
        let (files, prefix) = archive(bytes)?;
        let pickle = Pickle::read(&bytes[files[&format!("{prefix}data.pkl")].clone()])?;
        let order = files.get(&format!("{prefix}byteorder"));
        if order.is_some_and(|order| &bytes[order.clone()] != b"little") {
            return Err("its numbers are big-endian; save it on a little-endian machine".into());
        }
        let contents = Contents { pickle: &pickle, files: &files, prefix: &prefix };
        let (key, dict) = contents.dict(key)?;
        let mut tensors = BTreeMap::new();
        for (name, id) in contents.named(dict) {
            if let Some(place) = contents.tensor(id).map_err(|reason| format!("tensor `{name}`: {reason}"))? {
                tensors.insert(name.to_string(), place);
            }
        }
        Ok((key, tensors))
    }

    /// The key of the dict that the tensors are from; none where the file itself is that dict.
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// The tensors' names, in their order.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.tensors.keys()
    }

    /// The shape of a tensor, if there is one of this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|place| place.shape.as_slice())
    }

    /// Reads one tensor.
    ///
    /// # Errors
    /// If there is none of this name, or candle has not its number format.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let wrong = |reason: String| Error::weights(&self.path, format!("tensor `{name}`: {reason}"));
        let place = self.tensors.get(name).ok_or_else(|| wrong("is missing".into()))?;
        let dtype = dtype(&place.kind)
            .ok_or_else(|| wrong(format!("its number format `{}` cannot be read; save it as float32", place.kind)))?;
        let bytes = place.gather(&self.map[place.storage.clone()], dtype.size_in_bytes()).map_err(wrong)?;
        Ok(Tensor::from_raw_buffer(&bytes, dtype, &place.shape, &Device::Cpu)?)
    }
}

/// The number format of a storage's class, or of torch's own name.
fn dtype(kind: &str) -> Option<DType> {
    Some(match kind {
        "FloatStorage" | "float32" => DType::F32,
        "DoubleStorage" | "float64" => DType::F64,
        "HalfStorage" | "float16" => DType::F16,
        "BFloat16Storage" | "bfloat16" => DType::BF16,
        "ByteStorage" | "BoolStorage" | "uint8" | "bool" => DType::U8,
        "ShortStorage" | "int16" => DType::I16,
        "IntStorage" | "int32" => DType::I32,
        "LongStorage" | "int64" => DType::I64,
        _ => return None,
    })
}

/// The files of an archive, and what stands before `data.pkl` in their names.
fn archive(bytes: &[u8]) -> std::result::Result<(Files, String), String> {
    if !bytes.starts_with(b"PK") {
        let old = bytes.starts_with(&[0x80, 2, 0x8a, 10]) || bytes.starts_with(&[0x80, 2, b'}']);
        let what = if old {
            "it is in the format that torch.save had before version 1.6"
        } else {
            "it is no file of torch.save"
        };
        return Err(format!("{what}; load it in PyTorch, and save it with torch.save(…, FILE)"));
    }
    let broken =
        |error: zip::result::ZipError| format!("not a whole file of torch.save: {error}; fetch or copy it again");
    let mut zip = ZipArchive::new(Cursor::new(bytes)).map_err(broken)?;
    let mut files = Files::new();
    for i in 0..zip.len() {
        let file = zip.by_index_raw(i).map_err(broken)?;
        let name = file.name().map_err(broken)?.into_owned();
        if file.compression() != CompressionMethod::Stored || file.encrypted() {
            return Err(format!("`{name}` is compressed or encrypted in it, which torch.save does not do"));
        }
        let end = |start: u64| start.checked_add(file.size()).filter(|end| *end <= bytes.len() as u64);
        let range = file.data_start().and_then(|start| Some(start as usize..end(start)? as usize));
        let range = range.ok_or_else(|| format!("`{name}` in it ends beyond the file; fetch or copy it again"))?;
        files.insert(name, range);
    }
    let pickle = files.keys().find_map(|name| name.strip_suffix("data.pkl"));
    match pickle.filter(|prefix| prefix.is_empty() || prefix.ends_with('/')) {
        Some(prefix) => Ok((files.clone(), prefix.to_string())),
        None => Err("there is no data.pkl in it; save it with torch.save(…, FILE)".into()),
    }
}

/// What a pickle says of tensors.
struct Contents<'a> {
    pickle: &'a Pickle,
    files: &'a Files,
    prefix: &'a str,
}

impl<'a> Contents<'a> {
    /// The entries of a dict whose keys are texts.
    fn named(&self, dict: Id) -> impl Iterator<Item = (&'a str, Id)> {
        let pickle = self.pickle;
        let entries = pickle.entries(dict).unwrap_or_default().iter();
        entries.filter_map(move |(key, value)| Some((pickle.text(*key)?, *value)))
    }

    fn is_tensor(&self, id: Id) -> bool {
        !matches!(self.tensor(id), Ok(None))
    }

    fn has_tensors(&self, dict: Id) -> bool {
        self.named(dict).any(|(_, id)| self.is_tensor(id))
    }

    /// The dict that a key names, or the one that is most likely meant.
    fn dict(&self, key: Option<&str>) -> std::result::Result<(Option<String>, Id), String> {
        let root = self.pickle.root();
        let find = |dict: Id, key: &str| self.named(dict).find_map(|(name, id)| (name == key).then_some(id));
        let found = match key {
            Some(key) => {
                let step = |dict: Option<Id>, part: &str| find(dict?, part);
                let id = find(root, key).or_else(|| key.split('/').fold(Some(root), step));
                id.filter(|id| self.has_tensors(*id)).map(|id| (Some(key.to_string()), id))
            }
            None => {
                let known = KEYS.iter().find_map(|key| Some((Some((*key).to_string()), find(root, key)?)));
                known.filter(|(_, id)| self.has_tensors(*id)).or(self.has_tensors(root).then_some((None, root)))
            }
        };
        found.ok_or_else(|| {
            let dicts = self.named(root).filter(|(_, id)| self.has_tensors(*id)).map(|(name, _)| format!("`{name}`"));
            let dicts: Vec<String> = dicts.take(20).collect();
            let what = key.map_or("no dict of tensors".to_string(), |key| format!("no dict of tensors `{key}`"));
            match dicts.as_slice() {
                [] => format!("{what} in it; save a state_dict: torch.save(model.state_dict(), FILE)"),
                dicts => format!("{what} in it; choose one with --key: {}", dicts.join(", ")),
            }
        })
    }

    /// Where a tensor lies; none if the value is something else.
    fn tensor(&self, id: Id) -> std::result::Result<Option<Place>, String> {
        let mut id = id;
        // Parameters and subclasses hold a tensor, which holds no further one.
        for _ in 0..4 {
            let Some((name, arguments)) = self.pickle.call(id) else { return Ok(None) };
            match name {
                ("torch._utils", "_rebuild_tensor_v2") => return self.place(arguments, None).map(Some),
                ("torch._utils", "_rebuild_tensor_v3") => {
                    let kind = arguments.get(6).and_then(|id| self.pickle.name(*id)).map(|(_, name)| name);
                    return self.place(arguments, Some(kind.ok_or("it has no number format")?)).map(Some);
                }
                ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => {
                    id = *arguments.first().ok_or("a parameter has no tensor")?;
                }
                ("torch._tensor", "_rebuild_from_type_v2") => match arguments {
                    [callable, _, arguments, ..] => {
                        let known = self.pickle.name(*callable) == Some(("torch._utils", "_rebuild_tensor_v2"));
                        let arguments = self.pickle.tuple(*arguments).filter(|_| known);
                        return self.place(arguments.ok_or("it is of an unknown class")?, None).map(Some);
                    }
                    _ => return Err("it is of an unknown class".into()),
                },
                _ => return Ok(None),
            }
        }
        Err("it is a parameter of parameters".into())
    }

    /// The place that (storage, offset, shape, stride, …) name.
    fn place(&self, arguments: &[Id], kind: Option<&str>) -> std::result::Result<Place, String> {
        let pickle = self.pickle;
        let [storage, offset, shape, stride, ..] = *arguments else { return Err("it has no storage and shape".into()) };
        let super::pickle::Value::Stored(key) = *pickle.get(storage) else { return Err("it has no storage".into()) };
        let Some([_, class, key, ..]) = pickle.tuple(key) else { return Err("its storage has no key".into()) };
        let (Some((_, class)), Some(key)) = (pickle.name(*class), pickle.text(*key)) else {
            return Err("its storage has no class and key".into());
        };
        let sizes = |id: Id| -> Option<Vec<usize>> {
            pickle.tuple(id)?.iter().map(|id| usize::try_from(pickle.int(*id)?).ok()).collect()
        };
        let wrong = "its offset, shape and stride are not numbers from zero up";
        let offset = pickle.int(offset).and_then(|offset| usize::try_from(offset).ok()).ok_or(wrong)?;
        let (shape, stride) = (sizes(shape).ok_or(wrong)?, sizes(stride).ok_or(wrong)?);
        let file = format!("{}data/{key}", self.prefix);
        let storage = self.files.get(&file).ok_or_else(|| format!("its storage `{file}` is missing"))?.clone();
        Ok(Place { kind: kind.unwrap_or(class).to_string(), storage, offset, shape, stride })
    }
}

impl Place {
    /// The elements' bytes in order, of a storage with elements of `size` bytes.
    fn gather(&self, storage: &[u8], size: usize) -> std::result::Result<Vec<u8>, String> {
        let Self { offset, shape, stride, .. } = self;
        let lies = || format!("shape {shape:?} with stride {stride:?} from {offset} is beyond its storage");
        if shape.len() != stride.len() {
            return Err(lies());
        }
        let count = shape.iter().try_fold(1usize, |count, n| count.checked_mul(*n)).ok_or_else(lies)?;
        if count == 0 {
            return Ok(Vec::new());
        }
        let held = storage.len() / size;
        let steps = shape.iter().zip(stride).map(|(n, stride)| (n - 1).checked_mul(*stride));
        let last = steps.into_iter().try_fold(*offset, |last, step| last.checked_add(step?)).ok_or_else(lies)?;
        if last >= held || count > held.max(MOST_EXPANDED) {
            return Err(lies());
        }
        let rows = || shape.iter().rev().scan(1usize, |step, n| Some(std::mem::replace(step, *step * n)));
        if rows().zip(stride.iter().rev()).zip(shape.iter().rev()).all(|((row, stride), n)| row == *stride || *n == 1) {
            return Ok(storage[offset * size..(offset + count) * size].to_vec());
        }
        let mut bytes = Vec::with_capacity(count * size);
        let (mut index, mut at) = (vec![0usize; shape.len()], *offset);
        for _ in 0..count {
            bytes.extend_from_slice(&storage[at * size..][..size]);
            for axis in (0..shape.len()).rev() {
                index[axis] += 1;
                // A step past the end is taken back at once, whatever the stride.
                at = at.wrapping_add(stride[axis]);
                if index[axis] < shape[axis] {
                    break;
                }
                at = at.wrapping_sub(stride[axis].wrapping_mul(shape[axis]));
                index[axis] = 0;
            }
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    /// A file of torch.save with this pickle, and a storage `0` of the bytes 0 to 23.
    fn file(pickle: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let storage: Vec<u8> = (0..24).collect();
        for (name, bytes) in [("a/data.pkl", pickle), ("a/byteorder", b"little"), ("a/data/0", &storage)] {
            zip.start_file(name, SimpleFileOptions::default().compression_method(CompressionMethod::Stored)).unwrap();
            zip.write_all(bytes).unwrap();
        }
        file.write_all(&zip.finish().unwrap().into_inner()).unwrap();
        file
    }

    fn text(text: &str) -> Vec<u8> {
        [b"X", (text.len() as u32).to_le_bytes().as_slice(), text.as_bytes()].concat()
    }

    fn ints(values: &[i64]) -> Vec<u8> {
        let one = |value: &i64| [&[0x8a, 8], value.to_le_bytes().as_slice()].concat();
        [b"(".to_vec(), values.iter().flat_map(one).collect(), b"t".to_vec()].concat()
    }

    /// `{"x": tensor}`, the tensor of a storage's class, a storage's key, an offset, a shape and a stride.
    fn tensor(class: &str, key: &str, offset: i64, shape: &[i64], stride: &[i64]) -> Vec<u8> {
        let class = format!("ctorch\n{class}\n");
        let storage =
            [b"(", text("storage").as_slice(), class.as_bytes(), &text(key), &text("cpu"), b"K\x01tQ"].concat();
        let offset = [&[0x8a, 8], offset.to_le_bytes().as_slice()].concat();
        let hooks = b"\x89ccollections\nOrderedDict\n)R";
        let arguments = [b"(", storage.as_slice(), &offset, &ints(shape), &ints(stride), hooks, b"t"].concat();
        let made = [b"ctorch._utils\n_rebuild_tensor_v2\n".as_slice(), &arguments, b"R"].concat();
        [b"\x80\x02}".as_slice(), &text("x"), &made, b"s."].concat()
    }

    fn read(pickle: &[u8]) -> std::result::Result<Tensor, String> {
        let file = file(pickle);
        let opened = TorchFile::open(file.path(), None).map_err(|error| error.to_string())?;
        opened.tensor("x").map_err(|error| error.to_string())
    }

    #[test]
    fn views_into_a_storage() {
        for (offset, shape, stride, expected) in [
            (0, &[2, 3][..], &[3, 1][..], &[0u8, 1, 2, 3, 4, 5][..]),
            (1, &[2, 2], &[4, 2], &[1, 3, 5, 7]),
            (0, &[3, 2], &[1, 3], &[0, 3, 1, 4, 2, 5]),
            (5, &[2, 2], &[0, 1], &[5, 6, 5, 6]),
            (23, &[], &[], &[23]),
            (23, &[1], &[i64::MAX], &[23]),
            (99, &[0, 4], &[4, 1], &[]),
        ] {
            let made = read(&tensor("ByteStorage", "0", offset, shape, stride)).unwrap();
            assert_eq!(made.flatten_all().unwrap().to_vec1::<u8>().unwrap(), expected, "{shape:?} {stride:?}");
        }
        let half = read(&tensor("BFloat16Storage", "0", 1, &[1], &[1])).unwrap().to_dtype(DType::F32).unwrap();
        assert_eq!(half.to_vec1::<f32>().unwrap(), [f32::from_bits(0x0302_0000)]);
    }

    #[test]
    fn a_tensor_that_lies_is_named() {
        for (class, key, offset, shape, stride, reason) in [
            ("FloatStorage", "0", 0, &[7][..], &[1][..], "is beyond its storage"),
            ("ByteStorage", "0", -1, &[2], &[1], "not numbers from zero up"),
            ("ByteStorage", "0", 0, &[-2], &[1], "not numbers from zero up"),
            ("ByteStorage", "0", 0, &[2], &[-1], "not numbers from zero up"),
            ("ByteStorage", "0", 0, &[2], &[1, 1], "is beyond its storage"),
            ("ByteStorage", "0", 23, &[2], &[1], "is beyond its storage"),
            ("ByteStorage", "0", i64::MAX, &[2], &[i64::MAX], "is beyond its storage"),
            ("ByteStorage", "0", 0, &[i64::MAX, i64::MAX], &[0, 0], "is beyond its storage"),
            // One byte, a terabyte when written out.
            ("ByteStorage", "0", 0, &[1 << 20, 1 << 20], &[0, 0], "is beyond its storage"),
            ("ByteStorage", "1", 0, &[1], &[1], "its storage `a/data/1` is missing"),
            ("ByteStorage", "../data.pkl", 0, &[1], &[1], "is missing"),
            ("ComplexFloatStorage", "0", 0, &[1], &[1], "its number format `ComplexFloatStorage` cannot be read"),
        ] {
            let error = read(&tensor(class, key, offset, shape, stride)).unwrap_err();
            assert!(error.contains("tensor `x`: ") && error.contains(reason), "{error}");
        }
    }

    #[test]
    fn code_in_a_pickle_is_data() {
        let folder = tempfile::tempdir().unwrap();
        let trace = folder.path().join("ran");
        let call = [b"cos\nsystem\n".as_slice(), &text(&format!("touch {}", trace.display())), b"\x85R"].concat();
        let good = tensor("ByteStorage", "0", 0, &[2], &[1]);
        // Beside a tensor it is left alone, in a tensor's place it is none, and as the whole there is nothing to read.
        let beside = [b"\x80\x02}".as_slice(), &text("evil"), &call, b"s", &good[3..]].concat();
        assert_eq!(read(&beside).unwrap().to_vec1::<u8>().unwrap(), [0, 1]);
        let inside = [b"\x80\x02}".as_slice(), &text("x"), &call, b"s."].concat();
        let whole = [b"\x80\x02".as_slice(), &call, b"."].concat();
        for pickle in [inside, whole] {
            assert!(read(&pickle).unwrap_err().contains("no dict of tensors in it; save a state_dict"));
        }
        assert!(!trace.exists());
    }

    #[test]
    fn a_dict_in_itself_ends() {
        let pickle = [b"\x80\x02}q\x00".as_slice(), &text("model"), b"h\x00s."].concat();
        assert!(read(&pickle).unwrap_err().contains("no dict of tensors"));
    }

    #[test]
    fn other_files_are_named_with_the_next_step() {
        let good = std::fs::read(file(&tensor("ByteStorage", "0", 0, &[2], &[1])).path()).unwrap();
        let mut deflated = good.clone();
        // The method, in the local and in the central header of the first file.
        let central = good.windows(4).position(|bytes| bytes == b"PK\x01\x02").unwrap();
        (deflated[8], deflated[central + 10]) = (8, 8);
        for (bytes, reason) in [
            (
                b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.".to_vec(),
                "before version 1.6; load it in PyTorch, and save it",
            ),
            (b"GIF89a".to_vec(), "it is no file of torch.save"),
            (Vec::new(), "it is no file of torch.save"),
            (good[..good.len() / 2].to_vec(), "not a whole file of torch.save"),
            (b"PK\x05\x06".iter().copied().chain([0; 18]).collect(), "there is no data.pkl in it"),
            (deflated, "is compressed or encrypted in it"),
        ] {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&bytes).unwrap();
            let error = TorchFile::open(file.path(), None).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
