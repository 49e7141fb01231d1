//! CUDA's libraries, opened at their first use rather than at the program's start.
//!
//! A function of a library that is missing returns an error code of its kind, so opening a device is an error there and
//! nothing else. Libraries are looked for where the loader looks, in `$CUDA_HOME` and `$CUDA_PATH`, in `/usr/local/cuda`,
//! and among the packages of each Python on the path, where PyTorch brings them along.

#[cfg(trampolines)]
use std::ffi::{CStr, CString, c_int, c_void};
#[cfg(trampolines)]
use std::path::{Path, PathBuf};
#[cfg(trampolines)]
use std::sync::OnceLock;

/// What a machine lacks for computing on a GPU, and what to do about it; `None` where libraries are all there.
pub fn missing() -> Option<String> {
    #[cfg(trampolines)]
    for (library, advice) in [
        (DRIVER, "install NVIDIA's driver (580 or newer)"),
        (CUBLAS, "install CUDA 13, or set CUDA_HOME or LD_LIBRARY_PATH to where it is"),
        (CUBLAS_LT, "install CUDA 13, or set CUDA_HOME or LD_LIBRARY_PATH to where it is"),
        (CURAND, "install CUDA 13, or set CUDA_HOME or LD_LIBRARY_PATH to where it is"),
    ] {
        if open(library).is_null() {
            return Some(format!("{} was not found: {advice}", LIBRARIES[library].names[0]));
        }
    }
    None
}

#[cfg(trampolines)]
const DRIVER: usize = 0;
#[cfg(trampolines)]
const CURAND: usize = 2;
#[cfg(trampolines)]
const CUBLAS: usize = 3;
#[cfg(trampolines)]
const CUBLAS_LT: usize = 4;

#[cfg(trampolines)]
struct Library {
    /// Its names, the newest first.
    names: &'static [&'static str],
    /// What its functions return where it is missing.
    absent: extern "C" fn() -> c_int,
}

/// In the order of `build/trampolines.rs`.
#[cfg(trampolines)]
static LIBRARIES: [Library; 6] = [
    Library { names: &["libcuda.so.1", "libcuda.so"], absent: no_device },
    Library { names: &["libnvrtc.so.13", "libnvrtc.so.12"], absent: internal_error },
    Library { names: &["libcurand.so.10"], absent: initialization_failed },
    Library { names: &["libcublas.so.13", "libcublas.so.12"], absent: not_initialized },
    Library { names: &["libcublasLt.so.13", "libcublasLt.so.12"], absent: not_initialized },
    Library { names: &["libnccl.so.2"], absent: system_error },
];

/// CUDA_ERROR_NO_DEVICE
#[cfg(trampolines)]
extern "C" fn no_device() -> c_int {
    100
}

/// NVRTC_ERROR_INTERNAL_ERROR
#[cfg(trampolines)]
extern "C" fn internal_error() -> c_int {
    11
}

/// CURAND_STATUS_INITIALIZATION_FAILED
#[cfg(trampolines)]
extern "C" fn initialization_failed() -> c_int {
    203
}

/// CUBLAS_STATUS_NOT_INITIALIZED
#[cfg(trampolines)]
extern "C" fn not_initialized() -> c_int {
    1
}

/// ncclSystemError
#[cfg(trampolines)]
extern "C" fn system_error() -> c_int {
    2
}

#[cfg(trampolines)]
include!(concat!(env!("OUT_DIR"), "/symbols.rs"));
#[cfg(trampolines)]
core::arch::global_asm!(include_str!(concat!(env!("OUT_DIR"), "/trampolines.s")), options(att_syntax));

#[cfg(trampolines)]
unsafe extern "C" {
    /// Where each trampoline jumps to.
    static mut vqrae_cuda_slots: [*const c_void; SYMBOLS.len()];
}

/// What `dlopen` returned, for as long as the program runs.
#[cfg(trampolines)]
struct Handle(*mut c_void);

// SAFETY: a handle of the loader may be used from any thread.
#[cfg(trampolines)]
unsafe impl Send for Handle {}
// SAFETY: as above.
#[cfg(trampolines)]
unsafe impl Sync for Handle {}

#[cfg(trampolines)]
static HANDLES: [OnceLock<Handle>; LIBRARIES.len()] = [const { OnceLock::new() }; LIBRARIES.len()];

/// A library's handle; null where there is none.
#[cfg(trampolines)]
fn open(library: usize) -> *mut c_void {
    HANDLES[library]
        .get_or_init(|| {
            let names = LIBRARIES[library].names;
            let by_loader = names.iter().map(|name| load(Path::new(name)));
            // The driver's library belongs to the kernel's module: only the loader knows which one.
            let folders = if library == DRIVER { Vec::new() } else { folders() };
            let in_folders = folders.iter().flat_map(|folder| names.iter().map(|name| folder.join(name)));
            let in_folders = in_folders.filter(|path| path.exists()).map(|path| load(&path));
            Handle(by_loader.chain(in_folders).find(|handle| !handle.is_null()).unwrap_or(std::ptr::null_mut()))
        })
        .0
}

#[cfg(trampolines)]
fn load(path: &Path) -> *mut c_void {
    let Ok(path) = CString::new(path.as_os_str().as_encoded_bytes()) else { return std::ptr::null_mut() };
    // SAFETY: a string that ends in a zero; what the libraries do when they are loaded is theirs.
    unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) }
}

/// Where to look besides the loader's own places.
#[cfg(trampolines)]
fn folders() -> Vec<PathBuf> {
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let homes = homes.chain(["/usr/local/cuda".into()]);
    let mut folders: Vec<_> = homes.flat_map(|home| [home.join("lib64"), home.join("lib")]).collect();
    let path = std::env::var_os("PATH").unwrap_or_default();
    for prefix in std::env::split_paths(&path).filter_map(|bin| bin.parent().map(Path::to_path_buf)) {
        for entry in std::fs::read_dir(prefix.join("lib")).into_iter().flatten().flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(b"python3") {
                for packages in ["site-packages", "dist-packages"] {
                    folders.push(entry.path().join(packages).join("nvidia/cu13/lib"));
                    folders.push(entry.path().join(packages).join("nvidia/nccl/lib"));
                }
            }
        }
    }
    folders
}

/// Finds the function of a trampoline and has it jump there from now on.
#[cfg(trampolines)]
#[unsafe(no_mangle)]
extern "C" fn vqrae_cuda_resolve(index: usize) -> *const c_void {
    let (library, name): (usize, &CStr) = SYMBOLS[index];
    let handle = open(library);
    let mut function: *const c_void = std::ptr::null();
    if !handle.is_null() {
        // SAFETY: a handle that `dlopen` gave, and a string that ends in a zero.
        function = unsafe { libc::dlsym(handle, name.as_ptr()) };
    }
    if function.is_null() {
        function = LIBRARIES[library].absent as *const c_void;
    }
    // SAFETY: the index comes from a trampoline, so the slot is there; threads that meet here write the same value, a word.
    unsafe { (&raw mut vqrae_cuda_slots).cast::<*const c_void>().add(index).write_volatile(function) };
    function
}

#[cfg(all(test, trampolines))]
mod tests {
    use super::*;

    #[test]
    fn a_function_that_no_library_has_returns_an_error() {
        // Any function of a missing library; nvrtc is in no test machine's way.
        assert_eq!([no_device(), internal_error(), not_initialized()], [100, 11, 1]);
        let (index, _) = SYMBOLS.iter().enumerate().find(|(_, (library, _))| *library == DRIVER).unwrap();
        assert!(!vqrae_cuda_resolve(index).is_null());
    }

    #[test]
    fn what_is_missing_is_named_with_the_next_step() {
        match missing() {
            Some(text) => assert!(text.contains("was not found: install"), "{text}"),
            None => assert!(!open(DRIVER).is_null() && !open(CUBLAS).is_null()),
        }
    }
}
