//! The numbers of a parameter where the optimizer computes with them: on the CPU a vector, over which it has loops of its
//! own; elsewhere a flat tensor, by tensor operations, or on a GPU by kernels that take all parameters at once.

#[cfg(feature = "cuda")]
mod gpu;

use candle_core::{DType, Device, Result, Tensor};

use super::optimizer::Update;

/// f32 numbers, in the order of a parameter's elements.
#[derive(Debug, Clone)]
pub(super) enum Values {
    Host(Vec<f32>),
    Device(Tensor),
}

impl Values {
    /// Those of a tensor; on a device no copy, so not of a variable that is going to change.
    pub(super) fn of(tensor: &Tensor) -> Result<Self> {
        let flat = tensor.flatten_all()?;
        match flat.device() {
            Device::Cpu => flat.to_vec1().map(Self::Host),
            _ => Ok(Self::Device(flat.detach().contiguous()?)),
        }
    }

    pub(super) fn zeros(count: usize, device: &Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::Host(vec![0.0; count])),
            device => Tensor::zeros(count, DType::F32, device).map(Self::Device),
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Host(values) => values.len(),
            Self::Device(values) => values.elem_count(),
        }
    }

    /// A flat tensor on their device.
    pub(super) fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Host(values) => Tensor::from_slice(values, values.len(), &Device::Cpu),
            Self::Device(values) => Ok(values.clone()),
        }
    }

    /// Takes those of a flat tensor on any device, of the same length; stays where it is.
    pub(super) fn set(&mut self, tensor: &Tensor) -> Result<()> {
        let flat = tensor.to_dtype(DType::F32)?.flatten_all()?;
        match self {
            Self::Host(values) => *values = flat.to_device(&Device::Cpu)?.to_vec1()?,
            Self::Device(values) => *values = flat.to_device(values.device())?,
        }
        Ok(())
    }

    pub(super) fn add(&mut self, other: Self) -> Result<()> {
        match (self, other) {
            (Self::Host(sum), Self::Host(values)) => sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
            (Self::Device(sum), other) => *sum = (&*sum + other.tensor()?)?,
            (sum, other) => {
                *sum = Self::Device((sum.tensor()?.to_device(other.tensor()?.device())? + other.tensor()?)?)
            }
        }
        Ok(())
    }

    pub(super) fn divide(&mut self, by: f32) -> Result<()> {
        match self {
            Self::Host(values) => values.iter_mut().for_each(|value| *value /= by),
            Self::Device(values) => *values = values.affine(1.0 / f64::from(by), 0.0)?,
        }
        Ok(())
    }

    /// `a ← γ a + (1 − γ) w`.
    pub(super) fn follow(&mut self, new: &Tensor, decay: f32) -> Result<()> {
        match self {
            Self::Host(values) => {
                let new = new.flatten_all()?.to_vec1::<f32>()?;
                values.iter_mut().zip(new).for_each(|(old, new)| *old = decay * *old + (1.0 - decay) * new);
            }
            Self::Device(values) => {
                let new = new.flatten_all()?.detach().affine(f64::from(1.0 - decay), 0.0)?;
                *values = (values.affine(f64::from(decay), 0.0)? + new)?;
            }
        }
        Ok(())
    }
}

/// The sum of the squares of each, in f64.
pub(super) fn squares<'a>(all: impl IntoIterator<Item = &'a Values>) -> Result<Vec<f64>> {
    let (mut sums, mut waiting) = (Vec::new(), Vec::new());
    for values in all {
        match values {
            Values::Host(values) => sums.push(values.iter().map(|&v| f64::from(v) * f64::from(v)).sum()),
            Values::Device(values) => waiting.push(values),
        }
    }
    #[cfg(feature = "cuda")]
    if let Some(found) = gpu::squares(&waiting)? {
        sums.extend(found);
        return Ok(sums);
    }
    // One transfer for all of a device, which would else be waited for again and again.
    if !waiting.is_empty() {
        let square = |values: &Tensor| values.to_dtype(DType::F64)?.sqr()?.sum_all();
        let squares = waiting.into_iter().map(square).collect::<Result<Vec<_>>>()?;
        sums.extend(Tensor::stack(&squares, 0)?.to_vec1::<f64>()?);
    }
    Ok(sums)
}

/// Takes the steps of those that a GPU has, all at once and to the bits of the CPU's loop; returns the others.
pub(super) fn step_together(updates: Vec<Update<'_>>) -> Result<Vec<Update<'_>>> {
    #[cfg(feature = "cuda")]
    return gpu::step(updates);
    #[cfg(not(feature = "cuda"))]
    Ok(updates)
}
