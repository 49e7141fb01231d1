"""What counts as an image, and how it goes to the extension module."""

import io
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from ._vqrae import Error

# uint8 [H, W, 3] in RGB; a Pillow image; the bytes of an image file; the path of one; or, as datasets of the Hugging Face
# hub have it, a mapping with "bytes" or "path".
Image: TypeAlias = Any
# One image, a batch uint8 [B, H, W, 3], or any iterable of images, whose sizes may differ.
Images: TypeAlias = Any

Source: TypeAlias = bytes | tuple[int, int, bytes] | str


def is_one(images: Images) -> bool:
    """Whether this is one image rather than several."""
    if isinstance(images, np.ndarray):
        return images.ndim == 3 and images.dtype != object
    return isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike, Mapping)) or _is_pillow(images)


def each(images: Images) -> Iterator[Image]:
    """The images of what a caller passed."""
    if is_one(images):
        yield images
    elif isinstance(images, np.ndarray) and images.dtype != object and images.ndim != 4:
        raise Error(f"an array of images has the shape [B, H, W, 3], one image [H, W, 3]; got: {list(images.shape)}")
    elif isinstance(images, Iterable):
        yield from images
    else:
        raise TypeError(f"{type(images).__name__} is not an image; expected: {EXPECTED}")


EXPECTED = "an array uint8 [H, W, 3], a Pillow image, the bytes of an image file, or its path"


def source(image: Image) -> Source:
    """One image, as the extension module takes it.

    Raises `vqrae.Error` for an image that cannot be used, and `TypeError` for what is none.
    """
    if isinstance(image, Mapping):
        content, path = image.get("bytes"), image.get("path")
        if content is None and path is None:
            raise Error("this image has neither bytes nor a path")
        return source(path if content is None else content)
    if isinstance(image, bytes):
        return image
    if isinstance(image, (bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, (str, os.PathLike)):
        return os.fsdecode(image)
    if _is_pillow(image):
        return _of_pillow(image)
    if isinstance(image, np.ndarray):
        return _of_array(image)
    raise TypeError(f"{type(image).__name__} is not an image; expected: {EXPECTED}")


def _of_array(image: np.ndarray[Any, Any]) -> Source:
    if image.dtype != np.uint8:
        raise Error(f"an image's array is uint8, of 0 to 255; got: {image.dtype}; normalised pixels go to encode_pixels")
    if image.ndim != 3 or image.shape[2] != 3:
        raise Error(
            f"an image's array is RGB, [H, W, 3]; got: {list(image.shape)}; pass the image's file or a Pillow image, which "
            "may be grey or have alpha"
        )
    return image.shape[0], image.shape[1], image.tobytes()


def _is_pillow(image: Any) -> bool:
    # Where Pillow was not imported, nothing is an image of it.
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(image, pillow.Image)


def _of_pillow(image: Any) -> Source:
    """RGB as it is; other modes as a PNG file, so that grey, palettes, alpha and 16 bits follow the rules for files."""
    from PIL import ImageOps

    try:
        image = ImageOps.exif_transpose(image)
        if image.mode == "RGB" and "transparency" not in image.info:
            return image.height, image.width, image.tobytes()
        if image.mode not in _IN_PNG:
            image = image.convert("RGB")
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=0)
        return file.getvalue()
    except (OSError, SyntaxError, ValueError) as error:
        # Pillow reads the pixels only now, so a broken file shows here.
        raise Error(f"Pillow cannot read this image: {error}") from error


_IN_PNG = {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"}
