//! One integration binary, so that candle is linked once.
