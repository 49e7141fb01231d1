//! A product cut into pieces of work for threads.

use std::ops::Range;

use rayon::prelude::*;

use super::product::PANEL;

/// Rows of a piece: whole strips of every instruction set (6 rows, or 32).
pub(super) const ROWS: usize = 96;
/// Panels of a piece. Its sums (48 KiB) and a group of packed columns stay in the second-level cache.
pub(super) const PANELS: usize = 8;
/// Sums of a piece.
pub(super) const SUMS: usize = ROWS * PANELS * PANEL;

/// Runs `work` on every piece: with room for its sums, its rows and its panels.
pub(super) fn each(rows: usize, panels: usize, work: impl Fn(&mut [f32], Range<usize>, Range<usize>) + Sync) {
    let pieces = (0..count(rows, panels)).into_par_iter();
    // No more than there is work for: a single row, a token drawn after another, is little beside so much fresh memory.
    let sums = rows.min(ROWS) * panels.min(PANELS) * PANEL;
    pieces.for_each_init(
        || vec![0f32; sums],
        |sums, piece| {
            let (rows, panels) = extent(piece, rows, panels);
            work(sums, rows, panels);
        },
    );
}

/// Number of pieces.
pub(super) fn count(rows: usize, panels: usize) -> usize {
    rows.div_ceil(ROWS) * panels.div_ceil(PANELS)
}

/// A piece's rows and panels. A group's packed columns meet all rows before the next group is read.
pub(super) fn extent(piece: usize, rows: usize, panels: usize) -> (Range<usize>, Range<usize>) {
    let blocks = rows.div_ceil(ROWS);
    let (group, block) = (piece / blocks, piece % blocks);
    (block * ROWS..rows.min((block + 1) * ROWS), group * PANELS..panels.min((group + 1) * PANELS))
}

/// The elements of a matrix, written from several threads at places that differ.
pub(super) struct Shared<T> {
    first: *mut T,
    len: usize,
}

// SAFETY: whoever takes a slice promises that nobody else has it.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(super) fn new(elements: &mut [T]) -> Self {
        Self { first: elements.as_mut_ptr(), len: elements.len() }
    }

    /// `len` elements from `at` on.
    ///
    /// # Safety
    /// The elements that this was made of are still borrowed, and no two slices at a time have an element in common.
    #[allow(clippy::mut_from_ref, reason = "the caller's promise")]
    pub(super) unsafe fn slice(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.len), "a piece reaches outside its matrix");
        // SAFETY: inside the elements, as just checked, and the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(at), len) }
    }
}
