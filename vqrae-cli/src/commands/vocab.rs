//! `vocab`: visual tokens into a Hugging Face tokenizer.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;
use vqrae::codes::{CodeSet, write_whole};
use vqrae::{DType, Device, Error, Vqrae, files};

use crate::report::{self, Exit};
use crate::vocabulary::{
    Codebook, NameArgs, RECORD, TOKENIZER, Text, VisualTokens, companions, extend, read_bounded, size, tokenizer_of,
};
use crate::{hub, plan};

/// Add the codes of images to a Hugging Face tokenizer, so that a language model reads and writes them
///
/// The new tokens are one a code, and four that say where an image begins, its codes begin, a row of them ends and the image ends;
/// its size is text, 16*16. Their ids follow the largest that the tokenizer has; existing tokens keep theirs. OUT loads with
/// AutoTokenizer. Beside tokenizer.json it holds visual_tokens.json: the ids and names, and of which model the codes are.
/// `export --to lm --tokenizer OUT` writes text and codes with them. The same command again writes the same bytes.
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The tokenizer: a tokenizer.json, or a folder with one, whose other tokenizer files come along
    tokenizer: PathBuf,
    /// Folder to write
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Model whose codes they are: its folder, or OWNER/NAME[@REVISION] on the Hugging Face hub; without it, the model that ships
    /// with the program
    #[arg(long, value_name = "FOLDER|OWNER/NAME")]
    model: Option<PathBuf>,
    /// Folder of code shards that says which model's codes they are, in place of --model
    #[arg(long, value_name = "FOLDER", conflicts_with = "model")]
    codes: Option<PathBuf>,
    /// Replace files of OUT that are there and differ
    #[arg(long)]
    overwrite: bool,
    #[command(flatten, next_help_heading = "Names, by default Emu3's")]
    names: NameArgs,
}

const EXAMPLES: &str = "\
Examples:
  vqrae-cli vocab tokenizer.json -o with-images
  vqrae-cli vocab Qwen3-0.6B -o with-images --model my-model
  vqrae-cli vocab tokenizer.json -o with-images --codes codes --code-name '<img_{id}>' --row-end '<img_row>'
Then:
  vqrae-cli export codes -o out/lm --to lm --tokenizer with-images
  transformers: AutoTokenizer.from_pretrained(\"with-images\"); model.resize_token_embeddings(max(len(tokenizer), rows it has))";

pub(crate) fn execute(args: Args) -> Result<Exit> {
    let path = tokenizer_of(&args.tokenizer)?;
    let bytes = read_bounded(&path)?;
    let text = Text::parse(&path, &bytes)?;
    let vocabulary = text.vocabulary();
    let (bytes, visual) = with_visual_tokens(bytes, &text, &vocabulary, codebook(&args)?, &args)?;
    let folder = Some(args.tokenizer.as_path()).filter(|word| word.is_dir());
    let mut files = vec![(TOKENIZER, bytes)];
    files.extend(companions(folder, &vocabulary, &visual)?);
    // Last, so that where it is the others are too.
    files.push((RECORD, visual.to_bytes()?));
    write(&args.output, &files, args.overwrite)?;
    report::data(
        &json!({
            "output": args.output,
            "model_id": visual.codebook.model_id,
            "first_id": visual.first_id,
            "count": visual.count,
            "first_code_id": visual.codes.first_id,
            "vocab_size": visual.vocab_size,
        })
        .to_string(),
    );
    Ok(Exit::Success)
}

/// Whose codes become tokens.
fn codebook(args: &Args) -> Result<Codebook> {
    if let Some(codes) = &args.codes {
        return Ok(Codebook::of(&CodeSet::open(codes)?.manifest().header));
    }
    let (device, dtype) = (Device::Cpu, DType::F32);
    let model = match &args.model {
        Some(word) => Vqrae::from_pretrained(hub::folder(word)?, &device, dtype)?,
        None => plan::shipped(&device, dtype)?,
    };
    Ok(Codebook {
        model_id: model.id().to_string(),
        codebook_size: model.codebook_size(),
        codes_per_token: model.codes_per_token(),
    })
}

/// The bytes of the tokenizer with the tokens; as they are where an earlier run has put them in.
fn with_visual_tokens(
    bytes: Vec<u8>,
    text: &Text,
    vocabulary: &HashMap<String, u32>,
    codebook: Codebook,
    args: &Args,
) -> Result<(Vec<u8>, VisualTokens)> {
    let (shown, names) = (text.shown(), &args.names);
    let tokens = |first_id| {
        let tokens = VisualTokens::new(codebook.clone(), names, first_id).with_context(|| shown.to_string())?;
        names.check(&tokens).map(|()| tokens)
    };
    let new = tokens(size(vocabulary))?;
    let folder = if args.tokenizer.is_dir() { Some(args.tokenizer.as_path()) } else { args.tokenizer.parent() };
    if let Some(before) = VisualTokens::read(folder.unwrap_or(Path::new("")))?
        && !before.is_like(&new)
        && before.check(vocabulary).is_ok()
    {
        let other = if before.codebook == codebook { "has other names" } else { &format!("is for {codebook}") };
        bail!(
            "{shown} has the visual tokens of {} already, but this run {other}; start from the tokenizer without them",
            before.codebook
        );
    }
    let first = new.names().next().and_then(|name| vocabulary.get(&name));
    if let Some(&first) = first {
        let here = tokens(first.into())?;
        if here.check(vocabulary).is_ok() {
            return Ok((bytes, here));
        }
    }
    for (place, name) in new.names().enumerate() {
        if let Some(id) = vocabulary.get(&name) {
            bail!(
                "{shown} has a token `{name}` already, with the id {id}; pass another {}, or start from the tokenizer without \
                 visual tokens",
                names.flag(place)
            );
        }
    }
    if let Some((name, told, id)) = text.renumbered(&bytes) {
        report::say(&format!("note: {shown} has the id {told} for `{name}`, but readers give it {id}, which it keeps"));
    }
    Ok((extend(&bytes, text, &new)?, new))
}

/// Writes the files, each whole or not at all; what is there and differs stays, unless it may be replaced.
fn write(folder: &Path, contents: &[(&str, Vec<u8>)], overwrite: bool) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    // What a killed run left half written.
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))?.flatten() {
        files::sweep(&entry.path());
    }
    let mut differ = Vec::new();
    for (name, bytes) in contents {
        let path = folder.join(name);
        match path.exists() {
            true if read_bounded(&path)? == *bytes => {}
            true if !overwrite => bail!(
                "{} exists and differs; pass --overwrite to replace it, or choose another --output",
                path.display()
            ),
            _ => differ.push((path, bytes)),
        }
    }
    for (path, bytes) in differ {
        write_whole(path, bytes)?;
    }
    Ok(())
}
