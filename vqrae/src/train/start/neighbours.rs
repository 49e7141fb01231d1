//! A start that looks at neighbours: the first block of the decoder begins as the best linear map from the codes of a patch
//! and of the eight around it to its pixels, and that of the encoder sees the same eight.
//!
//! Position vectors are cosines and sines of a patch's row and column, so that the vector of a place one patch further on is
//! a rotation of them. A head whose queries are so rotated attends to one neighbour, and its values are that neighbour's
//! code; eight heads bring all eight, and the output layer is a least-squares fit. At the border, where there is no
//! such neighbour, the nearest patch answers.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;

use crate::cholesky::cholesky;
use crate::error::{Error, Result};
use crate::model::{Config as ModelConfig, Network};
use crate::ops::Norm;
use crate::vit::{self, Attention, patchify};
use crate::weights::Tensors;

/// The rows and columns by which the eight neighbours are off, a head each.
const OFFSETS: [(f64, f64); 8] = [(-1., -1.), (-1., 0.), (-1., 1.), (0., -1.), (0., 1.), (1., -1.), (1., 0.), (1., 1.)];

/// What scores are multiplied by: a patch next to the neighbour that is meant has e^−3.4 of its weight.
const SHARPNESS: f64 = 1.0;

/// Length of a position vector over the content's: the layer norm then hardly knows the content, and so is nearly linear.
const LENGTH: f64 = 3.0;

/// Where a tower keeps what, in tokens `width` wide.
pub(super) struct Tower {
    /// Beginning of the names of its positions.
    pub(super) positions: &'static str,
    /// Beginning of the names of its blocks.
    pub(super) layers: &'static str,
    /// The sizes of its blocks.
    pub(super) vit: vit::Config,
    /// Its grid.
    pub(super) grid: (usize, usize),
    /// The first of the elements that heads bring from neighbours.
    pub(super) first: usize,
    /// Their number.
    pub(super) brought: usize,
    /// Root mean square of the length of a token without its position.
    pub(super) length: f64,
}

impl Tower {
    fn head_width(&self) -> usize {
        self.vit.width / OFFSETS.len()
    }

    /// The first element of the position vector, which stands at the end of a token and is as wide as a head.
    pub(super) fn places(&self) -> usize {
        self.vit.width - self.head_width()
    }

    /// Whether the sizes leave room for it; the error says what is needed.
    pub(super) fn check(&self) -> std::result::Result<(), String> {
        let head = self.head_width();
        let (width, brought) = (self.vit.width, self.brought);
        if self.vit.heads != OFFSETS.len() || self.vit.depth == 0 {
            return Err(format!("one block or more of {} heads in `{}`", OFFSETS.len(), self.layers));
        }
        if brought > head || !head.is_multiple_of(4) || self.first + brought + head > width {
            return Err(format!("codes no wider than a head of `{}`, {width} / 8 and a multiple of 4", self.layers));
        }
        Ok(())
    }

    /// Position vectors, and the first block's queries, keys and values.
    pub(super) fn write(&self, tensors: &mut Tensors) -> Result<()> {
        let (width, head, places) = (self.vit.width, self.head_width(), self.places());
        let waves = head / 4;
        let length = LENGTH * self.length;
        let amplitude = length / (2.0 * waves as f64).sqrt();
        let spread = ((length.powi(2) + self.length.powi(2)) / width as f64).sqrt();
        // Half a turn across the grid, and its multiples.
        let angle = |wave: usize, side: usize| std::f64::consts::PI * (wave + 1) as f64 / side as f64;
        let mut table = vec![0f32; self.grid.0 * self.grid.1 * width];
        for (i, row) in table.chunks_exact_mut(width).enumerate() {
            let (y, x) = ((i / self.grid.1) as f64, (i % self.grid.1) as f64);
            for wave in 0..waves {
                let (sin_y, cos_y) = (angle(wave, self.grid.0) * y).sin_cos();
                let (sin_x, cos_x) = (angle(wave, self.grid.1) * x).sin_cos();
                let values = [cos_y, sin_y, cos_x, sin_x].map(|value| (value * amplitude) as f32);
                row[places + 4 * wave..][..4].copy_from_slice(&values);
            }
        }
        put(tensors, &format!("{}.weight", self.positions), table)?;
        // Norms hand on content as long as it was, and positions as plain cosines and sines.
        let gains: Vec<f32> = (0..width).map(|i| if i < places { spread } else { spread / amplitude } as f32).collect();
        for name in
            (0..self.vit.depth).flat_map(|i| [1, 2].map(|n| format!("{}.{i}.layer_norm{n}.weight", self.layers)))
        {
            put(tensors, &name, gains.clone())?;
        }
        let mut queries = vec![0f32; width * width];
        let (mut keys, mut values) = (queries.clone(), queries.clone());
        // Scores are divided by √head.
        let gain = (SHARPNESS * (head as f64).sqrt()).sqrt();
        for (h, (down, right)) in OFFSETS.into_iter().enumerate() {
            for wave in 0..waves {
                let turns = [(0, angle(wave, self.grid.0) * down), (2, angle(wave, self.grid.1) * right)];
                for (axis, turn) in turns {
                    let at = 4 * wave + axis;
                    let (sin, cos) = turn.sin_cos();
                    let rotation = [[cos, -sin], [sin, cos]];
                    for (i, row) in rotation.iter().enumerate() {
                        for (j, value) in row.iter().enumerate() {
                            queries[(h * head + at + i) * width + places + at + j] = (value * gain) as f32;
                        }
                        keys[(h * head + at + i) * width + places + at + i] = gain as f32;
                    }
                }
            }
            for i in 0..self.brought {
                values[(h * head + i) * width + self.first + i] = 1.0;
            }
        }
        for (name, weight) in [("q_proj", queries), ("k_proj", keys), ("v_proj", values)] {
            put(tensors, &format!("{}.0.self_attn.{name}.weight", self.layers), weight)?;
        }
        Ok(())
    }

    /// Fits what the decoder's first elements, `..painted`, are to be, given the codes that its tokens and their neighbours
    /// have. `batches` give normalised pixels `[B, 3, H, W]`, `true_tokens` what those elements should be, `[B·N, painted]`.
    pub(super) fn fit(
        &self,
        tensors: &mut Tensors,
        model: &ModelConfig,
        painted: usize,
        batches: &[Tensor],
        true_tokens: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<()> {
        let (width, brought, head) = (self.vit.width, self.brought, self.head_width());
        let block = format!("{}.0", self.layers);
        let out = format!("{block}.self_attn.out_proj.weight");
        // A first fit knows the tokens without a fit, whose lengths differ a little; the second has those of the first.
        for _ in 0..2 {
            put(tensors, &out, identity(width))?;
            let vb = VarBuilder::from_tensors(tensors.clone().into_iter().collect(), DType::F32, &Device::Cpu);
            let network = Network::load(vb.clone(), model)?;
            let positions = vb.get((self.grid.0 * self.grid.1, width), &format!("{}.weight", self.positions))?;
            let norm = Norm::load(vb.pp(&block).pp("layer_norm1"), width, self.vit.layer_norm_eps, false)?;
            let attention = Attention::load(vb.pp(&block).pp("self_attn"), &self.vit)?;
            let mut sums = Normal::new(brought + width + 1, painted);
            for pixels in batches {
                let tokens = network.quantizer.quantize(&network.latents(pixels)?)?.tokens.detach();
                let normed = norm.forward(&tokens.broadcast_add(&positions)?)?;
                let neighbours = attention.forward(&normed, &normed)?;
                let (b, n, _) = neighbours.dims3()?;
                let own = tokens.narrow(2, self.first, brought)?;
                let ones = Tensor::ones((b, n, 1), DType::F32, &Device::Cpu)?;
                sums.add(&Tensor::cat(&[&own, &neighbours, &ones], 2)?.flatten_to(1)?, &true_tokens(pixels)?)?;
            }
            let solution = sums.solve();
            let at = |row: usize, column: usize| solution[row * painted + column] as f32;
            let mut weight = vec![0f32; width * width];
            let mut bias = vec![0f32; width];
            let own = vb.get((width, brought), "quantizer.linear_out.weight")?.to_vec2::<f32>()?;
            let mut linear_out = own.concat();
            for p in 0..painted {
                (0..8 * head).for_each(|j| weight[p * width + j] = at(brought + j, p));
                bias[p] = at(brought + width, p);
                (0..brought).for_each(|j| linear_out[p * brought + j] = at(j, p) * own[self.first + j][j]);
            }
            put(tensors, &out, weight)?;
            put(tensors, &format!("{block}.self_attn.out_proj.bias"), bias)?;
            put(tensors, "quantizer.linear_out.weight", linear_out)?;
        }
        Ok(())
    }
}

/// What tokens `[B·N, painted]` of the true patches are: the patch embedding's first elements.
pub(super) fn embedded(pixels: &Tensor, weight: &Tensor, bias: &Tensor, p: usize) -> candle_core::Result<Tensor> {
    patchify(pixels, p)?.flatten_to(1)?.matmul(&weight.t()?)?.broadcast_add(bias)
}

/// Replaces the values of a tensor.
pub(super) fn put(tensors: &mut Tensors, name: &str, values: Vec<f32>) -> Result<()> {
    let slot = tensors.get_mut(name).ok_or_else(|| Error::Training(format!("the model has no `{name}`")))?;
    *slot = Tensor::from_vec(values, slot.shape(), &Device::Cpu)?;
    Ok(())
}

fn identity(n: usize) -> Vec<f32> {
    (0..n * n).map(|i| if i / n == i % n { 1.0 } else { 0.0 }).collect()
}

/// The normal equations `XᵀX W = XᵀY` of a least-squares fit, in f64.
struct Normal {
    xx: Vec<f64>,
    xy: Vec<f64>,
    inputs: usize,
    outputs: usize,
}

impl Normal {
    fn new(inputs: usize, outputs: usize) -> Self {
        Self { xx: vec![0.0; inputs * inputs], xy: vec![0.0; inputs * outputs], inputs, outputs }
    }

    /// Adds rows `[R, inputs]` and `[R, outputs]`.
    fn add(&mut self, x: &Tensor, y: &Tensor) -> candle_core::Result<()> {
        let x_t = x.t()?.contiguous()?;
        for (sums, product) in [(&mut self.xx, x_t.matmul(x)?), (&mut self.xy, x_t.matmul(y)?)] {
            let values = product.flatten_all()?.to_vec1::<f32>()?;
            sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(value));
        }
        Ok(())
    }

    /// W `[inputs, outputs]`, by Cholesky's factors; inputs that say the same share what they say.
    fn solve(self) -> Vec<f64> {
        const LEAST: f64 = 1e-6;
        let (n, m, mut w) = (self.inputs, self.outputs, self.xy);
        let root = cholesky(self.xx, n, LEAST);
        for column in 0..m {
            for i in 0..n {
                let dot: f64 = (0..i).map(|k| root[i * n + k] * w[k * m + column]).sum();
                w[i * m + column] = (w[i * m + column] - dot) / root[i * n + i];
            }
            for i in (0..n).rev() {
                let dot: f64 = (i + 1..n).map(|k| root[k * n + i] * w[k * m + column]).sum();
                w[i * m + column] = (w[i * m + column] - dot) / root[i * n + i];
            }
        }
        w
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_least_squares_fit_by_hand() {
        // y = 2 x₀ − x₁ on three points, exactly.
        let x = Tensor::new(&[[1f32, 0.], [0., 1.], [1., 1.]], &Device::Cpu).unwrap();
        let y = Tensor::new(&[[2f32], [-1.], [1.]], &Device::Cpu).unwrap();
        let mut sums = Normal::new(2, 1);
        sums.add(&x, &y).unwrap();
        let solution = sums.solve();
        assert!((solution[0] - 2.0).abs() < 1e-5 && (solution[1] + 1.0).abs() < 1e-5, "{solution:?}");
    }

    #[test]
    fn heads_attend_to_their_neighbours() {
        let vit = vit::Config {
            width: 128,
            depth: 1,
            heads: 8,
            mlp_width: 8,
            layer_norm_eps: 1e-6,
            style: vit::Style::default(),
        };
        let grid = (6, 5);
        let tower = Tower { positions: "positions", layers: "layers", vit, grid, first: 0, brought: 16, length: 1.0 };
        tower.check().unwrap();
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let mut tensors: Tensors = ["q_proj", "k_proj", "v_proj", "out_proj"]
            .iter()
            .flat_map(|name| {
                let name = format!("layers.0.self_attn.{name}");
                [(format!("{name}.weight"), zeros(&[128, 128])), (format!("{name}.bias"), zeros(&[128]))]
            })
            .chain([1, 2].map(|n| (format!("layers.0.layer_norm{n}.weight"), zeros(&[128]))))
            .chain([1, 2].map(|n| (format!("layers.0.layer_norm{n}.bias"), zeros(&[128]))))
            .chain([("positions.weight".to_string(), zeros(&[30, 128]))])
            .collect();
        tower.write(&mut tensors).unwrap();
        put(&mut tensors, "layers.0.self_attn.out_proj.weight", identity(128)).unwrap();
        let vb = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
        let norm = Norm::load(vb.pp("layers.0.layer_norm1"), 128, 1e-6, false).unwrap();
        let attention = Attention::load(vb.pp("layers.0.self_attn"), &vit).unwrap();
        // A token's first element is its number; the rest of its length does not matter here.
        let numbers: Vec<f32> =
            (0..30).flat_map(|i| (0..128).map(move |j| if j == 0 { i as f32 / 30.0 } else { 0.0 })).collect();
        let tokens = Tensor::from_vec(numbers, (1, 30, 128), &Device::Cpu).unwrap();
        let x = tokens.broadcast_add(&vb.get((30, 128), "positions.weight").unwrap()).unwrap();
        let normed = norm.forward(&x).unwrap();
        let brought = attention.forward(&normed, &normed).unwrap().get(0).unwrap().to_vec2::<f32>().unwrap();
        let own = normed.get(0).unwrap().to_vec2::<f32>().unwrap();
        let middle = 2 * 5 + 2;
        for (head, (down, right)) in OFFSETS.into_iter().enumerate() {
            let neighbour = (middle as f64 + down * 5.0 + right) as usize;
            let (got, expected) = (brought[middle][head * 16], own[neighbour][0]);
            assert!((got - expected).abs() < 0.02, "head {head}: {got}, expected: {expected}");
        }
    }
}
