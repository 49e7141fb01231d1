//! How visual tokens are called.

use std::collections::HashSet;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::VisualTokens;

/// The names of the visual tokens.
#[derive(clap::Args, Debug, Clone)]
pub(crate) struct NameArgs {
    /// Name of a code's token: {id} is the code's number, {id:06} with leading zeros to six digits
    #[arg(long, alias = "code_name", value_name = "TEMPLATE", default_value = CODE, value_parser = Template::parse)]
    pub(super) code_name: Template,
    /// Name of the token before an image, after which its size stands as text
    #[arg(long, alias = "image_start", value_name = "NAME", default_value = IMAGE_START)]
    image_start: String,
    /// Name of the token between the size and the codes
    #[arg(long, alias = "image_token", value_name = "NAME", default_value = IMAGE_TOKEN)]
    image_token: String,
    /// Name of the token after an image
    #[arg(long, alias = "image_end", value_name = "NAME", default_value = IMAGE_END)]
    image_end: String,
    /// Name of the token after each row of codes
    #[arg(long, alias = "row_end", value_name = "NAME", default_value = ROW_END)]
    row_end: String,
}

// Emu3's, but for the end of a row, which is `<|extra_200|>` there.
const CODE: &str = "<|visual token {id:06}|>";
const IMAGE_START: &str = "<|image start|>";
const IMAGE_TOKEN: &str = "<|image token|>";
const IMAGE_END: &str = "<|image end|>";
const ROW_END: &str = "<|image row end|>";

impl NameArgs {
    /// Those of a tokenizer that has visual tokens.
    pub(super) fn of(tokens: &VisualTokens) -> Self {
        Self {
            code_name: tokens.codes.name.clone(),
            image_start: tokens.image_start.name.clone(),
            image_token: tokens.image_token.name.clone(),
            image_end: tokens.image_end.name.clone(),
            row_end: tokens.row_end.name.clone(),
        }
    }

    /// The names that are no code's, each with its flag, in the order of their ids.
    pub(super) fn marks(&self) -> [(&'static str, &str); 4] {
        [
            ("--image-start", &self.image_start),
            ("--image-token", &self.image_token),
            ("--image-end", &self.image_end),
            ("--row-end", &self.row_end),
        ]
    }

    /// The flag of the name that has the `place`-th of the ids.
    pub(crate) fn flag(&self, place: usize) -> &'static str {
        self.marks().get(place).map_or("--code-name", |(flag, _)| flag)
    }

    /// Refuses names that are empty, or that two tokens would share.
    pub(crate) fn check(&self, tokens: &VisualTokens) -> Result<()> {
        let mut taken = HashSet::new();
        for (place, name) in tokens.names().enumerate() {
            let flag = self.flag(place);
            if name.is_empty() {
                bail!("{flag} is empty; give the token a name");
            }
            if !taken.insert(name.clone()) {
                bail!("{flag}: two tokens would have the name `{name}`; pass another");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
impl Default for NameArgs {
    fn default() -> Self {
        Self {
            code_name: Template::parse(CODE).expect("a template"),
            image_start: IMAGE_START.into(),
            image_token: IMAGE_TOKEN.into(),
            image_end: IMAGE_END.into(),
            row_end: ROW_END.into(),
        }
    }
}

/// A name with a number in it: `<|visual token {id:06}|>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Template {
    before: String,
    /// The least number of digits.
    digits: usize,
    after: String,
}

/// More digits than any number of 32 bits has.
const MOST_DIGITS: usize = 20;

impl Template {
    /// Reads `BEFORE{id}AFTER` or, with leading zeros to N digits, `BEFORE{id:0N}AFTER`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let parts = || {
            let (before, rest) = text.split_once("{id")?;
            let (format, after) = rest.split_once('}')?;
            let digits = match format {
                "" => 0,
                _ => format.strip_prefix(":0")?.parse().ok().filter(|&digits| digits <= MOST_DIGITS)?,
            };
            (!after.contains("{id")).then(|| Self { before: before.into(), digits, after: after.into() })
        };
        parts().ok_or_else(|| format!("expected: a name with one {{id}} or {{id:06}} in it, such as {CODE}"))
    }

    /// The name with a number.
    pub(crate) fn of(&self, id: u32) -> String {
        let Self { before, digits, after } = self;
        format!("{before}{id:0digits$}{after}")
    }
}

impl From<Template> for String {
    fn from(template: Template) -> Self {
        let Template { before, digits, after } = template;
        match digits {
            0 => format!("{before}{{id}}{after}"),
            digits => format!("{before}{{id:0{digits}}}{after}"),
        }
    }
}

impl TryFrom<String> for Template {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::codebook;
    use super::*;

    #[test]
    fn a_template_says_where_the_number_goes_and_how_wide_it_is() {
        for (text, name) in [(CODE, "<|visual token 000007|>"), ("IMG{id}", "IMG7"), ("{id:02}{x}", "07{x}")] {
            let template = Template::parse(text).unwrap();
            assert_eq!(template.of(7), name);
            assert_eq!(String::from(template), text);
        }
        assert_eq!(Template::parse("{id:02}").unwrap().of(u32::MAX), "4294967295");
        for text in ["", "code", "{id", "{id:}", "{id:6}", "{id:021}", "{id:0x}", "{id}{id}", "{ids}", "{id:0-1}"] {
            assert!(Template::parse(text).unwrap_err().contains("{id:06}"), "{text}");
        }
    }

    #[test]
    fn no_two_tokens_share_a_name() {
        let error = |names: NameArgs| {
            let tokens = VisualTokens::new(codebook(16, 1), &names, 0).unwrap();
            names.check(&tokens).unwrap_err().to_string()
        };
        let with = |name: &str| NameArgs { row_end: name.into(), ..NameArgs::default() };
        assert!(error(with("<|image end|>")).contains("--row-end: two tokens would have the name `<|image end|>`"));
        assert!(error(with("<|visual token 000003|>")).contains("--code-name: two tokens"));
        assert!(error(with("")).contains("--row-end is empty"));
    }
}
