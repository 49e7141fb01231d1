//! `--files-from`: paths, one a line or NUL-separated, or JSON objects with what is known about an image.
//!
//! ```text
//! cats/tom.jpg
//! {"path": "cats/tom.jpg", "caption": "a cat on a mat", "label": 3}
//! ```

use std::io::{BufRead, Read};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::About;

/// Names that other tools' lists have for the same.
const PATH: [&str; 5] = ["path", "image_path", "image", "file_name", "img_path"];
const CAPTION: [&str; 4] = ["caption", "text", "txt", "prompt"];
const LABEL: [&str; 4] = ["label", "class_id", "cls", "class"];

/// A line of a list.
pub(super) struct Line {
    pub(super) path: PathBuf,
    pub(super) about: Option<About>,
}

/// The lines of a list, which `-` reads from standard input; blank ones are left out.
pub(super) fn read(list: &Path, nul: bool) -> Result<Vec<Line>> {
    let shown = if list == Path::new("-") { "standard input".into() } else { list.display().to_string() };
    let file: Box<dyn Read> = match list == Path::new("-") {
        true => Box::new(std::io::stdin()),
        false => Box::new(std::fs::File::open(list).map_err(vqrae::Error::io(list))?),
    };
    let mut lines = Vec::new();
    for (number, line) in std::io::BufReader::new(file).split(if nul { 0 } else { b'\n' }).enumerate() {
        let line = line.with_context(|| shown.clone())?;
        let line = if nul { &line[..] } else { line.trim_ascii() };
        if !line.is_empty() {
            lines.push(parse(line).with_context(|| format!("{shown}: line {}", number + 1))?);
        }
    }
    Ok(lines)
}

fn parse(line: &[u8]) -> Result<Line> {
    if line.first() != Some(&b'{') {
        return Ok(Line { path: path(line)?, about: None });
    }
    let value: Value = serde_json::from_slice(line)?;
    let field = |names: &[&str]| names.iter().find_map(|name| value.get(name));
    let Some(text) = field(&PATH).and_then(Value::as_str) else { bail!("no `path`") };
    let mut about = About { caption: field(&CAPTION).and_then(Value::as_str).map(str::to_string), ..About::default() };
    match field(&LABEL) {
        Some(Value::Number(number)) => about.label = number.as_i64(),
        Some(Value::String(class)) => about.class = Some(class.clone()),
        _ => {}
    }
    Ok(Line { path: path(text.as_bytes())?, about: Some(about) })
}

#[cfg(unix)]
fn path(bytes: &[u8]) -> Result<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    Ok(Path::new(std::ffi::OsStr::from_bytes(bytes)).to_path_buf())
}

#[cfg(not(unix))]
fn path(bytes: &[u8]) -> Result<PathBuf> {
    Ok(PathBuf::from(std::str::from_utf8(bytes)?))
}

/// A listed path as the folder it starts from and what outputs are named after.
pub(super) fn split(path: &Path) -> Result<(PathBuf, PathBuf)> {
    if path.components().any(|part| part == Component::ParentDir) {
        bail!("{}: a path with `..` cannot name an output; list the absolute path", path.display());
    }
    let plain = |part: &Component<'_>| matches!(part, Component::Normal(_));
    let root: PathBuf = path.components().take_while(|part| !plain(part)).collect();
    let relative: PathBuf = path.components().filter(plain).collect();
    Ok((if root.as_os_str().is_empty() { PathBuf::from(".") } else { root }, relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_path_or_an_object() {
        let line = |text: &str| parse(text.as_bytes());
        assert_eq!(line("a b.jpg").unwrap().path, Path::new("a b.jpg"));
        let object = line(r#"{"image_path": "x/y.png", "text": "two", "class_id": 4}"#).unwrap();
        let about = About { caption: Some("two".into()), label: Some(4), class: None };
        assert_eq!((object.path.as_path(), object.about), (Path::new("x/y.png"), Some(about)));
        assert_eq!(line(r#"{"path": "x", "label": "tabby"}"#).unwrap().about.unwrap().class.as_deref(), Some("tabby"));
        assert!(line(r#"{"caption": "no path"}"#).is_err());
        assert!(line("{broken").is_err());
    }

    #[test]
    fn a_listed_path_has_a_root_and_a_name() {
        let split =
            |path: &str| split(Path::new(path)).map(|(a, b)| (a.display().to_string(), b.display().to_string()));
        assert_eq!(split("a/b.jpg").unwrap(), (".".into(), "a/b.jpg".into()));
        assert_eq!(split("./a/b.jpg").unwrap(), (".".into(), "a/b.jpg".into()));
        assert_eq!(split("/a/b.jpg").unwrap(), ("/".into(), "a/b.jpg".into()));
        assert!(split("../b.jpg").unwrap_err().to_string().contains("absolute"));
    }
}
