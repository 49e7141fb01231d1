"""How near `tokenize` comes to the model alone: 10,000 JPEGs to parquet shards.

    cargo build --release -p vqrae-cli
    python tests/scale/throughput.py FOLDER_OF_JPEGS [--images 10000] [--model FOLDER] [--samples-per-shard 1000]

The folder's photos are linked as often as it takes. Two figures: the share of the time in which the device computed, as the run's own
summary has it (`busy`), and images a second beside those of `vqrae-cli bench`, which computes and does nothing else, run just
before and just after. On a CPU, decoding takes cores from the model, which shows in the second figure alone.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
CLI = os.environ.get("VQRAE_CLI", ROOT / "target/release/vqrae-cli")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=pathlib.Path)
parser.add_argument("--images", type=int, default=10_000)
parser.add_argument("--model")
parser.add_argument("--samples-per-shard", default="1000")
parser.add_argument("--batch-size", default="16")
args = parser.parse_args()
model = ["--model", args.model] if args.model else []


def bench() -> float:
    shape = [] if args.model else ["--shapes", "shipped"]
    words = [CLI, "bench", *shape, *model, "--batch", args.batch_size, "--rounds", "5", "--dtype", "auto", "--json"]
    facts = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    found = re.findall(r'"tokenize":\s*{[^}]*"median":\s*([0-9.]+)', json.dumps(facts))
    return float(found[0])


photos = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
assert photos, f"no JPEGs in {args.folder}"
with tempfile.TemporaryDirectory(dir=args.folder.parent) as folder:
    place = pathlib.Path(folder, "photos")
    place.mkdir()
    for i in range(args.images):
        os.link(photos[i % len(photos)], place / f"{i:06}.jpg")
    before = bench()
    words = [CLI, "tokenize", "photos", "-o", "out", *model, "--samples-per-shard", args.samples_per_shard,
             "--batch-size", args.batch_size]
    run = subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    summary = json.loads(run.stdout)
    after = bench()
alone = (before + after) / 2
rate = summary["images_per_second"]
print("| images | shards | model alone, images/s | tokenize, images/s | of it | the device computed |")
print("|---|---|---|---|---|---|")
print(f"| {args.images:,} | {summary['shards']['of']} | {before:.1f}, {after:.1f} | {rate:.1f} | {rate / alone:.1%} | {summary['busy']:.1%} |")
