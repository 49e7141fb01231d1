"""Images to codes in a Ray Data pipeline, with the Python package `vqrae`: a step among others, where codes go on as columns.

    python ray_data.py images photos -o out
    python ray_data.py webdataset shards -o out --num-gpus 1
    python ray_data.py parquet train.parquet -o out --column image
"""

import argparse

import pyarrow as pa
import ray
import vqrae

EXTENSIONS = ["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"]

# The program's own columns, in types that do not depend on what a block happens to hold.
TYPES = {
    "path": pa.string(),
    **dict.fromkeys(["h", "w", "c", "width", "height"], pa.uint32()),
    **dict.fromkeys(["status", "error"], pa.string()),
}


class Tokenize:
    """Batches of images to batches of codes, for `map_batches`. The model is opened by the actor, not by the driver."""

    def __init__(self, column, path=None, device="auto", dtype="auto"):
        self.column = column
        self.tokenizer = vqrae.Tokenizer(path, device, dtype)

    def __call__(self, batch):
        made = self.tokenizer(batch, self.column)
        narrow = pa.uint16() if self.tokenizer.codebook_size <= 1 << 16 else pa.uint32()
        # A list even where no row, or every row, is an error: blocks whose columns differ in type cannot be written together.
        made["codes"] = pa.array(list(made["codes"]), pa.list_(narrow))
        # What is not known, or not so, is null in the program's files.
        failed = made["status"] == "error"
        made |= {name: pa.array(made[name], mask=failed) for name in ("width", "height")}
        made["error"] = pa.array(made["error"], pa.string(), mask=~failed)
        return pa.table({name: as_arrow(name, values) for name, values in made.items()})


def as_arrow(name, values):
    """A column; those of the program in their types, whatever the values of this block are."""
    return values if isinstance(values, pa.Array) else pa.array(values, TYPES.get(name))


def images(paths):
    """Files, with their paths. Not by `read_images`, which leaves EXIF orientation and alpha to the reader and ends the job at
    the first file that is no image; the tokenizer decodes as the program does."""
    return ray.data.read_binary_files(paths, include_paths=True, file_extensions=EXTENSIONS), "bytes"


def webdataset(paths):
    """Tars, a row a key: `__key__`, and a column an extension. Not decoded, for the same reason."""
    return ray.data.read_webdataset(paths, decoder=None), None


def parquet(paths):
    """Tables with a column of files' bytes, or of {bytes, path} as datasets of the Hugging Face hub have it."""
    return ray.data.read_parquet(paths), None


def tokenize(dataset, column, model, device, dtype, concurrency, num_cpus, num_gpus, batch_size=64):
    """The dataset with columns of codes instead of images."""
    return dataset.map_batches(
        Tokenize,
        fn_constructor_args=(column, model, device, dtype),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=concurrency),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    readers = {"images": images, "webdataset": webdataset, "parquet": parquet}
    parser.add_argument("kind", choices=readers)
    parser.add_argument("inputs", nargs="+", help="files or folders of that kind")
    parser.add_argument("-o", "--output", required=True, help="folder for parquet files")
    parser.add_argument("--column", help="where the images are; by default image, bytes, jpg, jpeg, png or webp")
    parser.add_argument("--model", help="the model's folder; without it, the one that ships with the package")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--concurrency", type=int, default=1, help="actors, each with a model (default: %(default)s)")
    parser.add_argument("--num-cpus", type=float, default=0.5, help="processors that Ray counts an actor (default: %(default)s)")
    parser.add_argument("--num-gpus", type=float, default=0, help="cards an actor (default: %(default)s)")
    args = parser.parse_args()

    ray.init(ignore_reinit_error=True)
    dataset, column = readers[args.kind](args.inputs)
    made = tokenize(
        dataset, args.column or column, args.model, args.device, args.dtype, args.concurrency, args.num_cpus, args.num_gpus
    )
    made.write_parquet(args.output)


if __name__ == "__main__":
    main()
