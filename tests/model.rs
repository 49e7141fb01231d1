//! The model as a whole: grids, output patches, the model that ships, and the paper's shape.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use vqrae::encoder::{self, SiglipConfig};
use vqrae::image::{Naflex, Preprocessor, Resample, Rgb};
use vqrae::quantizer::{self, Metric, SimVqConfig};
use vqrae::weights::Tensors;
use vqrae::{Config, Vqrae, decoder, metrics, model};

fn tiny(metric: Metric, decoder: decoder::Config) -> Config {
    let encoder = SiglipConfig {
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 3,
        image_size: 32,
        patch_size: 8,
        ..SiglipConfig::default()
    };
    let quantizer = SimVqConfig { codebook_size: 50, codebook_dim: 12, metric, ..SimVqConfig::default() };
    Config::new(encoder::Config::Siglip(encoder), quantizer::Config::SimVq(quantizer), decoder)
}

fn new(config: Config) -> Vqrae {
    let tensors = model::fresh_tensors(&config, Tensors::new(), 3).expect("fresh tensors");
    let preprocessor = Preprocessor::siglip(32, Resample::Bicubic);
    Vqrae::new(config, preprocessor, tensors, Path::new("tiny"), &Device::Cpu, DType::F32).expect("a model")
}

fn pixels(b: usize, h: usize, w: usize) -> Result<Tensor> {
    let wave: Vec<f32> = (0..b * 3 * h * w).map(|i| ((i as f32) * 0.37).sin() + ((i as f32) * 0.011).cos()).collect();
    Tensor::from_vec(wave, (b, 3, h, w), &Device::Cpu)
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().and_then(|x| x.to_vec1::<f32>()).expect("values").into_iter().map(f32::to_bits).collect()
}

#[test]
fn decoding_the_indices_gives_the_bits_of_decoding_the_quantised_features() -> Result<()> {
    for metric in [Metric::Euclidean, Metric::Cosine] {
        let model = new(tiny(metric, decoder::Config::default()));
        for (h, w) in [(32, 32), (16, 56), (8, 8)] {
            let pixels = pixels(2, h, w)?;
            let quantized = model.quantize(&model.encode(&pixels)?)?;
            let indices = model.encode_to_indices(&pixels)?;
            assert_eq!(indices.dims(), [2, h / 8, w / 8]);
            let from_features = model.decode(&quantized.tokens, (h / 8, w / 8))?;
            let from_indices = model.decode_from_indices(&indices)?;
            assert_eq!(from_indices.dims(), [2, 3, h, w]);
            assert_eq!(bits(&from_features), bits(&from_indices));
        }
    }
    Ok(())
}

#[test]
fn the_output_patch_may_differ_from_the_input_patch() -> Result<()> {
    let decoder = decoder::Config {
        patch_size: Some(12),
        hidden_size: Some(20),
        num_hidden_layers: Some(1),
        num_attention_heads: Some(2),
        intermediate_size: Some(30),
        ..decoder::Config::default()
    };
    let model = new(tiny(Metric::Euclidean, decoder));
    let indices = model.encode_to_indices(&pixels(1, 24, 40)?)?;
    assert_eq!(model.decode_from_indices(&indices)?.dims(), [1, 3, 36, 60]);
    Ok(())
}

#[test]
fn a_reconstruction_of_another_size_is_compared_with_the_original_at_that_size() -> Result<()> {
    let model = new(tiny(Metric::Euclidean, decoder::Config { patch_size: Some(12), ..decoder::Config::default() }));
    let levels = (0..3 * 61 * 47).map(|i| (i * i % 251) as u8).collect();
    let photo = Rgb::new(61, 47, levels).expect("a photo");
    for mode in ["squash", "center-crop", "adm-crop", "pad", "naflex"] {
        let preprocessor = Preprocessor {
            resize_mode: mode.parse().expect(mode),
            naflex: Some(Naflex { patch_size: 8, max_num_patches: 20 }),
            shortest_edge: Some(40),
            ..model.preprocessor().clone()
        };
        let seen = preprocessor.prepare(&photo).expect(mode);
        let (h, w) = (seen.height, seen.width);
        assert_eq!(preprocessor.prepare_at(&photo, (h, w)).expect(mode), seen, "{mode}");
        let pixels = Tensor::from_vec(preprocessor.normalize(&seen), (1, 3, h, w), &Device::Cpu)?;
        let painted = model.decode_from_indices(&model.encode_to_indices(&pixels)?)?.flatten_all()?.to_vec1()?;
        let (h, w) = (h / 8 * 12, w / 8 * 12);
        let painted = preprocessor.denormalize_to_rgb(&painted, h, w);
        let original = preprocessor.prepare_at(&photo, (h, w)).expect(mode);
        assert!(metrics::psnr(&original, &painted).is_some_and(f64::is_finite), "{mode}");
        assert_eq!(metrics::psnr(&seen, &painted), None);
        // The same view: brought to the small size, the large original is nearly the small one.
        let small = Preprocessor { size: (seen.height, seen.width), ..Preprocessor::siglip(32, Resample::Bicubic) };
        let psnr = metrics::psnr(&small.prepare(&original).expect(mode), &seen).expect("one size");
        assert!(psnr > 20.0, "{mode}: {psnr}");
    }
    Ok(())
}

#[test]
fn an_image_alone_and_in_a_batch_has_the_same_codes_whatever_the_threads() -> Result<()> {
    let model = Vqrae::shipped(&Device::Cpu, DType::F32).expect("the shipped model");
    let batch = pixels(5, 256, 256)?;
    let all = model.encode_to_indices(&batch)?;
    let features = model.encode(&batch)?;
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| -> Result<()> {
            for i in [0, 3] {
                let alone = batch.narrow(0, i, 1)?.contiguous()?;
                assert_eq!(bits(&model.encode(&alone)?), bits(&features.narrow(0, i, 1)?), "{threads} threads");
                let codes = model.encode_to_indices(&alone)?.flatten_all()?.to_vec1::<u32>()?;
                assert_eq!(codes, all.get(i)?.flatten_all()?.to_vec1::<u32>()?, "{threads} threads");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn codes_outside_the_codebook_and_pixels_off_the_patch_are_errors() -> Result<()> {
    let model = new(tiny(Metric::Euclidean, decoder::Config::default()));
    let outside = Tensor::new(&[[[50u32]]], &Device::Cpu)?;
    let message = model.decode_from_indices(&outside).expect_err("an error").to_string();
    assert!(message.contains("code 50") && message.contains("50 codes"), "{message}");
    let message = model.encode_to_indices(&pixels(1, 20, 32)?).expect_err("an error").to_string();
    assert!(message.contains("20×32") && message.contains("8×8"), "{message}");
    let nan = (pixels(1, 32, 32)? * f64::NAN)?;
    assert!(model.encode_to_indices(&nan).is_err());
    Ok(())
}

#[test]
fn the_id_follows_config_preprocessing_and_weights() {
    let config = tiny(Metric::Euclidean, decoder::Config::default());
    let tensors = model::fresh_tensors(&config, Tensors::new(), 3).expect("fresh tensors");
    let id = |config: &Config, side: usize, tensors: &Tensors| {
        let preprocessor = Preprocessor::siglip(side, Resample::Bicubic);
        let path = Path::new("tiny");
        let model = Vqrae::new(config.clone(), preprocessor, tensors.clone(), path, &Device::Cpu, DType::F32);
        model.expect("a model").id().to_string()
    };
    let first = id(&config, 32, &tensors);
    assert_eq!(first, id(&config, 32, &tensors));
    assert_ne!(first, id(&config, 64, &tensors));
    assert_ne!(first, id(&tiny(Metric::Cosine, decoder::Config::default()), 32, &tensors));
    let other = model::fresh_tensors(&config, Tensors::new(), 4).expect("fresh tensors");
    assert_ne!(first, id(&config, 32, &other));
}

#[test]
fn the_shipped_model_holds_what_its_readme_says() -> Result<()> {
    let model = Vqrae::shipped(&Device::Cpu, DType::F32).expect("the shipped model");
    assert_eq!(model.codebook_size(), 16_384);
    // Codes that people have made bear this id: another one would refuse them.
    assert_eq!(model.id(), "5e6f838f97a11fa9bcc8add8712b62d6");
    let preprocessor = model.preprocessor();
    let photos = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/photos");
    for (name, least) in [("coffee.png", 20.0), ("chelsea.png", 22.0), ("flower.jpg", 20.0)] {
        let photo = vqrae::image::open(&photos.join(name), &Default::default()).expect("a photo");
        let prepared = preprocessor.prepare(&photo).expect("a prepared photo");
        let pixels = Tensor::from_vec(preprocessor.normalize(&prepared), (1, 3, 256, 256), &Device::Cpu)?;
        let codes = model.encode_to_indices(&pixels)?;
        assert_eq!(codes.dims(), [1, 16, 16]);
        let painted = model.decode_from_indices(&codes)?.flatten_all()?.to_vec1::<f32>()?;
        let painted = preprocessor.denormalize_to_rgb(&painted, 256, 256);
        let psnr = metrics::psnr(&prepared, &painted).expect("equal sizes");
        assert!(psnr > least, "{name}: {psnr:.2} dB");
    }
    Ok(())
}
