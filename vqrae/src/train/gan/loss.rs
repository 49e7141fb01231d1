//! The adversarial losses: what discriminator and generator minimise, LeCam's regulariser, the adaptive weight.

use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

/// What discriminator and generator minimise, of the logits of real (r) and painted (f) images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// `½ (mean max(0, 1 − r) + mean max(0, 1 + f))` and `−mean f` (Lim & Ye, arXiv 1705.02894): TiTok's and RAE's.
    #[default]
    Hinge,
    /// `½ (mean softplus(−r) + mean softplus(f))` and, non-saturating, `mean softplus(−f)` (Goodfellow et al., arXiv
    /// 1406.2661).
    Vanilla,
}

impl Loss {
    /// The discriminator's loss, a scalar, of logits of any shape.
    pub fn discriminator(self, real: &Tensor, fake: &Tensor) -> Result<Tensor> {
        let (real, fake) = match self {
            Self::Hinge => (real.affine(-1.0, 1.0)?.relu()?, (fake + 1.0)?.relu()?),
            Self::Vanilla => (softplus(&real.neg()?)?, softplus(fake)?),
        };
        (real.mean_all()? + fake.mean_all()?)? * 0.5
    }

    /// The generator's loss, a scalar.
    pub fn generator(self, fake: &Tensor) -> Result<Tensor> {
        match self {
            Self::Hinge => fake.mean_all()?.neg(),
            Self::Vanilla => softplus(&fake.neg()?)?.mean_all(),
        }
    }
}

/// `ln(1 + eˣ)`, safe for large x.
fn softplus(x: &Tensor) -> Result<Tensor> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

/// LeCam's regulariser (Tseng et al., arXiv 2104.03310), as TiTok has it: how far the mean logits r̄ and f̄ of a batch are
/// on the wrong side of the other's moving average, `max(0, r̄ − f̃)² + max(0, r̃ − f̄)²`.
///
/// # Shapes
/// - r̄, f̄ (with a gradient) and the averages r̃, f̃: scalars
pub fn lecam(real: &Tensor, fake: &Tensor, average_real: &Tensor, average_fake: &Tensor) -> Result<Tensor> {
    (real - average_fake)?.relu()?.sqr()? + (average_real - fake)?.relu()?.sqr()?
}

/// Taming transformers' weight of the generator's loss (Esser et al., arXiv 2012.09841): the norm of the reconstruction's
/// gradient over the norm of the generator's, both at the decoder's last layer, at most 10⁴.
pub fn adaptive_weight(reconstruction: &Tensor, generator: &Tensor) -> Result<f64> {
    let norm = |gradient: &Tensor| -> Result<f64> {
        let values = gradient.flatten_all()?.to_vec1::<f32>()?;
        Ok(values.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt())
    };
    Ok((norm(reconstruction)? / (norm(generator)? + 1e-6)).clamp(0.0, 1e4))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn of(values: &[f32]) -> Result<Tensor> {
        Tensor::new(values, &Device::Cpu)
    }

    #[test]
    fn losses_by_hand() -> Result<()> {
        let (real, fake) = (of(&[2.0, 0.5])?, of(&[-3.0, 1.0])?);
        let scalar = |x: Tensor| x.to_scalar::<f32>();
        // (0 + 0.5)/2 and (0 + 2)/2, halved
        assert_eq!(scalar(Loss::Hinge.discriminator(&real, &fake)?)?, 0.625);
        assert_eq!(scalar(Loss::Hinge.generator(&fake)?)?, 1.0);
        let even = of(&[0.0])?;
        assert!((scalar(Loss::Vanilla.discriminator(&even, &even)?)? - 2f32.ln()).abs() < 1e-6);
        assert!((scalar(Loss::Vanilla.generator(&even)?)? - 2f32.ln()).abs() < 1e-6);
        // softplus(100) is 100, not infinite
        assert_eq!(scalar(Loss::Vanilla.generator(&of(&[-100.0])?)?)?, 100.0);
        Ok(())
    }

    #[test]
    fn lecam_by_hand() -> Result<()> {
        let scalar = |x: f32| Tensor::new(x, &Device::Cpu);
        let lecam = |r, f, real, fake| -> Result<f32> {
            lecam(&scalar(r)?, &scalar(f)?, &scalar(real)?, &scalar(fake)?)?.to_scalar()
        };
        assert_eq!(lecam(1.0, -1.0, 0.5, -0.5)?, 4.5);
        assert_eq!(lecam(-1.0, 1.0, 0.0, 0.0)?, 0.0);
        Ok(())
    }
}
