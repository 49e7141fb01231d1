//! x wᵀ + b on the GPU by cuBLASLt, with what follows a product done before its values leave the chip.
//!
//! A product is planned once for its shape and end: cuBLASLt's heuristic costs more than a small product. Sums are f32,
//! those of a sum's parts too; f32 values are multiplied as f32, never as TF32. The algorithm follows from the shape, M
//! among it: a row's last bits may differ from one batch size to another.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::{CudaSlice, CudaStream, CudaView, DevicePtr, DevicePtrMut};

use super::Gpu;
use super::elementwise::{self, Gelu};
use super::real::{Kind, Real, WHOLE, refuse, unwritten};
use crate::Error;

/// cublasOperation_t, which cudarc's cuBLASLt has no name for.
const TRANSPOSED: i32 = 1;
/// What cuBLASLt may use for a product.
const WORKSPACE: usize = 32 << 20;
/// Plans kept. A model has some ten for each number of rows; images of many sizes must not fill the memory.
const MOST_PLANS: usize = 4096;

/// M, D and E of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// M, rows of x.
    pub rows: usize,
    /// D, the width of x.
    pub inputs: usize,
    /// E, the width of the output.
    pub outputs: usize,
}

/// What becomes of x wᵀ + b.
#[derive(Debug)]
pub enum End<'a, T> {
    /// Itself.
    Plain,
    /// Its GELU in the tanh form. (cuBLASLt has no other: for the erf form, [`elementwise::gelu`] follows a product without
    /// a bias.)
    Gelu,
    /// Added to this. `[M, E]`
    Residual(&'a CudaView<'a, T>),
}

/// x wᵀ + b and its end.
///
/// # Shapes
/// - x: `[M, D]`
/// - weight: `[E, D]`
/// - bias: `[E]`
/// - output: `[M, E]`
///
/// # Errors
/// If an array has not the values of its shape, a size is zero, or cuBLASLt has no algorithm for the product alone. (Where it
/// has none for the end, a kernel of ours follows the product, which is rounded to T in between.)
pub fn linear<T: Real>(
    gpu: &Gpu,
    x: &CudaView<'_, T>,
    weight: &CudaView<'_, T>,
    bias: Option<&CudaView<'_, T>>,
    shape: Shape,
    end: End<'_, T>,
) -> Result<CudaSlice<T>, Error> {
    linear_by(gpu, x, weight, bias, shape, end, true)
}

/// As [`linear`]; without `fused`, bias and end are a kernel of ours after the product.
fn linear_by<T: Real>(
    gpu: &Gpu,
    x: &CudaView<'_, T>,
    weight: &CudaView<'_, T>,
    bias: Option<&CudaView<'_, T>>,
    shape: Shape,
    end: End<'_, T>,
    fused: bool,
) -> Result<CudaSlice<T>, Error> {
    let Shape { rows, inputs, outputs } = shape;
    let residual = if let End::Residual(residual) = end { Some(residual) } else { None };
    for (what, values, (height, width)) in [
        ("x", Some(x.len()), (rows, inputs)),
        ("weight", Some(weight.len()), (outputs, inputs)),
        ("bias", bias.map(|bias| bias.len()), (1, outputs)),
        ("residual", residual.map(|residual| residual.len()), (rows, outputs)),
    ] {
        if values.is_some_and(|values| values == 0 || height.checked_mul(width) != Some(values)) {
            return Err(refuse(format!(
                "linear: values of {what}, expected: {height} · {width}, at least 1, got: {values:?}"
            )));
        }
    }
    let products = gpu.products()?;
    let mut out = unwritten::<T>(gpu, "linear", rows.checked_mul(outputs))?;
    let asked = match end {
        End::Plain => Ending::Plain,
        End::Gelu => Ending::Gelu,
        End::Residual(_) => Ending::Residual,
    };
    if fused && products.multiply(gpu, (x, weight, bias, residual), shape, asked, &mut out)? {
        return Ok(out);
    }
    if !products.multiply(gpu, (x, weight, None, None), shape, Ending::Plain, &mut out)? {
        return Err(refuse(format!("cuBLASLt has no algorithm for {shape:?} of {:?}", T::KIND)));
    }
    match end {
        End::Gelu => elementwise::gelu_in_place(gpu, &mut out, bias, Gelu::Tanh)?,
        _ if bias.is_some() || residual.is_some() => elementwise::add_in_place(gpu, &mut out, bias, residual)?,
        _ => {}
    }
    Ok(out)
}

/// [`End`] without its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Ending {
    Plain,
    Gelu,
    Residual,
}

/// What an algorithm was chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    shape: Shape,
    kind: Kind,
    bias: bool,
    ending: Ending,
    /// Bytes to whose multiples all addresses are.
    alignment: u32,
}

/// x, w, b and the residual.
type Operands<'a, 'b, T> =
    (&'a CudaView<'b, T>, &'a CudaView<'b, T>, Option<&'a CudaView<'b, T>>, Option<&'a CudaView<'b, T>>);

/// cuBLASLt, its workspace, and the products planned so far.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    /// `None` where cuBLASLt has no algorithm. Held while a product is handed over, since a plan holds its bias.
    plans: Mutex<HashMap<Key, Option<Plan>>>,
}

// SAFETY: cuBLASLt's handle may be used from any thread.
unsafe impl Send for Products {}
// SAFETY: as above; plans are behind a lock.
unsafe impl Sync for Products {}

impl Products {
    pub(super) fn open(stream: &Arc<CudaStream>) -> Result<Self, Error> {
        stream.context().bind_to_thread()?;
        // SAFETY: scratch that cuBLASLt writes before it reads it.
        let workspace = unsafe { stream.alloc(WORKSPACE) }?;
        Ok(Self { handle: result::create_handle()?, workspace, plans: Mutex::default() })
    }

    /// Writes the product and its end to `out`, `[M, E]`; false if there is no algorithm for it. The operands have the shapes
    /// of [`linear`], and there is a residual if the ending says so.
    fn multiply<T: Real>(
        &self,
        gpu: &Gpu,
        (x, weight, bias, residual): Operands<'_, '_, T>,
        shape: Shape,
        ending: Ending,
        out: &mut CudaSlice<T>,
    ) -> Result<bool, Error> {
        let stream = gpu.stream();
        stream.context().bind_to_thread()?;
        let ((x, _x), (weight, _weight)) = (x.device_ptr(stream), weight.device_ptr(stream));
        let [bias, residual] = [bias, residual].map(|view| view.map(|view| view.device_ptr(stream)));
        let (out, _out) = out.device_ptr_mut(stream);
        let bias = bias.as_ref().map(|(bias, _)| *bias);
        // Where nothing is added, what is not read may as well be the output.
        let added = residual.as_ref().map_or(out, |(residual, _)| *residual);
        let all = x | weight | out | added | bias.unwrap_or(0) | WHOLE as u64;
        let key = Key { shape, kind: T::KIND, bias: bias.is_some(), ending, alignment: 1 << all.trailing_zeros() };

        let mut plans = self.plans.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !plans.contains_key(&key) {
            if plans.len() >= MOST_PLANS {
                plans.clear();
            }
            plans.insert(key, Plan::new(self.handle, key, bias)?);
        }
        let Some(Some(plan)) = plans.get(&key) else { return Ok(false) };
        if let Some(bias) = bias {
            plan.operation.set(sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        let (one, beta) = (1.0_f32, if ending == Ending::Residual { 1.0_f32 } else { 0.0 });
        let (workspace, _workspace) = self.workspace.device_ptr(stream);
        // SAFETY: the plan's handles live as long as it does, the arrays have the shapes of its layouts, and all that uses
        // the workspace is in this stream's order.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation.0,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                weight as *const c_void,
                plan.weight.0,
                x as *const c_void,
                plan.x.0,
                added as *const c_void,
                plan.out.0,
                out as *mut c_void,
                plan.out.0,
                &raw const plan.algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                stream.cu_stream().cast(),
            )
        }?;
        Ok(true)
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: made by `open`, and nothing uses it any more. There is nobody to tell of a failure.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// A product as cuBLASLt has it. Its matrices go by columns, so it is asked for outᵀ = w xᵀ.
struct Plan {
    operation: Operation,
    weight: Layout,
    x: Layout,
    out: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    /// `None` where there is no algorithm. `bias` is any address that a bias may have.
    fn new(handle: sys::cublasLtHandle_t, key: Key, bias: Option<u64>) -> Result<Option<Self>, Error> {
        use sys::cublasLtEpilogue_t::{
            CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_GELU, CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        use sys::cublasLtMatmulDescAttributes_t as Of;
        use sys::cublasLtMatmulPreferenceAttributes_t as Prefer;
        use sys::cublasStatus_t::{CUBLAS_STATUS_INVALID_VALUE, CUBLAS_STATUS_NOT_SUPPORTED};
        let Shape { rows, inputs, outputs } = key.shape;
        let operation = Operation::new()?;
        operation.set(Of::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        let epilogue = match (key.ending, key.bias) {
            (Ending::Gelu, true) => CUBLASLT_EPILOGUE_GELU_BIAS,
            (Ending::Gelu, false) => CUBLASLT_EPILOGUE_GELU,
            (_, true) => CUBLASLT_EPILOGUE_BIAS,
            (_, false) => CUBLASLT_EPILOGUE_DEFAULT,
        };
        operation.set(Of::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if let Some(bias) = bias {
            operation.set(Of::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        let weight = Layout::new(key.kind, inputs, outputs)?;
        let x = Layout::new(key.kind, inputs, rows)?;
        let out = Layout::new(key.kind, outputs, rows)?;
        let preference = Preference::new()?;
        preference.set(Prefer::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)?;
        // Parts of a sum are added in f32, not in the type of the output.
        let parts = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(Prefer::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &parts)?;
        for of in [
            Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Prefer::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(of, &key.alignment)?;
        }
        // SAFETY: all handles were made above.
        let found = unsafe {
            result::get_matmul_algo_heuristic(handle, operation.0, weight.0, x.0, out.0, out.0, preference.0)
        };
        match found {
            Ok(found) => Ok(Some(Self { operation, weight, x, out, algorithm: found.algo })),
            // Versions differ in how they say that there is none.
            Err(CublasError(CUBLAS_STATUS_NOT_SUPPORTED | CUBLAS_STATUS_INVALID_VALUE)) => Ok(None),
            Err(error) => Err(refuse(format!("cuBLASLt: {:?} for {key:?}", error.0))),
        }
    }
}

/// A matrix by columns without gaps.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(kind: Kind, rows: usize, columns: usize) -> Result<Self, Error> {
        let kind = match kind {
            Kind::F32 => sys::cudaDataType::CUDA_R_32F,
            Kind::F16 => sys::cudaDataType::CUDA_R_16F,
            Kind::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        };
        let gap = i64::try_from(rows).map_err(|_| refuse(format!("linear: width, got: {rows}")))?;
        Ok(Self(result::create_matrix_layout(kind, rows as u64, columns as u64, gap)?))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and this is its one owner.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// What is done to the matrices.
struct Operation(sys::cublasLtMatmulDesc_t);

impl Operation {
    fn new() -> Result<Self, Error> {
        let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        Ok(Self(result::create_matmul_desc(sums, sys::cudaDataType::CUDA_R_32F)?))
    }

    fn set<V: Copy>(&self, of: sys::cublasLtMatmulDescAttributes_t, value: &V) -> Result<(), Error> {
        // SAFETY: the handle is `new`'s, and the value is read before the call returns.
        Ok(unsafe { result::set_matmul_desc_attribute(self.0, of, (&raw const *value).cast(), size_of::<V>()) }?)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and this is its one owner.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// What an algorithm must do with.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self, Error> {
        Ok(Self(result::create_matmul_pref()?))
    }

    fn set<V: Copy>(&self, of: sys::cublasLtMatmulPreferenceAttributes_t, value: &V) -> Result<(), Error> {
        // SAFETY: the handle is `new`'s, and the value is read before the call returns.
        Ok(unsafe { result::set_matmul_pref_attribute(self.0, of, (&raw const *value).cast(), size_of::<V>()) }?)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and this is its one owner.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

impl From<CublasError> for Error {
    fn from(error: CublasError) -> Self {
        refuse(format!("cuBLASLt: {:?}", error.0))
    }
}

#[cfg(test)]
mod tests;
