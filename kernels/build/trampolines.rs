//! One jump for each function of CUDA's libraries, and empty libraries by the names that a linker is told.
//!
//! candle links CUDA's libraries by name, and a program that names a library does not start where it is missing. The
//! functions here take their place: the first call of one finds the library (`src/cuda/libraries.rs`), each later one is a
//! single jump. So one program serves machines with and without CUDA, and none of these libraries is needed to build it.
//!
//! x86-64 Linux alone; elsewhere the libraries are linked as candle asks for.

use std::fmt::Write;
use std::path::{Path, PathBuf};

const SYMBOLS: &str = "cuda/symbols.txt";

/// The libraries in the order of `LIBRARIES` in `src/cuda/libraries.rs`.
const LIBRARIES: [&str; 6] = ["cuda", "nvrtc", "curand", "cublas", "cublasLt", "nccl"];

pub(crate) fn write(toolkit: &Path) -> Result<(), String> {
    println!("cargo::rerun-if-changed={SYMBOLS}");
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    if (variable("CARGO_CFG_TARGET_OS").as_str(), variable("CARGO_CFG_TARGET_ARCH").as_str()) != ("linux", "x86_64") {
        return Ok(());
    }
    println!("cargo::rustc-cfg=trampolines");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let put = |name: &str, bytes: &[u8]| {
        let path = out.join(name);
        std::fs::write(&path, bytes).map_err(|error| format!("{}: {error}", path.display()))
    };
    let symbols = std::fs::read_to_string(SYMBOLS).map_err(|error| format!("{SYMBOLS}: {error}"))?;
    let (mut jumps, mut slots, mut names) = (String::new(), String::new(), String::new());
    let mut count = 0;
    for line in symbols.lines() {
        let (library, name) = line.split_once(' ').ok_or_else(|| format!("{SYMBOLS}: {line:?}"))?;
        let library =
            LIBRARIES.iter().position(|known| *known == library).ok_or_else(|| format!("{SYMBOLS}: {line:?}"))?;
        // A slot holds where to jump: at first to the two instructions after the jump, which have the function found.
        let slot = 8 * count;
        let _ = write!(
            jumps,
            ".globl {name}\n.hidden {name}\n.type {name},@function\n{name}: jmp *vqrae_cuda_slots+{slot}(%rip)\n\
             .Lfind{count}: push ${count}\n jmp vqrae_cuda_find\n"
        );
        let _ = writeln!(slots, ".quad .Lfind{count}");
        let _ = writeln!(names, "({library}, c\"{name}\"),");
        count += 1;
    }
    // All that can hold an argument is kept while the function is found: six integer registers, rax (the number of vector
    // arguments of a variadic call) and eight vector registers. The pushed number lies above them.
    let assembly = format!(
        ".text\n{jumps}\
         vqrae_cuda_find:\n\
         push %rdi\n push %rsi\n push %rdx\n push %rcx\n push %r8\n push %r9\n push %rax\n sub $136, %rsp\n\
         movups %xmm0, (%rsp)\n movups %xmm1, 16(%rsp)\n movups %xmm2, 32(%rsp)\n movups %xmm3, 48(%rsp)\n\
         movups %xmm4, 64(%rsp)\n movups %xmm5, 80(%rsp)\n movups %xmm6, 96(%rsp)\n movups %xmm7, 112(%rsp)\n\
         mov 192(%rsp), %rdi\n call vqrae_cuda_resolve\n mov %rax, %r11\n\
         movups (%rsp), %xmm0\n movups 16(%rsp), %xmm1\n movups 32(%rsp), %xmm2\n movups 48(%rsp), %xmm3\n\
         movups 64(%rsp), %xmm4\n movups 80(%rsp), %xmm5\n movups 96(%rsp), %xmm6\n movups 112(%rsp), %xmm7\n\
         add $136, %rsp\n pop %rax\n pop %r9\n pop %r8\n pop %rcx\n pop %rdx\n pop %rsi\n pop %rdi\n add $8, %rsp\n\
         jmp *%r11\n\
         .data\n.balign 8\n.globl vqrae_cuda_slots\n.hidden vqrae_cuda_slots\nvqrae_cuda_slots:\n{slots}.text\n"
    );
    put("trampolines.s", assembly.as_bytes())?;
    put("symbols.rs", format!("static SYMBOLS: [(usize, &std::ffi::CStr); {count}] = [\n{names}];\n").as_bytes())?;
    for library in LIBRARIES {
        put(&format!("lib{library}.a"), b"!<arch>\n")?;
    }
    println!("cargo::rustc-link-search=native={}", out.display());
    runtime(toolkit, &out)
}

/// candle's kernels ask for CUDA's runtime, which comes as a static library too.
fn runtime(toolkit: &Path, out: &Path) -> Result<(), String> {
    const NAME: &str = "libcudart_static.a";
    let folders = ["lib64", "lib", "targets/x86_64-linux/lib"].map(|folder| toolkit.join(folder).join(NAME));
    let library = folders.iter().find(|path| path.exists());
    let library = library.ok_or_else(|| format!("{NAME} was not found in {}: set CUDA_HOME", toolkit.display()))?;
    std::fs::copy(library, out.join(NAME)).map_err(|error| format!("{}: {error}", library.display()))?;
    std::fs::write(out.join("libcudart.a"), b"!<arch>\n").map_err(|error| error.to_string())?;
    println!("cargo::rustc-link-lib=static:+whole-archive,-bundle=cudart_static");
    for library in ["dl", "rt", "pthread"] {
        println!("cargo::rustc-link-lib=dylib={library}");
    }
    Ok(())
}
