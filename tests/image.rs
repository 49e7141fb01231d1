//! Images against Pillow, torchvision and transformers: the fixtures and their script stand in `fixtures/image`.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;
use vqrae::image::{
    self, ErrorKind, JPEG_DECODER, Limits, Naflex, Preprocessor, Resample, ResizeMode, Rgb, decode, open, save_png,
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/image")
}

/// A fixture's pixels, read by the `image` crate alone.
fn expected_pixels(path: &Path) -> Rgb {
    let pixels = ::image::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).into_rgb8();
    Rgb::new(pixels.width() as usize, pixels.height() as usize, pixels.into_raw()).unwrap()
}

/// Names the worst pixel when any channel differs by more than `allowed`.
fn assert_pixels(name: &str, got: &Rgb, expected: &Rgb, allowed: u8) {
    assert_eq!((got.width, got.height), (expected.width, expected.height), "{name}: size");
    let differences = || got.data.iter().zip(&expected.data).map(|(a, b)| a.abs_diff(*b));
    let (at, worst) = differences().enumerate().max_by_key(|(_, difference)| *difference).unwrap();
    let count = differences().filter(|difference| *difference > allowed).count();
    let (x, y, channel) = (at / 3 % got.width, at / 3 / got.width, at % 3);
    assert!(
        worst <= allowed,
        "{name}: {count} of {} values differ by more than {allowed}; worst at x {x}, y {y}, channel {channel}: \
         expected: {}, got: {}",
        got.data.len(),
        expected.data[at],
        got.data[at],
    );
}

/// Levels by which a decoder other than Pillow's own may differ; 0 wherever the module promises equality.
fn allowed(name: &str) -> u8 {
    const PURE_RUST_JPEG: u8 = 6;
    const PURE_RUST_CMYK: u8 = 3;
    match name {
        "cmyk.tiff" => 1,
        "cmyk.jpg" if JPEG_DECODER != "mozjpeg" => PURE_RUST_CMYK,
        _ if name.ends_with(".jpg") && JPEG_DECODER != "mozjpeg" => PURE_RUST_JPEG,
        _ => 0,
    }
}

#[test]
fn every_format_decodes_to_the_pixels_of_pillow() {
    let mut seen = 0;
    for entry in fs::read_dir(fixtures().join("decode")).unwrap() {
        let expected = entry.unwrap().path();
        let Some(input) = expected.to_str().unwrap().strip_suffix(".rgb.png").map(PathBuf::from) else {
            continue;
        };
        let name = input.file_name().unwrap().to_str().unwrap();
        let got = open(&input, &Limits::default()).unwrap_or_else(|error| panic!("{error}"));
        assert_pixels(name, &got, &expected_pixels(&expected), allowed(name));
        seen += 1;
    }
    assert!(seen > 50, "only {seen} fixtures were found");
}

#[test]
fn all_eight_exif_orientations_show_the_same_way_up_as_pillow() {
    for orientation in 1..=8 {
        let got = open(&fixtures().join(format!("decode/exif{orientation}.jpg")), &Limits::default()).unwrap();
        let turned = orientation >= 5;
        assert_eq!((got.width, got.height), if turned { (23, 41) } else { (41, 23) }, "orientation {orientation}");
    }
}

/// The folders of cases: one size for all images, and each image its own.
const PREPARED: [&str; 2] = ["prepare", "naflex"];

fn cases(folder: &str) -> Vec<Value> {
    serde_json::from_slice(&fs::read(fixtures().join(folder).join("cases.json")).unwrap()).unwrap()
}

fn text<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key].as_str().unwrap()
}

/// Squash, center-crop and naflex are transformers' processors, adm-crop is Pillow, pad is torchvision's resize.
#[test]
fn every_mode_gives_the_pixels_of_its_reference() {
    for (folder, case) in PREPARED.iter().flat_map(|folder| cases(folder).into_iter().map(move |case| (folder, case))) {
        let preprocessor = Preprocessor::from_json(&case["config"].to_string()).unwrap();
        let input = open(&fixtures().join("prepare").join(text(&case, "input")), &Limits::default()).unwrap();
        let got = preprocessor.prepare(&input).unwrap();
        let name = format!("{} {} {:?}", text(&case, "input"), preprocessor.tag(), preprocessor.size);
        let expected = expected_pixels(&fixtures().join(folder).join(text(&case, "expected")));
        assert_pixels(&name, &got, &expected, 0);
    }
}

#[test]
fn normalised_values_equal_those_of_transformers_bit_for_bit() {
    let seen: usize = PREPARED.iter().map(|folder| assert_values(folder)).sum();
    assert!(seen >= 9, "only {seen} tensors were compared");
}

/// Compares the values of a folder's cases, and tells how many there are.
fn assert_values(folder: &str) -> usize {
    let (cases, folder) = (cases(folder), fixtures().join(folder));
    let bytes = fs::read(folder.join("pixel_values.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut seen = 0;
    for case in cases.iter().filter(|case| case.get("pixel_values").is_some()) {
        let name = text(case, "pixel_values");
        let preprocessor = Preprocessor::from_json(&case["config"].to_string()).unwrap();
        let prepared = expected_pixels(&folder.join(text(case, "expected")));
        let got = preprocessor.normalize(&prepared);
        let expected = tensors.tensor(name).unwrap();
        let (words, _) = expected.data().as_chunks::<4>();
        assert_eq!(got.len(), words.len(), "{name}");
        for (at, (got, word)) in got.iter().zip(words).enumerate() {
            let expected = f32::from_le_bytes(*word);
            assert_eq!(got.to_bits(), expected.to_bits(), "{name}[{at}], expected: {expected}, got: {got}");
        }
        let back = preprocessor.denormalize_to_rgb(&got, prepared.height, prepared.width);
        assert_pixels(name, &back, &prepared, 0);
        seen += 1;
    }
    seen
}

#[test]
fn naflex_finds_the_sizes_that_transformers_finds() {
    let sizes: Vec<[usize; 6]> =
        serde_json::from_slice(&fs::read(fixtures().join("naflex/sizes.json")).unwrap()).unwrap();
    for [height, width, patch_size, max_num_patches, expected_height, expected_width] in &sizes {
        let naflex = Naflex { patch_size: *patch_size, max_num_patches: *max_num_patches };
        let got = naflex.size_of(*height, *width);
        assert_eq!(got, (*expected_height, *expected_width), "{height}x{width} by {naflex:?}");
    }
    assert_eq!(sizes.len(), 300);
}

#[test]
fn a_naflex_config_is_read_and_written_as_transformers_has_it() {
    for case in cases("naflex") {
        let ours = Preprocessor::from_json(&case["config"].to_string()).unwrap().to_json();
        for (key, value) in ours.as_object().unwrap().iter().filter(|(key, _)| *key != "do_convert_rgb") {
            assert_eq!(value, &case["config"][key], "{key}");
        }
        assert!(ours.get("max_num_patches").is_some() && ours.get("size").is_none());
    }
    let read = |text: &str| Preprocessor::from_json(text).unwrap();
    let fast = r#"{"image_processor_type": "Siglip2ImageProcessorFast", "resample": 2, "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5]}"#;
    let expected = Preprocessor { resize_mode: ResizeMode::Naflex, ..Preprocessor::siglip(256, Resample::Bilinear) };
    let expected = Preprocessor { naflex: Some(Naflex { patch_size: 16, max_num_patches: 256 }), ..expected };
    assert_eq!(read(fast), expected);
    assert_eq!(expected.tag(), format!("naflex-256-of-16-bilinear-torchvision/{JPEG_DECODER}"));
    // Another mode wants a size, and has no budget.
    let squash =
        SIGLIP.replace("\"do_rescale\"", "\"max_num_patches\": 9, \"resize_mode\": \"squash\", \"do_rescale\"");
    assert_eq!(read(&squash).naflex, None);
}

#[test]
fn another_resolution_shows_the_same_view() {
    let clip = r#"{"size": {"shortest_edge": 75}, "crop_size": 64, "do_center_crop": true, "resample": 3,
        "do_normalize": false}"#;
    let clip = Preprocessor::from_json(clip).unwrap();
    let larger = clip.at((128, 128));
    assert_eq!((larger.size, larger.shortest_edge), ((128, 128), Some(150)));
    assert_eq!(clip.at((64, 64)), clip);
    let naflex = Some(Naflex { patch_size: 16, max_num_patches: 256 });
    let naflex = Preprocessor { naflex, resize_mode: ResizeMode::Naflex, ..clip };
    let wide = naflex.at((64, 256));
    assert_eq!((wide.naflex.unwrap().max_num_patches, wide.size), (64, (128, 128)));
}

#[test]
fn naflex_without_resizing_takes_whole_patches_alone() {
    let config = r#"{"max_num_patches": 9, "patch_size": 8, "do_resize": false, "do_normalize": false}"#;
    let preprocessor = Preprocessor::from_json(config).unwrap();
    let image = |width: usize| Rgb::new(width, 16, vec![7; 3 * width * 16]).unwrap();
    assert_eq!(preprocessor.prepare(&image(24)).unwrap(), image(24));
    let message = preprocessor.prepare(&image(23)).unwrap_err().to_string();
    assert!(message.contains("23x16, which are no whole patches of 8"), "{message}");
    let without = Preprocessor { naflex: None, do_resize: true, ..preprocessor };
    let message = without.prepare(&image(24)).unwrap_err().to_string();
    assert!(message.contains("needs a patch_size and max_num_patches"), "{message}");
}

#[test]
fn values_out_of_range_are_clamped_on_the_way_back() {
    let preprocessor = Preprocessor::siglip(1, Resample::Bicubic);
    assert_eq!(preprocessor.denormalize_to_rgb(&[-7.0, f32::NAN, f32::INFINITY], 1, 1).data, [0, 0, 255]);
}

#[test]
fn a_sliver_of_an_image_is_squashed_and_padded_but_not_blown_up() {
    let sliver = open(&fixtures().join("decode/sliver.jpg"), &Limits::default()).unwrap();
    assert_eq!((sliver.width, sliver.height), (1, 4000));
    let mut preprocessor = Preprocessor::siglip(256, Resample::Bicubic);
    for mode in [ResizeMode::Squash, ResizeMode::Pad] {
        preprocessor.resize_mode = mode;
        let prepared = preprocessor.prepare(&sliver).unwrap();
        assert_eq!((prepared.width, prepared.height, prepared.data.len()), (256, 256, 3 * 256 * 256));
    }
    for mode in [ResizeMode::CenterCrop, ResizeMode::AdmCrop] {
        preprocessor.resize_mode = mode;
        let message = preprocessor.prepare(&sliver).unwrap_err().to_string();
        assert!(message.contains("too many pixels: 256x1024000"), "{message}");
    }
}

#[test]
fn without_do_resize_only_the_right_size_passes() {
    let image = Rgb::new(4, 4, (0..48).collect()).unwrap();
    let mut preprocessor = Preprocessor { do_resize: false, ..Preprocessor::siglip(4, Resample::Bicubic) };
    assert_eq!(preprocessor.prepare(&image).unwrap(), image);
    preprocessor.size = (2, 2);
    let message = preprocessor.prepare(&image).unwrap_err().to_string();
    assert!(message.contains("the image is 4x4 and do_resize is false"), "{message}");
    preprocessor.resize_mode = ResizeMode::CenterCrop;
    assert_eq!(preprocessor.prepare(&image).unwrap().data, [15, 16, 17, 18, 19, 20, 27, 28, 29, 30, 31, 32]);
}

#[test]
fn an_image_whose_buffer_lies_is_refused() {
    assert_eq!(Rgb::new(0, 3, vec![]), Err(ErrorKind::EmptyImage { width: 0, height: 3 }));
    assert_eq!(Rgb::new(2, 2, vec![0; 11]), Err(ErrorKind::WrongLength { width: 2, height: 2, got: 11 }));
    let lying = Rgb { width: 9, height: 9, data: vec![0; 3] };
    assert!(Preprocessor::siglip(4, Resample::Bicubic).prepare(&lying).is_err());
}

/// Opens what must not open, and checks that the message names the path and says `reason`.
fn assert_refused(path: &Path, reason: &str) {
    let message = open(path, &Limits::default()).unwrap_err().to_string();
    assert!(message.starts_with(&format!("{}: ", path.display())), "no path in: {message}");
    assert!(message.contains(reason), "expected: {reason}, got: {message}");
}

fn refused(name: &str, content: &[u8], reason: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, content).unwrap();
    assert_refused(&path, reason);
}

#[test]
fn an_empty_file_is_refused() {
    refused("empty.png", b"", "the file is empty");
}

#[test]
fn a_text_file_named_jpg_is_refused() {
    refused("notes.jpg", b"these are no pixels", "not a JPEG, PNG, WebP, BMP, GIF or TIFF image");
}

#[test]
fn a_missing_file_and_a_directory_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    assert_refused(&folder.path().join("nowhere.png"), "cannot be read");
    assert_refused(folder.path(), "cannot be read");
}

#[cfg(unix)]
#[test]
fn a_file_without_read_permission_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("secret.png");
    fs::write(&path, b"x").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    // Root reads everything; there the content is what is wrong.
    let reason = if fs::read(&path).is_ok() { "not a JPEG" } else { "cannot be read" };
    assert_refused(&path, reason);
}

#[test]
fn the_content_decides_not_the_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("photo.jpg");
    fs::copy(fixtures().join("decode/rgb.png"), &path).unwrap();
    assert_eq!(open(&path, &Limits::default()).unwrap().width, 97);
}

#[test]
fn truncated_files_are_refused_in_every_format() {
    for name in [
        "420.jpg",
        "progressive.jpg",
        "cmyk.jpg",
        "grey.jpg",
        "rgb.png",
        "palette.png",
        "rgb_16.png",
        "lossy.webp",
        "lossless.webp",
        "rgb.bmp",
        "still.gif",
        "rgb.tiff",
    ] {
        let whole = fs::read(fixtures().join("decode").join(name)).unwrap();
        for percent in [2, 30, 50, 90, 97] {
            let part = &whole[..whole.len() * percent / 100];
            assert!(decode(part, &Limits::default()).is_err(), "{name}: {percent} % of it passed for the whole");
        }
    }
}

#[test]
fn a_truncated_jpeg_and_a_truncated_png_say_so() {
    for name in ["420.jpg", "progressive.jpg", "rgb.png"] {
        let whole = fs::read(fixtures().join("decode").join(name)).unwrap();
        refused(name, &whole[..whole.len() / 2], "the image is truncated");
    }
}

#[test]
fn a_header_of_60000_by_60000_is_refused_before_any_allocation() {
    for name in ["huge.jpg", "huge.png", "huge.bmp", "huge.gif", "huge.tiff", "huge.webp"] {
        assert_refused(&fixtures().join("bad").join(name), "too many pixels: 60000x60000, limit: 178956970");
    }
}

#[test]
fn a_header_of_0_by_0_is_refused() {
    for name in ["zero.jpg", "zero.png", "zero.bmp", "zero.gif", "zero.tiff"] {
        assert_refused(&fixtures().join("bad").join(name), "");
    }
}

#[test]
fn the_pixel_limit_can_be_set() {
    let path = fixtures().join("decode/rgb.png");
    assert!(open(&path, &Limits { max_pixels: 97 * 64 }).is_ok());
    let error = open(&path, &Limits { max_pixels: 97 * 64 - 1 }).unwrap_err();
    assert!(error.to_string().ends_with("too many pixels: 97x64, limit: 6207"), "{error}");
}

/// xorshift64*: the same damage in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound
    }
}

#[test]
fn damaged_files_never_panic() {
    const TRIES: usize = 60;
    let limits = Limits { max_pixels: 1 << 20 };
    let mut random = Random(20_261_123);
    for name in [
        "37x29.jpg",
        "progressive.jpg",
        "cmyk.jpg",
        "exif6.jpg",
        "restart.jpg",
        "palette_trns.png",
        "exif6.png",
        "rgb_16.png",
        "lossy.webp",
        "lossless_alpha.webp",
        "animated.webp",
        "rgb.bmp",
        "palette.bmp",
        "animated.gif",
        "rgb.tiff",
        "exif5.tiff",
    ] {
        let whole = fs::read(fixtures().join("decode").join(name)).unwrap();
        for _ in 0..TRIES {
            let mut bytes = whole.clone();
            // Headers come first, so half of the flips go there.
            for _ in 0..=random.below(4) {
                let reach = if random.below(2) == 0 { bytes.len().min(200) } else { bytes.len() };
                let at = random.below(reach);
                bytes[at] ^= 1 << random.below(8);
            }
            if random.below(3) == 0 {
                bytes.truncate(random.below(bytes.len()));
            }
            if let Ok(image) = decode(&bytes, &limits) {
                assert_eq!(image.data.len(), 3 * image.width * image.height, "{name}");
            }
        }
    }
}

#[test]
fn a_png_is_written_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let image = Rgb::new(3, 2, (0..18).collect()).unwrap();
    let path = folder.path().join("out.png");
    save_png(&path, &image).unwrap();
    save_png(&path, &image).unwrap();
    assert_eq!(open(&path, &Limits::default()).unwrap(), image);
    let lying = Rgb { width: 30, ..image };
    assert!(save_png(&folder.path().join("lying.png"), &lying).is_err());
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "nothing but out.png is left");
    let nowhere = folder.path().join("no/such/folder.png");
    let message = save_png(&nowhere, &lying).unwrap_err().to_string();
    assert!(message.starts_with(&format!("{}: cannot be written", nowhere.display())), "{message}");
}

const SIGLIP: &str = r#"{"do_normalize": true, "do_rescale": true, "do_resize": true, "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor", "image_std": [0.5, 0.5, 0.5], "processor_class": "SiglipProcessor",
    "resample": 2, "rescale_factor": 0.00392156862745098, "size": {"height": 256, "width": 256}}"#;

#[test]
fn the_config_of_siglip_2_is_read() {
    let expected =
        Preprocessor { rescale_factor: 0.003_921_568_627_450_98, ..Preprocessor::siglip(256, Resample::Bilinear) };
    assert_eq!(Preprocessor::from_json(SIGLIP).unwrap(), expected);
    assert_eq!(expected.tag(), format!("squash-bilinear-torchvision/{JPEG_DECODER}"));
}

#[test]
fn every_config_survives_the_round_trip() {
    for case in PREPARED.iter().flat_map(|folder| cases(folder)) {
        let read = Preprocessor::from_json(&case["config"].to_string()).unwrap();
        assert_eq!(Preprocessor::from_json(&read.to_json().to_string()).unwrap(), read);
    }
    let clip = r#"{"size": 75, "crop_size": 64, "do_center_crop": true, "resample": 3, "image_std": [0.26862954, 1, 1],
        "image_mean": [0.48145466, 0.4578275, 0.40821073]}"#;
    let json = Preprocessor::from_json(clip).unwrap().to_json();
    // The shortest decimals of the same three f32.
    assert_eq!(json["image_mean"].to_string(), "[0.48145467,0.4578275,0.40821072]");
    assert_eq!(json["resize_mode"], "center-crop");
    assert_eq!(json["size"]["shortest_edge"], 75);
    assert_eq!(Preprocessor::from_json(SIGLIP).unwrap().to_json().get("resize_mode"), None);
}

#[test]
fn a_wrong_config_names_the_key() {
    for (key, value, message) in [
        ("resample", "1", "`resample` is wrong, expected: 2 (bilinear) or 3 (bicubic), got: 1"),
        ("resample", "null", "`resample` is missing"),
        ("size", "null", "`size` is missing"),
        ("size", r#"{"shortest_edge": 256}"#, "`size` is not supported: with shortest_edge alone"),
        ("size", r#"{"height": 0, "width": 4}"#, "`size` is wrong"),
        ("image_mean", "null", "`image_mean` is missing"),
        ("image_mean", "[0.5]", "`image_mean` is wrong, expected: three numbers, got: [0.5]"),
        ("image_std", "null", "`image_std` is missing"),
        ("image_std", "[0.5, 0, 0.5]", "`image_std` is wrong, expected: three positive numbers"),
        ("rescale_factor", "0", "`rescale_factor` is wrong"),
        ("do_resize", "\"yes\"", "`do_resize` is wrong, expected: true or false, got: \"yes\""),
        ("do_pad", "true", "`do_pad` is not supported"),
        (
            "resize_mode",
            "\"stretch\"",
            "`resize_mode` is wrong, expected: squash, center-crop, adm-crop, pad or naflex",
        ),
        ("max_num_patches", "0", "`max_num_patches` is wrong, expected: 1 to 1048576, got: 0"),
    ] {
        let mut config: Value = serde_json::from_str(SIGLIP).unwrap();
        config[key] = serde_json::from_str(value).unwrap();
        let got = Preprocessor::from_json(&config.to_string()).unwrap_err().to_string();
        assert!(got.starts_with(message), "expected: {message}, got: {got}");
    }
    let crop = r#"{"size": 32, "crop_size": 64, "do_center_crop": true}"#;
    let got = Preprocessor::from_json(crop).unwrap_err().to_string();
    assert_eq!(got, "`crop_size` is not supported: it is larger than size.shortest_edge");
}

#[test]
fn a_config_file_that_cannot_be_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("preprocessor_config.json");
    let message = |path: &Path| Preprocessor::from_file(path).unwrap_err().to_string();
    assert!(message(&path).starts_with(&format!("{}: cannot be read", path.display())));
    fs::write(&path, "[1]").unwrap();
    assert!(message(&path).starts_with(&format!("{}: not a JSON object", path.display())));
    fs::write(&path, SIGLIP).unwrap();
    assert_eq!(Preprocessor::from_file(&path).unwrap().size, (256, 256));
}

#[test]
fn modes_are_written_as_they_are_read() {
    for name in ["squash", "center-crop", "adm-crop", "pad", "naflex"] {
        let mode: ResizeMode = name.parse().unwrap();
        assert_eq!((mode.to_string().as_str(), serde_json::to_value(mode).unwrap()), (name, Value::from(name)));
    }
    assert!("stretch".parse::<ResizeMode>().unwrap_err().ends_with("got: stretch"));
    assert_eq!(serde_json::to_string(&[Resample::Bilinear, Resample::Bicubic]).unwrap(), "[2,3]");
    assert!(matches!(image::open("".as_ref(), &Limits::default()), Err(image::Error::Unreadable { .. })));
}
