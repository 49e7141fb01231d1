//! A Hugging Face tokenizer of text, `tokenizer.json`. The only file that knows the crate `tokenizers`.

use std::cell::Cell;
use std::collections::HashMap;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Once;

use anyhow::{Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use tokenizers::models::ModelWrapper;
use tokenizers::{AddedToken, Tokenizer};
use vqrae::Error;

/// The name of the file.
pub(crate) const TOKENIZER: &str = "tokenizer.json";

/// What to do about a file that is none.
const NEXT_STEP: &str = "pass the tokenizer.json of a Hugging Face tokenizer, or its folder";

/// Larger than any tokenizer: those of 256,000 tokens have 35 MB.
const MAX_BYTES: u64 = 256 << 20;

/// A tokenizer that was read, and where from.
pub(crate) struct Text {
    path: PathBuf,
    blake3: String,
    tokenizer: Tokenizer,
}

impl Text {
    /// Reads a `tokenizer.json`, or that of a folder.
    pub(crate) fn open(word: &Path) -> Result<Self> {
        let path = tokenizer_of(word)?;
        Self::parse(&path, &read_bounded(&path)?)
    }

    /// Reads the bytes of the file at `path`.
    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let shown = path.display();
        match without_panic(|| Tokenizer::from_bytes(bytes)) {
            Some(Ok(tokenizer)) => {
                let blake3 = blake3::hash(bytes).to_hex().to_string();
                Ok(Self { path: path.to_path_buf(), blake3, tokenizer })
            }
            Some(Err(error)) => bail!("{shown}: not a tokenizer ({error}); {NEXT_STEP}"),
            None => bail!("{shown}: not a tokenizer (what it says of tokens does not fit together); {NEXT_STEP}"),
        }
    }

    /// The file, for messages.
    pub(crate) fn shown(&self) -> std::path::Display<'_> {
        self.path.display()
    }

    /// The hash of the file.
    pub(crate) fn blake3(&self) -> &str {
        &self.blake3
    }

    /// All tokens with their ids, as every reader of the file numbers them.
    pub(crate) fn vocabulary(&self) -> HashMap<String, u32> {
        self.tokenizer.get_vocab(true)
    }

    /// The tokens that the file adds to those of its model.
    pub(super) fn added(&self) -> HashMap<String, u32> {
        let added = self.tokenizer.get_added_tokens_decoder();
        added.into_iter().map(|(id, token)| (token.content, id)).collect()
    }

    /// The tokens of the model alone.
    pub(super) fn of_model(&self) -> HashMap<String, u32> {
        self.tokenizer.get_vocab(false)
    }

    /// An added token that the file gives another id than readers do: its name and both ids.
    pub(crate) fn renumbered(&self, bytes: &[u8]) -> Option<(String, u32, u32)> {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct File {
            added_tokens: Vec<Told>,
        }
        #[derive(Deserialize)]
        struct Told {
            id: u32,
            content: String,
        }
        let told = serde_json::from_slice::<File>(bytes).unwrap_or_default().added_tokens;
        told.into_iter().find_map(|Told { id, content }| {
            let found = self.tokenizer.token_to_id(&content)?;
            (found != id).then_some((content, id, found))
        })
    }

    /// How many these are, which is the id that readers give to the first added token.
    pub(super) fn count_of_model(&self) -> u64 {
        self.tokenizer.get_vocab_size(false) as u64
    }

    /// The token with an id.
    pub(super) fn name(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// What would make the ids of a text depend on more than the text: cut and padded lengths, merges left out at random.
    pub(crate) fn make_plain(&mut self) -> Result<()> {
        self.tokenizer.with_truncation(None).map_err(|error| anyhow!("{}: {error}", self.path.display()))?;
        self.tokenizer.with_padding(None);
        if let ModelWrapper::BPE(model) = self.tokenizer.get_model()
            && model.dropout.is_some()
        {
            let mut model = model.clone();
            model.dropout = None;
            self.tokenizer.with_model(model);
        }
        Ok(())
    }

    /// The ids of a text in which names of special tokens stand for these tokens.
    pub(crate) fn encode(&mut self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, false)
    }

    /// The ids of a text that comes from elsewhere: names of special tokens in it are letters like others.
    pub(crate) fn encode_foreign(&mut self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, true)
    }

    fn encode_with(&mut self, text: &str, specials_are_text: bool) -> Result<Vec<u32>> {
        self.tokenizer.set_encode_special_tokens(specials_are_text);
        match without_panic(|| self.tokenizer.encode_fast(text, false)) {
            Some(Ok(encoding)) => Ok(encoding.get_ids().to_vec()),
            Some(Err(error)) => bail!("{}: cannot encode {text:?}: {error}", self.path.display()),
            None => bail!("{}: the tokenizer fails on {text:?}", self.path.display()),
        }
    }
}

/// A token as `added_tokens` of the file lists it.
#[derive(Serialize)]
pub(super) struct Listed {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

impl Listed {
    /// A token that is found in a text before all else, and that decoding leaves out where special tokens are not wanted.
    pub(super) fn special(name: String, id: u32) -> Self {
        Self { id, token: AddedToken::from(name, true) }
    }

    /// The same for `added_tokens_decoder` of tokenizer_config.json, where the id is the key.
    pub(super) fn token(&self) -> &AddedToken {
        &self.token
    }
}

/// The `tokenizer.json` that a file or a folder means.
pub(crate) fn tokenizer_of(word: &Path) -> Result<PathBuf> {
    let shown = word.display();
    if !word.exists() {
        bail!("{shown}: no such file or folder; {NEXT_STEP}");
    }
    if !word.is_dir() {
        return Ok(word.to_path_buf());
    }
    let path = word.join(TOKENIZER);
    if !path.exists() {
        bail!("{shown}: no {TOKENIZER} in this folder; {NEXT_STEP}");
    }
    Ok(path)
}

/// The bytes of a file that is a tokenizer, or stands beside one.
pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    // Asked before opening: opening a pipe would wait for a writer.
    if !std::fs::metadata(path).map_err(Error::io(path))?.is_file() {
        bail!("{}: not a regular file; {NEXT_STEP}", path.display());
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > MAX_BYTES {
        bail!("{}: longer than any tokenizer, {} MiB; {NEXT_STEP}", path.display(), MAX_BYTES >> 20);
    }
    Ok(bytes)
}

/// Does `work`, which may panic on hostile files; `None` if it did, and nothing is printed.
fn without_panic<T>(work: impl FnOnce() -> T) -> Option<T> {
    thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                usual(panic);
            }
        }));
    });
    QUIET.set(true);
    let done = catch_unwind(AssertUnwindSafe(work)).ok();
    QUIET.set(false);
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokenizer_that_makes_the_crate_panic_is_an_error() {
        // A merge that is longer than every token.
        let bytes = br#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}"#;
        let error = Text::parse(Path::new("tokenizer.json"), bytes).err().unwrap().to_string();
        assert!(error.starts_with("tokenizer.json: not a tokenizer") && error.contains("pass the"), "{error}");
        assert_eq!(without_panic(|| 1), Some(1));
        assert_eq!(without_panic(|| -> u8 { panic!("said by no one") }), None);
    }

    #[test]
    fn foreign_text_holds_no_tokens_of_ours() {
        let json = r#"{"added_tokens": [{"id": 3, "content": "<x>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}], "truncation": {"direction": "Right", "max_length": 1, "strategy":
            "LongestFirst", "stride": 0}, "model": {"type": "BPE", "dropout": 0.5, "vocab": {"<": 0, "x": 1, ">": 2},
            "merges": []}}"#;
        let mut text = Text::parse(Path::new("tokenizer.json"), json.as_bytes()).unwrap();
        text.make_plain().unwrap();
        assert_eq!(text.encode("<x>x").unwrap(), [3, 1]);
        assert_eq!(text.encode_foreign("<x>x").unwrap(), [0, 1, 2, 1]);
    }
}
