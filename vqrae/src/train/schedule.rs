//! Learning rates as pure functions of the step.

use serde::{Deserialize, Serialize};

/// The learning rate of one group of parameters: a linear warm-up, then a [`Shape`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Highest learning rate; zero freezes the group, and no gradient is computed for it.
    pub peak: f64,
    /// Learning rate of the last step of a cosine; zero where it is not said.
    #[serde(default)]
    pub end: f64,
    /// What follows the warm-up.
    #[serde(default)]
    pub schedule: Shape,
    /// Steps in which the rate rises; `train.warmup_steps` where it is not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<usize>,
}

/// What follows the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// Half a cosine from `peak` to `end`.
    #[default]
    Cosine,
    /// `peak` to the last step. A codebook wants it, and no warm-up: under a rate that warms up and anneals SimVQ loses
    /// usage (StableVQ, arXiv 2609.26774).
    Constant,
}

impl Rate {
    /// Zero: what has it is frozen.
    pub const FROZEN: Self = Self { peak: 0.0, end: 0.0, schedule: Shape::Cosine, warmup_steps: None };

    /// The rate of `step`, counted from 0, of a run of `steps` steps; `warmup` of them rise unless the group has its own.
    pub fn at(&self, step: usize, warmup: usize, steps: usize) -> f64 {
        let warmup = self.warmup_steps.unwrap_or(warmup);
        if step < warmup {
            return self.peak * (step + 1) as f64 / warmup as f64;
        }
        if self.schedule == Shape::Constant {
            return self.peak;
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
        let rate = Rate { peak: 1.0, end: 0.2, ..Rate::FROZEN };
        let at = |step| rate.at(step, 4, 13);
        assert_eq!([at(0), at(3), at(4)], [0.25, 1.0, 1.0]);
        assert!((at(8) - 0.6).abs() < 1e-12);
        assert!((at(12) - 0.2).abs() < 1e-12);
        assert!((at(99) - 0.2).abs() < 1e-12);
    }

    #[test]
    fn a_group_may_have_its_own_warm_up_and_stay_where_it_is() {
        let rate = Rate { peak: 1.0, schedule: Shape::Constant, warmup_steps: Some(0), ..Rate::FROZEN };
        assert_eq!([0, 3, 50, 99].map(|step| rate.at(step, 10, 100)), [1.0; 4]);
        let rate = Rate { warmup_steps: Some(2), ..rate };
        assert_eq!([0, 1, 2].map(|step| rate.at(step, 10, 100)), [0.5, 1.0, 1.0]);
    }
}
