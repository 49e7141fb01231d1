//! How a kernel moves over a plane of pixels: what convolutions and pooling have in common.

use std::ops::Range;

/// How a kernel moves over an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Pixels from one place to the next, down and to the right.
    pub stride: usize,
    /// Rows and columns of zeros around the image.
    pub padding: usize,
}

impl Default for Window {
    fn default() -> Self {
        Self { stride: 1, padding: 0 }
    }
}

impl Window {
    /// Places of a kernel of `kernel` pixels along a side of `side`; none where it does not fit.
    fn places(self, side: usize, kernel: usize) -> Option<usize> {
        if kernel == 0 {
            return None;
        }
        Some((side + 2 * self.padding).checked_sub(kernel)?.checked_div(self.stride)? + 1)
    }
}

/// A kernel on a plane: where each of its taps meets the plane.
#[derive(Clone, Copy)]
pub(super) struct Plane {
    pub(super) h: usize,
    pub(super) w: usize,
    pub(super) kh: usize,
    pub(super) kw: usize,
    pub(super) stride: usize,
    /// Rows of zeros above, columns of zeros to the left.
    pub(super) padding: (usize, usize),
    /// Rows and columns of the output.
    pub(super) out: (usize, usize),
}

impl Plane {
    /// None where the kernel does not fit.
    pub(super) fn new((h, w): (usize, usize), (kh, kw): (usize, usize), window: Window) -> Option<Self> {
        let out = (window.places(h, kh)?, window.places(w, kw)?);
        Some(Self { h, w, kh, kw, stride: window.stride, padding: (window.padding, window.padding), out })
    }

    /// Pixels of the input.
    #[inline(always)]
    pub(super) fn pixels(&self) -> usize {
        self.h * self.w
    }

    /// Pixels of the output.
    #[inline(always)]
    pub(super) fn area(&self) -> usize {
        self.out.0 * self.out.1
    }

    /// Pixels of the kernel.
    #[inline(always)]
    pub(super) fn taps(&self) -> usize {
        self.kh * self.kw
    }

    /// The row of the input that tap row `di` meets at output row `i`, unless it is padding.
    #[inline(always)]
    pub(super) fn source_row(&self, i: usize, di: usize) -> Option<usize> {
        (i * self.stride + di).checked_sub(self.padding.0).filter(|&y| y < self.h)
    }

    /// The output columns at which tap column `dj` meets the input, and the input's column at the first of them.
    #[inline(always)]
    pub(super) fn inside(&self, dj: usize) -> (Range<usize>, usize) {
        let begin = self.padding.1.saturating_sub(dj).div_ceil(self.stride).min(self.out.1);
        let end = (self.w + self.padding.1).saturating_sub(dj).div_ceil(self.stride).clamp(begin, self.out.1);
        (begin..end, (begin * self.stride + dj).saturating_sub(self.padding.1).min(self.w))
    }

    /// The way back from output to input as a plane of its own, where it is one: then the kernel is turned by half a circle.
    pub(super) fn turned(&self) -> Option<Self> {
        let padding = (self.kh - 1).checked_sub(self.padding.0).zip((self.kw - 1).checked_sub(self.padding.1));
        let padding = padding.filter(|_| self.stride == 1)?;
        let (h, w) = self.out;
        Some(Self { h, w, padding, out: (self.h, self.w), ..*self })
    }
}
