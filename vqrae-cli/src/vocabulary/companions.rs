//! What stands beside a `tokenizer.json` in its folder, and what transformers reads of it.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::extend::{append, member, root};
use super::text::Listed;
use super::{VisualTokens, read_bounded};

/// What AutoTokenizer reads first.
const CONFIG: &str = "tokenizer_config.json";

/// The same special tokens once more.
const SPECIAL: &str = "special_tokens_map.json";

/// Ids of added tokens, by their names.
const ADDED: &str = "added_tokens.json";

/// What comes along.
const COMPANIONS: [&str; 8] = [
    CONFIG,
    SPECIAL,
    ADDED,
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

/// The configuration of a tokenizer that has none: what transformers loads any `tokenizer.json` by.
const PLAIN_CONFIG: &str =
    "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"clean_up_tokenization_spaces\": false\n}\n";

/// The files of a tokenizer's folder, by name, as they are with visual tokens; where there is no folder, a configuration alone.
///
/// transformers gives tokens that these files name, but `tokenizer.json` lacks, ids of its own: the next ones, which visual tokens
/// would take. `before`, the vocabulary without these, must have all.
pub(crate) fn companions(
    folder: Option<&Path>,
    before: &HashMap<String, u32>,
    visual: &VisualTokens,
) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let mut files = Vec::new();
    for name in COMPANIONS {
        let Some(path) = folder.map(|folder| folder.join(name)).filter(|path| path.exists()) else { continue };
        let bytes = read_bounded(&path)?;
        let shown = path.display();
        if [CONFIG, SPECIAL, ADDED].contains(&name) {
            let value = serde_json::from_slice(&bytes).with_context(|| format!("{shown}: not a configuration"))?;
            check(name, &value, before).with_context(|| shown.to_string())?;
        }
        let bytes = match name {
            CONFIG => extend_config(&bytes, visual).with_context(|| format!("{shown}: not a configuration"))?,
            _ => bytes,
        };
        files.push((name, bytes));
    }
    if files.iter().all(|(name, _)| *name != CONFIG) {
        files.push((CONFIG, PLAIN_CONFIG.into()));
    }
    Ok(files)
}

/// Refuses a file that names a token which the vocabulary lacks, or has with another id.
fn check(file: &str, value: &Value, vocabulary: &HashMap<String, u32>) -> Result<()> {
    for (token, id) in named(file, value) {
        let found = vocabulary.get(token).map(|&found| u64::from(found));
        if found.is_none() || id.is_some_and(|id| found != Some(id)) {
            let lacks = match (found, id) {
                (Some(found), Some(id)) => format!("with the id {id}, but tokenizer.json has it with {found}"),
                _ => "but tokenizer.json lacks it".to_string(),
            };
            bail!(
                "names the token `{token}`, {lacks}; pass what AutoTokenizer.from_pretrained(FOLDER).save_pretrained(ANOTHER) \
                 writes"
            );
        }
    }
    Ok(())
}

/// The tokens that a file names, with their ids where it tells them.
fn named<'a>(file: &str, value: &'a Value) -> Vec<(&'a str, Option<u64>)> {
    let Value::Object(fields) = value else { return Vec::new() };
    let content =
        |value: &'a Value| value.as_str().or_else(|| value["content"].as_str()).filter(|text| !text.is_empty());
    let mut named = Vec::new();
    for (key, value) in fields {
        match (key.as_str(), value) {
            (name, id) if file == ADDED => named.push((name, id.as_u64())),
            ("added_tokens_decoder", Value::Object(tokens)) => {
                named.extend(tokens.iter().filter_map(|(id, token)| Some((content(token)?, id.parse().ok()))));
            }
            ("additional_special_tokens" | "extra_special_tokens", Value::Array(tokens)) => {
                named.extend(tokens.iter().filter_map(|token| Some((content(token)?, None))));
            }
            ("extra_special_tokens", Value::Object(tokens)) => {
                named.extend(tokens.values().filter_map(|token| Some((content(token)?, None))));
            }
            (name, token) if name.ends_with("_token") => named.extend(content(token).map(|token| (token, None))),
            _ => {}
        }
    }
    named
}

/// The bytes of a `tokenizer_config.json` with the visual tokens, where it lists added tokens at all.
fn extend_config(bytes: &[u8], visual: &VisualTokens) -> Result<Vec<u8>> {
    let Some(place) = member(bytes, &root(bytes)?, "added_tokens_decoder")? else { return Ok(bytes.to_vec()) };
    let decoder: HashMap<u32, Value> = serde_json::from_slice(&bytes[place.clone()])?;
    let mut entries = Vec::new();
    for (name, id) in visual.ids() {
        match decoder.get(&id) {
            None => entries.push(format!("\"{id}\":{}", serde_json::to_string(Listed::special(name, id).token())?)),
            Some(token) if token["content"] == name => {}
            Some(token) => bail!("the id {id} is of {}, expected: `{name}`", token["content"]),
        }
    }
    append(bytes, &place, &entries)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::NameArgs;
    use super::super::tests::codebook;
    use super::*;

    #[test]
    fn a_token_that_only_a_config_knows_is_named() {
        let vocabulary = HashMap::from([("<s>".to_string(), 1), ("</s>".to_string(), 2)]);
        let error = |file, value: Value| check(file, &value, &vocabulary).unwrap_err().to_string();
        let fine = json!({
            "bos_token": "<s>", "eos_token": { "content": "</s>" }, "pad_token": null, "add_bos_token": true, "model_max_length": 7,
            "additional_special_tokens": ["<s>"], "added_tokens_decoder": { "2": { "content": "</s>" } },
        });
        check(CONFIG, &fine, &vocabulary).unwrap();
        check(ADDED, &json!({ "<s>": 1 }), &vocabulary).unwrap();
        for value in [
            json!({ "pad_token": "<pad>" }),
            json!({ "pad_token": { "content": "<pad>" } }),
            json!({ "additional_special_tokens": ["<s>", { "content": "<pad>" }] }),
            json!({ "extra_special_tokens": { "x": "<pad>" } }),
            json!({ "added_tokens_decoder": { "3": { "content": "<pad>" } } }),
        ] {
            assert!(error(CONFIG, value).contains("names the token `<pad>`, but tokenizer.json lacks it; pass what"));
        }
        assert!(error(ADDED, json!({ "<s>": 7 })).contains("`<s>`, with the id 7, but tokenizer.json has it with 1"));
    }

    #[test]
    fn a_config_lists_the_new_tokens_where_it_lists_any() {
        let visual = VisualTokens::new(codebook(3, 1), &NameArgs::default(), 8).unwrap();
        let plain = br#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#;
        assert_eq!(extend_config(plain, &visual).unwrap(), plain);
        let listing = br#"{"added_tokens_decoder": {"7": {"content": "[A]"}}, "x": null}"#;
        let once = extend_config(listing, &visual).unwrap();
        let value: Value = serde_json::from_slice(&once).unwrap();
        assert_eq!(value["added_tokens_decoder"].as_object().unwrap().len(), 8);
        assert_eq!(value["added_tokens_decoder"]["14"]["content"], "<|visual token 000002|>");
        assert_eq!(extend_config(&once, &visual).unwrap(), once);
        let taken = br#"{"added_tokens_decoder": {"9": {"content": "[A]"}}}"#;
        assert!(extend_config(taken, &visual).unwrap_err().to_string().contains("the id 9 is of \"[A]\""));
        for damaged in [&b""[..], b"[]", b"{", b"7", br#"{"added_tokens_decoder": 7}"#] {
            assert!(extend_config(damaged, &visual).is_err());
        }
    }
}
