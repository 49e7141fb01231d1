"""Images to shards of codes on a Ray cluster: a task a shard, each of which runs vqrae-cli.

    python tokenize_shards.py photos -o out --num-cpus 4             folders: planned once, then a task a shard
    python tokenize_shards.py shards/*.tar -o out --num-gpus 1       tars, parquet files: a task a file
    python tokenize_shards.py photos -o out -- --dtype f32           words after -- go to vqrae-cli

All nodes see the same files. A shard that is finished is not made again, and two tasks at one shard are harmless, so whatever
was killed may simply be run again, to the same bytes. RAY_ADDRESS names a cluster; without it Ray starts on this machine.
"""

import argparse
import json
import os
import subprocess
import sys

import ray

ALL_DONE, SOME_UNREADABLE = 0, 3  # exit codes of vqrae-cli; images that cannot be read have rows that say why


class Unfinished(RuntimeError):
    """A shard that could not be finished; Ray tries again."""


def run(name, command, num_cpus):
    """Runs the program and returns its summary, the last line of its stdout."""
    threads = str(max(1, round(num_cpus)))
    environment = os.environ | {"RAYON_NUM_THREADS": threads}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (ALL_DONE, SOME_UNREADABLE):
        raise Unfinished(f"{name}: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return {"shard": name, **json.loads(done.stdout.splitlines()[-1])}


def commands(args):
    """The shards' names, each with the command that makes it."""
    inputs = [os.path.abspath(path) for path in args.inputs]
    base = [args.program, "tokenize"]
    words = ["-o", os.path.abspath(args.output), *args.words]
    if all(path.endswith((".tar", ".parquet")) for path in inputs):
        return [(path, [*base, path, *words]) for path in inputs]
    planned = subprocess.run([*base, *inputs, *words, "--plan"], stdout=subprocess.PIPE, text=True, check=True)
    count = json.loads(planned.stdout.splitlines()[-1])["shards"]
    ranks = [["--shard-index", str(i), "--num-shards", str(count)] for i in range(count)]
    return [(f"shard {i} of {count}", [*base, *inputs, *words, *rank]) for i, rank in enumerate(ranks)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", help="folders, or tars and parquet files")
    parser.add_argument("-o", "--output", required=True, help="folder for the shards")
    parser.add_argument("--program", default="vqrae-cli", help="the program, on every node (default: %(default)s)")
    parser.add_argument("--num-cpus", type=float, default=1, help="processors a task (default: %(default)s)")
    parser.add_argument("--num-gpus", type=float, default=0, help="cards a task (default: %(default)s)")
    parser.add_argument("--max-retries", type=int, default=3, help="times that a shard is tried again (default: %(default)s)")
    ours, _, words = partition(sys.argv[1:], "--")
    args = parser.parse_args(ours)
    args.words = words

    todo = commands(args)
    ray.init(ignore_reinit_error=True)
    options = {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus, "max_retries": args.max_retries}
    task = ray.remote(**options, retry_exceptions=[Unfinished])(run)
    pending = {task.remote(name, command, args.num_cpus): name for name, command in todo}
    failed = []
    while pending:
        finished, _ = ray.wait(list(pending))
        for reference in finished:
            name = pending.pop(reference)
            try:
                print(json.dumps(ray.get(reference)), flush=True)
            except ray.exceptions.RayError as error:
                failed.append(name)
                print(getattr(error, "cause", None) or error, file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"{len(failed)} of {len(todo)} shards are not finished, run the same command again: {', '.join(failed)}")


def partition(words, separator):
    """`str.partition` for lists."""
    at = words.index(separator) if separator in words else len(words)
    return words[:at], words[at : at + 1], words[at + 1 :]


if __name__ == "__main__":
    main()
