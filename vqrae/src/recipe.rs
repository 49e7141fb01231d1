//! Settings in a file, TOML or JSON, and `key=value` overrides of them.

use std::path::Path;

use crate::error::{Error, Result};

/// Reads a file of settings, JSON by the ending `.json` and TOML else, and applies overrides such as `train.steps=200`.
///
/// # Errors
/// If the file cannot be read, is not of its format, or an override is not `key=value`.
pub(crate) fn read(path: &Path, overrides: &[String]) -> Result<toml::Table> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let mut table: toml::Table = match path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("json")) {
        true => serde_json::from_str(&text).map_err(|e| Error::config(path, e))?,
        false => text.parse().map_err(|e| Error::config(path, e))?,
    };
    for wish in overrides {
        set(&mut table, wish).map_err(|reason| Error::config(path, reason))?;
    }
    Ok(table)
}

/// Applies `a.b.c=value`; the value is TOML, or a bare word.
fn set(table: &mut toml::Table, wish: &str) -> std::result::Result<(), String> {
    let (key, value) = wish.split_once('=').ok_or_else(|| format!("--set {wish}: expected: key=value"))?;
    let parsed = format!("v = {value}").parse::<toml::Table>().ok().and_then(|mut t| t.remove("v"));
    let value = parsed.unwrap_or_else(|| toml::Value::String(value.to_string()));
    let mut path: Vec<&str> = key.split('.').collect();
    let last = path.pop().unwrap_or(key);
    let mut at = table;
    for part in path {
        let entry = at.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        at = entry.as_table_mut().ok_or_else(|| format!("--set {wish}: `{part}` is not a section"))?;
    }
    at.insert(last.to_string(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_reach_nested_keys() {
        let mut table: toml::Table = "[train]\nsteps = 1".parse().unwrap();
        set(&mut table, "train.steps=20").unwrap();
        set(&mut table, "train.save_dtype=f16").unwrap();
        assert_eq!(table["train"]["steps"].as_integer(), Some(20));
        assert_eq!(table["train"]["save_dtype"].as_str(), Some("f16"));
        assert!(set(&mut table, "train").is_err());
    }
}
