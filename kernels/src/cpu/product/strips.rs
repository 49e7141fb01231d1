//! The loop of a product in vector registers, written once for all vector units.

/// Makes `multiply` of a unit's three instructions.
///
/// A strip is `ROWS` rows by `PANELS` panels, whose sums stay in registers for the whole inner dimension. Rows and panels
/// left over take the same loop with fewer of them.
macro_rules! strips {
    (
        element: $element:ty, features: $features:literal, rows: $rows:literal, panels: $panels:literal,
        vectors_of_a_panel: $vectors:literal, sum: $sum:ty,
        zero: $zero:expr, left: $left:expr, right: $right:expr, fuse: $fuse:expr, store: $store:expr $(,)?
    ) => {
        use super::super::{Block, PANEL};
        use crate::cpu::Element;

        const GROUP: usize = <$element as Element>::GROUP;

        /// Computes a block.
        ///
        /// # Safety
        /// As [`super::super::Kernel`].
        pub(in super::super) unsafe fn multiply(block: &Block<$element>) {
            // SAFETY: the caller's promise, passed on.
            unsafe { run(block) }
        }

        #[target_feature(enable = $features)]
        unsafe fn run(block: &Block<$element>) {
            let mut panel = 0;
            while panel < block.panels {
                let whole = block.panels - panel >= $panels;
                let mut row = 0;
                while row < block.rows {
                    let rows = (block.rows - row).min($rows);
                    // SAFETY: row and panel stay within the block.
                    unsafe {
                        match (rows, whole) {
                            (6, true) => strip::<6, { $panels * $vectors }>(block, row, panel),
                            (5, true) => strip::<5, { $panels * $vectors }>(block, row, panel),
                            (4, true) => strip::<4, { $panels * $vectors }>(block, row, panel),
                            (3, true) => strip::<3, { $panels * $vectors }>(block, row, panel),
                            (2, true) => strip::<2, { $panels * $vectors }>(block, row, panel),
                            (_, true) => strip::<1, { $panels * $vectors }>(block, row, panel),
                            (6, false) => strip::<6, $vectors>(block, row, panel),
                            (5, false) => strip::<5, $vectors>(block, row, panel),
                            (4, false) => strip::<4, $vectors>(block, row, panel),
                            (3, false) => strip::<3, $vectors>(block, row, panel),
                            (2, false) => strip::<2, $vectors>(block, row, panel),
                            (_, false) => strip::<1, $vectors>(block, row, panel),
                        }
                    }
                    row += rows;
                }
                panel += if whole { $panels } else { 1 };
            }
        }

        /// `M` rows by `N` vectors of sums.
        #[allow(clippy::modulo_one, reason = "a panel of one vector")]
        #[target_feature(enable = $features)]
        unsafe fn strip<const M: usize, const N: usize>(block: &Block<$element>, row: usize, panel: usize) {
            const LANES: usize = PANEL / $vectors;
            // SAFETY: rows are readable to whole groups, panels are padded to them, and `c` has room for all columns.
            unsafe {
                let a = block.a.add(row * block.a_stride);
                let b = block.b.add(panel * block.panel_stride);
                let mut sums: [[$sum; N]; M] = [[$zero; N]; M];
                for group in 0..block.inner.div_ceil(GROUP) {
                    let b = b.add(group * PANEL * GROUP);
                    let right: [_; N] = std::array::from_fn(|n| {
                        $right(b.add(n / $vectors * block.panel_stride + n % $vectors * LANES * GROUP))
                    });
                    let a = a.add(group * GROUP);
                    for m in 0..M {
                        let left = $left(a.add(m * block.a_stride));
                        for n in 0..N {
                            sums[m][n] = $fuse(sums[m][n], left, right[n]);
                        }
                    }
                }
                let c = block.c.add(row * block.c_stride + panel * PANEL);
                for m in 0..M {
                    for n in 0..N {
                        $store(c.add(m * block.c_stride + n * LANES), sums[m][n]);
                    }
                }
            }
        }
    };
}
