"""Makes the file that the loss `convnext` reads: torchvision's ConvNeXt-S, as TiTok's loss has it.

    pip install torch torchvision safetensors
    python weights/convert_convnext.py convnext_small.safetensors [--state-dict convnext_small-0c510722.pth]

Without --state-dict torchvision downloads IMAGENET1K_V1 (BSD licence). Names and layout stay torchvision's; the other sizes of
ConvNeXt have the same layout and can be given as a state dict.
"""
import argparse
import pathlib

import torch
import torchvision
from safetensors.torch import save_file


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path, help="the file to write")
    parser.add_argument("--state-dict", type=pathlib.Path, help="weights that are here already")
    a = parser.parse_args()
    if a.state_dict:
        tensors = torch.load(a.state_dict, map_location="cpu", weights_only=True)
    else:
        tensors = torchvision.models.convnext_small(weights="IMAGENET1K_V1").state_dict()
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, a.file)
    print(a.file, f"{sum(t.numel() for t in tensors.values()):,} values")


if __name__ == "__main__":
    main()
