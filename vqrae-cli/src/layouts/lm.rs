//! Documents for a language model that reads and writes images: the text of a row and its codes, as ids of one tokenizer, in the
//! files of Megatron or datatrove.
//!
//! ```text
//! (bos) TEXT image_start "h*w" image_token CODES row_end … CODES row_end image_end (eos)        --order text-image
//! (bos) image_start "h*w" image_token CODES row_end … CODES row_end image_end TEXT (eos)        --order image-text
//! ```
//!
//! The ids are those of `vocab`, which gives the names their places in the tokenizer (`vocabulary`).

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde_json::{Value, json};
use vqrae::codes::{Header, Row};

use super::Image;
use super::tokens::TokenRule;
use crate::vocabulary::{Codebook, RECORD, Vocabulary};

/// What a document of `--to lm` is made of
#[derive(clap::Args, Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LmArgs {
    /// Folder that `vocab` wrote: the tokenizer that has ids for codes
    #[arg(long, value_name = "FOLDER")]
    tokenizer: Option<PathBuf>,
    /// Whose files; megatron, unless another is named
    #[arg(long = "as", value_enum, value_name = "FILES")]
    files: Option<Files>,
    /// The text of an image; without it the caption, of rows without one the class, of rows without both none
    #[arg(long, value_enum, value_name = "WHAT")]
    text: Option<Words>,
    /// The text of an image in other words: {caption} and {class} stand for its own
    #[arg(long, value_name = "TEMPLATE", conflicts_with = "text")]
    prompt: Option<String>,
    /// What comes first; the text, unless the image is named
    #[arg(long, value_enum, value_name = "ORDER")]
    order: Option<Order>,
    /// Token to put before each document, by its name in the tokenizer
    #[arg(long, value_name = "TOKEN")]
    bos: Option<String>,
    /// Token to put after each document, by its name in the tokenizer
    #[arg(long, value_name = "TOKEN")]
    eos: Option<String>,
}

/// Whose files hold the documents.
#[derive(ValueEnum, Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Files {
    #[default]
    #[value(alias = "nemo")]
    Megatron,
    #[value(alias = "nanotron")]
    Datatrove,
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum Words {
    /// The caption, which every row must have
    Caption,
    /// The name of the class, which every row must have
    Class,
    /// No text
    None,
}

#[derive(ValueEnum, Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Order {
    #[default]
    TextImage,
    ImageText,
}

impl LmArgs {
    /// Refuses them for another layout.
    pub(crate) fn check_absent(&self, layout: &str) -> Result<()> {
        if *self == Self::default() {
            return Ok(());
        }
        bail!("{layout} holds no text: --tokenizer, --as, --text, --prompt, --order, --bos and --eos are for lm")
    }

    /// Whose files hold the documents.
    pub(crate) fn files(&self) -> Files {
        self.files.unwrap_or_default()
    }

    /// Which text an image has.
    fn source(&self) -> Source {
        match (&self.prompt, self.text) {
            (Some(prompt), _) => Source::Template(prompt.clone()),
            (None, None) => Source::Any,
            (None, Some(Words::Caption)) => Source::Template(CAPTION.into()),
            (None, Some(Words::Class)) => Source::Template(CLASS.into()),
            (None, Some(Words::None)) => Source::Template(String::new()),
        }
    }
}

const CAPTION: &str = "{caption}";
const CLASS: &str = "{class}";

/// Where the text of an image comes from.
#[derive(Debug, Clone)]
enum Source {
    /// The caption, else the class, else there is none.
    Any,
    /// Words in which [`CAPTION`] and [`CLASS`] stand for those of the row.
    Template(String),
}

impl Source {
    /// The text of a row.
    fn of(&self, row: &Row) -> Result<String> {
        match self {
            Self::Any => Ok(row.caption.clone().or_else(|| row.class.clone()).unwrap_or_default()),
            Self::Template(template) => fill(template, row),
        }
    }
}

/// The template with the words of a row, in which nothing is looked up again.
fn fill(template: &str, row: &Row) -> Result<String> {
    let (mut text, mut rest) = (String::new(), template);
    while let Some(at) = rest.find('{') {
        let (before, from) = rest.split_at(at);
        text.push_str(before);
        let named = [(CAPTION, &row.caption, "caption"), (CLASS, &row.class, "class")];
        match named.into_iter().find(|(name, ..)| from.starts_with(name)) {
            Some((name, Some(words), _)) => {
                text.push_str(words);
                rest = &from[name.len()..];
            }
            Some((.., kind)) => bail!(
                "row {} ({}) has no {kind}; pass --text none, or leave --text and --prompt out to take what each row has",
                row.key,
                row.path
            ),
            None => {
                text.push('{');
                rest = &from[1..];
            }
        }
    }
    Ok(text + rest)
}

/// Text and codes, in the order that a language model reads them.
pub(super) struct Interleaved {
    vocabulary: Vocabulary,
    rule: TokenRule,
    source: Source,
    order: Order,
    bos: Option<u32>,
    eos: Option<u32>,
    /// What stands before the codes of a grid.
    headers: HashMap<(usize, usize), Vec<u32>>,
    without_text: usize,
}

impl Interleaved {
    /// For the codes of a set; a tokenizer of another model's codes is refused.
    pub(super) fn new(args: &LmArgs, header: &Header) -> Result<Self> {
        let Some(folder) = &args.tokenizer else {
            bail!("lm needs --tokenizer FOLDER: a folder that vqrae-cli vocab wrote");
        };
        let mut vocabulary = Vocabulary::open(folder)?;
        vocabulary.text.make_plain()?;
        let (codebook, known) = (Codebook::of(header), &vocabulary.visual.codebook);
        if codebook != *known {
            bail!(
                "{}: tokens for the codes of {known}, but these are of {codebook}; make a tokenizer for them: vqrae-cli vocab … \
                 --codes SET",
                folder.join(RECORD).display()
            );
        }
        let names = vocabulary.text.vocabulary();
        let token = |flag: &str, name: &Option<String>| match name {
            None => Ok(None),
            Some(name) => names.get(name).copied().map(Some).with_context(|| {
                format!("{flag}: there is no token `{name}` in {}; pass one that is", vocabulary.text.shown())
            }),
        };
        let (bos, eos) = (token("--bos", &args.bos)?, token("--eos", &args.eos)?);
        let rule = TokenRule::of_vocabulary(&vocabulary.visual, vocabulary.size, header)?;
        let order = args.order.unwrap_or_default();
        Ok(Self { vocabulary, rule, source: args.source(), order, bos, eos, headers: HashMap::new(), without_text: 0 })
    }

    pub(super) fn rule(&self) -> &TokenRule {
        &self.rule
    }

    /// The ids of a row.
    pub(super) fn document(&mut self, row: &Row, image: &Image) -> Result<Vec<u32>> {
        let text = self.source.of(row)?;
        self.without_text += usize::from(text.is_empty());
        let of_row = || format!("row {} ({})", row.key, row.path);
        let text = self.vocabulary.text.encode_foreign(&text).with_context(of_row)?;
        let image = self.image(image)?;
        let mut document: Vec<u32> = self.bos.into_iter().collect();
        let parts = match self.order {
            Order::TextImage => [text, image],
            Order::ImageText => [image, text],
        };
        document.extend(parts.into_iter().flatten());
        document.extend(self.eos);
        Ok(document)
    }

    fn image(&mut self, image: &Image) -> Result<Vec<u32>> {
        let mut ids = self.header(image.h, image.w)?;
        ids.extend(self.rule.document(image));
        Ok(ids)
    }

    /// The beginning of an image of a grid: that, its size in letters, and that codes follow. Encoded as one, since some tokenizers
    /// treat the beginning of a text otherwise.
    fn header(&mut self, h: usize, w: usize) -> Result<Vec<u32>> {
        if let Some(ids) = self.headers.get(&(h, w)) {
            return Ok(ids.clone());
        }
        let visual = &self.vocabulary.visual;
        let (start, token) = (&visual.image_start, &visual.image_token);
        let ids = self.vocabulary.text.encode(&format!("{}{h}*{w}{}", start.name, token.name))?;
        if (ids.first(), ids.last()) != (Some(&start.id), Some(&token.id)) || ids.len() < 3 {
            bail!(
                "{}: `{}` is not found in a text, or the size of an image is lost; make the tokenizer anew with vqrae-cli vocab",
                self.vocabulary.text.shown(),
                start.name
            );
        }
        self.headers.insert((h, w), ids.clone());
        Ok(ids)
    }

    /// What `export.json` says of the documents, and what the user should know.
    pub(super) fn record(self) -> (Value, Vec<String>) {
        let Self { vocabulary, source, order, bos, eos, without_text, .. } = self;
        let text = match source {
            Source::Any => "the caption, else the class".to_string(),
            Source::Template(template) => template,
        };
        let order = order.to_possible_value().map(|value| value.get_name().to_string());
        let record = json!({
            "tokenizer_blake3": vocabulary.text.blake3(),
            "visual_tokens": vocabulary.visual,
            "text": text,
            "order": order,
            "bos": bos,
            "eos": eos,
        });
        let rows = if without_text == 1 { "1 document has" } else { &format!("{without_text} documents have") };
        let note = (without_text > 0).then(|| format!("{rows} no text"));
        (record, note.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_takes_the_words_of_the_row_once() {
        let row = Row { caption: Some("a {class} {".into()), class: Some("cat".into()), ..Row::default() };
        assert_eq!(fill("{class}: {caption}", &row).unwrap(), "cat: a {class} {");
        assert_eq!(fill("{x} {{class}} {", &row).unwrap(), "{x} {cat} {");
        assert_eq!(fill("", &row).unwrap(), "");
        let error = fill(CAPTION, &Row { path: "a.png".into(), ..Row::default() }).unwrap_err().to_string();
        assert!(error.contains("(a.png) has no caption"), "{error}");
        assert_eq!(Source::Any.of(&Row { caption: None, ..row.clone() }).unwrap(), "cat");
        assert_eq!(Source::Any.of(&row).unwrap(), "a {class} {");
    }
}
