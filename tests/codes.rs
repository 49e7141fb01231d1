//! Code files: what is written is read back, and a file that was cut, changed or made up is refused with its path.

use std::path::Path;

use tempfile::TempDir;
use vqrae::Error;
use vqrae::codes::{Codes, Format, single_tensor};

const FORMATS: [&str; 2] = ["safetensors", "npy"];

/// [`fnv`] of the files of [`sample`] as the format was before there were several codes a token, put together by another
/// program from the format's description.
const SAFETENSORS_HASH: u64 = 0x1e81_0d62_7675_926d;
const RECORD_HASH: u64 = 0xff2b_7254_501c_7d7f;

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn sample() -> Codes {
    Codes {
        indices: vec![3, 1, 4, 1, 5, 9],
        h: 2,
        w: 3,
        c: 1,
        model_id: "0f3a".to_string(),
        codebook_size: 16,
        source: "cats/\"tom\" é.jpg".to_string(),
        preprocessing: "squash-bicubic-32x48".to_string(),
        dtype: "f32".to_string(),
    }
}

/// splitmix64: the tests' own random numbers, the same on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }

    fn codes(&mut self) -> Codes {
        let (h, w, codebook_size) = (1 + self.below(20), 1 + self.below(20), 1 + self.below(70_000));
        let c = 1 + self.below(4);
        Codes {
            indices: (0..h * w * c).map(|_| self.below(codebook_size) as u32).collect(),
            h,
            w,
            c,
            codebook_size,
            source: (0..self.below(12)).map(|_| char::from(self.below(128) as u8)).collect(),
            ..sample()
        }
    }
}

/// Why reading this file fails, after checking that the message names it.
#[track_caller]
fn reason(path: &Path) -> String {
    let message = Codes::read(path).expect_err("the file should be refused").to_string();
    assert!(message.starts_with(&path.display().to_string()), "{message} does not name {}", path.display());
    message
}

#[track_caller]
fn assert_refused(path: &Path, because: &str) {
    let message = reason(path);
    assert!(message.contains(because), "expected {because:?} in: {message}");
}

#[test]
fn any_codes_come_back_as_they_were_written() {
    let folder = folder();
    let mut random = Random(1);
    for round in 0..200 {
        let codes = random.codes();
        for extension in FORMATS {
            let path = folder.path().join(format!("{round}/a.jpg.{extension}"));
            codes.write(&path).expect("writing");
            assert_eq!(Codes::read(&path).expect("reading"), codes);
        }
    }
}

#[test]
fn the_same_codes_give_the_same_bytes() {
    let folder = folder();
    for file in ["a.safetensors", "a.npy", "a.json"] {
        let bytes = |round: u32| {
            let path = folder.path().join(round.to_string()).join(file);
            sample().write(path.with_extension(Format::of(&path).unwrap_or(Format::Npy).extension())).expect("writing");
            std::fs::read(path).expect("reading")
        };
        assert_eq!(bytes(1), bytes(2), "{file}");
    }
}

#[test]
fn no_other_file_is_left_behind() {
    let folder = folder();
    for extension in FORMATS {
        sample().write(folder.path().join("a").with_extension(extension)).expect("writing");
    }
    let mut names: Vec<_> =
        folder.path().read_dir().expect("listing").map(|entry| entry.expect("an entry").file_name()).collect();
    names.sort();
    assert_eq!(names, ["a.json", "a.npy", "a.safetensors"]);
}

#[test]
fn numpy_would_read_the_array() {
    // >>> np.save(f, np.array([[3, 1, 4], [1, 5, 9]], dtype="<i4")); f.getvalue()[:128]
    let folder = folder();
    let path = folder.path().join("a.npy");
    sample().write(&path).expect("writing");
    let bytes = std::fs::read(path).expect("reading");
    let mut expected = b"\x93NUMPY\x01\x00v\x00{'descr': '<i4', 'fortran_order': False, 'shape': (2, 3), }".to_vec();
    expected.resize(127, b' ');
    expected.push(b'\n');
    assert_eq!(bytes[..128], expected);
    assert_eq!(bytes[128..], [3u32, 1, 4, 1, 5, 9].map(u32::to_le_bytes).concat());
}

#[test]
fn the_safetensors_crate_reads_tensor_and_record() {
    let folder = folder();
    let path = folder.path().join("a.safetensors");
    sample().write(&path).expect("writing");
    let bytes = std::fs::read(path).expect("reading");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    assert_eq!(file.tensor("codes").expect("the tensor").shape(), [2, 3]);
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("a header");
    assert_eq!(header.metadata().as_ref().expect("metadata")["model_id"], "0f3a");
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let folder = folder();
    for file in ["a.safetensors", "a.npy", "a.json"] {
        let path = folder.path().join(file);
        let code_file = path.with_extension(Format::of(&path).unwrap_or(Format::Npy).extension());
        sample().write(&code_file).expect("writing");
        let whole = std::fs::read(&path).expect("reading");
        // The record's last byte is a line's end, which JSON does not need.
        for length in 0..whole.len() - usize::from(file == "a.json") {
            std::fs::write(&path, &whole[..length]).expect("cutting");
            reason(&code_file);
        }
    }
}

#[test]
fn a_changed_byte_is_refused_or_changes_nothing() {
    let folder = folder();
    let mut random = Random(2);
    for file in ["a.safetensors", "a.npy", "a.json"] {
        let path = folder.path().join(file);
        let code_file = path.with_extension(Format::of(&path).unwrap_or(Format::Npy).extension());
        sample().write(&code_file).expect("writing");
        let whole = std::fs::read(&path).expect("reading");
        for _ in 0..2000 {
            let mut bytes = whole.clone();
            for _ in 0..=random.below(3) {
                let at = random.below(bytes.len());
                bytes[at] = random.below(256) as u8;
            }
            std::fs::write(&path, &bytes).expect("changing");
            if let Ok(codes) = Codes::read(&code_file) {
                assert_eq!(codes, sample(), "{file} read as something else");
            }
        }
    }
}

#[test]
fn lying_headers_are_refused() {
    let folder = folder();
    let safetensors = folder.path().join("a.safetensors");
    let record = Default::default();
    let data = [0u8; 24];
    for (name, dtype, shape, because) in [
        ("codes", "I32", vec![2, 300], "not a whole safetensors file"),
        ("codes", "I32", vec![usize::MAX, usize::MAX], "not a whole safetensors file"),
        ("codes", "I32", vec![6], "expected: I32 [h, w] or [h, w, c], got: I32 [6]"),
        ("codes", "F32", vec![2, 3], "expected: I32 [h, w] or [h, w, c], got: F32 [2, 3]"),
        ("codes", "I32", vec![1, 1, 2, 3], "expected: I32 [h, w] or [h, w, c], got: I32 [1, 1, 2, 3]"),
        ("tokens", "I32", vec![2, 3], "expected: one tensor \"codes\", got: \"tokens\""),
        ("codes", "I32", vec![2, 3], "format is missing from the record"),
    ] {
        std::fs::write(&safetensors, single_tensor(name, dtype, &shape, &data, &record)).expect("writing");
        assert_refused(&safetensors, because);
    }
    std::fs::write(&safetensors, u64::MAX.to_le_bytes()).expect("writing");
    assert_refused(&safetensors, "not a whole safetensors file");

    let npy = folder.path().join("b.npy");
    sample().write(&npy).expect("writing");
    let whole = std::fs::read(&npy).expect("reading");
    for (from, to, because) in [
        ("(2, 3)", "(9, 9)", "the header says [9, 9], but 24 bytes of data follow"),
        ("(2, 3), }", "(99999999999999999999, 9), }", "expected: an int32 array"),
        ("(2, 3), }", "(1, 1, 2, 3), }", "expected: an int32 array"),
        ("(2, 3), }   ", "(1, 2, 3), }", "the record says 1 codes a token"),
        ("'<i4'", "'<f4'", "expected: an int32 array"),
        ("False", "True", "expected: an int32 array"),
    ] {
        let at = whole.windows(from.len()).position(|window| window == from.as_bytes()).expect("the text");
        let lying = [&whole[..at], to.as_bytes(), &whole[at + to.len()..]].concat();
        std::fs::write(&npy, lying).expect("writing");
        assert_refused(&npy, because);
    }
}

#[test]
fn an_array_with_the_record_of_other_codes_is_refused() {
    let folder = folder();
    let (a, b) = (folder.path().join("a.npy"), folder.path().join("b.npy"));
    sample().write(&a).expect("writing");
    Codes { model_id: "77".to_string(), indices: vec![0; 6], ..sample() }.write(&b).expect("writing");
    std::fs::rename(b.with_extension("json"), a.with_extension("json")).expect("renaming");
    assert_refused(&a, "the checksum does not match");
    assert!(Codes::read(&b).expect_err("no record").to_string().contains("b.json"));
}

#[test]
fn codes_that_make_no_sense_are_not_written() {
    let folder = folder();
    let path = folder.path().join("a.safetensors");
    for (codes, because) in [
        (Codes { h: 3, ..sample() }, "the grid is 3x3, but there are 6 indices"),
        (Codes { h: 0, indices: vec![], ..sample() }, "an empty grid, 0x3"),
        (Codes { h: usize::MAX, ..sample() }, "is more than"),
        (Codes { codebook_size: 9, ..sample() }, "index 9 at position 5, but the codebook has 9 rows"),
        (Codes { codebook_size: 1 << 40, ..sample() }, "does not fit into i32 indices"),
        (Codes { c: 2, ..sample() }, "the grid is 2x3x2, but there are 6 indices"),
        (Codes { c: 0, indices: vec![], ..sample() }, "an empty grid, 2x3x0"),
    ] {
        let message = codes.write(&path).expect_err("should be refused").to_string();
        assert!(message.contains(because), "expected {because:?} in: {message}");
        assert!(!path.exists());
    }
    assert!(sample().write(folder.path().join("a.txt")).is_err());
}

#[test]
fn folders_missing_files_and_other_extensions_are_refused() {
    let folder = folder();
    std::fs::create_dir(folder.path().join("a.safetensors")).expect("a folder");
    assert_refused(&folder.path().join("a.safetensors"), "not a regular file");
    assert_refused(&folder.path().join("missing.npy"), "No such file");
    assert_refused(&folder.path().join("a.jpg"), "a code file ends in .safetensors or .npy");
}

#[test]
fn several_codes_a_token_stand_side_by_side_in_the_last_dimension() {
    let folder = folder();
    let codes = Codes { h: 1, w: 2, c: 3, ..sample() };
    for extension in FORMATS {
        codes.write(folder.path().join("a").with_extension(extension)).expect("writing");
    }
    let npy = std::fs::read(folder.path().join("a.npy")).expect("reading");
    assert!(String::from_utf8_lossy(&npy[..128]).contains("'shape': (1, 2, 3), "));
    let file = std::fs::read(folder.path().join("a.safetensors")).expect("reading");
    let file = safetensors::SafeTensors::deserialize(&file).expect("a safetensors file");
    assert_eq!(file.tensor("codes").expect("the tensor").shape(), [1, 2, 3]);
    let record = std::fs::read_to_string(folder.path().join("a.json")).expect("reading");
    assert!(record.contains(r#""codebooks": "3""#), "{record}");
}

#[test]
fn files_of_one_code_a_token_are_byte_for_byte_what_earlier_versions_wrote() {
    let folder = folder();
    for (file, before) in [("a.safetensors", SAFETENSORS_HASH), ("a.json", RECORD_HASH)] {
        let path = folder.path().join(file);
        sample().write(path.with_extension(Format::of(&path).unwrap_or(Format::Npy).extension())).expect("writing");
        let bytes = std::fs::read(&path).expect("reading");
        assert_eq!(fnv(&bytes), before, "{file}");
    }
}

/// FNV-1a, 64 bits.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[test]
fn codes_of_another_shape_than_the_models_are_refused_with_the_next_step() {
    assert!(sample().check_shape("a.npy", 1, 16).is_ok());
    for (codebooks, size) in [(4, 16), (1, 32)] {
        let message = sample().check_shape("a.npy", codebooks, size).expect_err("another shape").to_string();
        assert!(message.starts_with("a.npy") && message.contains("tokenize the image again"), "{message}");
    }
}

#[test]
fn codes_of_another_model_are_refused_with_both_ids() {
    assert!(sample().check_model("a.npy", "0f3a").is_ok());
    let error = sample().check_model("a.npy", "beef").expect_err("another model");
    assert!(matches!(error, Error::OtherModel { .. }));
    for part in ["a.npy", "0f3a", "beef"] {
        assert!(error.to_string().contains(part), "{error}");
    }
}
