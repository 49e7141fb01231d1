//! datatrove's tokenized file, which nanotron trains on: tokens in `NAME.ds`, where each document ends in `NAME.ds.index`, and
//! what they are in `NAME.ds.metadata`. One document is one image, or its text and the image.
//!
//! ```text
//! NAME.ds            u16 or u32 a token
//! NAME.ds.index      u64 a document: the number of tokens up to its end
//! NAME.ds.metadata   "tokenizer|bytes of a token", the number of tokens, the same for people
//! ```
//!
//! From datatrove's `pipeline/tokens/tokenizer.py` and `utils/dataset.py`; all numbers are little-endian.

use anyhow::Result;
use vqrae::codes::Row;

use super::folder::{Draft, OutFile};
use super::megatron::little_endian;
use super::tokens::Documents;
use super::{Image, Layout, RowIndex, Written};

/// Vocabularies up to this have tokens of 16 bits, as nanotron decides it.
const NARROW_UP_TO: u64 = 1 << 16;

pub(super) struct Datatrove<'a> {
    draft: &'a Draft,
    name: String,
    tokenizer: String,
    documents: Documents,
    ds: OutFile,
    ends: OutFile,
    count: usize,
    tokens: u64,
    index: RowIndex,
}

impl<'a> Datatrove<'a> {
    pub(super) fn new(draft: &'a Draft, name: &str, model_id: &str, documents: Documents) -> Result<Self> {
        // Readers split the line at its only bar.
        let model_id: String = model_id.chars().filter(|letter| !letter.is_control() && *letter != '|').collect();
        Ok(Self {
            draft,
            name: name.to_string(),
            tokenizer: format!("vqrae-{model_id}"),
            documents,
            ds: draft.create(format!("{name}.ds"))?,
            ends: draft.create(format!("{name}.ds.index"))?,
            count: 0,
            tokens: 0,
            index: RowIndex::new(draft)?,
        })
    }

    fn narrow(&self) -> bool {
        self.documents.rule().vocab_size() <= NARROW_UP_TO
    }
}

impl Layout for Datatrove<'_> {
    fn add(&mut self, row: &Row, image: &Image) -> Result<()> {
        let tokens = self.documents.of(row, image)?;
        self.ds.put(&little_endian(&tokens, self.narrow()))?;
        self.tokens += tokens.len() as u64;
        self.ends.put(&self.tokens.to_le_bytes())?;
        self.count += 1;
        self.index.add(row)
    }

    fn finish(self: Box<Self>) -> Result<Written> {
        let (width, dtype) = if self.narrow() { (2, "uint16") } else { (4, "uint32") };
        let metadata = format!("{}|{width}\n{}\n{}", self.tokenizer, self.tokens, for_people(self.tokens));
        self.draft.write(format!("{}.ds.metadata", self.name), metadata.as_bytes())?;
        self.ds.finish()?;
        self.ends.finish()?;
        self.index.finish()?;
        Ok(self.documents.written(self.count, self.tokens, dtype))
    }
}

/// A number of tokens with three digits, as humanize's `metric` writes it: `1.54 kT`.
fn for_people(tokens: u64) -> String {
    let exponent = tokens.checked_ilog10().unwrap_or_default();
    let (thousands, digits) = (exponent / 3, (2 - exponent % 3) as usize);
    let prefix = ["", "k", "M", "G", "T", "P", "E"].get(thousands as usize).copied().unwrap_or_default();
    format!("{:.digits$} {prefix}T", tokens as f64 / 1e3f64.powi(thousands as i32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_tokens_has_three_digits() {
        // python -c 'import humanize; print([humanize.metric(n, unit="T") for n in [0, 7, 384, 1536, 25600, 999_000_000, 2**63]])'
        let expected = ["0.00 T", "7.00 T", "384 T", "1.54 kT", "25.6 kT", "999 MT", "9.22 ET"];
        assert_eq!([0, 7, 384, 1536, 25_600, 999_000_000, 1 << 63].map(for_people), expected);
    }
}
