//! Which of an encoder's states are its features.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Which of an encoder's states are its features: `encoder.features` in `config.json`. Tokens of the encoder's own (class
/// token, registers) are never among them.
///
/// | in `config.json` | in transformers | final norm |
/// |---|---|---|
/// | `"last_hidden_state"` | `last_hidden_state` | applied |
/// | `"before_norm"` | `hidden_states[-1]` | not part of the model |
/// | `{"sum_last": k}` | `sum(hidden_states[-k:])` | not part of the model |
/// | `{"layer": k}` | `hidden_states[k]` | not part of the model |
/// | `{"layer_normed": k}` | `layernorm(hidden_states[k])`, a backbone's `feature_maps` of stage k | applied |
/// | `{"fuse": {"shallow": j, "deep": k, "by": …}}` | `hidden_states[j]` and `layernorm(hidden_states[k])`, made one by [`crate::fusion`] | applied to the deep ones, unless `"norm": false` |
///
/// Blocks are counted from 1, as transformers' `hidden_states` has the embeddings at 0. Blocks beyond the last one in use
/// are no part of the model: they are neither loaded nor computed, and [`crate::init`] leaves them out. A decoder whose
/// depth is not said mirrors the encoder's whole depth all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Features {
    /// After the final norm.
    #[default]
    LastHiddenState,
    /// Before the final norm.
    BeforeNorm,
    /// The sum of what the last k blocks put out, without the final norm (RAEv2, arXiv 2605.18324).
    SumLast(usize),
    /// What block k puts out.
    Layer(usize),
    /// What block k puts out, after the final norm.
    LayerNormed(usize),
    /// What two blocks put out, made one by a trained layer (IDEAL, arXiv 2606.11096).
    Fuse(Fuse),
}

/// Which two states become one, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fuse {
    /// The block, from 1, whose output has the details; 8 of 24 with IDEAL.
    pub shallow: usize,
    /// The block, from 1, whose output has the meaning; 24 of 24 with IDEAL.
    pub deep: usize,
    /// What makes them one.
    pub by: By,
    /// Whether the deep state passes the encoder's final norm, as with IDEAL. An InternViT that has none needs `false`.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub norm: bool,
}

/// What makes two states one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// A linear layer of the two side by side, 2·D → D.
    Linear,
    /// Cross-attention of the deep state to the shallow one, and an MLP.
    Attention,
}

impl By {
    /// Heads of the cross-attention, as IDEAL has it.
    pub(crate) const HEADS: usize = 8;
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks with a reference")]
fn is_yes(norm: &bool) -> bool {
    *norm
}

impl Features {
    /// Whether the final norm is part of the model.
    pub fn has_norm(self) -> bool {
        match self {
            Self::LastHiddenState | Self::LayerNormed(_) => true,
            Self::BeforeNorm | Self::SumLast(_) | Self::Layer(_) => false,
            Self::Fuse(fuse) => fuse.norm,
        }
    }

    /// How many of the encoder's `depth` blocks are part of the model.
    pub fn blocks(self, depth: usize) -> usize {
        match self {
            Self::LastHiddenState | Self::BeforeNorm | Self::SumLast(_) => depth,
            Self::Layer(k) | Self::LayerNormed(k) => k,
            Self::Fuse(fuse) => fuse.deep,
        }
    }

    /// The two states that become one, if they do.
    pub fn fuse(self) -> Option<Fuse> {
        if let Self::Fuse(fuse) = self { Some(fuse) } else { None }
    }

    /// From which of the `blocks` + 1 hidden states on they are summed.
    pub(crate) fn first_state(self, blocks: usize) -> usize {
        if let Self::SumLast(k) = self { blocks + 1 - k } else { blocks }
    }

    /// Whether an encoder of `depth` blocks and this width has them; the error names the field.
    pub(super) fn check(self, depth: usize, width: usize) -> Result<(), String> {
        let within = |name: &str, k: usize| match k {
            k if (1..=depth).contains(&k) => Ok(()),
            _ => Err(format!("encoder: features.{name} is {k}, expected: 1 to the {depth} blocks")),
        };
        match self {
            Self::LastHiddenState | Self::BeforeNorm => Ok(()),
            Self::SumLast(k) => within("sum_last", k),
            Self::Layer(k) => within("layer", k),
            Self::LayerNormed(k) => within("layer_normed", k),
            Self::Fuse(Fuse { shallow, deep, by, .. }) => {
                within("fuse.shallow", shallow)?;
                within("fuse.deep", deep)?;
                if shallow >= deep {
                    return Err(format!(
                        "encoder: features.fuse.shallow is {shallow}, expected: less than features.fuse.deep, {deep}"
                    ));
                }
                let heads = By::HEADS;
                if by == By::Attention && !width.is_multiple_of(heads) {
                    return Err(format!(
                        "encoder: features.fuse.by is `attention`, whose {heads} heads do not divide the width {width}; \
                         use `linear`"
                    ));
                }
                Ok(())
            }
        }
    }
}

/// In transformers' words.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LastHiddenState => f.write_str("last_hidden_state"),
            Self::BeforeNorm => f.write_str("hidden_states[-1]"),
            Self::SumLast(k) => write!(f, "sum(hidden_states[-{k}:])"),
            Self::Layer(k) => write!(f, "hidden_states[{k}]"),
            Self::LayerNormed(k) => write!(f, "layernorm(hidden_states[{k}])"),
            Self::Fuse(Fuse { shallow, deep, by, norm }) => {
                let by = if *by == By::Linear { "linear" } else { "attention" };
                let (open, close) = if *norm { ("layernorm(", ")") } else { ("", "") };
                write!(f, "{by}(hidden_states[{shallow}], {open}hidden_states[{deep}]{close})")
            }
        }
    }
}
