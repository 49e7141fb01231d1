//! Where a command computes: the words of `--device`, devices opened, and in words why one could not be.

use std::fmt::{Display, Formatter};
use std::str::FromStr;

use anyhow::{Result, bail};
use candle_core::DeviceLocation;
use vqrae::Device;

/// Where to compute, the same for every command.
#[derive(clap::Args, Debug)]
pub(crate) struct DeviceArgs {
    /// Where to compute: auto, cpu, cuda, cuda:1 for the second card; tokenize and train take several, as in cuda:0,1
    ///
    /// `auto` is the first card if this program was built with CUDA and can use it, and the CPU otherwise. On several
    /// cards, tokenize gives batches to each in turn, with the results of one; train divides every step's images.
    #[arg(
        long,
        env = "VQRAE_DEVICE",
        hide_env_values = true,
        default_value = "auto",
        value_name = "auto|cpu|cuda[:N]"
    )]
    pub(crate) device: Where,
}

/// The devices that a word names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Where {
    Auto,
    /// So many workers; `cpu,cpu` plays two cards in tests.
    Cpu(usize),
    /// Different cards.
    Cuda(Vec<usize>),
}

impl FromStr for Where {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        if text.split(',').all(|word| word == "cpu") {
            return Ok(Self::Cpu(text.split(',').count()));
        }
        let numbers = match text.split_once(':') {
            None if text == "cuda" => "0",
            Some(("cuda", numbers)) => numbers,
            _ => return Err("expected: auto, cpu, cuda, cuda:N or cuda:N,M".to_string()),
        };
        let card = |word: &str| word.parse().map_err(|_| format!("{word:?} is not a card's number"));
        let cards: Vec<usize> = numbers.split(',').map(card).collect::<Result<_, _>>()?;
        match cards.iter().enumerate().find(|(i, card)| cards[..*i].contains(card)) {
            Some((_, card)) => Err(format!("card {card} is named twice")),
            None => Ok(Self::Cuda(cards)),
        }
    }
}

/// As the command line has it.
impl Display for Where {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => write!(f, "auto"),
            Self::Cpu(workers) => write!(f, "{}", vec!["cpu"; *workers].join(",")),
            Self::Cuda(cards) => write!(f, "cuda:{}", joined(cards)),
        }
    }
}

impl Where {
    /// The one device of a command that computes on one.
    ///
    /// # Errors
    /// If the word names several, or the one cannot be used.
    pub(crate) fn open_one(&self) -> Result<Device> {
        match self.open_all()?.as_slice() {
            [device] => Ok(device.clone()),
            _ => bail!("--device {self} names several devices, but this command computes on one; name one of them"),
        }
    }

    /// All devices that the word names, each once but for the CPU.
    ///
    /// # Errors
    /// If one of them cannot be used: the message says what is missing.
    pub(crate) fn open_all(&self) -> Result<Vec<Device>> {
        match self {
            Self::Auto => Ok(auto(1)),
            Self::Cpu(workers) => Ok(vec![Device::Cpu; *workers]),
            Self::Cuda(cards) => cards.iter().map(|&card| open_card(card)).collect(),
        }
    }
}

/// The first `count` cards where this program can use so many, else the CPU as often.
#[cfg(feature = "cuda")]
pub(crate) fn auto(count: usize) -> Vec<Device> {
    if vqrae_kernels::cuda::missing().is_some() {
        return vec![Device::Cpu; count];
    }
    // Of several processes on a machine each takes its own card, if it sees more than one.
    if let (1, Some(card)) = (count, local_rank())
        && let Ok(card) = open_card(card)
    {
        return vec![card];
    }
    match (0..count).map(open_card).collect::<Result<Vec<_>>>() {
        Ok(cards) => cards,
        Err(error) => {
            // Without a driver the CPU is what everybody expects. A driver whose cards cannot be used is worth a line.
            crate::report::say(&format!("using the CPU: {error}"));
            vec![Device::Cpu; count]
        }
    }
}

/// The card that a launcher of several processes a machine means for this one: LOCAL_RANK of torchrun, SLURM_LOCALID of srun.
#[cfg(feature = "cuda")]
fn local_rank() -> Option<usize> {
    ["LOCAL_RANK", "SLURM_LOCALID"].iter().find_map(|name| std::env::var(name).ok()?.parse().ok())
}

/// The CPU as often as asked for: this program was built without CUDA.
#[cfg(not(feature = "cuda"))]
pub(crate) fn auto(count: usize) -> Vec<Device> {
    vec![Device::Cpu; count]
}

/// With a stream of its own: candle's default one is each thread's, and a device is used by several threads.
#[cfg(feature = "cuda")]
fn open_card(card: usize) -> Result<Device> {
    if let Some(missing) = vqrae_kernels::cuda::missing() {
        bail!("cuda:{card} cannot be used: {missing}; or pass --device cpu");
    }
    let open = || {
        let device = Device::new_cuda_with_stream(card)?;
        // A card that is too old for the kernels is refused here rather than at the first of them.
        vqrae_kernels::cuda::Gpu::on(&device.as_cuda_device()?.cuda_stream())?;
        anyhow::Ok(device)
    };
    open().map_err(|error| anyhow::anyhow!(refusal(card, &error.to_string())))
}

#[cfg(not(feature = "cuda"))]
fn open_card(card: usize) -> Result<Device> {
    bail!(
        "cuda:{card} cannot be used: this program was built without CUDA; build it with `cargo build --release --features \
         cuda`, or pass --device cpu"
    )
}

/// Why a card could not be opened, and what to do, from CUDA's own words.
#[cfg(any(feature = "cuda", test))]
fn refusal(card: usize, error: &str) -> String {
    let cause = error.lines().next().unwrap_or_default();
    let known = [
        (
            "CUDA_ERROR_NO_DEVICE",
            "the driver is there, but sees no card; compare with `nvidia-smi`, and unset CUDA_VISIBLE_DEVICES",
        ),
        ("CUDA_ERROR_INVALID_DEVICE", "there is no such card; `nvidia-smi -L` lists them, and the first is cuda:0"),
        ("CUDA_ERROR_STUB_LIBRARY", "the libcuda found is a stub for linking; install NVIDIA's driver"),
        (
            "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
            "libcuda and the driver are of different versions; install one of both, or restart",
        ),
        ("CUDA_ERROR_OUT_OF_MEMORY", "its memory is taken; `nvidia-smi` shows by whom"),
        ("CUBLAS_STATUS", "cuBLAS does not start; install the CUDA 13 that goes with the driver (580 or newer)"),
        ("CURAND_STATUS", "cuRAND does not start; install the CUDA 13 that goes with the driver (580 or newer)"),
    ];
    match known.iter().find(|(code, _)| error.contains(code)) {
        Some((code, words)) if cause.contains(code) => format!("cuda:{card} cannot be used: {words} ({cause})"),
        Some((_, words)) => format!("cuda:{card} cannot be used: {words}"),
        None => format!("cuda:{card} cannot be used: {cause}; or pass --device cpu"),
    }
}

/// What a device is called on the command line.
pub(crate) fn name(device: &Device) -> String {
    match device.location() {
        DeviceLocation::Cpu => "cpu".to_string(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

/// What several devices are called together: `cuda:0,1`.
pub(crate) fn names<'a>(devices: impl IntoIterator<Item = &'a Device>) -> String {
    let names: Vec<String> = devices.into_iter().map(name).collect();
    let cards: Option<Vec<&str>> = names.iter().map(|name| name.strip_prefix("cuda:")).collect();
    match cards {
        Some(cards) if !cards.is_empty() => format!("cuda:{}", joined(&cards)),
        _ => names.join(","),
    }
}

fn joined(items: &[impl Display]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// The memory of a device in MiB: free and in all. `None` on the CPU, or where the driver does not tell.
#[cfg(feature = "cuda")]
pub(crate) fn memory_mib(device: &Device) -> Option<(u64, u64)> {
    let stream = device.as_cuda_device().ok()?.cuda_stream();
    let (free, total) = stream.context().mem_get_info().ok()?;
    Some((free as u64 >> 20, total as u64 >> 20))
}

/// `None`: the CPU is all there is.
#[cfg(not(feature = "cuda"))]
pub(crate) fn memory_mib(_: &Device) -> Option<(u64, u64)> {
    None
}

/// The most of a device's memory that this process's tensors have taken so far, in MiB. `None` on the CPU, or where the driver
/// does not tell.
#[cfg(feature = "cuda")]
pub(crate) fn peak_mib(device: &Device) -> Option<u64> {
    use candle_core::cuda_backend::cudarc::driver::{result, sys};
    let stream = device.as_cuda_device().ok()?.cuda_stream();
    stream.synchronize().ok()?;
    let mut peak = 0u64;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
    // SAFETY: the device is one that a context is open on, and the attribute is a number of 64 bits.
    unsafe {
        let pool = result::device::get_default_mem_pool(stream.context().cu_device()).ok()?;
        result::mem_pool::get_attribute(pool, attribute, (&raw mut peak).cast()).ok()?;
    }
    Some(peak >> 20)
}

/// `None`: the CPU is all there is.
#[cfg(not(feature = "cuda"))]
pub(crate) fn peak_mib(_: &Device) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_devices() {
        let parse = |text: &str| text.parse::<Where>();
        assert_eq!(parse("auto"), Ok(Where::Auto));
        assert_eq!(parse("cpu"), Ok(Where::Cpu(1)));
        assert_eq!(parse("cpu,cpu,cpu"), Ok(Where::Cpu(3)));
        assert_eq!(parse("cuda"), Ok(Where::Cuda(vec![0])));
        assert_eq!(parse("cuda:3,1"), Ok(Where::Cuda(vec![3, 1])));
        assert!(parse("cuda:1,1").unwrap_err().contains("card 1 is named twice"));
        assert!(parse("cuda:1,").unwrap_err().contains("not a card's number"));
        for wrong in ["", "cpu:2", "gpu", "auto,cpu", "cpu,", "cuda:", "cuda:-1", "cuda,cuda"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        for text in ["auto", "cpu", "cpu,cpu", "cuda:0", "cuda:3,1"] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn the_cpu_can_always_be_opened() {
        assert_eq!(Where::Cpu(3).open_all().unwrap().len(), 3);
        assert!(Where::Cpu(1).open_one().unwrap().is_cpu());
        let error = Where::Cpu(2).open_one().unwrap_err().to_string();
        assert!(error.contains("cpu,cpu names several devices"), "{error}");
    }

    #[test]
    fn devices_have_the_names_of_the_command_line() {
        assert_eq!(names(&[Device::Cpu]), "cpu");
        assert_eq!(names(&[Device::Cpu, Device::Cpu]), "cpu,cpu");
        assert_eq!(memory_mib(&Device::Cpu), None);
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_cuda_auto_is_the_cpu_and_a_card_says_how_to_build() {
        assert!(Where::Auto.open_one().unwrap().is_cpu());
        let error = Where::Cuda(vec![1]).open_one().unwrap_err().to_string();
        assert!(error.starts_with("cuda:1 cannot be used: ") && error.contains("--features cuda"), "{error}");
    }

    #[test]
    fn what_cuda_says_becomes_a_next_step() {
        let none = refusal(0, "DriverError(CUDA_ERROR_NO_DEVICE, \"no CUDA-capable device is detected\")\n  1: main");
        assert!(none.starts_with("cuda:0 cannot be used: the driver is there, but sees no card"), "{none}");
        assert!(!none.contains("main"), "a backtrace in: {none}");
        let many = refusal(7, "DriverError(CUDA_ERROR_INVALID_DEVICE, \"invalid device ordinal\")");
        assert!(many.contains("cuda:7") && many.contains("nvidia-smi -L"), "{many}");
        assert!(refusal(0, "CublasError(CUBLAS_STATUS_NOT_INITIALIZED)").contains("cuBLAS does not start"));
        assert!(refusal(0, "CurandError(CURAND_STATUS_INITIALIZATION_FAILED)").contains("cuRAND"));
        assert!(refusal(0, "something new").ends_with("something new; or pass --device cpu"));
    }
}
