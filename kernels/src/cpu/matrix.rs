//! The matrices that inference works on: aligned rows of f32 or bf16 numbers.

use std::fmt::Debug;
use std::marker::PhantomData;

use super::product::Kernel;
use super::{Isa, product};
use crate::vectorised;

/// A number in bfloat16: the upper half of an f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

/// What weights and activations are held in: f32 or [`Bf16`]. Sums are f32 in either case.
pub trait Element: Copy + Debug + Default + PartialEq + Send + Sync + 'static + sealed::Sealed {
    /// Neighbours along the inner dimension that a product takes at once.
    const GROUP: usize;
    /// What the inner dimension is padded to, so that every instruction set can read whole steps.
    const STEP: usize;

    /// The nearest such number; ties go to the even one.
    fn narrow(x: f32) -> Self;
    /// The same number in f32.
    fn widen(self) -> f32;
    /// Numbers of f32 as they are, where this is f32.
    #[doc(hidden)]
    fn as_is(values: &[f32]) -> Option<&[Self]>;
    #[doc(hidden)]
    fn kernel(isa: Isa) -> Kernel<Self>;
}

mod sealed {
    /// Promises that all-zero bytes are a value, and that any bytes are.
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for super::Bf16 {}
}

impl Element for f32 {
    const GROUP: usize = 1;
    const STEP: usize = 1;

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    fn as_is(values: &[f32]) -> Option<&[Self]> {
        Some(values)
    }

    fn kernel(isa: Isa) -> Kernel<Self> {
        product::f32_kernel(isa)
    }
}

impl Element for Bf16 {
    const GROUP: usize = 2;
    const STEP: usize = 32;

    #[inline(always)]
    fn narrow(x: f32) -> Self {
        let bits = x.to_bits();
        // A NaN must stay one, whatever its payload.
        let rounded = if x.is_nan() { bits | 0x40_0000 } else { bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) };
        Self((rounded >> 16) as u16)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }

    fn as_is(_: &[f32]) -> Option<&[Self]> {
        None
    }

    fn kernel(isa: Isa) -> Kernel<Self> {
        product::bf16_kernel(isa)
    }
}

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([u8; LINE]);

const LINE: usize = 64;

/// Numbers that start at a cache line, zero at first.
#[derive(Clone, Default)]
pub(super) struct Buffer<T> {
    lines: Vec<Line>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> Buffer<T> {
    pub(super) fn new(len: usize) -> Self {
        let lines = (len * size_of::<T>()).div_ceil(LINE);
        Self { lines: vec![Line([0; LINE]); lines], len, element: PhantomData }
    }

    /// No elements yet, in memory that was another's.
    pub(super) fn of(lines: Vec<Line>) -> Self {
        Self { lines, len: 0, element: PhantomData }
    }

    /// Its memory, for another.
    pub(super) fn into_lines(self) -> Vec<Line> {
        self.lines
    }

    /// Room for `len` elements, whose values are whatever was there.
    pub(super) fn resize(&mut self, len: usize) {
        let lines = (len * size_of::<T>()).div_ceil(LINE);
        if lines > self.lines.len() {
            self.lines.resize(lines, Line([0; LINE]));
        }
        self.len = len;
    }

    /// Elements from one row of `columns` to the next: whole steps, and an odd number of lines, so that a column's elements
    /// spread over the cache. No less than three lines: a product may begin within a row, as attention's does at a head,
    /// and read a whole step.
    pub(super) fn row_stride(columns: usize) -> usize {
        let lines = (columns.next_multiple_of(T::STEP) * size_of::<T>()).div_ceil(LINE).max(2) | 1;
        lines * LINE / size_of::<T>()
    }

    pub(super) fn as_slice(&self) -> &[T] {
        // SAFETY: the lines hold `len` elements, whose alignment is less than theirs; any bytes are an element.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// A row-major matrix. Rows start at cache lines and are an odd number of these apart; the padding between them is zero.
#[derive(Clone)]
pub struct Matrix<T> {
    data: Buffer<T>,
    rows: usize,
    columns: usize,
    stride: usize,
}

impl Matrix<f32> {
    /// Adds another matrix of the same shape.
    ///
    /// # Panics
    /// When the shapes differ: a bug in the caller, not in the input.
    pub fn add(&mut self, other: &Self) {
        assert_eq!((self.rows, self.columns), (other.rows, other.columns));
        let others = other.data.as_slice();
        self.data.as_mut_slice().iter_mut().zip(others).for_each(|(x, y)| *x += y);
    }
}

impl<T: Element> Matrix<T> {
    /// Zeros.
    pub fn new(rows: usize, columns: usize) -> Self {
        let stride = Buffer::<T>::row_stride(columns);
        Self { data: Buffer::new(rows * stride), rows, columns, stride }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Elements from one row to the next.
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[T] {
        &self.data.as_slice()[i * self.stride..][..self.columns]
    }

    /// Row `i`.
    pub fn row_mut(&mut self, i: usize) -> &mut [T] {
        &mut self.data.as_mut_slice()[i * self.stride..][..self.columns]
    }

    /// The rows, with the padding behind each.
    pub(super) fn padded(&self) -> &[T] {
        self.data.as_slice()
    }

    /// The rows, with the padding behind each, which must stay zero.
    pub(super) fn padded_mut(&mut self) -> &mut [T] {
        self.data.as_mut_slice()
    }

    /// Replaces row `i` by f32 numbers, rounded.
    ///
    /// # Panics
    /// When there are not as many as columns: a bug in the caller, not in the input.
    pub fn set_row(&mut self, i: usize, values: &[f32]) {
        assert_eq!(values.len(), self.columns);
        narrow(self.row_mut(i), values);
    }

    /// All elements, row after row, in f32.
    pub fn to_vec(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.columns];
        for (i, row) in values.chunks_exact_mut(self.columns.max(1)).enumerate() {
            widen(row, self.row(i));
        }
        values
    }
}

vectorised! {
    fn narrow[T: Element](out: &mut [T], values: &[f32]) {
        out.iter_mut().zip(values).for_each(|(out, &x)| *out = T::narrow(x));
    }

    fn widen[T: Element](out: &mut [f32], values: &[T]) {
        out.iter_mut().zip(values).for_each(|(out, x)| *out = x.widen());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrowing_rounds_to_the_nearest_and_ties_to_even() {
        let narrow = |bits: u32| Bf16::narrow(f32::from_bits(bits)).0;
        assert_eq!(narrow(0x3F80_0000), 0x3F80); // 1
        assert_eq!(narrow(0x3F80_7FFF), 0x3F80);
        assert_eq!(narrow(0x3F80_8000), 0x3F80); // a tie, down to even
        assert_eq!(narrow(0x3F81_8000), 0x3F82); // a tie, up to even
        assert_eq!(narrow(0x7F7F_FFFF), 0x7F80); // beyond the largest: infinity
        assert!(Bf16::narrow(f32::from_bits(0x7F80_0001)).widen().is_nan());
    }

    #[test]
    fn rows_start_at_cache_lines_an_odd_number_of_them_apart() {
        for columns in [1, 16, 17, 512, 1024, 4304] {
            let matrix = Matrix::<Bf16>::new(3, columns);
            assert_eq!(matrix.row(1).as_ptr() as usize % LINE, 0);
            assert_eq!(matrix.stride() * 2 / LINE % 2, 1);
            assert!(matrix.stride() >= columns.next_multiple_of(32));
        }
    }
}
