//! Learning rates as pure functions of the step.

use serde::{Deserialize, Serialize};

/// The learning rate of one group of parameters: a linear warm-up, then half a cosine from `peak` to `end`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Highest learning rate; zero freezes the group, and no gradient is computed for it.
    pub peak: f64,
    /// Learning rate of the last step.
    pub end: f64,
}

impl Rate {
    /// The rate of `step`, counted from 0, of a run of `steps` steps, the first `warmup` of which rise.
    pub fn at(&self, step: usize, warmup: usize, steps: usize) -> f64 {
        if step < warmup {
            return self.peak * (step + 1) as f64 / warmup as f64;
        }
        let progress = (step - warmup) as f64 / (steps.saturating_sub(warmup + 1)).max(1) as f64;
        self.end + (self.peak - self.end) * 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_then_falls_along_a_cosine() {
        let rate = Rate { peak: 1.0, end: 0.2 };
        let at = |step| rate.at(step, 4, 13);
        assert_eq!([at(0), at(3), at(4)], [0.25, 1.0, 1.0]);
        assert!((at(8) - 0.6).abs() < 1e-12);
        assert!((at(12) - 0.2).abs() < 1e-12);
        assert!((at(99) - 0.2).abs() < 1e-12);
    }
}
