//! Visual tokens into the files of a tokenizer. What a file says already stays byte for byte: entries are put behind those that
//! are there, so no number, order or setting of another program's file is written anew.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, Result, bail};
use serde::de::IgnoredAny;
use serde_json::Deserializer;

use super::text::Listed;
use super::{Text, VisualTokens};

/// The bytes of a `tokenizer.json` with the visual tokens; existing tokens keep their ids, which is checked.
///
/// Readers number added tokens themselves, one after the other from the number of the model's tokens on, whatever `id` the file
/// says. Where ids of the model have holes, that number is taken, so there all added tokens become the model's too, which has ids
/// that hold.
pub(crate) fn extend(bytes: &[u8], text: &Text, visual: &VisualTokens) -> Result<Vec<u8>> {
    let shown = text.shown();
    let (before, model) = (text.vocabulary(), text.of_model());
    let has_holes = super::size(&model) != text.count_of_model();
    let mut extended = list(bytes, visual).with_context(|| shown.to_string())?;
    if has_holes {
        let mut named: Vec<(String, u32)> =
            text.added().into_iter().filter(|(name, _)| !model.contains_key(name)).collect();
        named.sort_by_key(|(_, id)| *id);
        named.extend(visual.ids());
        extended = give_to_model(&extended, &named).with_context(|| shown.to_string())?;
    }
    let after = Text::parse(std::path::Path::new(super::text::TOKENIZER), &extended)
        .with_context(|| format!("{shown}: visual tokens make it unreadable"))?;
    check(&before, &after, visual).with_context(|| format!("{shown}: cannot hold visual tokens"))?;
    Ok(extended)
}

/// Adds to `added_tokens` of a `tokenizer.json`.
fn list(bytes: &[u8], visual: &VisualTokens) -> Result<Vec<u8>> {
    let listed = visual.ids().map(|(name, id)| serde_json::to_string(&Listed::special(name, id)));
    let entries: Vec<String> = listed.collect::<serde_json::Result<_>>()?;
    let root = root(bytes)?;
    match member(bytes, &root, "added_tokens")? {
        Some(place) => append(bytes, &place, &entries),
        None => append(bytes, &root, &[format!("\"added_tokens\":[{}]", entries.join(","))]),
    }
}

/// Adds to the vocabulary of the model of a `tokenizer.json`.
fn give_to_model(bytes: &[u8], named: &[(String, u32)]) -> Result<Vec<u8>> {
    let model = member(bytes, &root(bytes)?, "model")?.context("there is no `model`")?;
    let vocabulary = member(bytes, &model, "vocab")?.context("there is no `model.vocab`")?;
    if bytes[vocabulary.start] != b'{' {
        bail!("ids have holes, which a vocabulary of this kind of model cannot have");
    }
    let entry = |(name, id): &(String, u32)| Ok(format!("{}:{id}", serde_json::to_string(name)?));
    append(bytes, &vocabulary, &named.iter().map(entry).collect::<serde_json::Result<Vec<_>>>()?)
}

/// Refuses an extended tokenizer in which a token of before has another id, or a new one not its own.
fn check(before: &HashMap<String, u32>, after: &Text, visual: &VisualTokens) -> Result<()> {
    let vocabulary = after.vocabulary();
    for (name, id) in before {
        if vocabulary.get(name) != Some(id) {
            bail!("the token `{name}` would no longer have the id {id}");
        }
    }
    visual.check(&vocabulary)?;
    for (name, id) in visual.ids() {
        match after.name(id) {
            Some(found) if found == name => {}
            found => bail!("the id {id} would be of `{}`, expected: `{name}`", found.unwrap_or_default()),
        }
    }
    Ok(())
}

/// Where the one value of a file stands.
pub(super) fn root(bytes: &[u8]) -> Result<Range<usize>> {
    let start = skip_space(bytes, 0);
    Ok(start..value_end(bytes, start)?)
}

/// Where the value of a key of an object stands; of a key that occurs twice the last, as readers take it.
pub(super) fn member(bytes: &[u8], object: &Range<usize>, key: &str) -> Result<Option<Range<usize>>> {
    if bytes.get(object.start) != Some(&b'{') {
        bail!("expected: an object");
    }
    let mut found = None;
    let mut at = skip_space(bytes, object.start + 1);
    while bytes.get(at) == Some(&b'"') {
        let end = value_end(bytes, at)?;
        let name: String = serde_json::from_slice(&bytes[at..end])?;
        let start = skip_space(bytes, skip_space(bytes, end) + 1); // behind the colon
        let end = value_end(bytes, start)?;
        if name == key {
            found = Some(start..end);
        }
        at = skip_space(bytes, skip_space(bytes, end) + 1); // behind the comma
    }
    Ok(found)
}

/// Puts entries behind those of an array or object, spaced as these are.
pub(super) fn append(bytes: &[u8], place: &Range<usize>, entries: &[String]) -> Result<Vec<u8>> {
    if !matches!(bytes.get(place.start), Some(b'[' | b'{')) {
        bail!("expected: a list");
    }
    let inside = &bytes[place.start + 1..place.end - 1];
    let first = skip_space(inside, 0);
    let (space, mut comma) = if first == inside.len() { (&[][..], &[][..]) } else { (&inside[..first], &b","[..]) };
    let last =
        inside.iter().rposition(|byte| !byte.is_ascii_whitespace()).map_or(place.start, |last| place.start + 1 + last);
    let mut extended = bytes[..=last].to_vec();
    for entry in entries {
        extended.extend_from_slice(comma);
        extended.extend_from_slice(space);
        extended.extend_from_slice(entry.as_bytes());
        comma = b",";
    }
    extended.extend_from_slice(&bytes[last + 1..]);
    Ok(extended)
}

/// Where the value that begins at `start` ends.
fn value_end(bytes: &[u8], start: usize) -> Result<usize> {
    let mut values = Deserializer::from_slice(bytes.get(start..).unwrap_or_default()).into_iter::<IgnoredAny>();
    values.next().context("ends early")??;
    Ok(start + values.byte_offset())
}

fn skip_space(bytes: &[u8], from: usize) -> usize {
    let rest = bytes.get(from..).unwrap_or_default();
    from + rest.iter().take_while(|byte| byte.is_ascii_whitespace()).count()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::tests::codebook;
    use super::super::{NameArgs, size};
    use super::*;

    fn extended(json: &str) -> Result<(String, VisualTokens)> {
        let text = Text::parse(Path::new("tokenizer.json"), json.as_bytes())?;
        let visual = VisualTokens::new(codebook(3, 1), &NameArgs::default(), size(&text.vocabulary()))?;
        Ok((String::from_utf8(extend(json.as_bytes(), &text, &visual)?)?, visual))
    }

    fn added(name: &str, id: u32) -> String {
        serde_json::to_string(&Listed::special(name.into(), id)).unwrap()
    }

    #[test]
    fn nothing_but_the_new_entries_is_written() {
        let a = added("[A]", 2);
        for (before, after) in
            [("[]", "[|]"), ("[ ]", "[| ]"), (&*format!("[\n  {a}\n]"), &*format!("[\n  {a},\n  |\n]"))]
        {
            let model = r#"{"type": "WordLevel", "later": 1e-7, "vocab": {"y": 1, "x": 0}, "unk_token": "x"}"#;
            let json = |list: &str| format!("{{ \"added_tokens\":{list}, \"model\": {model}}}\n");
            let (found, visual) = extended(&json(before)).unwrap();
            let separator = if before.contains('\n') { ",\n  " } else { "," };
            let entries: Vec<String> = visual.ids().map(|(name, id)| added(&name, id)).collect();
            assert_eq!(found, json(&after.replace('|', &entries.join(separator))));
        }
    }

    #[test]
    fn ids_are_new_whatever_the_file_looks_like() {
        let model = |vocab: &str| format!(r#""model": {{"type": "BPE", "vocab": {vocab}, "merges": []}}"#);
        let (a, b) = (added("[A]", 7), added("[B]", 3));
        for (json, first) in [
            // No list of added tokens at all.
            (format!("{{{}}}", model(r#"{"x": 0, "y": 1}"#)), 2),
            // Added tokens out of order, and with ids that readers do not heed.
            (format!(r#"{{"added_tokens": [{a}, {b}], {}}}"#, model(r#"{"x": 0, "y": 1}"#)), 4),
            // Holes in the ids of the model.
            (format!("{{{}}}", model(r#"{"x": 0, "y": 9}"#)), 10),
            (format!(r#"{{"added_tokens": [{a}, {b}], {}}}"#, model(r#"{"y": 9, "x": 0}"#)), 10),
            // Added tokens that are the model's too; a key twice; no token at all.
            (format!(r#"{{"added_tokens": [{a}], {}}}"#, model(r#"{"x": 0, "[A]": 5}"#)), 6),
            (format!(r#"{{"added_tokens": [], {}, "added_tokens": [{a}]}}"#, model(r#"{"x": 0}"#)), 2),
            (format!("{{{}}}", model("{}")), 0),
        ] {
            let before = Text::parse(Path::new("tokenizer.json"), json.as_bytes()).unwrap().vocabulary();
            let (after, visual) = extended(&json).unwrap();
            assert_eq!(visual.first_id, first, "{json}");
            let after = Text::parse(Path::new("tokenizer.json"), after.as_bytes()).unwrap().vocabulary();
            assert_eq!(after.len(), before.len() + 7);
            before.iter().for_each(|(name, id)| assert_eq!(after.get(name), Some(id), "{name} of {json}"));
            visual.check(&after).unwrap();
        }
    }
}
