//! `export`: code shards → the files that other projects' loaders read.

use std::path::{Component, Path, PathBuf};

use anyhow::Result;
use vqrae::codes::CodeSet;

use crate::interrupts::catch_interrupts;
use crate::layouts::{Language, Plan, To, Tokens, export};
use crate::report::{self, Exit};

/// Write code shards as the files that a generator's loader reads
///
/// CODES is a folder that `tokenize` filled with shards; they stay as they are. Rows without codes are left out and counted. OUT
/// appears when all of it is written. Beside the loader's files it holds rows.jsonl, whose lines tell of which image each document is,
/// and export.json: which set this is, and how ids become codes again.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Folder of code shards
    codes: PathBuf,
    /// Folder to write
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Whose loader is to read it
    #[arg(long, alias = "format", value_enum, value_name = "LAYOUT")]
    to: To,
    /// What files are named after where the loader wants a name: NAME.bin, NAME_codes; default: codes, for LlamaGen imagenet and the
    /// images' side
    #[arg(long, value_parser = file_name)]
    name: Option<String>,
    /// Images a second, which 1xgpt's training reads
    #[arg(long, value_name = "F")]
    hz: Option<f64>,
    /// Replace an export that is in OUT
    #[arg(long)]
    overwrite: bool,
    /// Export the shards that are finished, though some are not
    #[arg(long, alias = "allow_incomplete")]
    allow_incomplete: bool,
    #[command(flatten, next_help_heading = "Ids (megatron, datatrove, titok-jsonl)")]
    tokens: Tokens,
    #[command(flatten, next_help_heading = "Text and images (lm)")]
    language: Language,
}

const EXAMPLES: &str = "\
Examples, and what reads the output:
  vqrae-cli export codes -o out/imagenet_code_c2i_flip --to llamagen-c2i --name imagenet256
      LlamaGen: train_c2i.py --dataset imagenet_code --code-path out/imagenet_code_c2i_flip
  vqrae-cli export codes -o out/t2i --to llamagen-t2i
      LlamaGen's lists: --data-path out/t2i --code-path out/t2i, captions for extract_t5_feature.py
  vqrae-cli export codes -o out/rar --to rar
      1d-tokenizer: dataset.params.pretokenization=out/rar/codes.jsonl
  vqrae-cli export codes -o out/megatron --to megatron --id-offset 32000 --begin 1 --end 2 --row-end 48384
      Megatron-LM, NeMo: --data-path out/megatron/codes; the vocabulary is the text's 32,000, 16,384 codes and an end of row
  vqrae-cli export codes -o out/nanotron --to datatrove --id-offset 49152
      DatatroveFolderDataset(\"out/nanotron\", seq_len=256, token_size=2), nanotron's dataset_folder; 49,152 ids of text and 16,384 codes fit into 16 bits
  vqrae-cli export codes -o out/lm --to lm --tokenizer with-images --eos '</s>'
      Megatron-LM, NeMo, or with --as datatrove nanotron: captions and codes as ids of a tokenizer that `vocab` has extended
  vqrae-cli export codes -o out/1x --to 1xgpt --hz 30
      1xgpt: train.py --train_data_dir out/1x; the images of a folder, in the order of their names' bytes, are a clip
  vqrae-cli export codes -o out/wds --to webdataset
      webdataset.WebDataset(\"out/wds/{00000..00127}.tar\").decode().to_tuple(\"codes.npy\", \"json\")
  vqrae-cli export codes -o out/npy --to npy
      numpy.load(\"out/npy/codes/cats/tom.jpg.npy\"); safetensors: safetensors.numpy.load_file(…)[\"codes\"]
  vqrae-cli export codes -o out/clean --to parquet
      datasets.load_dataset(\"parquet\", data_files=\"out/clean/*.parquet\"); jsonl: load_dataset(\"json\", …)";

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let Args { codes, output, to, name, tokens, language, hz, overwrite, allow_incomplete } = args;
    let set = CodeSet::open(&codes)?;
    catch_interrupts()?;
    let plan = Plan { set: &set, output: &output, to, name, tokens, language, hz, overwrite, allow_incomplete };
    match export(&plan)? {
        Some(summary) => {
            report::data(&summary.to_string());
            Ok(Exit::Success)
        }
        None => Ok(Exit::Interrupted),
    }
}

/// A name without folders.
fn file_name(text: &str) -> Result<String, String> {
    let parts: Vec<_> = Path::new(text).components().collect();
    match parts.as_slice() {
        [Component::Normal(_)] if !text.ends_with(['/', '.']) => Ok(text.to_string()),
        _ => Err("expected: a name without folders".to_string()),
    }
}
