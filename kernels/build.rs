//! With the feature `cuda`: CUDA sources → one image for all parts; CUDA's libraries → opened at first use.

#[cfg(feature = "cuda")]
#[path = "build/nvcc.rs"]
mod nvcc;
#[cfg(feature = "cuda")]
#[path = "build/trampolines.rs"]
mod trampolines;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(trampolines)");
    #[cfg(feature = "cuda")]
    if let Err(reason) = nvcc::compile().and_then(|toolkit| trampolines::write(&toolkit)) {
        // Printed before the panic, since cargo shows the last lines first.
        panic!("{reason}");
    }
}
