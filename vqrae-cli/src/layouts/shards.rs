//! The same shards in another layout: parquet, jsonl or WebDataset, with their statistics and manifest: a set of its own, in which
//! every row has codes.

use std::fs::File;
use std::io::{BufWriter, Write};

use anyhow::{Context, Result};
use vqrae::Error;
use vqrae::codes::shard::{self, Stats, Tally, Writer};
use vqrae::codes::{Manifest, Row};

use super::folder::Draft;
use super::{Image, Layout, Written};

pub(super) struct Shards<'a> {
    draft: &'a Draft,
    manifest: Manifest,
    current: Option<Current>,
    images: usize,
    tokens: u64,
}

struct Current {
    source: Stats,
    file: String,
    writer: Writer<Hashed>,
    tally: Tally,
}

impl<'a> Shards<'a> {
    /// Of a set with this manifest.
    pub(super) fn new(draft: &'a Draft, manifest: &Manifest, layout: shard::Layout) -> Self {
        Self { draft, manifest: Manifest { layout, ..manifest.clone() }, current: None, images: 0, tokens: 0 }
    }

    fn end_shard(&mut self) -> Result<()> {
        let Some(Current { source, file, writer, tally }) = self.current.take() else { return Ok(()) };
        let shown = self.draft.shown(&file).display().to_string();
        let hashed = writer.finish().map_err(anyhow::Error::msg).context(shown.clone())?.finish().context(shown)?;
        let stats = tally.stats(&source.shard, self.manifest.layout, &source.inputs, source.shards, hashed);
        stats.write(&self.draft.path(""))?;
        self.images += stats.ok;
        self.tokens += stats.codes;
        Ok(())
    }
}

impl Layout for Shards<'_> {
    fn begin_shard(&mut self, source: &Stats) -> Result<()> {
        self.end_shard()?;
        let (header, layout) = (&self.manifest.header, self.manifest.layout);
        let file = format!("{}.{}", source.shard, layout.extension());
        let out = Hashed::create(self.draft, &file)?;
        let writer = Writer::new(out, header, layout).map_err(anyhow::Error::msg)?;
        self.current = Some(Current { source: source.clone(), file, writer, tally: Tally::new(header) });
        Ok(())
    }

    fn add(&mut self, row: &Row, _: &Image) -> Result<()> {
        let current = self.current.as_mut().context("a row outside of a shard")?;
        current.tally.add(row);
        let shown = || self.draft.shown(&current.file).display().to_string();
        current.writer.write(row).map_err(anyhow::Error::msg).with_context(shown)
    }

    fn finish(mut self: Box<Self>) -> Result<Written> {
        self.end_shard()?;
        self.manifest.write(&self.draft.path(""))?;
        let dtype = self.manifest.header.code_dtype();
        Ok(Written { tokens: self.tokens, dtype, ..Written::of(self.images) })
    }
}

/// A file with the length and the hash of what is written to it.
struct Hashed {
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Hashed {
    fn create(draft: &Draft, name: &str) -> Result<Self> {
        let file = File::create_new(draft.path(name)).map_err(Error::io(draft.shown(name)))?;
        Ok(Self { file: BufWriter::with_capacity(1 << 16, file), hasher: blake3::Hasher::new(), bytes: 0 })
    }

    fn finish(mut self) -> Result<(u64, String)> {
        self.file.flush()?;
        Ok((self.bytes, self.hasher.finalize().to_hex().to_string()))
    }
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}
