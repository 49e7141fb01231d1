//! Fixed linear maps along an image's height and width: what a discriminator resizes and blurs with.
//!
//! Each is a matrix a dimension, so the gradient is that of a matrix product, on any device.

use candle_core::{Device, Result, Tensor};

/// A map of images `[B, C, H, W]` to `[B, C, H', W']`.
///
/// # Shapes
/// - x: `[B, C, H, W]`
/// - rows: `[H', H]`, columns: `[W', W]`
pub(super) fn separable(x: &Tensor, rows: &Tensor, columns: &Tensor) -> Result<Tensor> {
    let (b, c, h, w) = x.dims4()?;
    let (to_h, to_w) = (rows.dim(0)?, columns.dim(0)?);
    let x = x.contiguous()?.reshape((b * c * h, w))?.matmul(&columns.t()?)?; // [BCH,W']
    let x = x.reshape((b * c, h, to_w))?.transpose(1, 2)?.contiguous()?; // [BC,W',H]
    let x = x.reshape((b * c * to_w, h))?.matmul(&rows.t()?)?; // [BCW',H']
    x.reshape((b * c, to_w, to_h))?.transpose(1, 2)?.contiguous()?.reshape((b, c, to_h, to_w))
}

/// Bilinear resize without antialiasing, half-pixel centres: `interpolate(…, mode="bilinear", align_corners=False)`.
pub(super) fn resize(x: &Tensor, (height, width): (usize, usize)) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    if (h, w) == (height, width) {
        return Ok(x.clone());
    }
    let device = x.device();
    separable(x, &bilinear(height, h, device)?.to_dtype(x.dtype())?, &bilinear(width, w, device)?.to_dtype(x.dtype())?)
}

/// The map `[to, from]` of a bilinear resize.
fn bilinear(to: usize, from: usize, device: &Device) -> Result<Tensor> {
    let mut matrix = vec![0f32; to * from];
    let scale = from as f32 / to as f32;
    for (i, row) in matrix.chunks_exact_mut(from).enumerate() {
        let source = (scale * (i as f32 + 0.5) - 0.5).max(0.0);
        let first = (source as usize).min(from - 1);
        let share = source - first as f32;
        row[first] += 1.0 - share;
        row[(first + 1).min(from - 1)] += share;
    }
    Tensor::from_vec(matrix, (to, from), device)
}

/// Half the size, rounded up, by the filter (1, 3, 3, 1)/8 each way, zeros beyond the edges (Zhang, arXiv 1904.11486).
pub(super) fn blur(x: &Tensor) -> Result<Tensor> {
    let (_, _, h, w) = x.dims4()?;
    separable(x, &binomial(h, x)?, &binomial(w, x)?)
}

/// The map `[⌈n/2⌉, n]` of the filter at every second place.
fn binomial(n: usize, like: &Tensor) -> Result<Tensor> {
    const FILTER: [f32; 4] = [0.125, 0.375, 0.375, 0.125];
    let to = n.div_ceil(2);
    let before = ((to - 1) * 2 + FILTER.len()).saturating_sub(n) / 2;
    let mut matrix = vec![0f32; to * n];
    for (i, row) in matrix.chunks_exact_mut(n).enumerate() {
        for (tap, weight) in FILTER.iter().enumerate() {
            if let Some(value) = (2 * i + tap).checked_sub(before).and_then(|at| row.get_mut(at)) {
                *value = *weight;
            }
        }
    }
    Tensor::from_vec(matrix, (to, n), like.device())?.to_dtype(like.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blur_keeps_what_is_even_and_halves_odd_sizes_upwards() -> Result<()> {
        let blurred = blur(&Tensor::ones((1, 1, 6, 7), candle_core::DType::F32, &Device::Cpu)?)?;
        assert_eq!(blurred.dims(), [1, 1, 3, 4]);
        let inner = blurred.get(0)?.get(0)?.to_vec2::<f32>()?[1][1];
        assert!((inner - 1.0).abs() < 1e-6);
        Ok(())
    }

    #[test]
    fn a_bilinear_row_by_hand() -> Result<()> {
        // [0, 1] to four: sources −0.25 (held at the edge), 0.25, 0.75, 1.25 (held).
        assert_eq!(
            bilinear(4, 2, &Device::Cpu)?.to_vec2::<f32>()?,
            [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
        );
        Ok(())
    }
}
