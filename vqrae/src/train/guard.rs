//! Which steps are taken: one whose loss or gradient is not finite, or whose gradient is far above the usual, would spoil
//! weights and moments for long, and is skipped.

use serde::{Deserialize, Serialize};

/// Norms that the usual one is the median of.
const WINDOW: usize = 101;

/// Norms before which nothing is usual yet.
const LEAST: usize = 10;

/// What the guard has seen; part of a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Seen {
    /// Gradient norms of the last steps that were taken, the oldest first; in f32, which JSON keeps to the bit.
    pub norms: Vec<f32>,
    /// Steps that were skipped, in all.
    pub skipped: usize,
    /// Of these, the last ones without a step taken between.
    pub in_a_row: usize,
}

impl Seen {
    /// Whether a step is to be taken; why not, if not. `factor` of zero looks for what is not finite alone.
    pub(super) fn judge(&mut self, loss: f64, norm: f64, factor: f64) -> Result<(), String> {
        let reason = if !loss.is_finite() || !norm.is_finite() {
            Some(format!("the loss is {loss} and the gradients' norm {norm}"))
        } else {
            let spike = |usual: f64| factor > 0.0 && norm > factor * usual;
            let usual = self.usual().filter(|&usual| spike(usual));
            usual.map(|usual| format!("the gradients' norm is {norm:.4}, usual is {usual:.4}"))
        };
        if let Some(reason) = reason {
            self.skipped += 1;
            self.in_a_row += 1;
            return Err(reason);
        }
        self.in_a_row = 0;
        if self.norms.len() == WINDOW {
            self.norms.remove(0);
        }
        self.norms.push(norm as f32);
        Ok(())
    }

    /// The median norm.
    fn usual(&self) -> Option<f64> {
        if self.norms.len() < LEAST {
            return None;
        }
        let mut sorted = self.norms.clone();
        sorted.sort_by(f32::total_cmp);
        Some(f64::from(sorted[sorted.len() / 2]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spike_is_what_lies_far_above_the_median() {
        let mut seen = Seen::default();
        assert!(seen.judge(1.0, 900.0, 10.0).is_ok(), "nothing is usual yet");
        (0..10).for_each(|_| assert!(seen.judge(1.0, 2.0, 10.0).is_ok()));
        assert!(seen.judge(1.0, 20.5, 10.0).unwrap_err().contains("usual is 2.0"));
        assert!(seen.judge(f64::NAN, 2.0, 0.0).is_err());
        assert_eq!((seen.skipped, seen.in_a_row), (2, 2));
        assert!(seen.judge(1.0, 20.5, 0.0).is_ok(), "no factor, no spikes");
        assert_eq!((seen.skipped, seen.in_a_row, seen.norms.len()), (2, 0, 12));
    }

    #[test]
    fn old_norms_are_forgotten() {
        let mut seen = Seen::default();
        (0..300).for_each(|i| assert!(seen.judge(1.0, f64::from(i), 0.0).is_ok()));
        assert_eq!((seen.norms.len(), seen.usual()), (WINDOW, Some(249.0)));
    }
}
