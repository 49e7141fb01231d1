//! Other projects' names of an encoder's tensors, brought to ours.
//!
//! One table serves all families, since their names do not contradict each other: Hugging Face's of transformers 4 (the
//! hub) and 5, and the original authors' (facebookresearch, timm, OpenGVLab).

use candle_core::Tensor;

use super::Tensors;
use crate::encoder::Layout;

/// What a whole model puts before its vision tower's names.
const PREFIXES: [&str; 7] =
    ["model.vision_tower.", "vision_tower.", "vision_model.", "dinov2.", "dinov2_with_registers.", "internvl.", "vit."];

/// Tensors that a tokenizer has no use for, by the start of their names.
const UNUSED: [&str; 9] = [
    "embeddings.mask_token",
    "mask_token",
    "decoder",
    "pooler.",
    "head.",
    "fc_norm.",
    "classifier.",
    "text_model.",
    "logit_",
];

/// Parts of a name outside the blocks.
const SURROUNDINGS: [(&str, &str); 11] = [
    ("embeddings.patch_embeddings.projection.", "embeddings.patch_embedding."),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("embeddings.class_embedding", CLASS),
    ("embeddings.cls_token", CLASS),
    ("cls_token", CLASS),
    ("embeddings.register_tokens", REGISTERS),
    ("register_tokens", REGISTERS),
    ("reg_token", REGISTERS),
    ("pos_embed", POSITIONS),
    ("layernorm.", "post_layernorm."),
    ("norm.", "post_layernorm."),
];
/// All the names that positions go by, after the table above.
const POSITION_NAMES: [&str; 2] = ["embeddings.position_embeddings", "embeddings.position_embedding"];

const CLASS: &str = "class";
const REGISTERS: &str = "registers";
const POSITIONS: &str = "positions";

/// What stands between a block's number and its own names.
const BLOCKS: [&str; 4] = ["encoder.layer.", "encoder.layers.", "blocks.", "layers."];

/// Parts of a name within a block. `attention.output` must come before `output`.
const WITHIN: [(&str, &str); 29] = [
    ("norm1.", "layer_norm1."),
    ("layernorm_before.", "layer_norm1."),
    ("norm2.", "layer_norm2."),
    ("layernorm_after.", "layer_norm2."),
    ("attention.attention.query.", "self_attn.q_proj."),
    ("attention.attention.key.", "self_attn.k_proj."),
    ("attention.attention.value.", "self_attn.v_proj."),
    ("attention.output.dense.", "self_attn.out_proj."),
    ("attention.o_proj.", "self_attn.out_proj."),
    ("attention.projection_layer.", "self_attn.out_proj."),
    ("attention.q_proj.", "self_attn.q_proj."),
    ("attention.k_proj.", "self_attn.k_proj."),
    ("attention.v_proj.", "self_attn.v_proj."),
    ("attention.q_norm.", "self_attn.q_norm."),
    ("attention.k_norm.", "self_attn.k_norm."),
    ("attn.q_norm.", "self_attn.q_norm."),
    ("attn.k_norm.", "self_attn.k_norm."),
    ("attn.qkv.", QKV),
    ("attn.proj.", "self_attn.out_proj."),
    ("layer_scale1.lambda1", "layer_scale1.weight"),
    ("layer_scale2.lambda1", "layer_scale2.weight"),
    ("lambda_1", "layer_scale1.weight"),
    ("lambda_2", "layer_scale2.weight"),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
    ("mlp.weights_in.", "mlp.fc1."),
    ("mlp.weights_out.", "mlp.fc2."),
    ("mlp.w12.", "mlp.fc1."),
    ("mlp.w3.", "mlp.fc2."),
];
/// timm's and OpenGVLab's layer scales have no name of their own part.
const LAYER_SCALES: [(&str, &str); 4] = [
    ("ls1.gamma", "layer_scale1.weight"),
    ("ls2.gamma", "layer_scale2.weight"),
    ("ls1", "layer_scale1.weight"),
    ("ls2", "layer_scale2.weight"),
];

const QKV: &str = "qkv.";
const GATE: &str = "mlp.gate_proj.";
const UP: &str = "mlp.up_proj.";

/// The tensors of a tower under our names, but for the first part `encoder.`.
///
/// Fused q, k and v are taken apart, a SwiGLU's two layers put together, class token, registers and their positions become
/// `embeddings.prefix_tokens`, and a patch embedding that is a linear layer becomes a convolution's.
pub(super) fn of_tower(tensors: Tensors, layout: &Layout) -> candle_core::Result<Tensors> {
    let mut ours = Tensors::new();
    for (name, tensor) in tensors {
        let name = PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(&name);
        if UNUSED.iter().any(|unused| name.starts_with(unused)) {
            continue;
        }
        match block(name) {
            Some((number, rest)) => add_to_block(&mut ours, &format!("layers.{number}."), rest, tensor)?,
            None => {
                ours.insert(renamed(name, &SURROUNDINGS), tensor);
            }
        }
    }
    join_gates(&mut ours)?;
    join_prefix(&mut ours, layout)?;
    convolve(&mut ours, layout.patch)?;
    Ok(ours)
}

/// The number of the block that a name belongs to, and the rest of the name.
fn block(name: &str) -> Option<(usize, &str)> {
    let rest = BLOCKS.iter().find_map(|blocks| name.strip_prefix(blocks))?;
    let (number, rest) = rest.split_once('.')?;
    Some((number.parse().ok()?, rest))
}

fn renamed(name: &str, table: &[(&str, &str)]) -> String {
    let found = table.iter().find_map(|(theirs, ours)| Some(format!("{ours}{}", name.strip_prefix(theirs)?)));
    found.unwrap_or_else(|| name.to_string())
}

fn add_to_block(ours: &mut Tensors, place: &str, rest: &str, tensor: Tensor) -> candle_core::Result<()> {
    let name = match renamed(rest, &WITHIN) {
        unchanged if unchanged == rest => renamed(rest, &LAYER_SCALES),
        renamed => renamed,
    };
    if let Some(kind) = name.strip_prefix(QKV) {
        for (part, x) in ["q_proj", "k_proj", "v_proj"].iter().zip(tensor.chunk(3, 0)?) {
            ours.insert(format!("{place}self_attn.{part}.{kind}"), x);
        }
    } else {
        // transformers 5 calls the second layer of a SwiGLU as others call theirs.
        let name = name.replace("mlp.down_proj.", "mlp.fc2.");
        ours.insert(place.to_string() + &name, tensor);
    }
    Ok(())
}

/// A gate and what it gates, one layer in transformers 4 and with the authors.
fn join_gates(ours: &mut Tensors) -> candle_core::Result<()> {
    let gates: Vec<String> = ours.keys().filter(|name| name.contains(GATE)).cloned().collect();
    for name in gates {
        let (Some(gate), Some(up)) = (ours.remove(&name), ours.remove(&name.replace(GATE, UP))) else {
            candle_core::bail!("tensor `{name}` has no sibling `{UP}…`");
        };
        ours.insert(name.replace(GATE, "mlp.fc1."), Tensor::cat(&[&gate, &up], 0)?);
    }
    Ok(())
}

/// Class token and registers to `embeddings.prefix_tokens` `[P, D]`, positions to `embeddings.position_embedding.weight`
/// `[h·w, D]`. The class token's position, first of all where there is one more than patches, is added to it.
fn join_prefix(ours: &mut Tensors, layout: &Layout) -> candle_core::Result<()> {
    const OURS: &str = "embeddings.position_embedding.weight";
    let names = POSITION_NAMES.iter().copied().chain([POSITIONS]);
    let Some(positions) = names.filter(|name| *name != OURS).find_map(|name| ours.remove(name)) else {
        return Ok(());
    };
    let positions = positions.reshape(((), layout.vit.width))?;
    let (n, patches) = (positions.dim(0)?, layout.grid.0 * layout.grid.1);
    let mut prefix = Vec::new();
    let mut first = 0;
    if let Some(class) = ours.remove(CLASS) {
        let class = class.reshape((1, layout.vit.width))?;
        first = usize::from(n == patches + 1);
        prefix.push(if first == 1 { (class + positions.narrow(0, 0, 1)?)? } else { class });
    }
    if let Some(registers) = ours.remove(REGISTERS) {
        prefix.push(registers.reshape(((), layout.vit.width))?);
    }
    if n - first != patches {
        candle_core::bail!("{n} positions do not fit the config's grid of {}×{}", layout.grid.0, layout.grid.1);
    }
    ours.insert(OURS.to_string(), positions.narrow(0, first, patches)?.contiguous()?);
    if !prefix.is_empty() {
        ours.insert("embeddings.prefix_tokens".to_string(), Tensor::cat(&prefix, 0)?);
    }
    Ok(())
}

/// SigLIP2 NaFlex embeds flattened patches, `[D, p·p·3]` in the order row, column, channel; a convolution's weight is
/// `[D, 3, p, p]`.
fn convolve(ours: &mut Tensors, p: usize) -> candle_core::Result<()> {
    const WEIGHT: &str = "embeddings.patch_embedding.weight";
    let Some(weight) = ours.get(WEIGHT) else { return Ok(()) };
    let &[d, inputs] = weight.dims() else { return Ok(()) };
    if inputs != 3 * p * p {
        candle_core::bail!("tensor `{WEIGHT}` takes {inputs} values a patch, expected: 3·{p}·{p}");
    }
    let weight = weight.reshape((d, p, p, 3))?.permute((0, 3, 1, 2))?.contiguous()?;
    ours.insert(WEIGHT.to_string(), weight);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_meet_in_one_name() {
        for (theirs, ours) in [
            ("attention.attention.query.weight", "self_attn.q_proj.weight"),
            ("attention.output.dense.bias", "self_attn.out_proj.bias"),
            ("output.dense.bias", "mlp.fc2.bias"),
            ("norm1.weight", "layer_norm1.weight"),
            ("mlp.fc1.weight", "mlp.fc1.weight"),
            ("lambda_1", "layer_scale1.weight"),
        ] {
            assert_eq!(renamed(theirs, &WITHIN), ours);
        }
        assert_eq!(block("encoder.layer.11.norm1.weight"), Some((11, "norm1.weight")));
        assert_eq!(block("blocks.0.ls1.gamma"), Some((0, "ls1.gamma")));
        assert_eq!(block("layernorm.weight"), None);
    }
}
