//! What 1X's world model reads (1xgpt, in the manner of Genie): square grids of all images in one array, `video.bin`.
//!
//! ```text
//! video.bin         [num_images, s, s] of token_dtype
//! segment_ids.bin   int32 [num_images]: which clip an image is of. Here images of one folder that follow each other are a clip
//! metadata.json     num_images, s, token_dtype, vocab_size, hz where it is given
//! ```
//!
//! From `RawTokenDataset` of 1x-technologies/1xgpt's `data.py`; all numbers are little-endian.

use anyhow::{Context, Result, bail};
use serde_json::json;
use vqrae::codes::{Header, Row};

use super::folder::{Draft, OutFile};
use super::megatron::little_endian;
use super::{Image, Layout, RowIndex, Written};

pub(super) struct Genie<'a> {
    draft: &'a Draft,
    header: Header,
    hz: Option<f64>,
    side: usize,
    video: OutFile,
    segments: OutFile,
    /// The folder of the last image and the number of its clip.
    clip: Option<(String, i32)>,
    images: usize,
    index: RowIndex,
}

impl<'a> Genie<'a> {
    pub(super) fn new(draft: &'a Draft, header: &Header, hz: Option<f64>) -> Result<Self> {
        let side = match header.grid {
            Some((h, w)) if h == w => h,
            Some((h, w)) => bail!("1xgpt reads square grids, but these are {h}x{w}"),
            None => bail!("1xgpt reads square grids of one size, but every image of this set has its own"),
        };
        if header.codes_per_token != 1 {
            bail!("1xgpt reads one code a token, but these have {}", header.codes_per_token);
        }
        Ok(Self {
            draft,
            header: header.clone(),
            hz,
            side,
            video: draft.create("video.bin")?,
            segments: draft.create("segment_ids.bin")?,
            clip: None,
            images: 0,
            index: RowIndex::new(draft)?,
        })
    }

    /// The number of the clip that an image belongs to; they only grow, as the reader assumes.
    fn clip_of(&mut self, path: &str) -> Result<i32> {
        let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
        let number = match &self.clip {
            Some((last, number)) if last == folder => return Ok(*number),
            Some((_, number)) => number.checked_add(1).context("more clips than an int32 counts")?,
            None => 0,
        };
        self.clip = Some((folder.to_string(), number));
        Ok(number)
    }
}

impl Layout for Genie<'_> {
    fn add(&mut self, row: &Row, image: &Image) -> Result<()> {
        let narrow = self.header.code_dtype() == "uint16";
        self.video.put(&little_endian(image.codes, narrow))?;
        let clip = self.clip_of(&row.path)?;
        self.segments.put(&clip.to_le_bytes())?;
        self.images += 1;
        self.index.add(row)
    }

    fn finish(self: Box<Self>) -> Result<Written> {
        self.video.finish()?;
        self.segments.finish()?;
        self.index.finish()?;
        let (side, dtype) = (self.side, self.header.code_dtype());
        let mut metadata = json!({
            "num_images": self.images,
            "s": side,
            "h": side,
            "w": side,
            "token_dtype": dtype,
            "vocab_size": self.header.codebook_size,
        });
        if let Some(hz) = self.hz {
            metadata["hz"] = hz.into();
        }
        self.draft.write("metadata.json", format!("{metadata:#}\n").as_bytes())?;
        Ok(Written { tokens: (self.images * side * side) as u64, dtype, ..Written::of(self.images) })
    }
}
