//! Codes → the ids of a generator's vocabulary, and the tokens around them.

use anyhow::{Result, bail};
use serde::Serialize;
use vqrae::codes::{Header, Row};

use super::lm::Interleaved;
use super::{Image, Written};
use crate::vocabulary::VisualTokens;

/// How codes become ids, for layouts that hold a list of tokens an image: megatron, datatrove, titok-jsonl
#[derive(clap::Args, Debug, Clone, PartialEq, Eq)]
pub(crate) struct TokenArgs {
    /// Number added to every code, such as the size of the text vocabulary that comes first
    #[arg(long, alias = "id_offset", value_name = "N", default_value_t = 0)]
    id_offset: u32,
    /// Several codes a token: the codes of codebook j become N + j·K + code, with K rows in each, so that no two codebooks share
    /// an id
    #[arg(long, alias = "separate_codebooks")]
    separate_codebooks: bool,
    /// Id to put after each row of the grid
    #[arg(long, alias = "row_end", value_name = "ID")]
    row_end: Option<u32>,
    /// Id to put before each image
    #[arg(long, value_name = "ID")]
    begin: Option<u32>,
    /// Id to put after each image
    #[arg(long, value_name = "ID")]
    end: Option<u32>,
    /// Ids of the reader's whole vocabulary, where it has more than occur here; it decides the width of a token
    #[arg(long, alias = "vocab_size", value_name = "N")]
    vocab_size: Option<u32>,
}

impl TokenArgs {
    /// Refuses them for a layout that has no use for them, for the reason that is given.
    pub(crate) fn check_absent(&self, reason: &str) -> Result<()> {
        let plain =
            Self { id_offset: 0, separate_codebooks: false, row_end: None, begin: None, end: None, vocab_size: None };
        if *self == plain {
            return Ok(());
        }
        bail!(
            "{reason}: --id-offset, --separate-codebooks, --row-end, --begin, --end and --vocab-size are \
             for megatron, datatrove and titok-jsonl"
        )
    }
}

/// Checked [`TokenArgs`]: how the codes of a set become ids.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct TokenRule {
    id_offset: u32,
    separate_codebooks: bool,
    row_end: Option<u32>,
    begin: Option<u32>,
    end: Option<u32>,
    vocab_size: u64,
    #[serde(skip)]
    codebook_size: u32,
    #[serde(skip)]
    codes_per_token: usize,
}

impl TokenRule {
    /// For the codes of a set. Ids that would stand for two things, or are beyond 32 bits or the vocabulary, are refused.
    pub(crate) fn new(args: &TokenArgs, header: &Header) -> Result<Self> {
        let TokenArgs { id_offset, separate_codebooks, row_end, begin, end, vocab_size } = args.clone();
        let (k, c) = (header.codebook_size as u64, header.codes_per_token as u64);
        let span = if separate_codebooks { k.saturating_mul(c) } else { k };
        let codes = u64::from(id_offset)..u64::from(id_offset).saturating_add(span);
        if codes.end > 1 << 32 {
            bail!(
                "codes would become ids up to {}, which 32 bits do not hold; pass a smaller --id-offset",
                codes.end - 1
            );
        }
        for (flag, id) in [("--row-end", row_end), ("--begin", begin), ("--end", end)] {
            if id.is_some_and(|id| codes.contains(&id.into())) {
                bail!(
                    "{flag} {} is the id of a code: these are {} to {}; pass another, or move the codes with --id-offset",
                    id.unwrap_or_default(),
                    codes.start,
                    codes.end - 1
                );
            }
        }
        let special = [row_end, begin, end].into_iter().flatten().map(|id| u64::from(id) + 1).max();
        let least = codes.end.max(special.unwrap_or_default());
        let vocab_size = vocab_size.map_or(least, u64::from);
        if vocab_size < least {
            bail!("--vocab-size {vocab_size} is too small: ids go up to {}", least - 1);
        }
        Ok(Self {
            id_offset,
            separate_codebooks,
            row_end,
            begin,
            end,
            vocab_size,
            codebook_size: k as u32,
            codes_per_token: header.codes_per_token,
        })
    }

    /// For a tokenizer that has visual tokens, of `vocab_size` ids in all.
    pub(super) fn of_vocabulary(visual: &VisualTokens, vocab_size: u64, header: &Header) -> Result<Self> {
        let args = TokenArgs {
            id_offset: visual.codes.first_id,
            separate_codebooks: header.codes_per_token > 1,
            row_end: Some(visual.row_end.id),
            begin: None,
            end: Some(visual.image_end.id),
            vocab_size: u32::try_from(vocab_size).ok(),
        };
        Self::new(&args, header)
    }

    /// Ids of the vocabulary: one more than the largest that can occur, unless the user named more.
    pub(crate) fn vocab_size(&self) -> u64 {
        self.vocab_size
    }

    /// Whether the codes of several codebooks have ids of their own.
    pub(crate) fn separates_codebooks(&self) -> bool {
        self.separate_codebooks
    }

    /// The tokens of an image: its codes in raster order, those of a token side by side, and what stands around them.
    pub(crate) fn document(&self, image: &Image) -> Vec<u32> {
        let line = image.w * self.codes_per_token;
        let stride = if self.separate_codebooks { self.codebook_size } else { 0 };
        let mut tokens = Vec::with_capacity(image.codes.len() + image.h + 2);
        tokens.extend(self.begin);
        for line in image.codes.chunks(line.max(1)) {
            let ids = line.iter().enumerate().map(|(i, code)| {
                let codebook = (i % self.codes_per_token.max(1)) as u32;
                self.id_offset + codebook * stride + code
            });
            tokens.extend(ids);
            tokens.extend(self.row_end);
        }
        tokens.extend(self.end);
        tokens
    }
}

/// What the rows of a set become where a document is a list of ids.
pub(super) enum Documents {
    /// The codes of an image, and what stands around them.
    Codes(TokenRule),
    /// The text of a row and its image.
    Interleaved(Box<Interleaved>),
}

impl Documents {
    /// How codes become ids.
    pub(super) fn rule(&self) -> &TokenRule {
        match self {
            Self::Codes(rule) => rule,
            Self::Interleaved(interleaved) => interleaved.rule(),
        }
    }

    /// The ids of a row.
    pub(super) fn of(&mut self, row: &Row, image: &Image) -> Result<Vec<u32>> {
        match self {
            Self::Codes(rule) => Ok(rule.document(image)),
            Self::Interleaved(interleaved) => interleaved.document(row, image),
        }
    }

    /// What was written, when `count` documents of `tokens` ids of a type were.
    pub(super) fn written(self, count: usize, tokens: u64, dtype: &'static str) -> Written {
        let rule = Some(self.rule().clone());
        let (language, notes) = match self {
            Self::Codes(_) => (None, Vec::new()),
            Self::Interleaved(interleaved) => {
                let (record, notes) = interleaved.record();
                (Some(record), notes)
            }
        };
        Written { tokens, dtype, rule, language, notes, ..Written::of(count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(codebook_size: usize, codes_per_token: usize) -> Header {
        Header {
            model_id: "0f".into(),
            preprocessing: "squash".into(),
            dtype: "f32".into(),
            codebook_size,
            codes_per_token,
            grid: None,
        }
    }

    fn args() -> TokenArgs {
        TokenArgs { id_offset: 0, separate_codebooks: false, row_end: None, begin: None, end: None, vocab_size: None }
    }

    fn document(args: &TokenArgs, c: usize, codes: &[u32], (h, w): (usize, usize)) -> Vec<u32> {
        TokenRule::new(args, &header(16, c)).unwrap().document(&Image { codes, h, w })
    }

    #[test]
    fn rows_of_the_grid_end_and_images_begin_and_end() {
        let args = TokenArgs { id_offset: 100, row_end: Some(7), begin: Some(1), end: Some(2), ..args() };
        assert_eq!(document(&args, 1, &[3, 4, 5, 6], (2, 2)), [1, 103, 104, 7, 105, 106, 7, 2]);
        assert_eq!(document(&args, 2, &[3, 4, 5, 6], (2, 1)), [1, 103, 104, 7, 105, 106, 7, 2]);
    }

    #[test]
    fn codebooks_are_told_apart_where_that_is_wished() {
        let args = TokenArgs { id_offset: 100, separate_codebooks: true, ..args() };
        assert_eq!(document(&args, 2, &[3, 4, 5, 15], (1, 2)), [103, 120, 105, 131]);
        assert_eq!(TokenRule::new(&args, &header(16, 2)).unwrap().vocab_size(), 132);
    }

    #[test]
    fn an_id_stands_for_one_thing() {
        let error = |args: TokenArgs, k| TokenRule::new(&args, &header(k, 1)).unwrap_err().to_string();
        assert!(error(TokenArgs { row_end: Some(15), ..args() }, 16).contains("--row-end 15 is the id of a code"));
        assert!(error(TokenArgs { end: Some(100), id_offset: 100, ..args() }, 16).contains("these are 100 to 115"));
        assert!(error(TokenArgs { vocab_size: Some(16), end: Some(16), ..args() }, 16).contains("ids go up to 16"));
        assert!(error(TokenArgs { id_offset: u32::MAX, ..args() }, 2).contains("32 bits"));
        assert!(error(args(), usize::MAX).contains("32 bits"));
        assert_eq!(TokenRule::new(&TokenArgs { begin: Some(16), ..args() }, &header(16, 1)).unwrap().vocab_size(), 17);
    }
}
