"""The plan for scale: what DDP's all-reduce costs each model on 1024 GPUs, computed on any machine.

    python benchmarks/scale.py --write-readme    # also renews the table in benchmarks/METHOD.md

PyTorch's fake process group answers every collective at once, so `place` sets DDP up here as among
1024 processes. Fake tensors have shapes and no memory, so the FLOP of a 512-pixel batch are counted
in seconds. Nothing is timed: the results are the same on any machine.
"""

import argparse
import math
import sys
from itertools import groupby, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lib import flops
from benchmarks.lib.models import MODELS
from benchmarks.lib.readme import METHOD, add_output, markdown, publish
from common.args import Speedups
from common.cli import Parser, number, positive, progress, run
from common.distributed import Process
from common.speedups import place

NAMES = (  # folder-backbone
    *("unet-resnet34", "fcn-resnet50", "fcn-resnet101"),
    *("DeepLabV3-mobilenet_v3_large", "DeepLabV3-resnet50", "DeepLabV3-resnet101"),
)
# Dense bf16 on tensor cores, FLOP/s, from NVIDIA's data sheets of the A100 and of the H100 SXM
# (which prints 1,979e12, for matrices with half their entries zero).
PEAK = {"A100": 312e12, "H100": 989e12}
GBIT_PER_S = (25, 100, 400)  # a cloud's Ethernet share, a good one, one NDR InfiniBand card per GPU
CROP = 512  # pixels, the side all train.py take by default
BATCH = 2  # the least for BatchNorm behind DeepLabV3's global pooling; FLOP are linear in it


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    rows = []
    dist.init_process_group("fake", rank=0, world_size=args.world_size, store=FakeStore())
    try:
        for name in progress(args.models, desc="models"):
            workload = measure(*name.split("-", 1))
            for gpu, gbit in product(PEAK, GBIT_PER_S):
                rows.append({"model": name} | workload | costs(workload, gpu, gbit, args))
    finally:
        dist.destroy_process_group()
    publish(rows, table, METHOD, "scale", args)


def measure(folder: str, backbone: str) -> dict[str, Any]:
    """What a model's step computes and sends under DDP: FLOP of one image, bytes in float32.

    `bucket_ready` is the share of the backward pass that is done when a bucket is complete.
    """
    build, loss_fn = MODELS[folder].module.build_model, MODELS[folder].module.loss_fn
    with FakeTensorMode():
        model = build(backbone, 2)
        forward, backward, done = flops.of_step(model, loss_fn, *_batch(CROP))
    model = build(backbone, 2)
    world = Process(0, dist.get_world_size(), torch.device("cpu"))
    name_of: dict[Tensor, str] = {tensor: name for name, tensor in model.named_parameters()}
    objective: Any = place(model, loss_fn, world, Speedups())
    buckets: list[tuple[int, int]] = []

    # DDP's own all-reduce takes its result from the work handle; a fake one has none. So a hook
    # returns the bucket itself. Content and order of buckets are fixed before the hook is called.
    def hook(_: None, bucket: dist.GradBucket) -> Future[Tensor]:
        ready = max(done[name_of[parameter]] for parameter in bucket.parameters())
        buckets.append((bucket.buffer().nbytes, ready))
        future: Future[Tensor] = Future()
        future.set_result(bucket.buffer())
        return future

    objective.register_comm_hook(None, hook)
    # DDP observes a static graph for two steps, with one bucket, and rebuilds before the third.
    for _ in range(4):
        buckets.clear()
        with _Collectives() as others:
            objective(*_batch(64)).backward()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_gflop": f"{forward / 1e9:.3f}",
        "backward_gflop": f"{backward / 1e9:.3f}",
        "bucket_bytes": " ".join(str(size) for size, _ in buckets),
        "bucket_ready": " ".join(f"{ready / backward:.6f}" for _, ready in buckets),
        "other_collectives": others.count,
    }


class _Collectives(TorchDispatchMode):
    """Counts collectives, also those that DDP's C++ code starts."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def _batch(side: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(BATCH, 3, side, side), torch.zeros(BATCH, side, side, dtype=torch.long)


def costs(
    workload: dict[str, Any], gpu: str, gbit: int, args: argparse.Namespace
) -> dict[str, Any]:
    """What the step of `measure` takes on `args.world_size` GPUs of a kind, in milliseconds.

    An all-reduce goes up and down two binary trees: 2(N-1)/N of its bytes cross each link, and
    2·log2 N messages wait for one another (Sanders, Speck and Träff 2009; NCCL does this).
    Efficiency is step / (step + exposed).
    """
    N = args.world_size
    forward, backward = (float(workload[f"{part}_gflop"]) for part in ("forward", "backward"))
    ms_per_gflop = args.batch_size * 1e12 / (PEAK[gpu] * args.utilisation)
    step = (forward + backward) * ms_per_gflop
    ready = [float(share) * backward * ms_per_gflop for share in workload["bucket_ready"].split()]
    latency = 2 * math.log2(N) * args.alpha / 1e3
    ms_per_byte = 2 * (N - 1) / N * 8e3 / (gbit * 1e9)
    sends = [int(size) * ms_per_byte + latency for size in workload["bucket_bytes"].split()]
    late = exposed(sends, ready)
    row = {"world_size": N, "batch_size": args.batch_size, "utilisation": args.utilisation}
    row |= {"alpha_us": args.alpha, "gbit_per_s": gbit, "gpu": gpu, "step_ms": f"{step:.3f}"}
    row |= {"peak_tflops": f"{PEAK[gpu] / 1e12:.0f}", "all_reduce_ms": f"{sum(sends):.3f}"}
    row |= {"exposed_ms": f"{late:.3f}", "efficiency": f"{step / (step + late):.4f}"}
    return row | {"grad_accum_for_99": max(1, math.ceil(0.99 / 0.01 * late / step))}


def exposed(sends: list[float], ready: list[float]) -> float:
    """Time from the end of the backward pass to the end of the last all-reduce.

    They run one at a time, in order, none before its bucket is complete.

    Args:
        sends: Time of each bucket's all-reduce.
        ready: Time from the start of the backward pass to each bucket; the last is its end.
    """
    return max(at + sum(sends[j:]) for j, at in enumerate(ready)) - ready[-1]


def table(rows: list[dict[str, str]]) -> str:
    """One line for each model and GPU, in Markdown; three values are those of `GBIT_PER_S`."""
    r = rows[0]
    head = ["model", "MB all-reduced, in buckets", "GPU", "step, ms", "all-reduces, ms"]
    head += ["exposed, ms", "scaling efficiency, %", "`--grad-accum` for 99 %"]
    lines = []
    for (model, gpu), rows_of_gpu in groupby(rows, lambda row: (row["model"], row["gpu"])):
        group = list(rows_of_gpu)
        sizes = [int(size) / 1e6 for size in group[0]["bucket_bytes"].split()]
        sent = f"{sum(sizes):.0f}: {', '.join(f'{size:.0f}' for size in sizes)}"
        cells = [model, sent, gpu, f"{float(group[0]['step_ms']):.1f}"]
        for key in ("all_reduce_ms", "exposed_ms"):
            cells.append(" / ".join(f"{float(row[key]):.1f}" for row in group))
        # Rounded down, so that only a perfect efficiency is 100.
        cells.append(" / ".join(f"{int(100 * float(row['efficiency']))}" for row in group))
        cells.append(" / ".join(row["grad_accum_for_99"] for row in group))
        lines.append(cells)
    return (
        f"World size {r['world_size']}, {r['batch_size']} tiles per GPU. Assumed: "
        f"{100 * float(r['utilisation']):.0f} % of the GPU's bf16 peak, {r['alpha_us']} µs per "
        f"message. Three values are for {' / '.join(map(str, GBIT_PER_S))} Gbit/s per GPU.\n\n"
        f"{markdown(head, lines, 'lllr')}"
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    known = [*NAMES, *dict.fromkeys(name.split("-")[0] for name in NAMES)]
    add("--models", nargs="+", choices=known, default=list(NAMES))
    add("--world-size", type=number(int, 2), default=1024, help="GPUs")
    add("-b", "--batch-size", type=positive, default=8, help="tiles per GPU and forward pass")
    add("--utilisation", type=number(float, 0.01, 1), default=0.4, help="of the peak: assumed")
    add("--alpha", type=number(float, 0), default=10, help="latency of one message, µs: assumed")
    add_output(parser, "scale", METHOD)
    args = parser.parse(argv)
    args.models = [n for n in NAMES if n in args.models or n.split("-")[0] in args.models]
    return args


if __name__ == "__main__":
    run(main)
