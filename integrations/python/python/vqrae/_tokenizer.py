"""`Tokenizer`: the one class of the package."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from . import _images
from ._images import Image, Images
from ._vqrae import Error, Model

Codes: TypeAlias = NDArray[np.int32]

# Images that are handed to the extension module at once. It takes them in batches of 16 and reads one batch ahead.
_CHUNK = 64

# Where a batch may have its images, in the order in which they are looked for.
_COLUMNS = ("image", "bytes", "jpg", "jpeg", "png", "webp")


class Tokenizer:
    """A VQRAE that turns images into codes and codes into images.

    Opened at first use, so making one costs nothing. Pickled, it is its three arguments: a copy opens the model anew where
    it is used. Threads may share one, and other Python threads run while it computes.

    Args:
        path: the model's folder; without one, the model that ships with the package.
        device: "auto" (a CUDA card if the wheel was built for it and there is one, else the CPU), "cpu", "cuda" or
            "cuda:N".
        dtype: what products are computed in: "auto" (bf16 where the device is faster in it, else f32), "f32", "bf16" or,
            on CUDA alone, "f16". Codes of different `precision` may differ.

    Raises, at first use: `vqrae.Error`, which is a `ValueError`, for a model, an image or codes that cannot be used;
    `OSError` for a file that cannot be read.
    """

    def __init__(self, path: str | None = None, device: str = "auto", dtype: str = "auto") -> None:
        self._arguments = (None if path is None else str(path), str(device), str(dtype))
        self._opened: Model | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def __repr__(self) -> str:
        path, device, dtype = self._arguments
        return f"{type(self).__name__}(path={path!r}, device={device!r}, dtype={dtype!r})"

    @property
    def _model(self) -> Model:
        with self._lock:
            if self._opened is None:
                self._opened = Model(*self._arguments)
            return self._opened

    @property
    def is_open(self) -> bool:
        """Whether the model was opened yet."""
        return self._opened is not None

    def encode(self, images: Images) -> Codes:
        """Images to codes, int32 `[B, h, w]`, or `[B, h, w, C]` for a model with C > 1 codes a token.

        An image is an array uint8 `[H, W, 3]` in RGB, a Pillow image, the bytes of an image file, or its path. `images` is
        one (B = 1), an array `[B, H, W, 3]`, or an iterable of images of any sizes. They are prepared as by the program:
        upright by EXIF, alpha on white, then resized as the model wants it.

        Codes are int32, as in the program's own files: numpy, PyTorch and JAX index with it or widen it to int64 without
        loss, which PyTorch does not do with unsigned numbers.

        Raises the first image's error; `encode_each` goes on. Also if the images have different grids, as with a model that
        keeps the aspect ratio: there too, `encode_each` is what to call.
        """
        codes: Codes = self._stacked(images, self.encode_each(images))
        return codes

    def encode_each(self, images: Images) -> list[Codes | Exception]:
        """For each image its codes, int32 `[h, w]` or `[h, w, C]`, or the exception that says why there are none."""
        return [_array_of(made, np.int32) for made in self._each(images, "encode")]

    def features(self, images: Images) -> NDArray[np.float32]:
        """Images, as for `encode`, to the encoder's continuous features, float32 `[B, N, D]`, N = h·w in raster order."""
        made = [_array_of(made, np.float32) for made in self._each(images, "features")]
        features: NDArray[np.float32] = self._stacked(images, made)
        return features

    def encode_pixels(self, pixels: NDArray[np.floating[Any]]) -> Codes:
        """Pixels that the caller prepared and normalised, float32 `[B, 3, H, W]`, to codes as of `encode`."""
        pixels = np.asarray(pixels)
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not np.issubdtype(pixels.dtype, np.floating):
            raise Error(f"pixels are float32 [B, 3, H, W]; got: {pixels.dtype} {list(pixels.shape)}")
        if 0 in pixels.shape:
            raise Error(f"there are no pixels: {list(pixels.shape)}")
        if not np.isfinite(pixels).all():
            raise Error("pixels are finite numbers, but some of these are not")
        shape, codes = self._model.encode_pixels(pixels.shape, pixels.astype(np.float32).tobytes())
        return np.frombuffer(codes, np.int32).reshape(shape).copy()

    def decode(self, codes: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
        """Codes, whole numbers `[B, h, w]` or `[B, h, w, C]`, B may be left out, to images, uint8 `[B, H, W, 3]`."""
        codes, model = np.asarray(codes), self._model
        dimensions = 3 if model.codes_per_token == 1 else 4
        if not np.issubdtype(codes.dtype, np.integer) or codes.ndim not in (dimensions - 1, dimensions):
            expected = "[B, h, w]" if dimensions == 3 else f"[B, h, w, {model.codes_per_token}]"
            raise Error(f"codes are whole numbers {expected}; got: {codes.dtype} {list(codes.shape)}")
        if codes.ndim < dimensions:
            codes = codes[np.newaxis]
        if codes.size == 0:
            raise Error(f"there are no codes: {list(codes.shape)}")
        lowest, highest = int(codes.min()), int(codes.max())
        if lowest < 0 or highest >= model.codebook_size:
            wrong = lowest if lowest < 0 else highest
            raise Error(f"{wrong} is no code of this model, whose codes are 0 to {model.codebook_size - 1}")
        shape, images = model.decode(codes.shape, codes.astype(np.uint32).tobytes())
        return np.frombuffer(images, np.uint8).reshape(shape).copy()

    def codebook(self) -> NDArray[np.float32]:
        """The vectors that features are compared with, float32 `[K, D]`; several codebooks stand one below the other."""
        shape, vectors = self._model.codebook()
        return np.frombuffer(vectors, np.float32).reshape(shape).copy()

    def __call__(self, batch: Mapping[str, Any], column: str | None = None) -> dict[str, Any]:
        """A batch of columns with images to one with codes: for `ray.data.Dataset.map_batches` and `datasets.Dataset.map`.

        The images are in `column`, by default the first of image, bytes, jpg, jpeg, png, webp that there is. It is left out
        of the result, which has beside the other columns those of the program's shards: `codes` (flat, h·w·C in raster
        order, uint16 up to a codebook of 65,536, else uint32), `h`, `w`, `c`, the image's own `width` and `height`,
        `status` and `error`.

        An image that cannot be used does not end the job: its status is "error", its error says why, its codes are None, and
        its numbers 0. Of others the error is "", so that the column has a type in every batch. `codes` is an array
        `[B, h·w·C]` if all images have as many, else a list.
        """
        found = column or next((name for name in _COLUMNS if name in batch), None)
        if found is None or found not in batch:
            wanted = column or ", ".join(_COLUMNS)
            raise Error(f"the batch has no column of images: none of {wanted} among {', '.join(map(str, batch))}")
        made = list(self._each(list(batch[found]), "encode"))
        model = self._model
        narrow = np.uint16 if model.codebook_size <= 1 << 16 else np.uint32
        arrays = [_array_of(image, np.int32) for image in made]
        codes = [None if isinstance(array, Exception) else array.astype(narrow).ravel() for array in arrays]
        even = len({None if row is None else len(row) for row in codes}) == 1 and codes[0] is not None
        errors = [str(image) if isinstance(image, Exception) else "" for image in made]

        def numbers(of: Callable[[Codes, Any], int]) -> NDArray[np.uint32]:
            pairs = zip(arrays, made)
            return np.array([0 if isinstance(a, Exception) else of(a, m) for a, m in pairs], np.uint32)

        return {name: values for name, values in batch.items() if name != found} | {
            "codes": np.stack([row for row in codes if row is not None]) if even else codes,
            "h": numbers(lambda array, _: array.shape[0]),
            "w": numbers(lambda array, _: array.shape[1]),
            "c": np.full(len(made), model.codes_per_token, np.uint32),
            "width": numbers(lambda _, image: image[1]),
            "height": numbers(lambda _, image: image[0]),
            "status": np.array(["error" if isinstance(image, Exception) else "ok" for image in made], object),
            "error": np.array(errors, object),
        }

    @property
    def model_id(self) -> str:
        """The hash of config, preprocessing and weights; codes of another model mean something else."""
        return self._model.id

    @property
    def codebook_size(self) -> int:
        """Number K of codes; with several codes a token, of each of them."""
        return self._model.codebook_size

    @property
    def codes_per_token(self) -> int:
        """Number C of codes a token."""
        return self._model.codes_per_token

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Rows and columns of the images that the model sees; None where every image has its own."""
        return self._model.image_size

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns (h, w) of the codes of an image; None where every image has its own."""
        return self._model.grid

    @property
    def preprocessing(self) -> str:
        """How images are prepared, in the words that the program writes beside codes."""
        return self._model.preprocessing

    @property
    def precision(self) -> str:
        """Number format and arithmetic: tokenizers of one precision give the same codes."""
        return self._model.precision

    @property
    def device(self) -> str:
        """Where it computes: "cpu" or "cuda:N"."""
        return self._model.device

    def _each(self, images: Images, method: str) -> Iterator[tuple[int, int, list[int], bytes] | Exception]:
        """What the model makes of each image, or what is wrong with it; a chunk of images is held at a time."""
        model, remaining = self._model, _images.each(images)
        while chunk := list(itertools.islice(remaining, _CHUNK)):
            sources = [_source(image) for image in chunk]
            good = [source for source in sources if not isinstance(source, Exception)]
            made = iter(getattr(model, method)(good))
            for source in sources:
                yield source if isinstance(source, Exception) else next(made)

    def _stacked(self, images: Images, made: list[Any]) -> Any:
        """The arrays of all images as one."""
        if not made:
            raise Error("there are no images")
        for i, array in enumerate(made):
            if isinstance(array, Error) and not _images.is_one(images):
                raise Error(f"image {i}: {array}") from array
            if isinstance(array, Exception):
                raise array
            if array.shape != made[0].shape:
                raise Error(
                    f"images 0 and {i} have different grids, so their results have different shapes, {list(made[0].shape)} and "
                    f"{list(array.shape)}; call encode_each, or pass one image at a time"
                )
        return np.stack(made)


def _source(image: Image) -> _images.Source | Error:
    try:
        return _images.source(image)
    except Error as error:
        return error


def _array_of(made: tuple[int, int, list[int], bytes] | Exception, dtype: Any) -> Any:
    if isinstance(made, Exception):
        return made
    _, _, shape, data = made
    return np.frombuffer(data, dtype).reshape(shape).copy()
