//! `cuda/*.cu` → OUT_DIR/kernels.fatbin, by nvcc.

use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCES: &str = "cuda";

/// The parts with machine code of their own in the image. Any other part from 8.0 on gets the code for 8.0 from the driver,
/// which translates it once and keeps it. CUDA's driver picks the image: nothing else here knows a part.
const PARTS: [&str; 2] = ["80", "90"];

/// Compiles all sources and returns the folder of the installation that did it.
pub(crate) fn compile() -> Result<PathBuf, String> {
    println!("cargo::rerun-if-changed={SOURCES}");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let nvcc = find()?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let mut images = Vec::new();
    for source in sources()? {
        let image = out.join(source.with_extension("fatbin").file_name().ok_or("a source without a name")?);
        let mut command = Command::new(&nvcc);
        command.args(["-fatbin", "-std=c++17", "-O3", "--threads=0", "--default-stream=per-thread"]);
        // No fast mathematics: binary64 and f32 roundings are part of what kernels promise.
        command.args(["-gencode", "arch=compute_80,code=compute_80"]);
        for part in PARTS {
            command.args(["-gencode", &format!("arch=compute_{part},code=sm_{part}")]);
        }
        let output = command.arg("-o").arg(&image).arg(&source).output();
        let output = output.map_err(|error| format!("{} could not be started: {error}", nvcc.display()))?;
        if !output.status.success() {
            let (source, message) = (source.display(), String::from_utf8_lossy(&output.stderr));
            return Err(format!("nvcc did not compile {source}:\n{message}"));
        }
        images.push(image);
    }
    let list: String = images.iter().map(|image| format!("include_bytes!({:?}),\n", image.display())).collect();
    let text = format!("/// The compiled sources.\nstatic IMAGES: [&[u8]; {}] = [\n{list}];\n", images.len());
    std::fs::write(out.join("images.rs"), text).map_err(|error| error.to_string())?;
    let toolkit = std::fs::canonicalize(&nvcc).unwrap_or(nvcc);
    toolkit.parent().and_then(Path::parent).map(Path::to_path_buf).ok_or("nvcc is not in CUDA's bin folder".into())
}

fn sources() -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(SOURCES).map_err(|error| format!("{SOURCES}: {error}"))?;
    let mut sources: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.sort();
    Ok(sources)
}

fn find() -> Result<PathBuf, String> {
    if let Some(nvcc) = std::env::var_os("NVCC") {
        return Ok(nvcc.into());
    }
    let homes =
        ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(|home| Path::new(&home).join("bin"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = homes.chain(std::env::split_paths(&path)).chain([PathBuf::from("/usr/local/cuda/bin")]);
    let mut found = folders.map(|folder| folder.join("nvcc")).filter(|nvcc| nvcc.exists());
    found.next().ok_or_else(|| {
        "CUDA's compiler nvcc was not found. Install CUDA 13 and set CUDA_HOME, or run `kernels/get_cuda.sh && \
         . .cuda/env.sh`, which needs neither root nor a GPU"
            .to_string()
    })
}
