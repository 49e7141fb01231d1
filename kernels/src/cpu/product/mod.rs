//! Matrix products against weights that were packed once.
//!
//! # Layout
//! A [`Packed`] matrix of inner width D and E columns is cut into panels of 16 columns. A panel holds, for one group of
//! neighbours along the inner dimension after the other, the 16 columns' values of that group:
//!
//! ```text
//! f32    [E/16][D][16]          one vector, or two or four, per step
//! bf16   [E/16][D/2][16][2]     pairs, as vdpbf16ps multiplies them, and a tile of AMX every 16 pairs
//! ```
//!
//! Inner dimension and columns are padded with zeros: D to a multiple of 32 for bf16, E to one of 16.
//!
//! # Order of the sums
//! An element of a product is summed over the inner dimension in ascending order by one chain of instructions, wherever in
//! the matrix it stands. So it depends on its row and its column alone, not on the rows that share its block: batches,
//! pieces and threads cannot change a bit. (`portable` sums in the order that `gemm` chooses for a block's shape.)

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
mod portable;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[macro_use]
mod strips;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use std::ops::Range;

use rayon::prelude::*;

use super::isa::Set;
use super::matrix::Buffer;
use super::{Bf16, Element, Isa, Matrix};

/// Columns of a panel.
pub(crate) const PANEL: usize = 16;

/// One product for a kernel: `c = a · b`, where `c` is f32.
///
/// `a` has `rows` rows `a_stride` apart, each readable up to `inner` rounded up to [`Element::STEP`]; `b` has `panels`
/// panels `panel_stride` apart; `c` has room for all their columns, rows `c_stride` apart.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Block<T> {
    pub(super) a: *const T,
    pub(super) a_stride: usize,
    pub(super) rows: usize,
    pub(super) b: *const T,
    pub(super) panel_stride: usize,
    pub(super) panels: usize,
    pub(super) inner: usize,
    pub(super) c: *mut f32,
    pub(super) c_stride: usize,
}

/// Computes a [`Block`].
///
/// # Safety
/// The pointers must be valid as the block says, and the processor must have the kernel's instructions.
#[doc(hidden)]
pub type Kernel<T> = unsafe fn(&Block<T>);

pub(super) fn f32_kernel(isa: Isa) -> Kernel<f32> {
    match isa.0 {
        Set::Portable => portable::multiply,
        #[cfg(target_arch = "aarch64")]
        Set::Neon => neon::f32::multiply,
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => avx2::f32::multiply,
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 | Set::Avx512Bf16 | Set::AmxBf16 => avx512::f32::multiply,
    }
}

pub(super) fn bf16_kernel(isa: Isa) -> Kernel<Bf16> {
    match isa.0 {
        Set::Portable => portable::multiply,
        #[cfg(target_arch = "aarch64")]
        Set::Neon => neon::bf16::multiply,
        #[cfg(target_arch = "x86_64")]
        Set::Avx2 => avx2::bf16::multiply,
        #[cfg(target_arch = "x86_64")]
        Set::Avx512 => avx512::widened::multiply,
        #[cfg(target_arch = "x86_64")]
        Set::Avx512Bf16 => avx512::bf16::multiply,
        #[cfg(target_arch = "x86_64")]
        Set::AmxBf16 => amx::multiply,
    }
}

/// The right side of a product, packed for the instructions at hand.
#[derive(Clone)]
pub struct Packed<T> {
    data: Buffer<T>,
    inner: usize,
    columns: usize,
    kernel: Kernel<T>,
}

impl<T: Element> Packed<T> {
    /// The transposed of a weight, as a linear layer multiplies with it.
    ///
    /// # Shapes
    /// - weight: `[E, D]`, row-major
    ///
    /// # Panics
    /// When the weight does not divide into rows of `d`: a bug in the caller, not in the input.
    pub fn new(weight: &[f32], d: usize, isa: Isa) -> Self {
        Self::stacked(&[weight], d, isa)
    }

    /// Several weights `[E₁, D]`, `[E₂, D]`, … as one of `[E₁ + E₂ + …, D]`.
    pub fn stacked(weights: &[&[f32]], d: usize, isa: Isa) -> Self {
        let rows = |weight: &&[f32]| weight.len() / d;
        let columns = weights.iter().map(rows).sum();
        let mut packed = Self::zeros(d, columns, isa);
        let row = |mut i: usize| {
            for weight in weights {
                assert_eq!(weight.len() % d, 0);
                if i < rows(weight) {
                    return &weight[i * d..][..d];
                }
                i -= rows(weight);
            }
            unreachable!("a column beyond the last weight")
        };
        let panel_len = packed.panel_len().max(1);
        packed.data.as_mut_slice().par_chunks_mut(panel_len).enumerate().for_each(|(panel, out)| {
            for column in 0..PANEL.min(columns - panel * PANEL) {
                pack_row(out, column, row(panel * PANEL + column));
            }
        });
        packed
    }

    /// An empty matrix, for [`Packed::fill_transposed`] and [`Packed::fill`].
    pub(super) fn zeros(inner: usize, columns: usize, isa: Isa) -> Self {
        let len = inner.next_multiple_of(T::STEP) * columns.next_multiple_of(PANEL);
        Self { data: Buffer::new(len), inner, columns, kernel: T::kernel(isa) }
    }

    /// Replaces the contents by the transposed of `[columns, inner]`: column j of the product's right side is row j.
    pub(super) fn fill_transposed(&mut self, rows: &[T], stride: usize) {
        let (panel_len, inner, columns) = (self.panel_len(), self.inner, self.columns);
        for (panel, out) in self.data.as_mut_slice().chunks_exact_mut(panel_len).enumerate() {
            for column in 0..PANEL.min(columns - panel * PANEL) {
                let row = &rows[(panel * PANEL + column) * stride..][..inner];
                let (at, whole) = (column * T::GROUP, inner / T::GROUP * T::GROUP);
                let mut groups = out.chunks_exact_mut(PANEL * T::GROUP);
                for (group, out) in row[..whole].chunks_exact(T::GROUP).zip(&mut groups) {
                    out[at..at + T::GROUP].copy_from_slice(group);
                }
                if let (Some(out), rest @ 1..) = (groups.next(), inner - whole) {
                    out[at..at + rest].copy_from_slice(&row[whole..]);
                }
            }
        }
    }

    /// Replaces the contents by `[inner, columns]`, as it is.
    pub(super) fn fill(&mut self, rows: &[T], stride: usize) {
        let (panel_len, inner, columns) = (self.panel_len(), self.inner, self.columns);
        for (panel, out) in self.data.as_mut_slice().chunks_exact_mut(panel_len).enumerate() {
            let width = PANEL.min(columns - panel * PANEL);
            for (group, out) in out.chunks_exact_mut(PANEL * T::GROUP).enumerate().take(inner.div_ceil(T::GROUP)) {
                for d in group * T::GROUP..inner.min((group + 1) * T::GROUP) {
                    let row = &rows[d * stride + panel * PANEL..][..width];
                    for (out, &x) in out.chunks_exact_mut(T::GROUP).zip(row) {
                        out[d % T::GROUP] = x;
                    }
                }
            }
        }
    }

    /// Replaces column `column` of the product's right side.
    pub(super) fn set_column(&mut self, column: usize, values: &[T]) {
        let panel_len = self.panel_len();
        let panel = &mut self.data.as_mut_slice()[column / PANEL * panel_len..][..panel_len];
        for (i, group) in values.chunks(T::GROUP).enumerate() {
            panel[(i * PANEL + column % PANEL) * T::GROUP..][..group.len()].copy_from_slice(group);
        }
    }

    /// Replaces row `row` of the product's right side.
    pub(super) fn set_row(&mut self, row: usize, values: &[T]) {
        let panel_len = self.panel_len();
        for (panel, values) in self.data.as_mut_slice().chunks_exact_mut(panel_len).zip(values.chunks(PANEL)) {
            let group = &mut panel[row / T::GROUP * PANEL * T::GROUP..][..PANEL * T::GROUP];
            group.chunks_exact_mut(T::GROUP).zip(values).for_each(|(out, &x)| out[row % T::GROUP] = x);
        }
    }

    /// Inner width D.
    pub fn inner(&self) -> usize {
        self.inner
    }

    /// Number of columns E.
    pub fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn panels(&self) -> usize {
        self.columns.div_ceil(PANEL)
    }

    fn panel_len(&self) -> usize {
        self.inner.next_multiple_of(T::STEP) * PANEL
    }

    /// `out = a · self`, for the columns of some panels and some rows of `a` from column `first` on.
    ///
    /// # Shapes
    /// - out: `[rows, ≥ 16 · panels]`, rows `out_stride` apart
    pub(crate) fn multiply(
        &self,
        out: &mut [f32],
        out_stride: usize,
        a: &Matrix<T>,
        rows: Range<usize>,
        first: usize,
        panels: Range<usize>,
    ) {
        let (count, width) = (rows.len(), panels.len() * PANEL);
        if count == 0 || width == 0 {
            return;
        }
        let start = rows.start * a.stride() + first;
        let readable = self.inner.next_multiple_of(T::STEP);
        assert!(rows.end <= a.rows() && first + readable <= a.stride() && panels.end <= self.panels());
        assert!(out_stride >= width && (count - 1) * out_stride + width <= out.len());
        let block = Block {
            a: a.padded()[start..].as_ptr(),
            a_stride: a.stride(),
            rows: count,
            b: self.data.as_slice()[panels.start * self.panel_len()..].as_ptr(),
            panel_stride: self.panel_len(),
            panels: panels.len(),
            inner: self.inner,
            c: out.as_mut_ptr(),
            c_stride: out_stride,
        };
        // SAFETY: the extents were just checked against the slices, and an `Isa` proves that its instructions are here.
        unsafe { (self.kernel)(&block) }
    }
}

/// Writes one column of a panel.
fn pack_row<T: Element>(panel: &mut [T], column: usize, row: &[f32]) {
    for (i, group) in row.chunks(T::GROUP).enumerate() {
        let out = &mut panel[(i * PANEL + column) * T::GROUP..];
        for (out, &x) in out.iter_mut().zip(group) {
            *out = T::narrow(x);
        }
    }
}
