//! How tensor cores sum: the one assumption of the search's proof (`nearest/bound.rs`), put to the device itself.

use cudarc::driver::PushKernelArg;

use super::super::{Gpu, launch};
use super::{int, multiply};
use crate::Error;
use crate::nearest::bound;

impl Gpu {
    /// Whether tensor cores sum within the bound that the search relies on, by vectors that are hard to sum. Asked once.
    pub(in crate::cuda) fn sums_hold(&self) -> Result<bool, Error> {
        if let Some(held) = self.sums_held.get() {
            return Ok(*held);
        }
        let held = self.try_sums()?;
        Ok(*self.sums_held.get_or_init(|| held))
    }

    fn try_sums(&self) -> Result<bool, Error> {
        const ROWS: usize = 64;
        const WIDTH: usize = 1024;
        let stream = self.stream();
        // Ones and their neighbours of one sign, which lose most to rounding towards zero; large and small ones by turns;
        // a large one in front of many small ones.
        let bits = |row: usize, i: usize, seed: u32| -> u16 {
            let random = (seed ^ (row * WIDTH + i) as u32).wrapping_mul(0x9E37_79B1) >> 16;
            let (ones, mantissa) = (0x3C00u16, (random & 0x3FF) as u16);
            match row % 4 {
                0 => ones | mantissa,
                1 => (ones | mantissa) ^ ((random as u16) & 0x8000),
                2 if i.is_multiple_of(2) => 0x5400 | mantissa,
                2 => 0x1400 | mantissa,
                _ if i == 0 => 0x7000 | mantissa,
                _ => ones | mantissa,
            }
        };
        let matrix =
            |seed: u32| -> Vec<u16> { (0..ROWS * WIDTH).map(|at| bits(at / WIDTH, at % WIDTH, seed)).collect() };
        let (codes, tokens) = (matrix(3), matrix(0xB529_7A4D));
        let (device_codes, device_tokens) = (stream.clone_htod(&codes)?, stream.clone_htod(&tokens)?);
        let mut by_blas = stream.alloc_zeros::<f32>(ROWS * ROWS)?;
        multiply(self, (&device_codes, ROWS), (&device_tokens, ROWS), WIDTH, &mut by_blas)?;
        let mut by_warp = stream.alloc_zeros::<f32>(ROWS * ROWS)?;
        let function = self.function("multiply_by_warp", 0)?;
        let (count, width) = (int(ROWS)?, int(WIDTH)?);
        let mut args = stream.launch_builder(&function);
        args.arg(&device_tokens).arg(&device_codes).arg(&mut by_warp).arg(&count).arg(&width);
        // SAFETY: the kernel's arguments: a block of one warp for 16 tokens and 8 codes.
        unsafe { launch(args, (ROWS / 16, ROWS / 8), 32, 0) }?;
        let (by_blas, by_warp) = (stream.clone_dtoh(&by_blas)?, stream.clone_dtoh(&by_warp)?);

        let widen = |values: &[u16]| values.iter().map(|&bits| half_to_f64(bits)).collect::<Vec<_>>();
        let (codes, tokens) = (widen(&codes), widen(&tokens));
        let norm = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
        let Some(sums) = bound::tensor_core_sums(WIDTH) else { return Ok(false) };
        let holds = |at: usize| {
            let (token, code) = (&tokens[at / ROWS * WIDTH..][..WIDTH], &codes[at % ROWS * WIDTH..][..WIDTH]);
            let exact: f64 = token.iter().zip(code).map(|(a, b)| a * b).sum();
            let most = sums.bound(norm(token), norm(code), WIDTH);
            [by_blas[at], by_warp[at]].iter().all(|&got| (f64::from(got) - exact).abs() <= most)
        };
        Ok((0..ROWS * ROWS).all(holds))
    }
}

/// The value of a finite fp16 number that is not subnormal.
fn half_to_f64(bits: u16) -> f64 {
    let (sign, exponent, mantissa) = (u64::from(bits >> 15), u64::from(bits >> 10 & 31), u64::from(bits & 0x3FF));
    f64::from_bits(sign << 63 | (exponent + 1023 - 15) << 52 | mantissa << 42)
}
