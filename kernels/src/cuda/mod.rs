//! The same work on an NVIDIA GPU, through cudarc: nearest codes by the same [contract](crate::nearest).
//!
//! Sources are `kernels/cuda/*.cu`, compiled by nvcc when the crate is built with the feature `cuda`. CUDA's libraries are
//! opened at first use ([`missing`] says what a machine lacks), so one program serves machines with and without a GPU.
//!
//! [`Gpu`] is a device and a stream; everything here runs in that stream's order. Values are cudarc's [`CudaSlice`]s, so what
//! another crate keeps on the device is used where it lies.

pub mod attention;
pub mod elementwise;
mod libraries;
pub mod linear;
mod nearest;
pub mod norm;
pub mod pixels;
mod real;
#[cfg(test)]
mod reference;
pub mod training;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

pub use cudarc;
use cudarc::cublas::CudaBlas;
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream, DriverError, LaunchArgs, LaunchConfig};
use cudarc::nvrtc::Ptx;
pub use libraries::missing;
pub use nearest::{Codebook, Method, Mode};
pub use real::{Half, Kind, Real};

use crate::Error;

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The oldest compute capability that the kernels run on: they multiply by `mma.sync` and copy by `cp.async`.
const OLDEST: (i32, i32) = (8, 0);

/// A GPU and a stream on it, with the kernels loaded.
pub struct Gpu {
    stream: Arc<CudaStream>,
    modules: Vec<Arc<CudaModule>>,
    functions: Mutex<HashMap<&'static str, CudaFunction>>,
    blas: OnceLock<CudaBlas>,
    products: OnceLock<linear::Products>,
    /// Whether tensor cores were seen to sum within the bound.
    sums_held: OnceLock<bool>,
    processors: u32,
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gpu").field("ordinal", &self.stream.context().ordinal()).finish_non_exhaustive()
    }
}

/// The GPUs in use, by the address of their stream, which a [`Gpu`] keeps alive.
static OPEN: Mutex<Vec<(usize, Arc<Gpu>)>> = Mutex::new(Vec::new());

impl Gpu {
    /// A stream of its own on the GPU numbered `ordinal`.
    ///
    /// # Errors
    /// If there is no such GPU, it is older than compute capability 8.0, or CUDA's libraries are missing.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, Error> {
        if let Some(reason) = missing() {
            return Err(Error::Gpu { message: reason });
        }
        let stream = CudaContext::new(ordinal).and_then(|context| context.new_stream());
        Self::on(&stream.map_err(|error| Error::Gpu { message: format!("cuda:{ordinal}: {}", describe(&error)) })?)
    }

    /// The kernels on a stream that exists, loaded at its first use and kept.
    ///
    /// # Errors
    /// As [`Gpu::open`].
    pub fn on(stream: &Arc<CudaStream>) -> Result<Arc<Self>, Error> {
        let key = Arc::as_ptr(stream) as usize;
        let mut open = OPEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((_, gpu)) = open.iter().find(|(known, _)| *known == key) {
            return Ok(gpu.clone());
        }
        let gpu = Arc::new(Self::load(stream.clone())?);
        open.push((key, gpu.clone()));
        Ok(gpu)
    }

    fn load(stream: Arc<CudaStream>) -> Result<Self, Error> {
        use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as PROCESSORS;
        let context = stream.context();
        let (major, minor) = context.compute_capability()?;
        if (major, minor) < OLDEST {
            let name = context.name()?;
            let message = format!("{name} has compute capability {major}.{minor}; 8.0 is the oldest that works");
            return Err(Error::Gpu { message });
        }
        let load = |image: &&[u8]| context.load_module(Ptx::from_binary(image.to_vec()));
        let modules = IMAGES.iter().map(load).collect::<Result<_, _>>()?;
        let processors = u32::try_from(context.attribute(PROCESSORS)?).unwrap_or(1).max(1);
        Ok(Self {
            stream,
            modules,
            functions: Mutex::default(),
            blas: OnceLock::new(),
            products: OnceLock::new(),
            sums_held: OnceLock::new(),
            processors,
        })
    }

    /// Where everything runs, in order.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Streaming multiprocessors of the device.
    pub fn processors(&self) -> u32 {
        self.processors
    }

    /// cuBLAS on the stream.
    pub(crate) fn blas(&self) -> Result<&CudaBlas, Error> {
        if self.blas.get().is_none() {
            let _ = self.blas.set(CudaBlas::new(self.stream.clone())?);
        }
        self.blas.get().ok_or_else(|| Error::Gpu { message: "cuBLAS could not be opened".to_string() })
    }

    /// cuBLASLt and the products planned so far.
    fn products(&self) -> Result<&linear::Products, Error> {
        if self.products.get().is_none() {
            let _ = self.products.set(linear::Products::open(&self.stream)?);
        }
        self.products.get().ok_or_else(|| real::refuse("cuBLASLt could not be opened"))
    }

    /// A kernel by the name it has in its source; `shared` bytes of dynamic shared memory are allowed to it.
    pub(crate) fn function(&self, name: &'static str, shared: usize) -> Result<CudaFunction, Error> {
        use cudarc::driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST_SHARED;
        /// What a kernel may use without asking.
        const FREE: usize = 48 << 10;
        let mut functions = self.functions.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let function = match functions.get(name) {
            Some(function) => function.clone(),
            None => {
                let mut found = self.modules.iter().filter_map(|module| module.load_function(name).ok());
                let function =
                    found.next().ok_or_else(|| Error::Gpu { message: format!("there is no kernel {name}") })?;
                functions.entry(name).or_insert(function).clone()
            }
        };
        if shared > FREE {
            function.set_attribute(MOST_SHARED, i32::try_from(shared).unwrap_or(i32::MAX))?;
        }
        Ok(function)
    }
}

/// Launches `args` on blocks × threads, or does nothing where there are no blocks.
///
/// # Safety
/// The arguments must be those of the kernel, and all that it reaches must be there.
pub(crate) unsafe fn launch(
    mut args: LaunchArgs<'_>,
    blocks: (usize, usize),
    threads: u32,
    shared: usize,
) -> Result<(), Error> {
    if blocks.0 == 0 || blocks.1 == 0 {
        return Ok(());
    }
    let narrow = |x: usize| u32::try_from(x).map_err(|_| Error::Gpu { message: format!("{x} blocks are too many") });
    let grid_dim = (narrow(blocks.0)?, narrow(blocks.1)?, 1);
    let config = LaunchConfig { grid_dim, block_dim: (threads, 1, 1), shared_mem_bytes: narrow(shared)? };
    // SAFETY: the caller's promise.
    unsafe { args.launch(config) }?;
    Ok(())
}

impl From<DriverError> for Error {
    fn from(error: DriverError) -> Self {
        Self::Gpu { message: describe(&error) }
    }
}

impl From<cudarc::cublas::result::CublasError> for Error {
    fn from(error: cudarc::cublas::result::CublasError) -> Self {
        Self::Gpu { message: format!("cuBLAS: {:?}", error.0) }
    }
}

fn describe(error: &DriverError) -> String {
    // `error_string` asks the driver, which may be what is missing.
    format!("CUDA: {:?}", error.0)
}

/// A GPU for tests, or `None` where there is none and the test can only be left out.
///
/// `VQRAE_REQUIRE_GPU` set, a missing GPU fails the test: where one is meant to be, tests must not pass by doing nothing.
#[cfg(test)]
pub(crate) fn test_gpu() -> Option<Arc<Gpu>> {
    static GPU: OnceLock<Result<Arc<Gpu>, Error>> = OnceLock::new();
    match GPU.get_or_init(|| Gpu::open(0)) {
        Ok(gpu) => Some(gpu.clone()),
        Err(error) => {
            assert!(std::env::var_os("VQRAE_REQUIRE_GPU").is_none(), "VQRAE_REQUIRE_GPU is set, and: {error}");
            None
        }
    }
}
