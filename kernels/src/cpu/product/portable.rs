//! Products on any processor: the `gemm` crate, in f32.

use super::{Block, PANEL};
use crate::cpu::Element;
use crate::matrix::{Into, View, multiply as gemm};

/// Computes a block, a panel at a time.
///
/// # Safety
/// As [`super::Kernel`].
pub(super) unsafe fn multiply<T: Element>(block: &Block<T>) {
    let (rows, inner) = (block.rows, block.inner);
    let groups = inner.div_ceil(T::GROUP);
    let mut a = vec![0f32; rows * inner];
    for (i, out) in a.chunks_exact_mut(inner).enumerate() {
        // SAFETY: rows are readable to `inner`.
        let row = unsafe { std::slice::from_raw_parts(block.a.add(i * block.a_stride), inner) };
        out.iter_mut().zip(row).for_each(|(out, x)| *out = x.widen());
    }
    let mut b = vec![0f32; groups * T::GROUP * PANEL];
    for panel in 0..block.panels {
        // SAFETY: a panel is padded to whole groups.
        let packed = unsafe { std::slice::from_raw_parts(block.b.add(panel * block.panel_stride), b.len()) };
        for (i, x) in packed.iter().enumerate() {
            let (group, column, d) = (i / (PANEL * T::GROUP), i / T::GROUP % PANEL, i % T::GROUP);
            b[(group * T::GROUP + d) * PANEL + column] = x.widen();
        }
        let len = (rows - 1) * block.c_stride + PANEL;
        // SAFETY: `c` has room for the panel's columns.
        let c = unsafe { std::slice::from_raw_parts_mut(block.c.add(panel * PANEL), len) };
        gemm(
            c,
            block.c_stride,
            View::new(&a, rows, inner, inner),
            View::new(&b, inner, PANEL, PANEL),
            1.0,
            Into::Replace,
        );
    }
}
