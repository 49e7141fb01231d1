//! One matrix product on one thread, over views with strides: the safe face of the `gemm` crate.
//!
//! It stands here rather than beside its users because `gemm` is compiled anew in every crate that calls it.

/// A view of a row-major matrix inside a slice: element (i, j) stands at `i * row_stride + j * column_stride`.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    /// `rows × columns` starting at `data[0]`, rows `row_stride` apart.
    #[must_use]
    pub fn new(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// The transposed view.
    #[must_use]
    pub fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn row_stride(&self) -> usize {
        self.row_stride
    }

    pub(crate) fn column_stride(&self) -> usize {
        self.column_stride
    }

    /// The elements, the view's first one first.
    pub(crate) fn data(&self) -> &'a [f32] {
        self.data
    }

    /// `rows` rows from `first` on.
    pub(crate) fn part(self, first: usize, rows: usize) -> Self {
        let start = (first * self.row_stride).min(self.data.len());
        Self { data: &self.data[start..], rows, ..self }
    }

    /// Whether all elements, of which there are some, lie within the slice.
    pub(crate) fn is_whole(&self) -> bool {
        self.last() < self.data.len()
    }

    fn last(&self) -> usize {
        (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride
    }
}

/// What happens to the elements that the destination holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    /// They are replaced.
    Replace,
    /// The product is added to them.
    Add,
}

/// `out (+)= scale · a b`, where rows of `out` are `row_stride` apart.
///
/// # Panics
/// When a view reaches outside its slice or the shapes do not fit: a bug in the caller, not in the input.
pub fn multiply(out: &mut [f32], row_stride: usize, a: View, b: View, scale: f32, into: Into) {
    let (m, k, n) = (a.rows, a.columns, b.columns);
    assert_eq!(k, b.rows);
    if m == 0 || n == 0 || k == 0 {
        if into == Into::Replace {
            out.fill(0.0);
        }
        return;
    }
    assert!(a.is_whole() && b.is_whole());
    assert!((m - 1) * row_stride + n <= out.len() && (m == 1 || row_stride >= n));
    // SAFETY: the three views were just checked to lie within their slices, and `out` is borrowed mutably.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            row_stride as isize,
            into == Into::Add,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_by_hand() {
        let a = [1., 2., 3., 4., 5., 6.]; // 2×3
        let b = [1., 0., 2., 1., 0., 3.]; // 3×2
        let mut out = [10.; 4];
        multiply(&mut out, 2, View::new(&a, 2, 3, 3), View::new(&b, 3, 2, 2), 1.0, Into::Replace);
        assert_eq!(out, [5., 11., 14., 23.]);
        multiply(&mut out, 2, View::new(&a, 2, 3, 3), View::new(&a, 2, 3, 3).t(), 2.0, Into::Add);
        assert_eq!(out, [33., 75., 78., 177.]);
    }
}
