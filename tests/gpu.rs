//! Whole models on a GPU against the same on a CPU and against PyTorch: encoders, quantizers, decoders, a step of training.
//!
//! Without a GPU these tests do nothing, but for `VQRAE_REQUIRE_GPU`: then one must be there, or be played by the CPU
//! (kernels/cuda/cpu).

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use vqrae::{DType, Device, Tensor, Vqrae, init};

use crate::compare::{Tolerance, assert_close, fixture, noise, say, tensors_of};
use crate::pairs::{ENCODERS, QUANTIZERS, encoder};

/// f32 on both, in orders of their own.
const F32: Tolerance = Tolerance { relative: 1e-4, absolute: 1e-6 };
/// Eight or eleven bits of mantissa, a few layers.
const HALF: Tolerance = Tolerance { relative: 0.03, absolute: 0.0 };

fn gpu() -> Option<Device> {
    static GPU: OnceLock<Result<Device, String>> = OnceLock::new();
    match GPU.get_or_init(|| Device::new_cuda_with_stream(0).map_err(|error| error.to_string())) {
        Ok(device) => Some(device.clone()),
        Err(error) => {
            assert!(std::env::var_os("VQRAE_REQUIRE_GPU").is_none(), "VQRAE_REQUIRE_GPU is set, and: {error}");
            None
        }
    }
}

fn on_cpu(x: &Tensor) -> Tensor {
    x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap()
}

/// The part of two sets of indices that differs.
fn differing(a: &Tensor, b: &Tensor) -> f64 {
    let flat = |x: &Tensor| x.to_device(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<u32>().unwrap();
    let (a, b) = (flat(a), flat(b));
    assert_eq!(a.len(), b.len());
    a.iter().zip(&b).filter(|(a, b)| a != b).count() as f64 / a.len() as f64
}

#[test]
fn a_whole_model_on_a_gpu_equals_pytorch() {
    let Some(gpu) = gpu() else { return };
    let folder = fixture("vqrae");
    for (dtype, tolerance) in [(DType::F32, F32), (DType::BF16, HALF), (DType::F16, HALF)] {
        let model = Vqrae::from_pretrained(&folder, &gpu, dtype).unwrap();
        for case in ["4x4", "3x5"] {
            let reference = tensors_of(&folder.join("reference.safetensors"), case);
            let features = on_cpu(&model.encode(&reference["pixels"]).unwrap());
            let worst = assert_close("features", &features, &reference["features"], tolerance);
            let (b, _, height, width) = reference["pixels"].dims4().unwrap();
            let indices = reference["indices"].to_dtype(DType::U32).unwrap();
            let indices = indices.reshape((b, height / 8, width / 8)).unwrap();
            let image = on_cpu(&model.decode_from_indices(&indices).unwrap());
            assert_close("image", &image, &reference["image"], tolerance);
            if dtype == DType::F32 {
                assert_eq!(differing(&model.encode_to_indices(&reference["pixels"]).unwrap(), &indices), 0.0);
            }
            say(&format!("a whole model on a GPU in {}, grid {case}: {worst:.1e}", model.precision()));
        }
    }
}

#[test]
fn every_encoder_and_quantizer_on_a_gpu_equals_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let place = tempfile::tempdir().unwrap();
    let pixels = noise("pixels", &[2, 3, 32, 24]);
    // Each encoder with a quantizer or two, each quantizer at least once: all pairs are the CPU's test.
    for (i, (quantizer, _)) in QUANTIZERS.into_iter().enumerate() {
        let name = ENCODERS[i % ENCODERS.len()];
        let what = format!("{name} with {quantizer}");
        let [wishes, started] = ["json", "started"].map(|kind| place.path().join(format!("{i}.{kind}")));
        fs::write(&wishes, format!(r#"{{"quantizer":{quantizer},"decoder":{{"num_hidden_layers":1}}}}"#)).unwrap();
        init(&encoder(name, place.path()), &wishes, &[], None, &started, 7).unwrap_or_else(|e| panic!("{what}: {e}"));
        let cpu = Vqrae::from_pretrained(&started, &Device::Cpu, DType::F32).unwrap();
        for (dtype, tolerance) in [(DType::F32, F32), (DType::BF16, HALF)] {
            let model = Vqrae::from_pretrained(&started, &gpu, dtype).unwrap();
            let expected = cpu.encode(&pixels).unwrap();
            let features = model.encode(&pixels).unwrap();
            assert_close(&format!("{what}: features"), &on_cpu(&features), &expected, tolerance);
            let codes = cpu.encode_to_indices(&pixels).unwrap();
            let painted = cpu.decode_from_indices(&codes).unwrap();
            let on_gpu = on_cpu(&model.decode_from_indices(&codes).unwrap());
            assert_close(&format!("{what}: pixels"), &on_gpu, &painted, tolerance);
            let quantized = model.quantize(&expected.to_device(&gpu).unwrap().to_dtype(dtype).unwrap()).unwrap();
            let wrong = differing(&quantized.indices, &codes);
            // Roundings before the search may move a feature past a border; the search itself may not.
            assert!(wrong <= if dtype == DType::F32 { 0.0 } else { 0.1 }, "{what}: {wrong} of the codes differ");
        }
    }
}

#[test]
fn the_shipped_model_gives_a_photo_the_same_codes_on_a_gpu() {
    let Some(gpu) = gpu() else { return };
    let photo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/photos/astronaut.png");
    let image = vqrae::image::open(&photo, &vqrae::image::Limits::default()).unwrap();
    let cpu = Vqrae::shipped(&Device::Cpu, DType::F32).unwrap();
    let prepared = cpu.preprocessor().prepare(&image).unwrap();
    let (h, w) = (prepared.height, prepared.width);
    let pixels = Tensor::from_vec(cpu.preprocessor().normalize(&prepared), (1, 3, h, w), &Device::Cpu).unwrap();
    let codes = cpu.encode_to_indices(&pixels).unwrap();
    for (dtype, most) in [(DType::F32, 0.01), (DType::BF16, 0.1)] {
        let model = Vqrae::shipped(&gpu, dtype).unwrap();
        assert_eq!(model.id(), cpu.id());
        let wrong = differing(&model.encode_to_indices(&pixels).unwrap(), &codes);
        say(&format!(
            "the shipped model on a GPU in {}: {:.2} % of the codes differ",
            model.precision(),
            100.0 * wrong
        ));
        assert!(wrong <= most, "{wrong} of the codes differ in {dtype:?}");
    }
}
