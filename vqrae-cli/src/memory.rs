//! What to do when a device's memory does not hold a batch: find out which one it holds, and say so.
//!
//! The run ends all the same. On a GPU other batches may give other bits, so a run that quietly went on in smaller ones
//! would write codes that depend on what else used the card.

use anyhow::{Result, anyhow};
use vqrae::{Device, Tensor};

use crate::device;

/// What `compute` makes of a batch, `[B, …]` on the host.
///
/// # Errors
/// Its own; if it ran out of a device's memory, the error says how many images the memory holds.
pub(crate) fn within<R>(device: &Device, batch: &Tensor, mut compute: impl FnMut(&Tensor) -> Result<R>) -> Result<R> {
    let error = match compute(batch) {
        Err(error) if is_full(&error) => error,
        result => return result,
    };
    let size = batch.dim(0)?;
    let mut fits = size / 2;
    while fits > 0 {
        match compute(&batch.narrow(0, 0, fits)?) {
            Ok(_) => break,
            Err(error) if is_full(&error) => fits /= 2,
            Err(other) => return Err(other),
        }
    }
    Err(anyhow!("{} ({})", refusal(&place(device), size, fits), cause(&error)))
}

fn refusal(place: &str, size: usize, fits: usize) -> String {
    match (size, fits) {
        (1, _) => {
            format!("one image does not fit in the memory of {place}; pass a smaller --resolution, or --device cpu")
        }
        (_, 0) => format!(
            "a batch of {size} images does not fit in the memory of {place}, and neither does one image; pass a smaller \
             --resolution, or --device cpu"
        ),
        _ => format!(
            "a batch of {size} images does not fit in the memory of {place}; {fits} {}: pass --batch-size {fits}",
            if fits == 1 { "does" } else { "do" }
        ),
    }
}

/// A device with its memory: `cuda:0 (81920 MiB)`.
pub(crate) fn place(device: &Device) -> String {
    let name = device::name(device);
    device::memory_mib(device).map_or(name.clone(), |(_, total)| format!("{name} ({total} MiB)"))
}

/// Whether an error says that a device's memory is full, in the words of CUDA or of one of its libraries.
pub(crate) fn is_full(error: &anyhow::Error) -> bool {
    const WORDS: [&str; 4] =
        ["CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED", "CURAND_STATUS_ALLOCATION_FAILED", "out of memory"];
    error.chain().any(|cause| {
        let text = cause.to_string();
        WORDS.iter().any(|word| text.contains(word))
    })
}

/// What CUDA itself said, without the places in the program that candle adds.
pub(crate) fn cause(error: &anyhow::Error) -> String {
    error.root_cause().to_string().lines().next().unwrap_or_default().trim().to_string()
}

#[cfg(test)]
mod tests {
    use vqrae::DType;

    use super::*;

    /// A device that holds `most` images, and what it was asked.
    fn run(size: usize, most: usize, asked: &mut Vec<usize>) -> Result<usize> {
        let batch = Tensor::zeros((size, 2), DType::F32, &Device::Cpu)?;
        within(&Device::Cpu, &batch, |batch| {
            let images = batch.dim(0)?;
            asked.push(images);
            match images > most {
                true => Err(anyhow!("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")").context("matmul")),
                false => Ok(images),
            }
        })
    }

    #[test]
    fn a_batch_that_fits_is_computed_once() {
        let mut asked = Vec::new();
        assert_eq!(run(64, 64, &mut asked).unwrap(), 64);
        assert_eq!(asked, [64]);
    }

    #[test]
    fn halves_find_what_fits_and_the_run_ends() {
        let mut asked = Vec::new();
        let error = run(64, 16, &mut asked).unwrap_err().to_string();
        assert_eq!(asked, [64, 32, 16]);
        let expected =
            "a batch of 64 images does not fit in the memory of cpu; 16 do: pass --batch-size 16 (DriverError";
        assert!(error.starts_with(expected), "{error}");
        let error = run(7, 2, &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("1 does: pass --batch-size 1"), "{error}");
    }

    #[test]
    fn where_no_image_fits_no_batch_size_is_named() {
        for size in [1, 5] {
            let mut asked = Vec::new();
            let error = run(size, 0, &mut asked).unwrap_err().to_string();
            assert!(error.contains("--resolution") && !error.contains("--batch-size"), "{error}");
            assert_eq!(asked.last(), Some(&1));
        }
    }

    #[test]
    fn another_error_stays_what_it_is() {
        let batch = Tensor::zeros((4, 2), DType::F32, &Device::Cpu).unwrap();
        let mut calls = 0;
        let compute = |_: &Tensor| -> Result<()> {
            calls += 1;
            Err(anyhow!("CUDA_ERROR_ILLEGAL_ADDRESS"))
        };
        assert_eq!(within(&Device::Cpu, &batch, compute).unwrap_err().to_string(), "CUDA_ERROR_ILLEGAL_ADDRESS");
        assert_eq!(calls, 1);
    }
}
