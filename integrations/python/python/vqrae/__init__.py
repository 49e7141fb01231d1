"""VQRAE (arXiv 2511.23386): a pretrained vision encoder as an image tokenizer.

>>> import numpy, vqrae
>>> tokenizer = vqrae.Tokenizer()               # the model that ships with the package, or Tokenizer("my-model")
>>> photos = numpy.zeros((2, 300, 400, 3), numpy.uint8)
>>> codes = tokenizer.encode(photos)            # int32 [B, h, w]
>>> codes.shape
(2, 16, 16)
>>> tokenizer.decode(codes).shape               # uint8 [B, H, W, 3]
(2, 256, 256, 3)

The same image gives the same codes as by the program `vqrae-cli`, alone or in any batch.
"""

from ._images import Image, Images
from ._tokenizer import Tokenizer
from ._vqrae import Error, __version__

__all__ = ["Error", "Image", "Images", "Tokenizer", "__version__"]
