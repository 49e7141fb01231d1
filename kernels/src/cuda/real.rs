//! The types of values that kernels come in, and what every launcher checks.

use cudarc::driver::{CudaSlice, DeviceRepr};

use super::Gpu;
use crate::Error;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A type of values by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// f32
    F32,
    /// IEEE's half precision
    F16,
    /// f32's upper half
    Bf16,
}

/// Values on a GPU: f32, f16 or bf16. Sums are f32 in all three.
pub trait Real: DeviceRepr + Copy + sealed::Sealed + 'static {
    /// Which one it is.
    const KIND: Kind;
}

impl Real for f32 {
    const KIND: Kind = Kind::F32;
}

impl Real for half::f16 {
    const KIND: Kind = Kind::F16;
}

impl Real for half::bf16 {
    const KIND: Kind = Kind::Bf16;
}

/// Values that tensor cores multiply: f16 or bf16.
pub trait Half: Real {}

impl Half for half::f16 {}

impl Half for half::bf16 {}

/// Bytes that kernels move at a time.
pub(super) const WHOLE: usize = 16;

/// One of a kernel's names, in the order of [`Kind`].
pub(super) const fn name_of<T: Real>(names: [&'static str; 3]) -> &'static str {
    names[T::KIND as usize]
}

pub(super) fn refuse(message: impl Into<String>) -> Error {
    Error::Gpu { message: message.into() }
}

/// Memory for the result of a launch that writes all of it. `None` for a `len` that no `usize` holds.
pub(super) fn unwritten<T: Real>(gpu: &Gpu, what: &str, len: Option<usize>) -> Result<CudaSlice<T>, Error> {
    let most = usize::MAX / size_of::<T>() / 2;
    let Some(len) = len.filter(|len| (1..=most).contains(len)) else {
        return Err(refuse(format!("{what}: values of the result, expected: 1 to {most}, got: {len:?}")));
    };
    // SAFETY: every value is written by the launch that the memory is for, before anything in the stream reads it.
    Ok(unsafe { gpu.stream().alloc(len) }?)
}

/// `value` as a kernel's `int`.
pub(super) fn int(what: &str, value: usize) -> Result<i32, Error> {
    i32::try_from(value).map_err(|_| refuse(format!("{what}, expected: at most {}, got: {value}", i32::MAX)))
}

/// Whether all addresses and the step between rows of `width` values are on 16-byte boundaries. An absent array has address 0.
pub(super) fn whole<T>(width: usize, addresses: &[u64]) -> bool {
    width.is_multiple_of(WHOLE / size_of::<T>()) && addresses.iter().all(|address| address.is_multiple_of(WHOLE as u64))
}

/// Blocks of `threads` for `count` threads, which kernels number in 32 bits.
pub(super) fn blocks(what: &str, count: usize, threads: u32) -> Result<(usize, usize), Error> {
    let most = (u32::MAX - threads) as usize;
    if count > most {
        return Err(refuse(format!("{what}: threads, expected: at most {most}, got: {count}")));
    }
    Ok((count.div_ceil(threads as usize), 1))
}
