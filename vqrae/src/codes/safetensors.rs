//! Codes as a safetensors file: one tensor `codes`, i32 `[h, w]` or `[h, w, c]`, the record as the header's metadata.

use safetensors::{Dtype, SafeTensors};

use super::{Codes, Record};

const TENSOR: &str = "codes";

pub(super) fn to_bytes(codes: &Codes) -> Vec<u8> {
    single_tensor(TENSOR, "I32", &codes.shape(), &codes.index_bytes(), &codes.record())
}

pub(super) fn from_bytes(bytes: &[u8]) -> Result<Codes, String> {
    let broken = |error: safetensors::SafeTensorError| format!("not a whole safetensors file ({error})");
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(broken)?;
    let file = SafeTensors::deserialize(bytes).map_err(broken)?;
    let tensor = match file.tensors().as_slice() {
        [(name, tensor)] if name == TENSOR => tensor.clone(),
        others => return Err(format!("expected: one tensor \"{TENSOR}\", got: {}", names(others))),
    };
    let shape = match (tensor.dtype(), tensor.shape()) {
        (Dtype::I32, shape @ ([_, _] | [_, _, _])) => shape,
        (dtype, shape) => {
            return Err(format!("tensor {TENSOR}, expected: I32 [h, w] or [h, w, c], got: {dtype} {shape:?}"));
        }
    };
    let record: Record = header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
    Codes::from_parts(shape, tensor.data(), &record)
}

fn names(tensors: &[(String, safetensors::tensor::TensorView<'_>)]) -> String {
    match tensors {
        [] => "no tensor".to_string(),
        [(name, _)] => format!("{name:?}"),
        many => format!("{} tensors", many.len()),
    }
}

/// The bytes of a safetensors file of one tensor. `dtype` is the format's own name for the type of `data`, `I32` or
/// `F32`, and `data` is little-endian.
///
/// The safetensors crate keeps metadata in a hash map, so its bytes change from run to run; these do not.
pub fn single_tensor(name: &str, dtype: &str, shape: &[usize], data: &[u8], metadata: &Record) -> Vec<u8> {
    let tensor = serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [0, data.len()] });
    let mut header = serde_json::json!({ "__metadata__": metadata, name: tensor }).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    [&(header.len() as u64).to_le_bytes(), header.as_slice(), data].concat()
}
