//! Codes as an array for numpy: format version 1.0, int32, C order, `[h, w]` or `[h, w, c]`; the record is a JSON
//! object beside it.
//!
//! The header is what numpy itself writes, and only that is read back:
//! <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>.

use super::{Codes, Record};

const MAGIC: &[u8] = b"\x93NUMPY\x01\x00";

/// The header's text starts after the magic and its own length in two bytes.
const TEXT_AT: usize = MAGIC.len() + 2;

/// What the numbers of an array are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NpyType {
    /// `uint16`
    U16,
    /// `int32`
    I32,
    /// `int64`
    I64,
}

impl NpyType {
    fn descr(self) -> &'static str {
        match self {
            Self::U16 => "<u2",
            Self::I32 => "<i4",
            Self::I64 => "<i8",
        }
    }
}

/// An array of these numbers, in C order, as `numpy.save` writes it.
///
/// # Errors
/// A value that the type does not hold.
pub fn npy_array(dtype: NpyType, shape: &[usize], values: &[i64]) -> Result<Vec<u8>, String> {
    let mut data = Vec::with_capacity(values.len() * 8);
    for &value in values {
        let fits = || format!("{value} does not fit into the array's {dtype:?}");
        match dtype {
            NpyType::U16 => data.extend(u16::try_from(value).map_err(|_| fits())?.to_le_bytes()),
            NpyType::I32 => data.extend(i32::try_from(value).map_err(|_| fits())?.to_le_bytes()),
            NpyType::I64 => data.extend(value.to_le_bytes()),
        }
    }
    Ok(with_header(dtype, shape, &data))
}

/// An array's data with the header before it.
fn with_header(dtype: NpyType, shape: &[usize], data: &[u8]) -> Vec<u8> {
    let mut sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
    if let [one] = sizes.as_mut_slice() {
        // Python's tuple of one.
        one.push(',');
    }
    let descr = dtype.descr();
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}", sizes.join(", "));
    // The data is aligned to 64 bytes, the last of the padding being a line's end.
    let length = (TEXT_AT + text.len() + 1).next_multiple_of(64) - TEXT_AT;
    text.extend(std::iter::repeat_n(' ', length - text.len() - 1));
    text.push('\n');
    [MAGIC, &(length as u16).to_le_bytes(), text.as_bytes(), data].concat()
}

/// The array and its record.
pub(super) fn to_bytes(codes: &Codes) -> (Vec<u8>, Vec<u8>) {
    let array = with_header(NpyType::I32, &codes.shape(), &codes.index_bytes());
    (array, format!("{:#}\n", serde_json::json!(codes.record())).into_bytes())
}

pub(super) fn from_bytes(array: &[u8], record: &[u8]) -> Result<Codes, String> {
    let (shape, data) = parse(array)?;
    let record: Record = serde_json::from_slice(record).map_err(|error| format!("the record beside it: {error}"))?;
    Codes::from_parts(&shape, data, &record)
}

/// Splits an array into its shape and its data, whose lengths agree.
fn parse(array: &[u8]) -> Result<(Vec<usize>, &[u8]), String> {
    let rest = array.strip_prefix(MAGIC).ok_or("not an .npy file of version 1.0")?;
    let (length, rest) = rest.split_first_chunk().ok_or("the header is cut short")?;
    let length = usize::from(u16::from_le_bytes(*length));
    let (text, data) = rest.split_at_checked(length).ok_or("the header is cut short")?;
    let text: String = String::from_utf8_lossy(text).split_whitespace().collect();
    let shape = parse_shape(&text)
        .ok_or_else(|| format!("expected: an int32 array [h, w] or [h, w, c] in C order, got: {text}"))?;
    let expected = shape.iter().try_fold(4usize, |bytes, &size| bytes.checked_mul(size));
    if expected != Some(data.len()) {
        return Err(format!("the header says {shape:?}, but {} bytes of data follow", data.len()));
    }
    Ok((shape, data))
}

/// The shape in a header whose spaces are gone.
fn parse_shape(text: &str) -> Option<Vec<usize>> {
    let shape = text.strip_prefix("{'descr':'<i4','fortran_order':False,'shape':(")?.strip_suffix("),}")?;
    let shape: Vec<usize> = shape.split(',').map(|size| size.parse().ok()).collect::<Option<_>>()?;
    matches!(shape.len(), 2 | 3).then_some(shape)
}
