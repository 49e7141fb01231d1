"""Codes, images and features are the program's, however an image is passed."""

import numpy as np
import pytest
from conftest import FIXTURES, PHOTOS
from PIL import Image

import vqrae

NAMES = sorted(path.name for path in PHOTOS.iterdir() if path.suffix in (".jpg", ".png"))
PATHS = [PHOTOS / name for name in NAMES]

DECODE = FIXTURES / "image/decode"
FILES = sorted(path.name for path in DECODE.iterdir() if not path.name.endswith(".rgb.png"))


@pytest.fixture(scope="module")
def expected(codes_of_cli):
    codes = codes_of_cli(PHOTOS)
    return np.stack([codes[name] for name in NAMES])


def test_paths_bytes_arrays_and_pillow_images_give_the_codes_of_the_program(tokenizer, expected):
    codes = tokenizer.encode(PATHS)
    assert codes.dtype == np.int32 and codes.shape == (6, 16, 16) and codes.flags.writeable
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(tokenizer.encode([path.read_bytes() for path in PATHS]), expected)
    np.testing.assert_array_equal(tokenizer.encode(Image.open(path) for path in PATHS), expected)
    arrays = [np.asarray(Image.open(path)) for path in PATHS]
    np.testing.assert_array_equal(tokenizer.encode(arrays), expected)
    # Not contiguous, and one image instead of several.
    np.testing.assert_array_equal(tokenizer.encode(np.asfortranarray(arrays[2])), expected[2:3])
    np.testing.assert_array_equal(tokenizer.encode(str(PATHS[3])), expected[3:4])
    dataset = [{"bytes": path.read_bytes(), "path": None} for path in PATHS]
    np.testing.assert_array_equal(tokenizer.encode(dataset), expected)


def test_an_image_has_the_same_codes_in_any_batch(tokenizer, expected):
    many = PATHS * 12  # more than one batch of 16, more than one chunk of 64
    np.testing.assert_array_equal(tokenizer.encode(many), np.tile(expected, (12, 1, 1)))


def test_f32_too_gives_the_codes_of_the_program(codes_of_cli):
    codes = codes_of_cli(PHOTOS, "--dtype", "f32")
    tokenizer = vqrae.Tokenizer(dtype="f32")
    assert tokenizer.precision == "f32"
    np.testing.assert_array_equal(tokenizer.encode(PATHS), np.stack([codes[name] for name in NAMES]))


# Where Pillow reads other pixels than the program: it drops or clips 16 bits, and rounds a CMYK TIFF.
NOT_BY_PILLOW = {"rgb_16.png", "rgb_alpha_16.png", "grey_alpha_16.png", "grey_16.tiff", "cmyk.tiff"}


def test_every_kind_of_file_gives_the_codes_of_the_program(tokenizer, codes_of_cli):
    codes = codes_of_cli(DECODE)
    made = dict(zip(FILES, tokenizer.encode_each(DECODE / name for name in FILES)))
    of_bytes = dict(zip(FILES, tokenizer.encode_each((DECODE / name).read_bytes() for name in FILES)))
    compared = 0
    for name in FILES:
        if name not in codes:
            assert isinstance(made[name], vqrae.Error) and isinstance(of_bytes[name], vqrae.Error), name
            continue
        compared += 1
        np.testing.assert_array_equal(made[name], codes[name], name)
        np.testing.assert_array_equal(of_bytes[name], codes[name], name)
        if name not in NOT_BY_PILLOW:
            with Image.open(DECODE / name) as image:
                np.testing.assert_array_equal(tokenizer.encode(image)[0], codes[name], f"{name} by Pillow")
    assert compared > 50


def test_decoded_codes_are_the_reconstructions_of_the_program(tokenizer, cli, tmp_path):
    cli("reconstruct", PHOTOS, "-o", tmp_path)
    codes = tokenizer.encode(PATHS)
    images = tokenizer.decode(codes)
    assert images.dtype == np.uint8 and images.shape == (6, 256, 256, 3)
    for name, image in zip(NAMES, images):
        with Image.open(tmp_path / "reconstructions" / f"{name}.png") as reconstruction:
            np.testing.assert_array_equal(image, np.asarray(reconstruction), name)
    # One alone, and any type of whole numbers.
    np.testing.assert_array_equal(tokenizer.decode(codes[1].astype(np.int64)), images[1:2])
    np.testing.assert_array_equal(tokenizer.decode(np.tile(codes, (4, 1, 1)).astype(np.uint16)), np.tile(images, (4, 1, 1, 1)))


def test_prepared_pixels_give_the_codes_of_their_image(tokenizer):
    levels = np.random.default_rng(3).integers(0, 256, (17, 256, 256, 3), np.uint8)
    # mean and std of 0.5, at f32 as the library computes it
    pixels = (levels.astype(np.float32) * np.float32(1 / 255) - np.float32(0.5)) / np.float32(0.5)
    codes = tokenizer.encode(levels)
    same = (tokenizer.encode_pixels(pixels.transpose(0, 3, 1, 2)) == codes).mean()
    assert same > 0.999, same  # the last bit of a pixel may round elsewhere
    assert len(np.unique(codes)) > 100


def test_features_are_the_quantizers_input_and_the_codebook_has_its_rows(tokenizer):
    features = tokenizer.features(PATHS)
    assert features.shape == (6, 256, 256) and features.dtype == np.float32 and np.isfinite(features).all()
    np.testing.assert_array_equal(features[4:5], tokenizer.features(PATHS[4]))
    codebook = tokenizer.codebook()
    assert codebook.shape == (tokenizer.codebook_size, 32) and codebook.dtype == np.float32
    assert len(np.unique(codebook, axis=0)) == tokenizer.codebook_size


def test_several_codes_a_token_stand_in_a_last_dimension(make_model, codes_of_cli):
    model = make_model("siglip/tiny", 'type = "residual"\nlevels = 3\nlevel = { codebook_size = 16, codebook_dim = 8 }')
    tokenizer = vqrae.Tokenizer(model)
    codes = codes_of_cli(PHOTOS, "--model", model)
    made = tokenizer.encode(PATHS)
    assert made.shape == (6, *tokenizer.grid, 3) and tokenizer.codes_per_token == 3
    np.testing.assert_array_equal(made, np.stack([codes[name] for name in NAMES]))
    images = tokenizer.decode(made)
    np.testing.assert_array_equal(tokenizer.decode(made[2]), images[2:3])
    with pytest.raises(vqrae.Error, match=r"\[B, h, w, 3\]"):
        tokenizer.decode(made[0, 0])
    flat = tokenizer({"image": PATHS})["codes"]
    np.testing.assert_array_equal(flat, made.reshape(6, -1))


def test_a_model_that_keeps_the_aspect_ratio_gives_every_image_its_grid(make_model, codes_of_cli):
    model = make_model("encoders/naflex", 'type = "simvq"\ncodebook_size = 16\ncodebook_dim = 8')
    tokenizer = vqrae.Tokenizer(model)
    codes = codes_of_cli(PHOTOS, "--model", model)
    assert tokenizer.grid is None and tokenizer.image_size is None
    for name, made in zip(NAMES, tokenizer.encode_each(PATHS)):
        np.testing.assert_array_equal(made, codes[name], name)
    assert len({made.shape for made in codes.values()}) > 1
    with pytest.raises(vqrae.Error, match="call encode_each"):
        tokenizer.encode(PATHS)
    batch = tokenizer({"jpg": PATHS})
    assert isinstance(batch["codes"], list)
    for i, name in enumerate(NAMES):
        assert (batch["h"][i], batch["w"][i]) == codes[name].shape
        np.testing.assert_array_equal(batch["codes"][i], codes[name].ravel())
