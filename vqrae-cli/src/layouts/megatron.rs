//! Megatron's indexed data set, which Megatron-LM, NeMo and Megatron Bridge train on: tokens in `NAME.bin`, where each document
//! begins in `NAME.idx`. One document is one image, or its text and the image.
//!
//! ```text
//! NAME.idx   "MMIDIDX\0\0", u64 version 1, u8 type of a token (8: uint16, 4: int32), u64 sequences S, u64 S + 1,
//!            i32 [S] tokens of each, i64 [S] where each begins in bytes, i64 [S + 1] which sequence each document begins with
//! ```
//!
//! From Megatron-LM's `megatron/core/datasets/indexed_dataset.py`; all numbers are little-endian.

use anyhow::{Result, bail};
use vqrae::codes::Row;

use super::folder::{Draft, OutFile};
use super::tokens::Documents;
use super::{Image, Layout, RowIndex, Written};

/// Vocabularies below this have tokens of 16 bits, as Megatron's own writer decides it.
const NARROW_BELOW: u64 = 65_500;

/// The largest number of Megatron's widest type of tokens, int32, and one more.
const WIDEST: u64 = 1 << 31;

pub(super) struct Megatron<'a> {
    draft: &'a Draft,
    name: String,
    documents: Documents,
    bin: OutFile,
    lengths: Vec<i32>,
    tokens: u64,
    index: RowIndex,
}

impl<'a> Megatron<'a> {
    pub(super) fn new(draft: &'a Draft, name: &str, documents: Documents) -> Result<Self> {
        let vocab_size = documents.rule().vocab_size();
        if vocab_size > WIDEST {
            bail!("ids up to {} do not fit into int32, Megatron's widest type of tokens", vocab_size - 1);
        }
        let bin = draft.create(format!("{name}.bin"))?;
        let index = RowIndex::new(draft)?;
        Ok(Self { draft, name: name.to_string(), documents, bin, lengths: Vec::new(), tokens: 0, index })
    }

    fn narrow(&self) -> bool {
        self.documents.rule().vocab_size() < NARROW_BELOW
    }
}

impl Layout for Megatron<'_> {
    fn add(&mut self, row: &Row, image: &Image) -> Result<()> {
        let tokens = self.documents.of(row, image)?;
        self.bin.put(&little_endian(&tokens, self.narrow()))?;
        self.lengths.push(i32::try_from(tokens.len())?);
        self.tokens += tokens.len() as u64;
        self.index.add(row)
    }

    fn finish(self: Box<Self>) -> Result<Written> {
        let (code, width, dtype) = if self.narrow() { (8u8, 2, "uint16") } else { (4u8, 4, "int32") };
        let count = self.lengths.len();
        self.bin.finish()?;
        let mut idx = self.draft.create(format!("{}.idx", self.name))?;
        idx.put(b"MMIDIDX\0\0")?;
        idx.put(&1u64.to_le_bytes())?;
        idx.put(&[code])?;
        idx.put(&(count as u64).to_le_bytes())?;
        idx.put(&(count as u64 + 1).to_le_bytes())?;
        for length in &self.lengths {
            idx.put(&length.to_le_bytes())?;
        }
        let mut begin = 0i64;
        for &length in &self.lengths {
            idx.put(&begin.to_le_bytes())?;
            begin += i64::from(length) * width;
        }
        for document in 0..=count as i64 {
            idx.put(&document.to_le_bytes())?;
        }
        idx.finish()?;
        self.index.finish()?;
        Ok(self.documents.written(count, self.tokens, dtype))
    }
}

/// Tokens as numbers of 16 or 32 bits; those of a vocabulary that fits into 16 lose nothing.
pub(super) fn little_endian(tokens: &[u32], narrow: bool) -> Vec<u8> {
    if narrow {
        tokens.iter().flat_map(|&token| (token as u16).to_le_bytes()).collect()
    } else {
        tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
    }
}
