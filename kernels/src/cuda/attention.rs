//! softmax(q kᵀ / √H) v on the GPU (`attention.cu`), for heads of width 32, 48, 64, 72, 80, 96 and 128 in f16 or bf16.
//!
//! Every query sees every key; scores are f32, weights are rounded to the type of the values before they are multiplied by
//! these. What a query gets depends on its own image alone, to the bit, whatever the batch.

use cudarc::driver::{CudaSlice, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, PushKernelArg};

use super::real::{Half, Kind, WHOLE, int, refuse, unwritten};
use super::{Gpu, launch};
use crate::Error;

/// Widths of a head, and their kernels in f16 and bf16.
const HEADS: [(usize, [&str; 2]); 7] = [
    (32, ["attention_f16_32", "attention_bf16_32"]),
    (48, ["attention_f16_48", "attention_bf16_48"]),
    (64, ["attention_f16_64", "attention_bf16_64"]),
    (72, ["attention_f16_72", "attention_bf16_72"]),
    (80, ["attention_f16_80", "attention_bf16_80"]),
    (96, ["attention_f16_96", "attention_bf16_96"]),
    (128, ["attention_f16_128", "attention_bf16_128"]),
];

/// As in attention.cu.
const THREADS: u32 = 128;
const KEYS: usize = 64;

/// Where tokens lie, in values: a token's heads are side by side, H values each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strides {
    /// From an image to the next.
    pub image: usize,
    /// From a token to the next.
    pub token: usize,
}

/// How much there is of everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// B
    pub images: usize,
    /// Tokens that ask.
    pub queries: usize,
    /// Tokens that are seen.
    pub keys: usize,
    /// Heads of a token.
    pub heads: usize,
    /// H, the width of a head.
    pub width: usize,
}

/// `Attention` of attention.cu.
#[repr(C)]
struct Arguments {
    q: u64,
    k: u64,
    v: u64,
    out: u64,
    q_rows: [i64; 2],
    kv_rows: [i64; 2],
    queries: i32,
    keys: i32,
    heads: i32,
    scale: f32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for Arguments {}

/// Whether there is a kernel for heads of this width.
pub fn serves(width: usize) -> bool {
    HEADS.iter().any(|(known, _)| *known == width)
}

/// Attention within each image, from the product that makes q, k and v at once.
///
/// # Shapes
/// - qkv: `[B, N, 3·heads·H]`, the columns of q, then of k, then of v
/// - output: `[B, N, heads·H]`
///
/// # Errors
/// As [`attention`].
pub fn fused_attention<T: Half>(
    gpu: &Gpu,
    qkv: &CudaView<'_, T>,
    images: usize,
    tokens: usize,
    heads: usize,
    width: usize,
) -> Result<CudaSlice<T>, Error> {
    let sizes = Sizes { images, queries: tokens, keys: tokens, heads, width };
    let all = [images, tokens, 3, heads, width].iter().try_fold(1_usize, |product, x| product.checked_mul(*x));
    if all.is_none_or(|all| all == 0 || all != qkv.len()) {
        let message = format!("attention: values of qkv, expected: those of {sizes:?}, got: {}", qkv.len());
        return Err(refuse(message));
    }
    let d = heads * width;
    let rows = Strides { image: tokens * 3 * d, token: 3 * d };
    let (q, k, v) = (qkv.slice(..), qkv.slice(d..), qkv.slice(2 * d..));
    attention(gpu, &q, &k, &v, rows, rows, sizes)
}

/// softmax(q kᵀ / √H) v for each head of each image.
///
/// # Shapes
/// - q: value i of head h of token n of image b at `b·image + n·token + h·H + i` of `q_rows`
/// - k, v: so too, of `kv_rows`
/// - output: `[B, queries, heads·H]`
///
/// # Errors
/// If there is no kernel for the width, a size is zero or too large, an array ends before its last token, or its rows are not
/// on 16-byte boundaries.
pub fn attention<T: Half>(
    gpu: &Gpu,
    q: &CudaView<'_, T>,
    k: &CudaView<'_, T>,
    v: &CudaView<'_, T>,
    q_rows: Strides,
    kv_rows: Strides,
    sizes: Sizes,
) -> Result<CudaSlice<T>, Error> {
    let Sizes { images, queries, keys, heads, width } = sizes;
    let Some((_, names)) = HEADS.iter().find(|(known, _)| *known == width) else {
        let known = HEADS.map(|(width, _)| width);
        return Err(refuse(format!("attention: width of a head, expected: one of {known:?}, got: {width}")));
    };
    if [images, queries, keys, heads].contains(&0) {
        return Err(refuse(format!("attention: sizes, expected: at least 1, got: {sizes:?}")));
    }
    let d = heads.checked_mul(width);
    let q_rows = rows("q", q.len(), q_rows, images, queries, d)?;
    let kv_len = k.len().min(v.len());
    let kv_rows = rows("k or v", kv_len, kv_rows, images, keys, d)?;
    let len = [images, queries].iter().try_fold(d.unwrap_or(0), |product, x| product.checked_mul(*x));
    let mut out = unwritten::<T>(gpu, "attention", len)?;
    let blocks = queries.div_ceil(queries_per_block(width)).checked_mul(heads).and_then(|x| x.checked_mul(images));
    let blocks = blocks.filter(|x| i32::try_from(*x).is_ok());
    let blocks = blocks.ok_or_else(|| refuse(format!("attention: {sizes:?} are too many for a launch")))?;
    let stream = gpu.stream();
    {
        let ((q, _q), (k, _k), (v, _v)) = (q.device_ptr(stream), k.device_ptr(stream), v.device_ptr(stream));
        let (out, _out) = out.device_ptr_mut(stream);
        if [q, k, v].iter().any(|address| !address.is_multiple_of(WHOLE as u64)) {
            return Err(refuse(format!(
                "attention: q, k and v, expected: on 16-byte boundaries, got: {q:#x}, {k:#x}, {v:#x}"
            )));
        }
        // The kernel's powers are of two.
        let scale = (std::f64::consts::LOG2_E / (width as f64).sqrt()) as f32;
        let [queries, keys, heads] = [int("queries", queries)?, int("keys", keys)?, int("heads", heads)?];
        let arguments = Arguments { q, k, v, out, q_rows, kv_rows, queries, keys, heads, scale };
        let shared = 4 * KEYS * (width.next_multiple_of(16) + 8) * size_of::<T>();
        let function = gpu.function(names[usize::from(T::KIND == Kind::Bf16)], shared)?;
        let mut launcher = stream.launch_builder(&function);
        launcher.arg(&arguments);
        // SAFETY: the kernel's one argument; `rows` saw that q, k and v reach their last token, and out has its shape.
        unsafe { launch(launcher, (blocks, 1), THREADS, shared) }?;
    }
    Ok(out)
}

/// `Head<H>::QUERIES` of attention.cu.
fn queries_per_block(width: usize) -> usize {
    if width <= 80 { 128 } else { 64 }
}

/// The strides as the kernel takes them, if `len` values reach the last token of the last image.
fn rows(
    what: &str,
    len: usize,
    strides: Strides,
    images: usize,
    tokens: usize,
    d: Option<usize>,
) -> Result<[i64; 2], Error> {
    let last = || {
        let image = strides.image.checked_mul(images - 1)?;
        strides.token.checked_mul(tokens - 1)?.checked_add(image)?.checked_add(d?)
    };
    let needed = last().filter(|needed| i64::try_from(*needed).is_ok());
    if needed.is_none_or(|needed| needed > len) {
        let message = format!(
            "attention: values of {what}, expected: {needed:?} for {images} · {tokens} tokens of {d:?}, got: {len}"
        );
        return Err(refuse(message));
    }
    let Strides { image, token } = strides;
    // With one image or one token a stride is not used, but it is cast.
    let used = [if images > 1 { image } else { 0 }, if tokens > 1 { token } else { 0 }];
    if used.iter().any(|stride| !stride.is_multiple_of(WHOLE / 2)) {
        return Err(refuse(format!("attention: strides of {what}, expected: multiples of 8 values, got: {strides:?}")));
    }
    Ok(used.map(|stride| i64::try_from(stride).unwrap_or(0)))
}

#[cfg(test)]
mod tests;
