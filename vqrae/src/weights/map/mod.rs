//! Key maps: which tensor of another project's checkpoint becomes which of ours, as a TOML file. `weights/README.md` says
//! how to write one; `weights/maps/` has those that are part of the program.

mod expression;
mod route;
mod template;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use expression::Facts;
use route::Line;
pub use route::{Plan, Route};
use template::Template;

/// What a vision tower's names begin with once a map's prefixes were replaced: its tensors go the way of `init`'s.
pub const TOWER: &str = "tower.";

/// A map.
#[derive(Debug, Clone)]
pub struct Map {
    /// Its name, or the file's.
    pub name: String,
    written: Written,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    /// What it is a map of.
    about: String,
    /// Maps that this one adds to, and whose values it replaces.
    #[serde(default)]
    extends: Vec<String>,
    /// The dict in a PyTorch file that holds the tensors.
    key: Option<String>,
    /// Beginnings of names and what they become, one after the other.
    #[serde(default)]
    prefixes: Vec<(String, String)>,
    /// Whether a vision tower is part of the checkpoint.
    #[serde(default)]
    tower: bool,
    /// Tensors by which a checkpoint is known.
    #[serde(default)]
    needs: Vec<Template>,
    #[serde(default)]
    tensors: Vec<Line>,
    #[serde(default)]
    fill: Vec<Fill>,
    /// Tensors of the checkpoint that have no use.
    #[serde(default)]
    drop: Vec<Template>,
    /// Sections of `config.json`.
    #[serde(default)]
    config: BTreeMap<String, Value>,
    /// `preprocessor_config.json`, where the checkpoint has none.
    preprocessor: Option<Value>,
}

/// A tensor of ours that no checkpoint holds.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fill {
    /// Our name; nothing is filled where the checkpoint has a tensor that becomes it, or the model no such tensor.
    pub to: String,
    /// What it is.
    pub value: Constant,
    /// Of `sin_cos`: the side of the grid that positions are counted on, whatever the grid's own is.
    pub base: Option<usize>,
}

/// A tensor that is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Constant {
    /// Zeros.
    Zeros,
    /// Ones.
    Ones,
    /// The identity.
    Identity,
    /// MAE's fixed positions of a square grid, `[h·w, D]`: a quarter of the width each for sine and cosine of the column,
    /// then of the row.
    SinCos,
}

/// The maps that are part of the program: name and text.
macro_rules! built_in {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_str!(concat!("../../../../weights/maps/", $name, ".toml")))),+]
    };
}

const BUILT_IN: &[(&str, &str)] = built_in![
    "diffusers-rae-dinov2",
    "diffusers-rae-mae",
    "diffusers-rae-siglip2",
    "fork-dinov2",
    "fork-dinov2-vq",
    "fork-mae",
    "fork-mae-vq",
    "fork-siglip",
    "fork-siglip-vq",
    "fork-simvq",
    "fork-vq",
    "part-decoder",
    "part-diffusers",
    "part-dinov2",
    "part-identity",
    "part-mae",
    "part-siglip",
    "part-vqp",
    "rae-decoder",
    "rae-dinov2",
    "rae-mae",
    "rae-siglip",
    "vqp-fsq",
    "vqp-grouped-residual-vq",
    "vqp-lfq",
    "vqp-residual-vq",
    "vqp-simvq",
    "vqp-vq",
    "vqp-vq-norm",
];

impl Map {
    /// The map of this name that is part of the program, or the file at this path.
    ///
    /// # Errors
    /// If there is neither, or it says what no map says.
    pub fn open(name: &str) -> Result<Self> {
        Self::nested(name, None, &mut Vec::new())
    }

    /// The names of the maps that are part of the program, but for those that others alone extend.
    pub fn built_in() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name).filter(|name| !name.starts_with("part-"))
    }

    fn nested(name: &str, beside: Option<&Path>, above: &mut Vec<String>) -> Result<Self> {
        let own = BUILT_IN.iter().find(|(own, _)| *own == name);
        let path = beside.and_then(Path::parent).map_or_else(|| name.into(), |folder| folder.join(name));
        let (text, path) = match own {
            Some((_, text)) => ((*text).to_string(), format!("weights/maps/{name}.toml").into()),
            None if !path.exists() => {
                let names: Vec<_> = Self::built_in().collect();
                let reason =
                    format!("is neither a map's file nor one of the maps in the program: {}", names.join(", "));
                return Err(Error::config(&path, reason));
            }
            None => (std::fs::read_to_string(&path).map_err(Error::io(&path))?, path),
        };
        if above.iter().any(|other| other == name) {
            return Err(Error::config(&path, "extends itself"));
        }
        let mut written: Written = toml::from_str(&text).map_err(|error| Error::config(&path, error))?;
        above.push(name.to_string());
        for name in std::mem::take(&mut written.extends).iter().rev() {
            let beside = own.is_none().then_some(path.as_path());
            written.add_to(Self::nested(name, beside, above)?.written);
        }
        above.pop();
        Ok(Self { name: name.to_string(), written })
    }

    /// What it is a map of.
    pub fn about(&self) -> &str {
        &self.written.about
    }

    /// The dict in a PyTorch file that holds the tensors, if it says.
    pub fn key(&self) -> Option<&str> {
        self.written.key.as_deref()
    }

    /// A checkpoint's name as the rest of the map sees it: with other beginnings.
    pub fn renamed(&self, name: &str) -> String {
        self.written.prefixes.iter().fold(name.to_string(), |name, (from, to)| match name.strip_prefix(from.as_str()) {
            Some(rest) => format!("{to}{rest}"),
            None => name,
        })
    }

    /// What becomes of these [renamed](Map::renamed) tensors.
    ///
    /// # Errors
    /// If two would become one, and the map does not say how.
    pub fn plan<'a>(&self, names: impl Iterator<Item = &'a String>) -> std::result::Result<Plan, String> {
        let mut plan = Plan::default();
        let names: Vec<&String> = names.collect();
        let lacks = |needed: &&Template| !names.iter().any(|name| needed.gaps(name).is_some());
        plan.unmet.extend(self.written.needs.iter().filter(lacks).map(|needed| format!("`{needed}`")));
        let (tower, names): (Vec<_>, Vec<_>) =
            names.into_iter().partition(|name| self.written.tower && name.starts_with(TOWER));
        plan.tower = tower.into_iter().cloned().collect();
        if self.written.tower && plan.tower.is_empty() {
            plan.unmet.push("a vision tower".to_string());
        }
        let mut used = vec![false; names.len()];
        for line in &self.written.tensors {
            let routes = line.routes(&names, &mut used)?;
            if routes.is_empty() && !line.optional {
                plan.unmet.push(line.wants());
            }
            plan.routes.extend(routes);
        }
        for (name, used) in names.into_iter().zip(used) {
            let dropped = self.written.drop.iter().any(|drop| drop.gaps(name).is_some());
            match (used, dropped) {
                (true, _) => {}
                (false, true) => plan.dropped.push(name.clone()),
                (false, false) => plan.unknown.push(name.clone()),
            }
        }
        Ok(plan)
    }

    /// Those maps of the program that fit these names; where none does, the nearest and what is wrong with it.
    pub fn fitting<'a>(
        names: impl Iterator<Item = &'a String> + Clone,
    ) -> Result<std::result::Result<Vec<Self>, (Self, Plan)>> {
        let (mut fitting, mut nearest): (Vec<Self>, Option<(Self, Plan)>) = (Vec::new(), None);
        for name in Self::built_in() {
            let map = Self::open(name)?;
            let renamed: Vec<String> = names.clone().map(|name| map.renamed(name)).collect();
            match map.plan(renamed.iter()) {
                Ok(plan) if plan.fits() => fitting.push(map),
                Ok(plan) if nearest.as_ref().is_none_or(|(_, other)| plan.distance() < other.distance()) => {
                    nearest = Some((map, plan));
                }
                _ => {}
            }
        }
        Ok(match nearest {
            Some(nearest) if fitting.is_empty() => Err(nearest),
            _ => Ok(fitting),
        })
    }

    /// The sections of `config.json`: as written, `set` put into it by dotted keys, and what is to be looked up looked up.
    ///
    /// # Errors
    /// If a value cannot be had; the error names its key.
    pub fn config(
        &self,
        config: &Value,
        shapes: &BTreeMap<String, Vec<usize>>,
        set: &[(String, Value)],
    ) -> std::result::Result<serde_json::Map<String, Value>, String> {
        let mut sections = serde_json::json!(self.written.config);
        for (key, value) in set {
            put(&mut sections, key, value.clone())?;
        }
        match (Facts { config, shapes }).fill_in(&sections, "")? {
            Value::Object(sections) => Ok(sections),
            _ => Err("config is no table".into()),
        }
    }

    /// `preprocessor_config.json`, if it has one.
    ///
    /// # Errors
    /// If a value cannot be had.
    pub fn preprocessor(
        &self,
        config: &Value,
        shapes: &BTreeMap<String, Vec<usize>>,
    ) -> std::result::Result<Option<Value>, String> {
        let Some(written) = &self.written.preprocessor else { return Ok(None) };
        let hint = |why: String| format!("preprocessor: {why} or name a file with --preprocessor");
        (Facts { config, shapes }).fill_in(written, "").map(Some).map_err(hint)
    }

    /// The sections of `config.json` that it has.
    pub fn sections(&self) -> impl Iterator<Item = &String> {
        self.written.config.keys()
    }

    /// What no checkpoint holds.
    pub fn fill(&self) -> &[Fill] {
        &self.written.fill
    }
}

/// Sets a value by its dotted key.
pub(crate) fn put(sections: &mut Value, key: &str, value: Value) -> std::result::Result<(), String> {
    let mut place = sections;
    for part in key.split('.') {
        let fields =
            place.as_object_mut().ok_or_else(|| format!("--set {key}: what stands before it is no section"))?;
        place = fields.entry(part).or_insert_with(|| serde_json::json!({}));
    }
    *place = value;
    Ok(())
}

impl Written {
    /// What another map says and this one does not.
    fn add_to(&mut self, other: Self) {
        let Self { key, prefixes, tower, needs, tensors, fill, drop, config, preprocessor, .. } = other;
        self.key = self.key.take().or(key);
        let own = std::mem::replace(&mut self.prefixes, prefixes);
        let new: Vec<_> = own.into_iter().filter(|prefix| !self.prefixes.contains(prefix)).collect();
        self.prefixes.extend(new);
        self.tower |= tower;
        self.needs.extend(needs);
        self.tensors.splice(0..0, tensors);
        self.fill
            .extend(fill.into_iter().filter(|fill| self.fill.iter().all(|own| own.to != fill.to)).collect::<Vec<_>>());
        self.drop.extend(drop);
        for (section, values) in config {
            let own = self.config.entry(section).or_insert_with(|| serde_json::json!({}));
            if let (Some(own), Value::Object(values)) = (own.as_object_mut(), values) {
                values.into_iter().for_each(|(key, value)| drop_in(own, key, value));
            }
        }
        self.preprocessor = self.preprocessor.take().or(preprocessor);
    }
}

/// Sets what is not set.
fn drop_in(fields: &mut serde_json::Map<String, Value>, key: String, value: Value) {
    fields.entry(key).or_insert(value);
}

impl Fill {
    /// The tensor, of a shape.
    ///
    /// # Errors
    /// If the shape has no such tensor.
    pub fn tensor(&self, shape: &[usize]) -> candle_core::Result<Tensor> {
        match (self.value, shape) {
            (Constant::Zeros, _) => Tensor::zeros(shape, DType::F32, &Device::Cpu),
            (Constant::Ones, _) => Tensor::ones(shape, DType::F32, &Device::Cpu),
            (Constant::Identity, [rows, columns]) if rows == columns => Tensor::eye(*rows, DType::F32, &Device::Cpu),
            (Constant::SinCos, [n, width]) if n.isqrt() * n.isqrt() == *n && width % 4 == 0 => {
                let (side, quarter) = (n.isqrt(), width / 4);
                let scale = self.base.map_or(1.0, |base| base as f64 / side as f64);
                let mut values = Vec::with_capacity(n * width);
                for (row, column) in (0..side).flat_map(|row| (0..side).map(move |column| (row, column))) {
                    for at in [column, row] {
                        let angle = |i: usize| at as f64 * scale / 10_000f64.powf(i as f64 / quarter as f64);
                        values.extend((0..quarter).map(|i| angle(i).sin() as f32));
                        values.extend((0..quarter).map(|i| angle(i).cos() as f32));
                    }
                }
                Tensor::from_vec(values, shape, &Device::Cpu)
            }
            (value, _) => candle_core::bail!("`{}` of shape {shape:?} cannot be filled with {value:?}", self.to),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_map_of_the_program_can_be_opened() {
        for name in Map::built_in() {
            let map = Map::open(name).unwrap_or_else(|error| panic!("{error}"));
            assert!(!map.about().is_empty() && !map.written.tensors.is_empty(), "{name}");
        }
        assert!(Map::open("no-such-map").unwrap_err().to_string().contains("fork-siglip"));
    }

    #[test]
    fn a_map_adds_to_what_it_extends() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write(
            "a.toml",
            "about = 'a'\nextends = ['b.toml']\nprefixes = [['x.', '']]\ndrop = ['q']\n[config.decoder]\npatch_size = 8\n",
        );
        write(
            "b.toml",
            "about = 'b'\nkey = 'ema'\nprefixes = [['m.', 'x.']]\n[[tensors]]\nfrom = 'p'\nto = 'q'\n[config.decoder]\npatch_size = 4\nhidden_size = 7\n",
        );
        let map = Map::open(folder.path().join("a.toml").to_str().unwrap()).unwrap();
        assert_eq!((map.about(), map.key(), map.renamed("m.p").as_str()), ("a", Some("ema"), "p"));
        let config = map.config(&Value::Null, &BTreeMap::new(), &[]).unwrap();
        assert_eq!(config["decoder"], serde_json::json!({ "patch_size": 8, "hidden_size": 7 }));
        write("b.toml", "about = 'b'\nextends = ['a.toml']");
        let error = Map::open(folder.path().join("a.toml").to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("extends itself"), "{error}");
    }

    #[test]
    fn sin_cos_by_hand() {
        let fill = Fill { to: "p".into(), value: Constant::SinCos, base: None };
        let positions = fill.tensor(&[4, 4]).unwrap().to_vec2::<f32>().unwrap();
        // Second patch: column 1, row 0.
        assert_eq!(positions[1], [1f32.sin(), 1f32.cos(), 0., 1.]);
        let scaled = Fill { base: Some(4), ..fill }.tensor(&[4, 4]).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(scaled[2], [0., 1., 2f32.sin(), 2f32.cos()]);
        assert!(Fill { to: "p".into(), value: Constant::SinCos, base: None }.tensor(&[5, 4]).is_err());
    }
}
