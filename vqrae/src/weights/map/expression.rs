//! Values of a map that are looked up in a checkpoint: `= sqrt(shape(head.weight, 0) / 3)`.
//!
//! ```text
//! value    = sum { "or" sum }                 the first that there is
//! sum      = product { ("+" | "-") product }
//! product  = atom { ("*" | "/") atom }        whole numbers; a division leaves no rest
//! atom     = number | "(" value ")" | a list as JSON has it
//!          | shape(NAME, DIMENSION)           of the first tensor whose name fits
//!          | count(NAME)                      how many different things fill NAME's last gap
//!          | config(KEY)                      of the checkpoint's config.json, nested keys with dots
//!          | sqrt(value) | min(value, value)
//! ```

use std::collections::BTreeMap;

use serde_json::Value;

use super::template::{self, Template};

/// What is known of a checkpoint.
pub(super) struct Facts<'a> {
    /// Its config.json, or null.
    pub(super) config: &'a Value,
    /// Its tensors' shapes, by the names that a map sees.
    pub(super) shapes: &'a BTreeMap<String, Vec<usize>>,
}

type Result<T> = std::result::Result<T, String>;

/// How deep brackets may stand in brackets.
const DEEPEST: usize = 32;

impl Facts<'_> {
    /// A value in which every text that begins with `=` is replaced by what it says; the error names the key.
    pub(super) fn fill_in(&self, value: &Value, key: &str) -> Result<Value> {
        Ok(match value {
            Value::Object(fields) => {
                let dot = if key.is_empty() { "" } else { "." };
                let filled = fields
                    .iter()
                    .map(|(name, value)| Ok((name.clone(), self.fill_in(value, &format!("{key}{dot}{name}"))?)));
                Value::Object(filled.collect::<Result<_>>()?)
            }
            Value::Array(items) => {
                Value::Array(items.iter().map(|item| self.fill_in(item, key)).collect::<Result<_>>()?)
            }
            Value::String(text) => match text.strip_prefix('=') {
                Some(text) => self.value(text).map_err(|why| format!("{key}: {why}; give it with --set {key}=…"))?,
                None => value.clone(),
            },
            _ => value.clone(),
        })
    }

    fn value(&self, text: &str) -> Result<Value> {
        let mut reader = Reader { facts: self, text, depth: 0 };
        let value = reader.value()?;
        let rest = reader.text.trim();
        if rest.is_empty() { value } else { Err(format!("`{rest}` makes no sense in `={text}`")) }
    }
}

struct Reader<'a> {
    facts: &'a Facts<'a>,
    text: &'a str,
    depth: usize,
}

/// Outer errors are of the text, inner ones of what is looked up: for those `or` has another value.
type Found = Result<Result<Value>>;

impl Reader<'_> {
    /// Takes a word or sign, if it comes next.
    fn takes(&mut self, what: &str) -> bool {
        let text = self.text.trim_start();
        let found = text.strip_prefix(what);
        self.text = found.unwrap_or(text);
        found.is_some()
    }

    fn wants(&mut self, what: &str) -> Result<()> {
        if self.takes(what) { Ok(()) } else { Err(format!("`{what}` is missing before `{}`", self.text)) }
    }

    /// What stands up to one of some signs.
    fn until(&mut self, signs: &[char]) -> Result<String> {
        let Some(end) = self.text.find(signs) else { return Err(format!("`{}` does not end", self.text)) };
        let (taken, rest) = self.text.split_at(end);
        self.text = rest;
        Ok(taken.trim().to_string())
    }

    fn value(&mut self) -> Found {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err("brackets stand too deep".into());
        }
        let mut found = self.sum()?;
        while self.takes("or ") {
            let other = self.sum()?;
            found = found.or(other);
        }
        self.depth -= 1;
        Ok(found)
    }

    fn sum(&mut self) -> Found {
        let mut found = self.product()?;
        loop {
            let with = match () {
                () if self.takes("+") => i64::checked_add,
                () if self.takes("-") => i64::checked_sub,
                () => return Ok(found),
            };
            found = both(found, self.product()?, |a, b| with(a, b).ok_or_else(|| "a number is too large".into()));
        }
    }

    fn product(&mut self) -> Found {
        let mut found = self.atom()?;
        loop {
            if self.takes("*") {
                let other = self.atom()?;
                found = both(found, other, |a, b| a.checked_mul(b).ok_or_else(|| "a number is too large".into()));
            } else if self.takes("/") {
                let other = self.atom()?;
                found = both(found, other, |a, b| match a.checked_rem(b) {
                    Some(0) => Ok(a / b),
                    _ => Err(format!("{a} does not divide by {b}")),
                });
            } else {
                return Ok(found);
            }
        }
    }

    fn atom(&mut self) -> Found {
        if self.takes("shape(") {
            let name = self.until(&[','])?;
            self.wants(",")?;
            let dimension = self.until(&[')'])?;
            self.wants(")")?;
            let dimension = dimension.parse::<usize>().map_err(|_| format!("`{dimension}` is no dimension"))?;
            let template = Template::try_from(name)?;
            let tensor = self.facts.shapes.iter().find(|(name, _)| template.gaps(name).is_some());
            return Ok(match tensor {
                None => Err(format!("there is no tensor `{template}`")),
                Some((name, shape)) => match shape.get(dimension) {
                    Some(size) => Ok(Value::from(*size)),
                    None => Err(format!("`{name}` has shape {shape:?}, which has no dimension {dimension}")),
                },
            });
        }
        if self.takes("count(") {
            let template = Template::try_from(self.until(&[')'])?)?;
            self.wants(")")?;
            let count = template::count(&template, self.facts.shapes.keys());
            return Ok(if count > 0 {
                Ok(Value::from(count))
            } else {
                Err(format!("there is no tensor `{template}`"))
            });
        }
        if self.takes("config(") {
            let key = self.until(&[')'])?;
            self.wants(")")?;
            let found = key.split('.').try_fold(self.facts.config, |value, part| value.get(part));
            let found = found.filter(|value| !value.is_null()).cloned();
            return Ok(found.ok_or_else(|| format!("the checkpoint's config.json has no `{key}`")));
        }
        if self.takes("sqrt(") {
            let value = self.value()?;
            self.wants(")")?;
            return Ok(value.and_then(|value| {
                let number = whole(&value)?;
                let root = (number.max(0) as f64).sqrt().round() as i64;
                let exact = root.checked_mul(root) == Some(number);
                if exact { Ok(Value::from(root)) } else { Err(format!("{number} is no square")) }
            }));
        }
        if self.takes("min(") {
            let a = self.value()?;
            self.wants(",")?;
            let b = self.value()?;
            self.wants(")")?;
            return Ok(both(a, b, |a, b| Ok(a.min(b))));
        }
        if self.takes("(") {
            let value = self.value()?;
            self.wants(")")?;
            return Ok(value);
        }
        let text = self.text.trim_start();
        if text.starts_with('[') {
            let list = self.until(&[']'])? + "]";
            self.wants("]")?;
            return Ok(Ok(serde_json::from_str(&list).map_err(|_| format!("`{list}` is no list"))?));
        }
        let (digits, rest) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
        self.text = rest;
        let number = digits.parse::<i64>().map_err(|_| format!("`{text}` is no value"))?;
        Ok(Ok(Value::from(number)))
    }
}

fn whole(value: &Value) -> Result<i64> {
    value.as_i64().ok_or_else(|| format!("{value} is no whole number"))
}

fn both(a: Result<Value>, b: Result<Value>, with: impl Fn(i64, i64) -> Result<i64>) -> Result<Value> {
    with(whole(&a?)?, whole(&b?)?).map(Value::from)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn value(text: &str) -> Result<Value> {
        let config = json!({ "act": "gelu", "deep": { "heads": 3 }, "none": null });
        let names = [
            ("head.weight", vec![768, 16]),
            ("layers.0.w", vec![4]),
            ("layers.10.w", vec![4]),
            ("layers.10.b", vec![4]),
        ];
        let shapes = names.map(|(name, shape)| (name.to_string(), shape)).into();
        Facts { config: &config, shapes: &shapes }.fill_in(&json!(format!("={text}")), "encoder.size")
    }

    #[test]
    fn values_are_looked_up_and_computed() {
        for (text, expected) in [
            (" sqrt(shape(head.weight, 0) / 3)", json!(16)),
            (" count(layers.{n}.{kind})", json!(2)),
            (" count(layers.{n}.w)", json!(2)),
            (" config(act)", json!("gelu")),
            (" config(deep.heads) or 12", json!(3)),
            (" config(none) or shape(nothing, 0) or min(shape(head.weight, 1) / 4, 16)", json!(4)),
            ("1 + 2 * (3 - 1)", json!(5)),
            (" config(none) or [0.5, 1]", json!([0.5, 1])),
        ] {
            assert_eq!(value(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_had_is_named_with_its_key() {
        for (text, why) in [
            ("shape(tail.weight, 0)", "there is no tensor `tail.weight`"),
            ("shape(head.weight, 2)", "`head.weight` has shape [768, 16], which has no dimension 2"),
            ("7 / 2", "7 does not divide by 2"),
            ("7 / 0", "7 does not divide by 0"),
            ("sqrt(8)", "8 is no square"),
            ("config(act) * 2", "\"gelu\" is no whole number"),
            ("config(b)", "config.json has no `b`"),
            ("1 2", "`2` makes no sense"),
            ("x", "`x` is no value"),
            ("shape(a", "does not end"),
            ("9223372036854775807 + 1", "too large"),
            (&"(".repeat(100), "too deep"),
        ] {
            let error = value(text).unwrap_err();
            assert!(error.starts_with("encoder.size: ") && error.contains(why), "{error}");
            assert!(error.ends_with("--set encoder.size=…"), "{error}");
        }
    }
}
