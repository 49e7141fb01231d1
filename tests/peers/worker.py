"""One peer in a process of its own, told over stdin what to do; bench.py starts it.

    worker.py convert FOLDER MODELS               the model's halves as OpenVINO and ONNX files
    worker.py PEER PRECISION WHAT FOLDER MODELS   answers `B` with the seconds of one run at batch B, `keep FILE` by writing
                                                  the codes of the last run; WHAT is tokenize, reconstruct or nearest
"""
import json
import pathlib
import sys
import time

import numpy as np


def noise(count: int, seed: int) -> np.ndarray:
    """The numbers that `vqrae-cli bench` takes for an input (vqrae-cli/src/commands/bench/worker.rs)."""
    x = ((np.uint64(seed) << np.uint64(40)) | np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)


def inputs(folder: pathlib.Path, what: str, batch: int) -> np.ndarray:
    config = json.loads((folder / "config.json").read_text())
    side, k = config["encoder"]["image_size"], config["quantizer"]["codebook_size"]
    if what == "tokenize":
        return noise(batch * 3 * side**2, 0).reshape(batch, 3, side, side)
    n = (side // config["encoder"]["patch_size"]) ** 2
    return ((noise(batch * n, 0) + 1) / 2 * k).astype(np.int64).reshape(batch, n) % k


def pytorch(precision, what, folder, models, compiled=False):
    import torch
    from model import HALVES

    torch.set_grad_enabled(False)
    model = HALVES[what](folder, {"f32": torch.float32, "bf16": torch.bfloat16}[precision])

    def prepare(batch):
        x, run = torch.from_numpy(inputs(folder, what, batch)), model
        if compiled:
            import torch._inductor.config as inductor

            torch._dynamo.reset()
            inductor.freezing = True
            run = torch.compile(model)
        return lambda: run(x).numpy()

    return prepare


def compiled(*args):
    return pytorch(*args, compiled=True)


def openvino(precision, what, folder, models, throughput=False):
    """With the hint LATENCY, a batch is one request; with THROUGHPUT, every image is one, several of them at a time."""
    import openvino as ov

    core = ov.Core()
    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "THROUGHPUT" if throughput else "LATENCY"}

    def open(batch):
        model = core.read_model(models / f"{what}.xml")
        model.reshape(list(inputs(folder, what, batch).shape))
        return core.compile_model(model, "CPU", hints)

    held = {}

    def prepare(batch):
        x = inputs(folder, what, batch)
        if not throughput:
            held.clear()
            request = held.setdefault(batch, open(batch)).create_infer_request()
            return lambda: request.infer({0: x}, share_inputs=True)[0]
        queue = ov.AsyncInferQueue(held.get(1) or held.setdefault(1, open(1)))
        out = [None] * batch
        queue.set_callback(lambda request, i: out.__setitem__(i, request.get_output_tensor(0).data.copy()))

        def run():
            for i in range(batch):
                queue.start_async({0: x[i : i + 1]}, i)
            queue.wait_all()
            return np.concatenate(out)

        return run

    return prepare


def openvino_requests(*args):
    return openvino(*args, throughput=True)


def onnxruntime(precision, what, folder, models):
    import onnxruntime as ort

    session = ort.InferenceSession(models / f"{what}.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def prepare(batch):
        x = inputs(folder, what, batch)
        return lambda: session.run(None, {name: x})[0]

    return prepare


def nearest(precision, _what, file, _models):
    import torch
    from safetensors.torch import load_file

    torch.set_grad_enabled(False)
    tensors, dtype = load_file(file), {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
    tokens, codes = tensors["tokens"].to(dtype), tensors["codes"].to(dtype)

    def prepare(batch):
        z = tokens[: 256 * batch]
        return lambda: (z @ codes.T).argmax(1).numpy()

    return prepare


def convert(folder: pathlib.Path, models: pathlib.Path):
    """Each format on its own; says on stdout what could not be converted, and why."""
    import gc

    import openvino as ov
    import torch
    from model import HALVES

    def to_openvino(model, x, what):
        ov.save_model(ov.convert_model(model, example_input=x), models / f"{what}.xml", compress_to_fp16=False)

    def to_onnx(model, x, what):
        axes = {"x": {0: "batch"}, "y": {0: "batch"}}
        path = models / f"{what}.onnx"
        torch.onnx.export(model, (x,), path, input_names=["x"], output_names=["y"], dynamic_axes=axes, dynamo=False)

    for what, half in HALVES.items():
        model, x = half(folder), torch.from_numpy(inputs(folder, what, 2))
        for name, to in (("openvino", to_openvino), ("onnxruntime", to_onnx)):
            try:
                with torch.no_grad():
                    to(model, x, what)
            except Exception as error:
                print(f"{name}: {what} could not be converted: {str(error).splitlines()[0]}", flush=True)
            gc.collect()


def peak_mib() -> int:
    line = next(l for l in pathlib.Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


PEERS = {f.__name__: f for f in (pytorch, compiled, openvino, openvino_requests, onnxruntime, nearest)}


def main():
    if sys.argv[1] == "convert":
        return convert(*map(pathlib.Path, sys.argv[2:]))
    peer, precision, what, folder, models = sys.argv[1:]
    prepare = PEERS[peer](precision, what, pathlib.Path(folder), pathlib.Path(models))
    answer = lambda **facts: print(json.dumps(facts), flush=True)
    answer(ready=True)
    prepared, run, out = None, None, None
    for line in sys.stdin:
        words = line.split()
        if words[0] == "keep":
            np.save(words[1], out)
            answer(kept=True)
            continue
        if prepared != int(words[0]):
            prepared, run = int(words[0]), None
            run = prepare(prepared)
        begin = time.perf_counter()
        out = run()
        answer(seconds=time.perf_counter() - begin, peak_mib=peak_mib())


if __name__ == "__main__":
    main()
