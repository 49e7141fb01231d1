"""What a tokenizer promises beside its codes: laziness, pickling, threads, processes, and errors in words."""

import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES, PHOTOS

import vqrae

PHOTO = PHOTOS / "china.jpg"
NOISE = np.random.default_rng(0).integers(0, 256, (64, 256, 256, 3), np.uint8)


def test_nothing_is_opened_before_the_first_use():
    tokenizer = vqrae.Tokenizer("no/such/model", device="cuda:99")
    assert not tokenizer.is_open and "no/such/model" in repr(tokenizer)
    tokenizer = vqrae.Tokenizer()
    assert not tokenizer.is_open
    assert tokenizer.grid == (16, 16) and tokenizer.is_open


def test_pickled_it_is_its_arguments(tokenizer):
    codes = tokenizer.encode(PHOTO)
    data = pickle.dumps(tokenizer)
    assert len(data) < 200
    copy = pickle.loads(data)
    assert not copy.is_open and repr(copy) == repr(tokenizer)
    np.testing.assert_array_equal(copy.encode(PHOTO), codes)
    assert copy.model_id == tokenizer.model_id


def test_what_a_model_is_can_be_read(tokenizer):
    assert len(tokenizer.model_id) >= 16 and int(tokenizer.model_id, 16)
    assert (tokenizer.codebook_size, tokenizer.codes_per_token) == (16384, 1)
    assert tokenizer.image_size == (256, 256) and tokenizer.grid == (16, 16)
    assert "center-crop" in tokenizer.preprocessing and tokenizer.device == "cpu"
    assert tokenizer.precision.split("/")[0] in ("f32", "bf16")


def test_other_threads_run_while_it_computes(tokenizer):
    """With the lock held, a thread that only sleeps a millisecond at a time would stand still until the codes are there."""
    tokenizer.encode(PHOTO)
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    tokenizer.encode(NOISE)
    took = time.perf_counter() - start
    done.set()
    ticker.join()
    during = [t for t in ticks if start < t < start + took]
    # The calling thread holds the lock only to hand over and to take, so there are ticks in every quarter of the time.
    quarters = {int(4 * (t - start) / took) for t in during}
    assert quarters == {0, 1, 2, 3}, f"{len(during)} ticks in {took:.3f} s"


def test_threads_share_one_and_get_the_codes_of_one(tokenizer):
    expected, shared = tokenizer.encode(NOISE), vqrae.Tokenizer()
    made = [None] * 4

    def encode(i):
        made[i] = shared.encode(NOISE[i::4])

    threads = [threading.Thread(target=encode, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for i in range(4):
        np.testing.assert_array_equal(made[i], expected[i::4])


def _encode(tokenizer):
    return tokenizer.encode(PHOTO)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork beside threads, which is what is tested
def test_it_works_in_child_processes(tokenizer, method):
    expected = tokenizer.encode(PHOTO)  # the parent's threads run before it forks
    with multiprocessing.get_context(method).Pool(2) as pool:
        for codes in pool.map_async(_encode, [tokenizer] * 3).get(timeout=60):
            np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(tokenizer.encode(PHOTO), expected)


def test_a_bad_image_is_an_error_that_says_why(tokenizer, tmp_path):
    truncated = PHOTO.read_bytes()[:5000]
    (tmp_path / "half.jpg").write_bytes(truncated)
    for image, error, words in [
        (b"", vqrae.Error, "the file is empty"),
        (b"no image at all", vqrae.Error, "not a JPEG"),
        (truncated, vqrae.Error, "truncated"),
        (tmp_path / "half.jpg", vqrae.Error, r"half\.jpg: the image is truncated"),
        (tmp_path / "none.jpg", FileNotFoundError, r"none\.jpg: cannot be read"),
        (tmp_path, OSError, "cannot be read"),
        (FIXTURES / "image/bad/huge.png", vqrae.Error, "too many pixels"),
        (FIXTURES / "image/bad/zero.png", vqrae.Error, "."),
        (np.zeros((8, 8), np.uint8), vqrae.Error, r"\[H, W, 3\]"),
        ([np.zeros((8, 8, 4), np.uint8)], vqrae.Error, r"image 0: .*got: \[8, 8, 4\]"),
        (np.zeros((0, 8, 3), np.uint8), vqrae.Error, "no pixels"),
        (np.zeros((8, 8, 3), np.float32), vqrae.Error, "uint8"),
        ({"bytes": None, "path": None}, vqrae.Error, "neither"),
        (7, TypeError, "int is not an image"),
        ([None], TypeError, "NoneType is not an image"),
        ([], vqrae.Error, "no images"),
    ]:
        with pytest.raises(error, match=words):
            tokenizer.encode(image)
    assert issubclass(vqrae.Error, ValueError)
    error = pickle.loads(pickle.dumps(tokenizer.encode_each(b"")[0]))
    assert type(error) is vqrae.Error and str(error) == "the file is empty"


def test_good_images_go_on_beside_bad_ones(tokenizer):
    good = tokenizer.encode(PHOTO)[0]
    made = tokenizer.encode_each([PHOTO, b"bad", PHOTO, "none.jpg", PHOTO])
    assert [type(codes) for codes in made] == [np.ndarray, vqrae.Error, np.ndarray, FileNotFoundError, np.ndarray]
    for codes in made[::2]:
        np.testing.assert_array_equal(codes, good)
    with pytest.raises(vqrae.Error, match="^image 1: not a JPEG"):
        tokenizer.encode([PHOTO, b"bad"])


def test_a_file_that_pillow_opens_and_cannot_read_is_an_error_of_its_own(tokenizer, tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "half.jpg").write_bytes(PHOTO.read_bytes()[:5000])
    made = tokenizer.encode_each([image.open(PHOTO), image.open(tmp_path / "half.jpg")])
    assert isinstance(made[0], np.ndarray) and "Pillow cannot read" in str(made[1])


def test_what_does_not_suit_the_model_is_refused(tokenizer, tmp_path):
    codes = tokenizer.encode(PHOTO)
    for wrong, words in [
        (codes.astype(np.float32), "whole numbers"),
        (codes[0, 0], r"expected: \[B, h, w\]|whole numbers \[B, h, w\]"),
        (codes - 20000, "is no code of this model"),
        (codes + 16384, "is no code of this model, whose codes are 0 to 16383"),
        (codes[:0], "no codes"),
    ]:
        with pytest.raises(vqrae.Error, match=words):
            tokenizer.decode(wrong)
    for wrong, words in [
        (np.zeros((1, 3, 32, 32), np.uint8), "float32"),
        (np.zeros((3, 32, 32), np.float32), r"\[B, 3, H, W\]"),
        (np.full((1, 3, 256, 256), np.nan, np.float32), "finite"),
        (np.zeros((0, 3, 256, 256), np.float32), "no pixels"),
    ]:
        with pytest.raises(vqrae.Error, match=words):
            tokenizer.encode_pixels(wrong)
    with pytest.raises((vqrae.Error, RuntimeError), match="250"):
        tokenizer.encode_pixels(np.zeros((1, 3, 250, 256), np.float32))

    with pytest.raises(FileNotFoundError, match=r"no-model.config\.json"):
        vqrae.Tokenizer(tmp_path / "no-model").encode(PHOTO)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(vqrae.Error, match=r"config\.json: missing field"):
        vqrae.Tokenizer(str(tmp_path)).codebook()
    with pytest.raises(vqrae.Error, match='device is "gpu", expected: "auto"'):
        vqrae.Tokenizer(device="gpu").grid
    with pytest.raises(vqrae.Error, match='dtype is "int8", expected: "auto"'):
        vqrae.Tokenizer(dtype="int8").grid
    with pytest.raises(vqrae.Error, match="cuda:99 cannot be used"):
        vqrae.Tokenizer(device="cuda:99").grid


def test_a_batch_of_columns_comes_back_with_codes(tokenizer):
    paths = [PHOTO, PHOTOS / "rocket.jpg"]
    expected = tokenizer.encode(paths)
    batch = {"path": np.array(["a", "b"], object), "bytes": np.array([path.read_bytes() for path in paths], object)}
    made = tokenizer(batch)
    assert list(made) == ["path", "codes", "h", "w", "c", "width", "height", "status", "error"]
    assert made["codes"].dtype == np.uint16
    np.testing.assert_array_equal(made["codes"], expected.reshape(2, -1))
    assert [made[name].tolist() for name in "hwc"] == [[16, 16], [16, 16], [1, 1]]
    assert (made["width"].tolist(), made["height"].tolist()) == ([640, 640], [427, 427])
    assert made["status"].tolist() == ["ok", "ok"] and made["error"].tolist() == ["", ""]

    bad = tokenizer({"path": ["a", "b"], "scan": [b"bad", paths[1]]}, column="scan")
    assert bad["codes"][0] is None and bad["h"].tolist() == [0, 16]
    np.testing.assert_array_equal(bad["codes"][1], expected[1].ravel())
    assert bad["status"].tolist() == ["error", "ok"] and bad["error"][0].startswith("not a JPEG")
    assert tokenizer({"image": NOISE[:3]})["codes"].shape == (3, 256)
    assert tokenizer({"image": []})["codes"] == []
    with pytest.raises(vqrae.Error, match="no column of images: none of image, bytes, .* among path, text"):
        tokenizer({"path": ["a"], "text": ["b"]})


def test_memory_stays_bounded_over_many_images(tokenizer):
    """An iterable of 400 photos of 0.8 MB is never held: a chunk and what is made of it is."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc on this system")

    def resident():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    tokenizer.encode(NOISE)
    before, most = resident(), 0.0

    def photos():
        nonlocal most
        for i in range(400):
            most = max(most, resident())
            yield np.full((512, 512, 3), i % 256, np.uint8)

    assert len(tokenizer.encode(photos())) == 400
    assert most - before < 250, f"{most - before:.0f} MiB more"
