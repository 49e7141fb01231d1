//! An open model, as the Python side sees it: bytes and sizes.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;
use vqrae::image::ResizeMode;
use vqrae::{DType, Device, Tensor, Vqrae};

use crate::device;
use crate::error::{Failure, refuse};
use crate::images::{self, BATCH, Source};
use crate::threads::on_pool;

/// A model, open on a device. It never changes, so threads may share it.
#[pyclass(frozen, module = "vqrae._vqrae")]
pub(crate) struct Model {
    model: Vqrae,
}

/// The numbers of a tensor, little- or big-endian as the machine is, and its shape.
struct Array {
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// An image's own rows and columns, and what was made of it.
type Made = ((usize, usize), Array);

#[pymethods]
impl Model {
    /// Opens the model of a folder; without one, the model that ships with the package.
    #[new]
    fn new(py: Python<'_>, path: Option<PathBuf>, device: &str, dtype: &str) -> PyResult<Self> {
        let open = || {
            let device = device::open(device)?;
            let dtype = device::dtype(dtype, &device)?;
            Ok(match &path {
                Some(folder) => Vqrae::from_pretrained(folder, &device, dtype)?,
                None => Vqrae::shipped(&device, dtype)?,
            })
        };
        Ok(Self { model: py.detach(|| on_pool(open))? })
    }

    /// For each image its rows, its columns, and the shape and bytes of its codes, i32 `[h, w]` or `[h, w, C]`; or an
    /// exception.
    fn encode<'py>(&self, py: Python<'py>, images: Vec<Source>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        self.each_image(py, &images, |pixels| self.model.encode_to_indices(pixels))
    }

    /// For each image its rows, its columns, and the shape and bytes of its features, f32 `[N, D]`; or an exception.
    fn features<'py>(&self, py: Python<'py>, images: Vec<Source>) -> PyResult<Vec<Bound<'py, PyAny>>> {
        self.each_image(py, &images, |pixels| self.model.encode(pixels))
    }

    /// The shape and bytes of the codes of pixels f32 `[B, 3, H, W]`, prepared and normalised by the caller.
    fn encode_pixels<'py>(
        &self,
        py: Python<'py>,
        shape: [usize; 4],
        pixels: PyBackedBytes,
    ) -> PyResult<(Vec<usize>, Bound<'py, PyBytes>)> {
        let compute = || {
            let numbers = pixels.as_chunks::<4>().0.iter().map(|number| f32::from_ne_bytes(*number)).collect();
            let pixels = Tensor::from_vec(numbers, shape.as_slice(), &Device::Cpu)?;
            self.in_batches(&pixels, |pixels| Ok(self.model.encode_to_indices(pixels)?))
        };
        let array = py.detach(|| on_pool(compute))?;
        Ok((array.shape, PyBytes::new(py, &array.bytes)))
    }

    /// The shape and bytes of the images that codes u32 `[B, h, w]` or `[B, h, w, C]` decode to, u8 `[B, H, W, 3]`.
    fn decode<'py>(
        &self,
        py: Python<'py>,
        shape: Vec<usize>,
        codes: PyBackedBytes,
    ) -> PyResult<(Vec<usize>, Bound<'py, PyBytes>)> {
        let compute = || {
            let numbers = codes.as_chunks::<4>().0.iter().map(|number| u32::from_ne_bytes(*number)).collect();
            let codes = Tensor::from_vec(numbers, shape, &Device::Cpu)?;
            self.in_batches(&codes, |codes| self.paint(codes))
        };
        let array = py.detach(|| on_pool(compute))?;
        Ok((array.shape, PyBytes::new(py, &array.bytes)))
    }

    /// The shape and bytes of the vectors that features are compared with, f32 `[K, e]`.
    fn codebook<'py>(&self, py: Python<'py>) -> PyResult<(Vec<usize>, Bound<'py, PyBytes>)> {
        let array = py.detach(|| on_pool(|| Array::of(&self.model.codebook()?)))?;
        Ok((array.shape, PyBytes::new(py, &array.bytes)))
    }

    #[getter]
    fn id(&self) -> &str {
        self.model.id()
    }

    #[getter]
    fn codebook_size(&self) -> usize {
        self.model.codebook_size()
    }

    #[getter]
    fn codes_per_token(&self) -> usize {
        self.model.codes_per_token()
    }

    /// Rows and columns of the images that the model sees; `None` where every image has its own size.
    #[getter]
    fn image_size(&self) -> Option<(usize, usize)> {
        let preprocessor = self.model.preprocessor();
        (preprocessor.resize_mode != ResizeMode::Naflex).then_some(preprocessor.size)
    }

    /// Rows and columns of the codes of such an image.
    #[getter]
    fn grid(&self) -> PyResult<Option<(usize, usize)>> {
        let grid = |(h, w)| self.model.grid_of(h, w).map_err(|error| Failure::from(error).into());
        self.image_size().map(grid).transpose()
    }

    #[getter]
    fn preprocessing(&self) -> String {
        self.model.preprocessor().tag()
    }

    #[getter]
    fn precision(&self) -> &str {
        self.model.precision()
    }

    #[getter]
    fn device(&self) -> String {
        device::name(self.model.device())
    }
}

impl Model {
    /// What `compute` makes of each image, or the exception that says why not, in their order.
    fn each_image<'py>(
        &self,
        py: Python<'py>,
        sources: &[Source],
        compute: impl Fn(&Tensor) -> candle_core::Result<Tensor> + Sync,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let made = py.detach(|| on_pool(|| self.pipeline(sources, &compute)))?;
        let outcome = |made: Result<Made, Failure>| match made {
            Ok(((height, width), array)) => {
                (height, width, array.shape, PyBytes::new(py, &array.bytes)).into_pyobject(py).map(Bound::into_any)
            }
            Err(failure) => Ok(PyErr::from(failure).into_value(py).into_bound(py).into_any()),
        };
        made.into_iter().map(outcome).collect()
    }

    /// A batch is computed while the next one is read.
    fn pipeline(
        &self,
        sources: &[Source],
        compute: &(impl Fn(&Tensor) -> candle_core::Result<Tensor> + Sync),
    ) -> Result<Vec<Result<Made, Failure>>, Failure> {
        let read = |batch| images::load(batch, self.model.preprocessor());
        let mut batches = sources.chunks(BATCH);
        let mut ahead = batches.next().map(read);
        let mut all = Vec::with_capacity(sources.len());
        while let Some(images) = ahead {
            let next = batches.next();
            let compute = || images::each(&images, &self.model, compute);
            let (computed, following) = rayon::join(compute, || next.map(read));
            for (image, tensor) in images.into_iter().zip(computed?) {
                all.push(match (image, tensor) {
                    (Ok(image), Some(tensor)) => Ok((image.original, Array::of(&tensor)?)),
                    (Err(failure), _) => Err(failure),
                    (Ok(_), None) => refuse("the model made nothing of this image"),
                });
            }
            ahead = following;
        }
        Ok(all)
    }

    /// What `compute` makes of a tensor `[B, …]`, a batch at a time, the last one filled up where the batch could matter.
    fn in_batches(&self, all: &Tensor, compute: impl Fn(&Tensor) -> Result<Tensor, Failure>) -> Result<Array, Failure> {
        let mut made = Vec::new();
        for start in (0..all.dim(0)?).step_by(BATCH) {
            let batch = all.narrow(0, start, BATCH.min(all.dim(0)? - start))?;
            let (count, lacking) = (batch.dim(0)?, BATCH - batch.dim(0)?);
            let whole = self.model.is_batch_invariant() || lacking == 0;
            let batch = if whole { batch } else { batch.pad_with_zeros(0, 0, lacking)? };
            made.push(compute(&batch.to_device(self.model.device())?)?.narrow(0, 0, count)?.to_device(&Device::Cpu)?);
        }
        Array::of(&Tensor::cat(&made, 0)?)
    }

    /// The images u8 `[B, H, W, 3]` of codes `[B, h, w]` or `[B, h, w, C]`.
    fn paint(&self, codes: &Tensor) -> Result<Tensor, Failure> {
        let decoded = self.model.decode_from_indices(codes)?.to_device(&Device::Cpu)?;
        let (b, _, h, w) = decoded.dims4()?;
        let mut bytes = Vec::with_capacity(b * h * w * 3);
        for i in 0..b {
            let image = decoded.get(i)?.flatten_all()?.to_vec1::<f32>()?;
            bytes.extend(self.model.preprocessor().denormalize_to_rgb(&image, h, w).data);
        }
        Ok(Tensor::from_vec(bytes, (b, h, w, 3), &Device::Cpu)?)
    }
}

impl Array {
    /// Of u8, f32, or of codes, which become i32: more readers know it than u32, and every code is far below its limit.
    fn of(tensor: &Tensor) -> Result<Self, Failure> {
        let flat = tensor.flatten_all()?;
        let bytes = match tensor.dtype() {
            DType::U8 => flat.to_vec1::<u8>()?,
            DType::U32 => flat.to_vec1::<u32>()?.into_iter().flat_map(u32::to_ne_bytes).collect(),
            _ => flat.to_dtype(DType::F32)?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_ne_bytes).collect(),
        };
        Ok(Self { shape: tensor.dims().to_vec(), bytes })
    }
}
