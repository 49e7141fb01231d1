//! The lines that TiTok's repository trains its generators on (RAR, MaskGIT): `NAME.jsonl`, for each image
//! `{"class_id": 7, "tokens": [3, 1, 4]}`. The reader counts lines and picks them by number.
//!
//! From `PretoeknizedDataSetJSONL` of bytedance/1d-tokenizer's `data/webdataset_reader.py`.

use anyhow::Result;
use serde::Serialize;
use vqrae::codes::Row;

use super::folder::{Draft, OutFile};
use super::tokens::TokenRule;
use super::{Image, Layout, RowIndex, Written, label};

#[derive(Serialize)]
struct Line<'a> {
    class_id: i64,
    tokens: &'a [u32],
}

pub(super) struct Titok {
    rule: TokenRule,
    lines: OutFile,
    images: usize,
    tokens: u64,
    index: RowIndex,
}

impl Titok {
    pub(super) fn new(draft: &Draft, name: &str, rule: TokenRule) -> Result<Self> {
        let lines = draft.create(format!("{name}.jsonl"))?;
        Ok(Self { rule, lines, images: 0, tokens: 0, index: RowIndex::new(draft)? })
    }
}

impl Layout for Titok {
    fn add(&mut self, row: &Row, image: &Image) -> Result<()> {
        let tokens = self.rule.document(image);
        self.lines.put_line(&Line { class_id: label(row)?, tokens: &tokens })?;
        self.images += 1;
        self.tokens += tokens.len() as u64;
        self.index.add(row)
    }

    fn finish(self: Box<Self>) -> Result<Written> {
        self.lines.finish()?;
        self.index.finish()?;
        Ok(Written { tokens: self.tokens, dtype: "int", rule: Some(self.rule), ..Written::of(self.images) })
    }
}
