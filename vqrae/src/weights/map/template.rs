//! Names with gaps: `layers.{n}.norm1.{kind}`.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde::Deserialize;

/// A tensor's name with gaps. `{n}` is a part of a name, or of what stands between two dots; `{rest..}`, at the end alone,
/// is all parts that follow.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Template {
    text: String,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq)]
enum Part {
    Text(String),
    /// What stands before the gap, its name, what stands after.
    Gap(String, String, String),
    Rest(String),
}

/// What a name has in a template's gaps, in their order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Gaps(Vec<(String, String)>);

impl TryFrom<String> for Template {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = |why: &str| format!("`{text}`: {why}");
        let mut parts = Vec::new();
        // `{rest..}` has dots of its own.
        let (head, rest) = match text.strip_suffix("..}").and_then(|head| head.rsplit_once('{')) {
            Some((head, name)) => (head.strip_suffix('.').unwrap_or(head), Some(name)),
            None => (text.as_str(), None),
        };
        if !head.is_empty() || rest.is_none() {
            for part in head.split('.') {
                parts.push(match part.split_once('{') {
                    None if part.contains('}') => return Err(wrong("`}` without `{`")),
                    None => Part::Text(part.to_string()),
                    Some((before, gap)) => {
                        let (name, after) = gap.split_once('}').ok_or_else(|| wrong("`{` without `}`"))?;
                        if name.is_empty() || [before, name, after].iter().any(|text| text.contains(['{', '}'])) {
                            return Err(wrong("one gap, with a name, between two dots"));
                        }
                        Part::Gap(before.to_string(), name.to_string(), after.to_string())
                    }
                });
            }
        }
        if let Some(name) = rest {
            let joined = head.is_empty() || text[head.len()..].starts_with('.');
            if name.is_empty() || name.contains(['}', '.']) || !joined {
                return Err(wrong("`{name..}` stands alone after a dot, at the end"));
            }
            parts.push(Part::Rest(name.to_string()));
        }
        Ok(Self { text, parts })
    }
}

impl std::fmt::Display for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl Template {
    /// What a name has in the gaps, if it fits.
    pub(super) fn gaps(&self, name: &str) -> Option<Gaps> {
        let mut found = Gaps::default();
        let mut left = Some(name);
        for part in &self.parts {
            let rest = left?;
            let (first, after) = rest.split_once('.').map_or((rest, None), |(first, after)| (first, Some(after)));
            left = after;
            match part {
                Part::Text(text) if text == first => {}
                Part::Text(_) => return None,
                Part::Gap(before, gap, behind) => {
                    let value = first.strip_prefix(before.as_str())?.strip_suffix(behind.as_str())?;
                    found.add(gap, value)?;
                }
                Part::Rest(gap) => {
                    found.add(gap, rest)?;
                    left = None;
                }
            }
        }
        left.is_none().then_some(found)
    }

    /// The name with its gaps filled; the error names a gap that nothing fills.
    pub(super) fn name(&self, gaps: &Gaps) -> Result<String, String> {
        let value = |gap: &str| {
            let found = gaps.0.iter().find_map(|(name, value)| (name == gap).then_some(value.as_str()));
            found.ok_or_else(|| format!("`{}` has a gap `{gap}` that `from` has not", self.text))
        };
        let parts = self.parts.iter().map(|part| match part {
            Part::Text(text) => Ok(text.clone()),
            Part::Gap(before, gap, after) => Ok(format!("{before}{}{after}", value(gap)?)),
            Part::Rest(gap) => value(gap).map(str::to_string),
        });
        Ok(parts.collect::<Result<Vec<_>, String>>()?.join("."))
    }
}

impl Gaps {
    /// A gap that stands twice must hold the same twice.
    fn add(&mut self, gap: &str, value: &str) -> Option<()> {
        let same = self.0.iter().find(|(name, _)| name == gap).is_none_or(|(_, other)| other == value);
        self.0.push((gap.to_string(), value.to_string()));
        (same && !value.is_empty()).then_some(())
    }

    /// In the order of the gaps, numbers by their size.
    pub(super) fn compare(&self, other: &Self) -> Ordering {
        let part = |(a, b): (&(String, String), &(String, String))| match (a.1.parse::<u64>(), b.1.parse::<u64>()) {
            (Ok(a), Ok(b)) => a.cmp(&b),
            _ => a.1.cmp(&b.1),
        };
        self.0.iter().zip(&other.0).map(part).find(|order| order.is_ne()).unwrap_or(Ordering::Equal)
    }
}

/// How many different things fill a template's last gap among the names; names themselves, if it has none.
pub(super) fn count<'a>(template: &Template, names: impl Iterator<Item = &'a String>) -> usize {
    let filled: BTreeMap<String, ()> = names
        .filter_map(|name| {
            let gaps = template.gaps(name)?;
            Some((gaps.0.last().map_or_else(|| name.clone(), |(_, value)| value.clone()), ()))
        })
        .collect();
    filled.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(text: &str) -> Template {
        Template::try_from(text.to_string()).unwrap()
    }

    #[test]
    fn gaps_are_parts_of_a_name() {
        for (from, name, to, expected) in [
            ("layers.{n}.norm.{kind}", "layers.12.norm.bias", "l.{n}.{kind}", Some("l.12.bias")),
            ("layers.{n}.norm", "layers.12.norm.bias", "l.{n}", None),
            ("layers.{n}.norm.{kind}", "layers.12.norm", "l.{n}", None),
            ("ls{n}.gamma", "ls2.gamma", "scale{n}", Some("scale2")),
            ("ls{n}.gamma", "ls.gamma", "scale{n}", None),
            ("{a}.{a}", "x.x", "{a}", Some("x")),
            ("{a}.{a}", "x.y", "{a}", None),
            ("net.{rest..}", "net.0.weight", "{rest..}", Some("0.weight")),
            ("net.{rest..}", "net", "x", None),
            ("{all..}", "a.b.c", "x.{all..}", Some("x.a.b.c")),
        ] {
            let made = template(from).gaps(name).map(|gaps| template(to).name(&gaps).unwrap());
            assert_eq!(made.as_deref(), expected, "{from} {name}");
        }
    }

    #[test]
    fn templates_that_make_no_sense() {
        for text in ["a.{b", "a}.b", "{}", "{a}{b}", "a{b..}", "{..}", "{a..}.b"] {
            assert!(Template::try_from(text.to_string()).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_are_ordered_by_their_size() {
        let gaps = |name| template("{g}.{l}").gaps(name).unwrap();
        assert_eq!(gaps("2.10").compare(&gaps("10.2")), Ordering::Less);
        assert_eq!(gaps("2.10").compare(&gaps("2.9")), Ordering::Greater);
    }
}
