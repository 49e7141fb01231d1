use crate::cpu::VARIABLE;

/// What was refused, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The width D is zero.
    #[error("width of a code, expected: at least 1, got: 0")]
    ZeroWidth,
    /// The codebook has no rows.
    #[error("number of codes, expected: at least 1, got: 0")]
    NoCodes,
    /// The codebook has more rows than a `u32` index can name.
    #[error("number of codes, expected: at most {}, got: {codes}", u32::MAX)]
    TooManyCodes {
        /// The number of rows given.
        codes: usize,
    },
    /// The values do not divide into rows of the codebook's width.
    #[error("number of values, expected: a multiple of the width {width}, got: {values}")]
    RaggedRows {
        /// The number of values given.
        values: usize,
        /// The width D of a row.
        width: usize,
    },
    /// A codebook row holds a NaN or an infinity.
    #[error("values of code {row}, expected: all finite, got: a NaN or an infinity")]
    NonFiniteCode {
        /// The first such row.
        row: usize,
    },
    /// A token row holds a NaN or an infinity.
    #[error("values of token {row}, expected: all finite, got: a NaN or an infinity")]
    NonFiniteToken {
        /// The first such row.
        row: usize,
    },
    /// `VQRAE_CPU` names instructions that this machine has not.
    #[error("{VARIABLE}: instructions `{name}`, expected one of those this machine has: {available}")]
    NoSuchInstructions {
        /// The name given.
        name: String,
        /// The names that would do.
        available: String,
    },
    /// A GPU could not be used.
    #[cfg(feature = "cuda")]
    #[error("{message}")]
    Gpu {
        /// What failed, in CUDA's own words.
        message: String,
    },
}
