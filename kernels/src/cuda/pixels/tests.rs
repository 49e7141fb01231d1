use half::{bf16, f16};

use super::*;
use crate::cuda::reference::{Rounded, down, up};
use crate::cuda::test_gpu;

fn both_layouts<T: Rounded>() {
    let Some(gpu) = test_gpu() else { return };
    for (images, height, width, patch) in [(2, 6, 4, 2), (1, 1, 1, 1), (3, 28, 42, 14), (1, 32, 32, 16)] {
        let bytes: Vec<u8> = (0..images * height * width * 3).map(|i| (i * i / 7 % 251 + i % 5) as u8).collect();
        let table: Vec<f32> = (0..768).map(|i| (i % 256) as f32 / 127.5 - 1.0 - (i / 256) as f32 / 3.0).collect();
        let (bytes_up, table_up) = (up(&gpu, &bytes), up(&gpu, &table));
        let (size, what) = ((height, width), format!("{:?} {images} · {height} · {width}", T::KIND));
        let run = |layout| normalise::<T>(&gpu, &bytes_up.as_view(), &table_up.as_view(), size, layout).unwrap();
        let value = |image: usize, c: usize, y: usize, x: usize| {
            let byte = bytes[((image * height + y) * width + x) * 3 + c];
            T::round(f64::from(table[c * 256 + usize::from(byte)]))
        };
        let mut planes = Vec::new();
        for (image, c) in (0..images).flat_map(|image| (0..3).map(move |c| (image, c))) {
            planes.extend((0..height * width).map(|i| value(image, c, i / width, i % width)));
        }
        assert_eq!(down(&gpu, &run(Layout::Planes)), planes, "{what}");
        let mut patches = Vec::new();
        for (image, top) in (0..images).flat_map(|image| (0..height).step_by(patch).map(move |top| (image, top))) {
            for (left, c) in (0..width).step_by(patch).flat_map(|left| (0..3).map(move |c| (left, c))) {
                let pixels = 0..patch * patch;
                patches.extend(pixels.map(|i| value(image, c, top + i / patch, left + i % patch)));
            }
        }
        assert_eq!(down(&gpu, &run(Layout::Patches(patch))), patches, "{what}, patches of {patch}");
    }
}

#[test]
fn every_byte_has_its_tables_value_in_planes_and_in_patches() {
    both_layouts::<f32>();
    both_layouts::<f16>();
    both_layouts::<bf16>();
}

#[test]
fn what_does_not_fit_is_refused_with_its_numbers() {
    let Some(gpu) = test_gpu() else { return };
    let (bytes, table) = (up(&gpu, &[0_u8; 36]), up(&gpu, &[0.0_f32; 768]));
    let (table, short) = (table.as_view(), table.slice(..767));
    let message =
        |table, size, layout| normalise::<f32>(&gpu, &bytes.as_view(), table, size, layout).unwrap_err().to_string();
    assert!(message(&table, (5, 4), Layout::Planes).contains("images of 5 · 4 · 3 bytes, got: 36"));
    assert!(message(&table, (0, 4), Layout::Planes).contains("0 · 4"));
    assert!(message(&short, (3, 4), Layout::Planes).contains("got: 767"));
    assert!(message(&table, (3, 4), Layout::Patches(2)).contains("3 and 4, got: 2"));
    assert!(message(&table, (3, 4), Layout::Patches(0)).contains("got: 0"));
}
