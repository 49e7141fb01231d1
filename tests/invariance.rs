//! The same image gives the same bits: alone, in a batch, on one thread, on two.

use std::path::Path;

use vqrae::image::{Preprocessor, Resample};
use vqrae::model::fresh_tensors;
use vqrae::weights::Tensors;
use vqrae::{Config, DType, Device, Tensor, Vqrae};

use crate::compare::{assert_same_bits, noise};

/// A model whose 144 and 153 tokens fill no whole number of blocks of rows (96), strips (6, 32) or panels (16).
fn model(metric: &str, dtype: DType) -> Vqrae {
    let config = format!(
        r#"{{"model_type":"vqrae","format":1,
        "encoder":{{"model_type":"siglip_vision_model","hidden_size":144,"intermediate_size":200,"num_hidden_layers":2,
                    "num_attention_heads":2,"image_size":96,"patch_size":8}},
        "quantizer":{{"type":"simvq","codebook_size":700,"codebook_dim":150,"metric":"{metric}"}}}}"#
    );
    let path = Path::new("invariance");
    let config = Config::from_json(&config, path).unwrap();
    let mut tensors = fresh_tensors(&config, Tensors::new(), 1).unwrap();
    // Fresh weights are small; larger ones spread the features over many codes.
    for tensor in tensors.values_mut().filter(|tensor| tensor.rank() > 1) {
        *tensor = (&*tensor * 4.0).unwrap();
    }
    let preprocessor = Preprocessor::siglip(96, Resample::Bicubic);
    Vqrae::new(config, preprocessor, tensors, path, &Device::Cpu, dtype).unwrap()
}

/// Features, indices and the decoded image.
fn all_stages(model: &Vqrae, pixels: &Tensor) -> [Tensor; 3] {
    let features = model.encode(pixels).unwrap();
    let indices = model.encode_to_indices(pixels).unwrap();
    let image = model.decode_from_indices(&indices).unwrap();
    [features, indices, image]
}

const STAGES: [&str; 3] = ["features", "indices", "image"];

fn on_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

/// Batches of five: on the model's own grid, and on one with interpolated positions.
fn batches() -> [Tensor; 2] {
    [noise("square", &[5, 3, 96, 96]), noise("wide", &[5, 3, 72, 136])]
}

#[test]
fn an_image_alone_and_in_a_batch_of_five_gives_the_same_bits() {
    for (metric, dtype) in [("euclidean", DType::F32), ("cosine", DType::F32), ("euclidean", DType::BF16)] {
        let model = model(metric, dtype);
        for batch in batches() {
            let together = all_stages(&model, &batch);
            let mut used = together[1].flatten_all().unwrap().to_vec1::<u32>().unwrap();
            used.sort_unstable();
            used.dedup();
            assert!(used.len() > 20, "{metric}: only {} codes are used, which would hide a difference", used.len());
            for i in 0..5 {
                let alone = all_stages(&model, &batch.narrow(0, i, 1).unwrap());
                for ((stage, alone), together) in STAGES.iter().zip(&alone).zip(&together) {
                    let what = format!("{metric}, {stage} of image {i} of {:?}", batch.dims());
                    assert_same_bits(&what, alone, &together.narrow(0, i, 1).unwrap());
                }
            }
        }
    }
}

#[test]
fn one_thread_and_more_give_the_same_bits() {
    for (batch, dtype) in batches().iter().flat_map(|batch| [(batch, DType::F32), (batch, DType::BF16)]) {
        let run = |threads| on_threads(threads, || all_stages(&model("euclidean", dtype), batch));
        let one = run(1);
        for threads in [2, 3] {
            for ((stage, got), expected) in STAGES.iter().zip(&run(threads)).zip(&one) {
                let what = format!("{stage} on {threads} threads of {:?} in {}", batch.dims(), dtype.as_str());
                assert_same_bits(&what, got, expected);
            }
        }
    }
}
