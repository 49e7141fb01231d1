//! What LlamaGen's own extraction writes and its training reads, a file an image: numpy arrays of int64, numbered from 0.
//!
//! ```text
//! NAME_codes/I.npy     [1, views, T] of image I: its views (flipped, cropped) side by side, one of which training picks
//! NAME_labels/I.npy    [1]
//! ```
//!
//! and for captions, a list a shard:
//!
//! ```text
//! LIST.jsonl           a line an image: {"image_path": …, "text": [caption]}
//! LIST/LINE.npy        [1, T] of the image in that line, counted from 0
//! ```
//!
//! T is h · w · C codes in raster order, those of a token side by side. From FoundationVision/LlamaGen's `extract_codes_c2i.py`,
//! `extract_codes_t2i.py`, `extract_t5_feature.py`, `dataset/imagenet.py` and `dataset/t2i.py`.

use anyhow::{Context, Result, bail};
use serde_json::json;
use vqrae::codes::shard::Stats;
use vqrae::codes::{NpyType, Row, npy_array};

use super::folder::{Draft, OutFile};
use super::{Image, Layout, RowIndex, Written, label};

/// How many files `dataset/imagenet.py` looks for, whatever there is.
const HARD_CODED: usize = 1_281_167;

/// Classes → images.
pub(super) struct ClassToImage<'a> {
    draft: &'a Draft,
    codes: String,
    labels: String,
    current: Option<Current>,
    views: Option<Vec<Option<String>>>,
    images: usize,
    tokens: u64,
    index: RowIndex,
}

/// The image whose views are coming.
struct Current {
    path: String,
    label: i64,
    views: Vec<Option<String>>,
    codes: Vec<i64>,
}

impl<'a> ClassToImage<'a> {
    pub(super) fn new(draft: &'a Draft, name: &str) -> Result<Self> {
        let (codes, labels) = (format!("{name}_codes"), format!("{name}_labels"));
        draft.create_folder(&codes)?;
        draft.create_folder(&labels)?;
        let index = RowIndex::new(draft)?;
        Ok(Self { draft, codes, labels, current: None, views: None, images: 0, tokens: 0, index })
    }

    /// Writes the image whose views have all come.
    fn end_image(&mut self) -> Result<()> {
        let Some(Current { path, label, views, codes }) = self.current.take() else { return Ok(()) };
        let of_all = self.views.get_or_insert_with(|| views.clone());
        if *of_all != views {
            bail!(
                "{path} has the views {}, but the images before it {}; LlamaGen wants the same of every image",
                names(&views),
                names(of_all)
            );
        }
        let shape = [1, views.len(), codes.len() / views.len().max(1)];
        let file = format!("{}/{}.npy", self.codes, self.images);
        self.draft.write(&file, &npy_array(NpyType::I64, &shape, &codes).map_err(anyhow::Error::msg)?)?;
        let file = format!("{}/{}.npy", self.labels, self.images);
        self.draft.write(&file, &npy_array(NpyType::I64, &[1], &[label]).map_err(anyhow::Error::msg)?)?;
        self.images += 1;
        self.tokens += codes.len() as u64;
        Ok(())
    }
}

impl Layout for ClassToImage<'_> {
    fn add(&mut self, row: &Row, image: &Image) -> Result<()> {
        let codes = image.codes.iter().map(|&code| i64::from(code));
        match &mut self.current {
            // The same view once more is the same file listed twice.
            Some(current) if current.path == row.path && !current.views.contains(&row.view) => {
                current.views.push(row.view.clone());
                current.codes.extend(codes);
            }
            _ => {
                self.end_image()?;
                self.index.add(row)?;
                let (path, label) = (row.path.clone(), label(row)?);
                self.current = Some(Current { path, label, views: vec![row.view.clone()], codes: codes.collect() });
            }
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<Written> {
        self.end_image()?;
        self.index.finish()?;
        let views = self.views.unwrap_or_default();
        let mut notes = Vec::new();
        if self.images != HARD_CODED {
            notes.push(format!(
                "dataset/imagenet.py of LlamaGen looks for {HARD_CODED} files in each folder; change it to {}",
                self.images
            ));
        }
        if views.len() > 1 {
            notes.push(format!("LlamaGen picks one of {} views only where --code-path has `flip` in it", views.len()));
        }
        let views = views.into_iter().map(Option::unwrap_or_default).collect();
        Ok(Written { tokens: self.tokens, dtype: "int64", views, notes, ..Written::of(self.images) })
    }
}

/// Views for a message.
fn names(views: &[Option<String>]) -> String {
    let names: Vec<_> = views.iter().map(|view| view.as_deref().unwrap_or("(whole)")).collect();
    names.join(", ")
}

/// Captions → images.
pub(super) struct TextToImage<'a> {
    draft: &'a Draft,
    list: Option<List>,
    images: usize,
    tokens: u64,
}

struct List {
    name: String,
    lines: OutFile,
    count: usize,
}

impl<'a> TextToImage<'a> {
    pub(super) fn new(draft: &'a Draft) -> Self {
        Self { draft, list: None, images: 0, tokens: 0 }
    }

    fn end_list(&mut self) -> Result<()> {
        self.list.take().map_or(Ok(()), |list| list.lines.finish())
    }
}

impl Layout for TextToImage<'_> {
    fn begin_shard(&mut self, shard: &Stats) -> Result<()> {
        self.end_list()?;
        // The reader takes a list's name up to its first dot.
        let name = shard.shard.replace('.', "_");
        self.draft.create_folder(&name)?;
        let lines = self.draft.create(format!("{name}.jsonl"))?;
        self.list = Some(List { name, lines, count: 0 });
        Ok(())
    }

    fn add(&mut self, row: &Row, image: &Image) -> Result<()> {
        let list = self.list.as_mut().context("a row outside of a shard")?;
        let Some(caption) = &row.caption else {
            bail!(
                "row {} ({}) has no caption, which llamagen-t2i needs; tokenize images with their captions",
                row.key,
                row.path
            );
        };
        let codes: Vec<i64> = image.codes.iter().map(|&code| i64::from(code)).collect();
        let array = npy_array(NpyType::I64, &[1, codes.len()], &codes).map_err(anyhow::Error::msg)?;
        self.draft.write(format!("{}/{}.npy", list.name, list.count), &array)?;
        let line = json!({ "image_path": row.path, "text": [caption], "key": row.key, "view": row.view });
        list.lines.put_line(&line)?;
        list.count += 1;
        self.images += 1;
        self.tokens += codes.len() as u64;
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<Written> {
        self.end_list()?;
        Ok(Written { tokens: self.tokens, dtype: "int64", ..Written::of(self.images) })
    }
}
