//! A file an image, as `tokenize` writes them for a few photos: `codes/<path>.npy` or `.safetensors`, which `reconstruct` decodes.
//! Where an image has several views, `<path>` is marked with each.

use std::path::{Component, Path};

use anyhow::{Context, Result, bail};
use vqrae::codes::{Format, Header, Row};

use super::folder::Draft;
use super::{Image, Layout, Written};

pub(super) struct Images<'a> {
    draft: &'a Draft,
    header: Header,
    format: Format,
    images: usize,
    tokens: u64,
}

impl<'a> Images<'a> {
    pub(super) fn new(draft: &'a Draft, header: &Header, format: Format) -> Result<Self> {
        draft.create_folder("codes")?;
        Ok(Self { draft, header: header.clone(), format, images: 0, tokens: 0 })
    }
}

impl Layout for Images<'_> {
    fn add(&mut self, row: &Row, image: &Image) -> Result<()> {
        let name = name(row, self.format)?;
        let (path, shown) = (self.draft.path(&name), self.draft.shown(&name));
        // In the folder of an .npy its record stands too.
        if path.exists() {
            bail!("{}: two rows of the set have the path {}", shown.display(), row.path);
        }
        let codes = row.to_codes(&self.header).context("a row without codes")?;
        codes.write(&path).with_context(|| shown.display().to_string())?;
        self.images += 1;
        self.tokens += image.codes.len() as u64;
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Written> {
        Ok(Written { tokens: self.tokens, dtype: "int32", ..Written::of(self.images) })
    }
}

/// Where a row's file is, below the output: a path of the set, which may say anything, must lead nowhere else.
fn name(row: &Row, format: Format) -> Result<String> {
    let mut components = Path::new(&row.path).components();
    if row.path.is_empty() || row.path.ends_with('/') || !components.all(|part| matches!(part, Component::Normal(_))) {
        bail!("row {}: the path {:?} would lead out of the output folder", row.key, row.path);
    }
    let view = row.view.as_ref().map(|view| format!("@{}", view.replace(['/', '\\'], "-"))).unwrap_or_default();
    Ok(format!("codes/{}{view}.{}", row.path, format.extension()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_path_leads_out_of_the_folder() {
        let named = |path: &str, view: Option<&str>| {
            let row = Row { path: path.into(), view: view.map(Into::into), ..Row::default() };
            name(&row, Format::Npy)
        };
        assert_eq!(named("cats/tom.jpg", None).unwrap(), "codes/cats/tom.jpg.npy");
        assert_eq!(named("tom.jpg", Some("32x32/flip")).unwrap(), "codes/tom.jpg@32x32-flip.npy");
        for path in ["", "/etc/passwd", "../tom.jpg", "cats/../../tom.jpg", "cats/"] {
            assert!(named(path, None).is_err(), "{path}");
        }
    }
}
