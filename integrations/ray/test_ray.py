"""Both forms and the templates, on data of this machine: what they write is what the program alone writes.

The program is named by VQRAE_CLI; `vqrae`, `ray[data]`, `pyarrow` and `pillow` are installed.
"""

import io
import json
import os
import runpy
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

# Every run of the program and every actor computes with one thread: several share this machine, and the bytes are the same.
os.environ |= {"RAYON_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
import ray  # noqa: E402

HERE = Path(__file__).resolve().parent
PROGRAM = Path(os.environ.get("VQRAE_CLI", "target/release/vqrae-cli")).absolute()
BAD = b"\xff\xd8\xff\xe0 this JPEG ends early"


def photo(seed):
    """A JPEG of its own size."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (4 + seed % 3, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((90 + 10 * seed, 120), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve photos and three files that are none, as a folder, as three tars and as a table."""
    folder = tmp_path_factory.mktemp("data")
    files = {f"{'ab'[i % 2]}/{i:02}.jpg": BAD if i % 5 == 2 else photo(i) for i in range(15)}
    for name, content in files.items():
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "tars").mkdir()
    for t, tar in enumerate("xyz"):
        with tarfile.open(folder / f"tars/{tar}.tar", "w") as archive:
            for name, content in list(files.items())[5 * t : 5 * t + 5]:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    images = [{"bytes": content, "path": None} for content in files.values()]
    pq.write_table(pa.table({"name": list(files), "image": images}), folder / "table.parquet")
    return folder


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


def program(*words, **environment):
    done = subprocess.run(
        [PROGRAM, *map(str, words)], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 3), done.stderr
    return done


@pytest.fixture
def script(monkeypatch, capfd):
    """Runs a script as Python would, but in this process, whose cluster it then uses: a start of Ray takes seconds."""

    def run(name, *words, code=0):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capfd.readouterr()
        try:
            runpy.run_path(str(HERE / name), run_name="__main__")
            ended, said = 0, ""
        except SystemExit as error:
            ended, said = (1, error.code) if isinstance(error.code, str) else (error.code or 0, "")
        stdout, stderr = capfd.readouterr()
        assert ended == code, stdout + stderr + said
        return stdout, stderr + said

    return run


def tree(folder):
    """The bytes of a set of shards; the plan is what it was made by, not what it is."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop("plan.jsonl", None)
    assert any(name.endswith("_stats.json") for name in files) and "manifest.json" in files
    return files


def make_executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_task_a_tar_writes_the_bytes_of_the_program(script, data, tmp_path):
    tars = sorted((data / "tars").glob("*.tar"))
    program("tokenize", *tars, "-o", tmp_path / "plain")
    stdout, stderr = script("tokenize_shards.py", *tars, "-o", tmp_path / "ray", "--program", PROGRAM)
    assert tree(tmp_path / "ray") == tree(tmp_path / "plain")
    assert {f"{tar}.parquet" for tar in "xyz"} <= set(tree(tmp_path / "ray"))
    summaries = [json.loads(line) for line in stdout.splitlines()]
    assert sorted(summary["shard"] for summary in summaries) == [str(tar) for tar in tars]
    assert [(summary["images"], summary["skipped"]) for summary in summaries] == [(4, 1)] * 3


def test_a_folder_is_planned_once_and_its_shards_have_the_bytes_of_the_program(script, data, tmp_path):
    words = ["--samples-per-shard", 4, "--dtype", "f32"]
    program("tokenize", data / "photos", "-o", tmp_path / "plain", *words)
    stdout, stderr = script("tokenize_shards.py", data / "photos", "-o", tmp_path / "ray", "--program", PROGRAM, "--", *words)
    assert len(stdout.splitlines()) == 4
    assert tree(tmp_path / "ray") == tree(tmp_path / "plain")
    assert (tmp_path / "ray/plan.jsonl").exists()


def test_a_shard_that_fails_is_named_and_the_others_are_finished(script, data, tmp_path):
    tars = [data / "tars/x.tar", data / "tars/missing.tar", data / "tars/z.tar"]
    words = ["-o", tmp_path / "out", "--program", PROGRAM, "--max-retries", 0]
    stdout, stderr = script("tokenize_shards.py", *tars, *words, code=1)
    assert "1 of 3 shards are not finished" in stderr and str(tars[1]) in stderr.splitlines()[-1]
    assert {"x_stats.json", "z_stats.json"} <= set(tree(tmp_path / "out"))


@pytest.mark.parametrize("end", ["exit 1", "kill -9 $PPID"], ids=["the program fails", "the worker is killed"])
def test_a_shard_is_tried_again(script, data, tmp_path, end):
    flaky = f'#!/bin/sh\nif [ ! -e {tmp_path}/tried ]; then touch {tmp_path}/tried; {end}; fi\nexec {PROGRAM} "$@"\n'
    flaky = make_executable(tmp_path / "flaky", flaky)
    script("tokenize_shards.py", data / "tars/y.tar", "-o", tmp_path / "ray", "--program", flaky)
    program("tokenize", data / "tars/y.tar", "-o", tmp_path / "plain")
    assert (tmp_path / "tried").exists()
    assert tree(tmp_path / "ray") == tree(tmp_path / "plain")


COLUMNS = ["codes", "h", "w", "c", "width", "height", "status"]


def rows_of(folder, name):
    """The rows of parquet files, by what `name` makes of a row; each without the path in its error."""
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    reason = lambda row: row["error"] and row["error"].split(": ")[-1]
    by_name = {name(row): ({column: row[column] for column in COLUMNS}, reason(row)) for row in rows}
    assert len(by_name) == len(rows)
    return by_name


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    """The rows of the program, by the names of the photos."""
    out = tmp_path_factory.mktemp("expected")
    program("tokenize", data / "photos", "-o", out)
    rows = rows_of(out, lambda row: row["path"])
    assert len(rows) == 15 and sum(row["status"] == "error" for row, _ in rows.values()) == 3
    return rows


@pytest.mark.parametrize("kind", ["images", "webdataset", "parquet"])
def test_ray_data_makes_the_rows_of_the_program(script, data, expected, tmp_path, kind):
    inputs = {"images": data / "photos", "webdataset": data / "tars", "parquet": data / "table.parquet"}[kind]
    name = {
        "images": lambda row: Path(row["path"]).relative_to(data / "photos").as_posix(),
        "webdataset": lambda row: row["__key__"] + ".jpg",
        "parquet": lambda row: row["name"],
    }[kind]
    script("ray_data.py", kind, inputs, "-o", tmp_path)
    assert rows_of(tmp_path, name) == expected
    for path in tmp_path.glob("*.parquet"):
        schema = pq.read_schema(path)
        assert schema.field("codes").type.value_type == pa.uint16(), schema
        assert "image" not in schema.names and "jpg" not in schema.names and "bytes" not in schema.names


def on_path(folder):
    """A PATH where vqrae-cli is the program and srun runs what it is given."""
    folder.mkdir()
    (folder / "vqrae-cli").symlink_to(PROGRAM)
    make_executable(folder / "srun", '#!/bin/sh\nexec "$@"\n')
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "out"
    program("tokenize", data / "photos", "-o", out, "--samples-per-shard", 4)
    return tree(out)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("tasks", [1, 2])
def test_the_slurm_template_writes_the_bytes_of_the_program(data, plain, tmp_path, count, tasks):
    out = tmp_path / "out"
    program("tokenize", data / "photos", "-o", out, "--samples-per-shard", 4, "--plan")
    variables = {"INPUT": str(data / "photos"), "OUTPUT": str(out), "WORDS": "--samples-per-shard 4"} | on_path(tmp_path / "bin")
    first = 5  # --array=5-7
    for index in range(count):
        array = {"SLURM_ARRAY_TASK_ID": first + index, "SLURM_ARRAY_TASK_MIN": first, "SLURM_ARRAY_TASK_COUNT": count}
        for process in range(tasks):
            numbers = {**array, "SLURM_PROCID": process, "SLURM_NTASKS": tasks, "SLURM_CPUS_PER_TASK": 1}
            environment = os.environ | variables | {name: str(value) for name, value in numbers.items()}
            subprocess.run(["bash", HERE.parent / "slurm/tokenize.sbatch"], env=environment, check=True, capture_output=True)
    assert tree(out) == plain
    assert program("verify", out).returncode == 0


@pytest.mark.parametrize("count", [1, 3])
def test_the_kubernetes_template_writes_the_bytes_of_the_program(data, plain, tmp_path, count):
    job = yaml.safe_load((HERE.parent / "kubernetes/tokenize-job.yaml").read_text())
    assert job["spec"]["completionMode"] == "Indexed"
    container = job["spec"]["template"]["spec"]["containers"][0]
    written = {variable["name"]: variable["value"] for variable in container["env"]}
    assert written["COMPLETIONS"] == str(job["spec"]["completions"]) == str(job["spec"]["parallelism"])

    out = tmp_path / "out"
    program("tokenize", data / "photos", "-o", out, "--samples-per-shard", 4, "--plan")
    variables = written | {"INPUT": str(data / "photos"), "OUTPUT": str(out), "COMPLETIONS": str(count)}
    variables |= {"WORDS": "--samples-per-shard 4"} | on_path(tmp_path / "bin")
    for index in range(count):
        environment = os.environ | variables | {"JOB_COMPLETION_INDEX": str(index)}
        subprocess.run([*container["command"], *container["args"]], env=environment, check=True, capture_output=True)
    assert tree(out) == plain
