//! What do features know of a photo, and what do they still know once they are codes?
//!
//! `vqrae-cli features PHOTOS -o FEATURES`, PHOTOS with a folder a class, then
//! `cargo run --release --workspace --example 07_understanding -- FEATURES [MODEL]`
//!
//! One model gives both (the paper's point): continuous features to understand with, codes to generate with. Here both are asked
//! for a photo's class, by its nearest neighbours and by a linear layer, on photos that neither saw.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vqrae::{DType, Device, Tensor, Vqrae, weights};
use vqrae_examples::classes::Labels;
use vqrae_examples::understanding::{nearest, probe};

/// Every so many photos of a class one is asked about.
const ASKED: usize = 4;

/// Photos as one vector each.
struct Part {
    labels: Labels,
    /// Means over the tokens, `[M, D]`, of each kind of vector.
    pooled: Vec<Vec<Tensor>>,
}

#[allow(clippy::print_stdout, reason = "an example prints what it shows")]
fn main() -> anyhow::Result<()> {
    let mut words = std::env::args_os().skip(1).map(PathBuf::from);
    let Some(folder) = words.next() else { anyhow::bail!("say where features are: 07_understanding FEATURES [MODEL]") };
    let model = match words.next() {
        Some(model) => Vqrae::from_pretrained(model, &Device::Cpu, DType::F32)?,
        None => Vqrae::shipped(&Device::Cpu, DType::F32)?,
    };
    anyhow::ensure!(model.codes_per_token() == 1, "{}: a token of this model has several codes", model.id());
    let codebook = model.codebook()?;
    let classes = classes(&folder.join("features"))?;
    let empty = || Part { labels: Labels { numbers: Vec::new(), classes: classes.len() }, pooled: vec![Vec::new(); 2] };
    let [mut known, mut asked] = [empty(), empty()];
    for (number, files) in classes.values().enumerate() {
        for (i, file) in files.iter().enumerate() {
            let part = if i % ASKED == ASKED - 1 { &mut asked } else { &mut known };
            let features = features(file, &model)?; // [1,N,D]
            part.labels.numbers.push(number as u32);
            part.pooled[0].push(features.mean(1)?);
            let codes = model.quantize(&features)?.indices.flatten_all()?;
            part.pooled[1].push(codebook.index_select(&codes, 0)?.mean_keepdim(0)?);
        }
    }
    println!(
        "| {} photos asked about, {} known, {} classes | numbers a token | k-NN, % | linear probe, % |",
        asked.labels.numbers.len(),
        known.labels.numbers.len(),
        classes.len()
    );
    println!("|---|---|---|---|");
    for (i, what) in ["continuous features", "their codes' vectors"].into_iter().enumerate() {
        let (gallery, queries) = (Tensor::cat(&known.pooled[i], 0)?, Tensor::cat(&asked.pooled[i], 0)?);
        println!(
            "| {what} | {} | {:.1} | {:.1} |",
            gallery.dim(1)?,
            nearest(&gallery, &known.labels, &queries, &asked.labels)?,
            probe(&gallery, &known.labels, &queries, &asked.labels)?
        );
    }
    println!("| the largest class | | {:.1} | |", asked.labels.largest());
    Ok(())
}

/// The files of each class.
fn classes(folder: &Path) -> anyhow::Result<BTreeMap<String, Vec<PathBuf>>> {
    let mut classes = BTreeMap::new();
    let sorted = |folder: &Path| -> std::io::Result<Vec<PathBuf>> {
        let mut paths =
            std::fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
        paths.sort();
        Ok(paths)
    };
    for class in sorted(folder)?.into_iter().filter(|path| path.is_dir()) {
        let name = class.file_name().unwrap_or_default().to_string_lossy().into_owned();
        classes.insert(name, sorted(&class)?);
    }
    anyhow::ensure!(classes.len() > 1, "{}: expected a folder a class, of files of features", folder.display());
    Ok(classes)
}

/// The features of a file, `[1, N, D]`.
fn features(file: &Path, model: &Vqrae) -> anyhow::Result<Tensor> {
    let mut tensors = weights::read_file(file)?;
    let features = tensors.remove("features").ok_or_else(|| anyhow::anyhow!("{}: no features", file.display()))?;
    let (width, expected) = (features.dim(1)?, model.config().encoder.width());
    anyhow::ensure!(width == expected, "{}: features of {width} numbers, the model has {expected}", file.display());
    Ok(features.unsqueeze(0)?)
}
