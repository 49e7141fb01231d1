//! The words for a device and for a number format, as the command line has them.

use vqrae::{DType, Device};

use crate::error::{Failure, refuse};

/// `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// For another word, and for a card that cannot be used; `auto` is the CPU then.
pub(crate) fn open(word: &str) -> Result<Device, Failure> {
    let card = match word {
        "cpu" => return Ok(Device::Cpu),
        "auto" => return Ok(open_card(0).unwrap_or(Device::Cpu)),
        "cuda" => Some(0),
        _ => word.strip_prefix("cuda:").and_then(|number| number.parse().ok()),
    };
    match card {
        Some(card) => open_card(card),
        None => refuse(format!("device is {word:?}, expected: \"auto\", \"cpu\", \"cuda\" or \"cuda:N\"")),
    }
}

/// `auto`, `f32`, `bf16` or `f16`, or as PyTorch calls them.
pub(crate) fn dtype(word: &str, device: &Device) -> Result<DType, Failure> {
    Ok(match word {
        "auto" => vqrae::auto_dtype(device)?,
        "f32" | "float32" => DType::F32,
        "bf16" | "bfloat16" => DType::BF16,
        "f16" | "float16" => DType::F16,
        _ => return refuse(format!("dtype is {word:?}, expected: \"auto\", \"f32\", \"bf16\" or \"f16\"")),
    })
}

/// With a stream of its own: candle's default one is each thread's, and a tokenizer is used by several threads.
#[cfg(feature = "cuda")]
fn open_card(card: usize) -> Result<Device, Failure> {
    if let Some(missing) = vqrae_kernels::cuda::missing() {
        return refuse(format!("cuda:{card} cannot be used: {missing}; or pass device=\"cpu\""));
    }
    let open = || {
        let device = Device::new_cuda_with_stream(card)?;
        // A card that is too old for the kernels is refused here rather than at the first of them.
        vqrae_kernels::cuda::Gpu::on(&device.as_cuda_device()?.cuda_stream())?;
        Ok::<_, vqrae::Error>(device)
    };
    open().map_err(|error| {
        let text = error.to_string();
        let cause = text.lines().next().unwrap_or_default();
        Failure::Refused(format!("cuda:{card} cannot be used: {cause}; or pass device=\"cpu\""))
    })
}

#[cfg(not(feature = "cuda"))]
fn open_card(card: usize) -> Result<Device, Failure> {
    refuse(format!(
        "cuda:{card} cannot be used: this wheel was built without CUDA; build it with `maturin build --release --features \
         cuda`, or pass device=\"cpu\""
    ))
}

/// What a device is called.
pub(crate) fn name(device: &Device) -> String {
    use candle_core::DeviceLocation;
    match device.location() {
        DeviceLocation::Cpu => "cpu".to_string(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}
