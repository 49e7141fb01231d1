//! The visual tokens of a language model: the names and ids that codes, and what stands around them, have in a tokenizer of text.
//!
//! An image is written as Emu3 writes it, its size as text, its codes row by row:
//!
//! ```text
//! <|image start|>2*3<|image token|>CODE CODE CODE<|image row end|>CODE CODE CODE<|image row end|><|image end|>
//! ```
//!
//! The new ids are one run after the largest id that the tokenizer had: the four names above, then the codes. Codebook j of
//! several has the codes of `j·K` to `j·K + K - 1`. `visual_tokens.json` beside `tokenizer.json` says so.

mod companions;
mod extend;
mod names;
mod text;

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use vqrae::codes::Header;

pub(crate) use self::companions::companions;
pub(crate) use self::extend::extend;
pub(crate) use self::names::{NameArgs, Template};
pub(crate) use self::text::{TOKENIZER, Text, read_bounded, tokenizer_of};

/// What `visual_tokens.json` says first.
const FORMAT: &str = "vqrae-vocab-1";

/// The name of the file.
pub(crate) const RECORD: &str = "visual_tokens.json";

/// Whose codes are tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Codebook {
    /// The id of the model.
    pub(crate) model_id: String,
    /// Codes of a codebook, K.
    pub(crate) codebook_size: usize,
    /// Codes a token of the image, C, each from a codebook of its own.
    pub(crate) codes_per_token: usize,
}

impl Codebook {
    /// Of a set of codes.
    pub(crate) fn of(header: &Header) -> Self {
        let Header { model_id, codebook_size, codes_per_token, .. } = header.clone();
        Self { model_id, codebook_size, codes_per_token }
    }
}

impl std::fmt::Display for Codebook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { model_id, codebook_size, codes_per_token } = self;
        match codes_per_token {
            1 => write!(f, "model {model_id} ({codebook_size} codes)"),
            c => write!(f, "model {model_id} ({c} codebooks of {codebook_size} codes)"),
        }
    }
}

/// A token that is one of its kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    pub(crate) name: String,
    pub(crate) id: u32,
}

/// The tokens that codes become.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CodeTokens {
    /// The name of each, by the code's number.
    pub(crate) name: Template,
    pub(crate) first_id: u32,
    pub(crate) count: u32,
}

/// The visual tokens of a tokenizer: `visual_tokens.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VisualTokens {
    format: String,
    #[serde(flatten)]
    pub(crate) codebook: Codebook,
    /// The least of the ids.
    pub(crate) first_id: u32,
    /// How many there are.
    pub(crate) count: u32,
    /// One more than the largest: rows that the language model's embedding needs.
    pub(crate) vocab_size: u32,
    pub(crate) image_start: Mark,
    pub(crate) image_token: Mark,
    pub(crate) image_end: Mark,
    pub(crate) row_end: Mark,
    pub(crate) codes: CodeTokens,
}

/// Names that are no code's.
const MARKS: u32 = 4;

impl VisualTokens {
    /// Gives the names ids from `first_id` on.
    pub(crate) fn new(codebook: Codebook, names: &NameArgs, first_id: u64) -> Result<Self> {
        let codes = codebook.codebook_size.saturating_mul(codebook.codes_per_token);
        let vocab_size = (codes as u64).saturating_add(first_id + u64::from(MARKS));
        let (Ok(vocab_size), Ok(first_id)) = (u32::try_from(vocab_size), u32::try_from(first_id)) else {
            bail!("ids would go up to {}, which 32 bits do not hold", vocab_size.saturating_sub(1));
        };
        let mark = |name: &str, at: u32| Mark { name: name.to_string(), id: first_id + at };
        let [image_start, image_token, image_end, row_end] = names.marks().map(|(_, name)| name);
        let first_code = first_id + MARKS;
        Ok(Self {
            format: FORMAT.to_string(),
            codebook,
            first_id,
            count: vocab_size - first_id,
            vocab_size,
            image_start: mark(image_start, 0),
            image_token: mark(image_token, 1),
            image_end: mark(image_end, 2),
            row_end: mark(row_end, 3),
            codes: CodeTokens { name: names.code_name.clone(), first_id: first_code, count: vocab_size - first_code },
        })
    }

    /// All names, in the order of their ids.
    pub(crate) fn names(&self) -> impl Iterator<Item = String> + '_ {
        let marks = [&self.image_start, &self.image_token, &self.image_end, &self.row_end];
        let codes = (0..self.codes.count).map(|code| self.codes.name.of(code));
        marks.into_iter().map(|mark| mark.name.clone()).chain(codes)
    }

    /// All names with their ids.
    pub(crate) fn ids(&self) -> impl Iterator<Item = (String, u32)> + '_ {
        self.names().zip(self.first_id..)
    }

    /// Refuses a tokenizer that gives a name another id.
    pub(crate) fn check(&self, vocabulary: &HashMap<String, u32>) -> Result<()> {
        for (name, id) in self.ids() {
            match vocabulary.get(&name) {
                Some(&found) if found == id => {}
                Some(found) => bail!("the token `{name}` has the id {found}, expected: {id}"),
                None => bail!("there is no token `{name}`, expected: with the id {id}"),
            }
        }
        Ok(())
    }

    /// Whether two differ in nothing but where ids begin.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        self.codebook == other.codebook && self.names().eq(other.names())
    }

    /// Reads the record of a folder; `None` if it has none.
    pub(crate) fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(RECORD);
        if !path.exists() {
            return Ok(None);
        }
        let damaged = "write it anew with vqrae-cli vocab, from the tokenizer without visual tokens";
        let record: Self = serde_json::from_slice(&read_bounded(&path)?)
            .with_context(|| format!("{}: not a record of visual tokens; {damaged}", path.display()))?;
        // What it says of ids follows from the first of them.
        let again = Self::new(record.codebook.clone(), &NameArgs::of(&record), record.first_id.into());
        if again.ok().as_ref() != Some(&record) {
            bail!("{}: what it says of the ids does not agree; {damaged}", path.display());
        }
        Ok(Some(record))
    }

    /// The bytes of the record.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        Ok((serde_json::to_string_pretty(self)? + "\n").into_bytes())
    }
}

/// A tokenizer that knows visual tokens.
pub(crate) struct Vocabulary {
    pub(crate) text: Text,
    pub(crate) visual: VisualTokens,
    /// One more than the largest id.
    pub(crate) size: u64,
}

impl Vocabulary {
    /// Opens a folder that `vocab` wrote.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let shown = folder.display();
        let Some(visual) = VisualTokens::read(folder)? else {
            bail!("{shown}: no {RECORD} in it; pass a folder that vqrae-cli vocab wrote");
        };
        let text = Text::open(folder)?;
        let vocabulary = text.vocabulary();
        visual.check(&vocabulary).with_context(|| {
            format!("{}: not the tokenizer that {RECORD} is of; run vqrae-cli vocab again", text.shown())
        })?;
        let size = size(&vocabulary);
        Ok(Self { text, visual, size })
    }
}

/// One more than the largest id.
pub(crate) fn size(vocabulary: &HashMap<String, u32>) -> u64 {
    vocabulary.values().max().map_or(0, |&id| u64::from(id) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn codebook(codebook_size: usize, codes_per_token: usize) -> Codebook {
        Codebook { model_id: "0f3a".into(), codebook_size, codes_per_token }
    }

    #[test]
    fn ids_are_one_run_and_the_record_says_so() {
        let tokens = VisualTokens::new(codebook(5, 2), &NameArgs::default(), 100).unwrap();
        let ids: Vec<_> = tokens.ids().collect();
        assert_eq!(ids.len(), 14);
        assert_eq!(ids[0], ("<|image start|>".into(), 100));
        assert_eq!(ids[3], ("<|image row end|>".into(), 103));
        assert_eq!(ids[4], ("<|visual token 000000|>".into(), 104));
        assert_eq!(ids[13], ("<|visual token 000009|>".into(), 113));
        assert_eq!((tokens.codes.first_id, tokens.vocab_size), (104, 114));
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(VisualTokens::read(folder.path()).unwrap(), None);
        std::fs::write(folder.path().join(RECORD), tokens.to_bytes().unwrap()).unwrap();
        assert_eq!(VisualTokens::read(folder.path()).unwrap(), Some(tokens));
    }

    #[test]
    fn a_record_that_contradicts_itself_is_refused() {
        let tokens = VisualTokens::new(codebook(5, 1), &NameArgs::default(), 100).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let text = String::from_utf8(tokens.to_bytes().unwrap()).unwrap();
        for (from, to) in [("109", "110"), ("104", "105"), ("\"codebook_size\": 5", "\"codebook_size\": 6"), ("{", "[")]
        {
            assert!(text.contains(from));
            std::fs::write(folder.path().join(RECORD), text.replacen(from, to, 1)).unwrap();
            let error = format!("{:#}", VisualTokens::read(folder.path()).unwrap_err());
            assert!(error.contains(RECORD) && error.contains("vqrae-cli vocab"), "{error}");
        }
    }

    #[test]
    fn ids_beyond_32_bits_are_refused() {
        for (k, c, first) in
            [(usize::MAX, 2, 0), (1 << 32, 1, 0), (16, 1, u64::from(u32::MAX)), (16, 1, (1 << 32) - 19)]
        {
            let error = VisualTokens::new(codebook(k, c), &NameArgs::default(), first).unwrap_err().to_string();
            assert!(error.contains("32 bits"), "{error}");
        }
        assert!(VisualTokens::new(codebook(16, 1), &NameArgs::default(), (1 << 32) - 21).is_ok());
    }
}
