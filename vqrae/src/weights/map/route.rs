//! From tensors of a checkpoint to tensors of ours: renamed, reshaped, joined, taken apart.

use candle_core::{Result, Tensor};
use serde::Deserialize;

use super::template::{Gaps, Template};

/// One `[[tensors]]` of a map.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Line {
    /// The checkpoint's names. Several tensors that become the same one of ours are joined, in the order of these names and
    /// of what fills their gaps.
    from: Names,
    /// Our name; several: equal pieces, the first dimension (or `split`) taken apart.
    to: Names,
    /// Whether a checkpoint may lack it, and a model have no use for it.
    #[serde(default)]
    pub(super) optional: bool,
    /// What is done to each tensor before it is joined, in turn.
    #[serde(default)]
    steps: Vec<Step>,
    join: Option<Join>,
    #[serde(default)]
    split: usize,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Names {
    One(Template),
    More(Vec<Template>),
}

impl Names {
    fn all(&self) -> &[Template] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::More(names) => names,
        }
    }
}

/// What is done to a tensor.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Step {
    /// A dimension of size 1 goes.
    Squeeze(usize),
    /// A dimension of size 1 comes.
    Unsqueeze(usize),
    Transpose([usize; 2]),
    /// One size may be −1.
    Reshape(Vec<i64>),
    Slice {
        dim: usize,
        start: usize,
        /// The end of the dimension, unless said otherwise.
        end: Option<usize>,
    },
    Add(f64),
    Multiply(f64),
    Power(f64),
}

/// How several tensors become one.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Join {
    /// Side by side along a dimension.
    Along(usize),
    /// Matrices as blocks of one matrix, zeros between them.
    Diagonal,
    Sum,
}

/// Tensors of ours that come from tensors of a checkpoint.
#[derive(Debug, Clone)]
pub struct Route {
    /// The checkpoint's names, in the order in which they are joined.
    pub from: Vec<String>,
    /// Our names.
    pub to: Vec<String>,
    /// Whether a model without these is none the worse.
    pub optional: bool,
    steps: Vec<Step>,
    join: Option<Join>,
    split: usize,
}

/// What a map makes of a checkpoint's names.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Which become ours, and how.
    pub routes: Vec<Route>,
    /// Those of a vision tower.
    pub tower: Vec<String>,
    /// Those without a use.
    pub dropped: Vec<String>,
    /// Those that the map says nothing of.
    pub unknown: Vec<String>,
    /// What the map wants and the checkpoint has not.
    pub unmet: Vec<String>,
}

impl Plan {
    /// Whether the map says all of the checkpoint, and nothing beyond.
    pub fn fits(&self) -> bool {
        self.unknown.is_empty() && self.unmet.is_empty()
    }

    /// How far off it is.
    pub(super) fn distance(&self) -> usize {
        self.unknown.len() + self.unmet.len()
    }
}

/// A name that fits: which of the line's templates, what fills its gaps, and the name itself.
type Source<'a> = (usize, Gaps, &'a String);

impl Line {
    /// The routes of all names that fit; `used` learns which did.
    pub(super) fn routes(&self, names: &[&String], used: &mut [bool]) -> std::result::Result<Vec<Route>, String> {
        let mut found: Vec<(Vec<String>, Vec<Source>)> = Vec::new();
        for (i, name) in names.iter().enumerate() {
            for (place, template) in self.from.all().iter().enumerate() {
                let Some(gaps) = template.gaps(name) else { continue };
                used[i] = true;
                let to = self.to.all().iter().map(|to| to.name(&gaps)).collect::<std::result::Result<Vec<_>, _>>()?;
                match found.iter_mut().find(|(others, _)| *others == to) {
                    Some((_, sources)) => sources.push((place, gaps, name)),
                    None => found.push((to, vec![(place, gaps, name)])),
                }
            }
        }
        let route = |(to, mut sources): (Vec<String>, Vec<Source>)| {
            sources.sort_by(|a, b| a.0.cmp(&b.0).then_with(|| a.1.compare(&b.1)));
            let from: Vec<String> = sources.into_iter().map(|(_, _, name)| name.clone()).collect();
            if from.len() > 1 && self.join.is_none() {
                return Err(format!("`{}` would come of {}; say how with `join`", to[0], listed(&from)));
            }
            let Self { optional, steps, join, split, .. } = self.clone();
            Ok(Route { from, to, optional, steps, join, split })
        };
        found.into_iter().map(route).collect()
    }

    /// What it looks for.
    pub(super) fn wants(&self) -> String {
        listed(&self.from.all().iter().map(ToString::to_string).collect::<Vec<_>>())
    }
}

/// Names for a message.
pub(super) fn listed(names: &[String]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    names.join(", ")
}

impl Route {
    /// What becomes of the tensors of [`Route::from`]: one for each of [`Route::to`].
    ///
    /// # Errors
    /// If a step does not suit a tensor's shape.
    pub fn apply(&self, tensors: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let step = |tensor: Tensor| self.steps.iter().try_fold(tensor, |tensor, step| step.apply(tensor));
        let tensors = tensors.into_iter().map(step).collect::<Result<Vec<_>>>()?;
        let joined = match (self.join, tensors.as_slice()) {
            (_, [one]) => one.clone(),
            (Some(Join::Along(dimension)), many) => Tensor::cat(many, dimension)?,
            (Some(Join::Sum), [first, others @ ..]) => others.iter().try_fold(first.clone(), |sum, x| sum + x)?,
            (Some(Join::Diagonal), many) => diagonal(many)?,
            _ => candle_core::bail!("nothing is to be joined"),
        };
        let pieces = match self.to.len() {
            1 => vec![joined],
            n if joined.dim(self.split)? % n == 0 => joined.chunk(n, self.split)?,
            n => candle_core::bail!("dimension {} of {:?} does not divide by {n}", self.split, joined.dims()),
        };
        pieces.iter().map(Tensor::contiguous).collect()
    }
}

impl Step {
    fn apply(&self, x: Tensor) -> Result<Tensor> {
        match self {
            Self::Squeeze(dimension) if x.dim(*dimension)? == 1 => x.squeeze(*dimension),
            Self::Squeeze(dimension) => candle_core::bail!("dimension {dimension} of {:?} is not 1", x.dims()),
            Self::Unsqueeze(dimension) => x.unsqueeze(*dimension),
            Self::Transpose([a, b]) => x.transpose(*a, *b),
            Self::Reshape(sizes) => x.reshape(full_shape(sizes, &x)?),
            Self::Slice { dim, start, end } => {
                let size = x.dim(*dim)?;
                let end = end.unwrap_or(size);
                if *start >= end || end > size {
                    candle_core::bail!("dimension {dim} of {:?} has no {start} to {end}", x.dims());
                }
                x.narrow(*dim, *start, end - start)
            }
            Self::Add(value) => x + *value,
            Self::Multiply(value) => x * *value,
            Self::Power(value) => x.powf(*value),
        }
    }
}

/// A shape whose −1 is what is left of a tensor.
fn full_shape(sizes: &[i64], x: &Tensor) -> Result<Vec<usize>> {
    let wrong = || candle_core::Error::Msg(format!("{:?} cannot become {sizes:?}", x.dims()));
    let known = sizes.iter().filter(|size| **size != -1).map(|size| usize::try_from(*size).ok());
    let known = known.into_iter().try_fold(1usize, |product, size| product.checked_mul(size?)).ok_or_else(wrong)?;
    let left = x.elem_count().checked_div(known).unwrap_or(0);
    let gaps = sizes.iter().filter(|size| **size == -1).count();
    if gaps > 1 || known * if gaps == 1 { left } else { 1 } != x.elem_count() {
        return Err(wrong());
    }
    Ok(sizes.iter().map(|size| usize::try_from(*size).unwrap_or(left)).collect())
}

/// Blocks of one matrix.
fn diagonal(blocks: &[Tensor]) -> Result<Tensor> {
    let sizes = blocks.iter().map(Tensor::dims2).collect::<Result<Vec<_>>>()?;
    let columns: usize = sizes.iter().map(|size| size.1).sum();
    let mut before = 0;
    let mut rows = Vec::new();
    for (block, size) in blocks.iter().zip(sizes) {
        rows.push(block.pad_with_zeros(1, before, columns - before - size.1)?);
        before += size.1;
    }
    Tensor::cat(&rows, 0)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn line(text: &str) -> Line {
        toml::from_str(text).unwrap()
    }

    fn routes(line: &Line, names: &[&str]) -> std::result::Result<Vec<Route>, String> {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        line.routes(&names.iter().collect::<Vec<_>>(), &mut vec![false; names.len()])
    }

    #[test]
    fn gaps_that_ours_has_not_are_joined_by_their_numbers() {
        let line = line("from = 'layers.{n}.codes'\nto = 'codebook'\njoin = { along = 0 }");
        let routes = routes(&line, &["layers.10.codes", "layers.2.codes", "other"]).unwrap();
        assert_eq!(routes[0].from, ["layers.2.codes", "layers.10.codes"]);
        let x = |value: f32| Tensor::new(&[[value]], &Device::Cpu).unwrap();
        let made = routes[0].apply(vec![x(2.), x(10.)]).unwrap();
        assert_eq!(made[0].to_vec2::<f32>().unwrap(), [[2.], [10.]]);
    }

    #[test]
    fn two_tensors_for_one_name_need_a_join() {
        let error = routes(&line("from = 'a.{n}'\nto = 'b'"), &["a.0", "a.1"]).unwrap_err();
        assert_eq!(error, "`b` would come of `a.0`, `a.1`; say how with `join`");
    }

    #[test]
    fn one_tensor_becomes_several() {
        let line =
            line("from = 'qkv.{kind}'\nto = ['q.{kind}', 'k.{kind}', 'v.{kind}']\nsteps = [{ transpose = [0, 1] }]");
        let route = &routes(&line, &["qkv.weight"]).unwrap()[0];
        assert_eq!(route.to, ["q.weight", "k.weight", "v.weight"]);
        let made = route.apply(vec![Tensor::arange(0f32, 6., &Device::Cpu).unwrap().reshape((2, 3)).unwrap()]).unwrap();
        assert_eq!(made[1].to_vec2::<f32>().unwrap(), [[1., 4.]]);
    }

    #[test]
    fn steps_and_joins() {
        let x = Tensor::arange(0f32, 6., &Device::Cpu).unwrap().reshape((1, 3, 2)).unwrap();
        for (steps, expected) in [
            ("[{ squeeze = 0 }, { slice = { dim = 0, start = 1 } }]", vec![2., 3., 4., 5.]),
            ("[{ reshape = [-1] }, { slice = { dim = 0, start = 1, end = 3 } }]", vec![1., 2.]),
            (
                "[{ slice = { dim = 1, start = 2 } }, { add = 1.0 }, { power = 2.0 }, { multiply = 2.0 }]",
                vec![50., 72.],
            ),
        ] {
            let line = line(&format!("from = 'a'\nto = 'b'\nsteps = {steps}"));
            let made = routes(&line, &["a"]).unwrap()[0].apply(vec![x.clone()]).unwrap();
            assert_eq!(made[0].flatten_all().unwrap().to_vec1::<f32>().unwrap(), expected, "{steps}");
        }
        for steps in [
            "[{ squeeze = 1 }]",
            "[{ reshape = [4, -1] }]",
            "[{ slice = { dim = 1, start = 3 } }]",
            "[{ squeeze = 7 }]",
        ] {
            let line = line(&format!("from = 'a'\nto = 'b'\nsteps = {steps}"));
            assert!(routes(&line, &["a"]).unwrap()[0].apply(vec![x.clone()]).is_err(), "{steps}");
        }
        let blocks =
            [Tensor::new(&[[1f32, 2.]], &Device::Cpu).unwrap(), Tensor::new(&[[3f32], [4.]], &Device::Cpu).unwrap()];
        assert_eq!(diagonal(&blocks).unwrap().to_vec2::<f32>().unwrap(), [[1., 2., 0.], [0., 0., 3.], [0., 0., 4.]]);
    }
}
