"""The plan for scale: what DDP's all-reduce costs each model at 1024 GPUs, computed on any machine.

python benchmarks/scale.py -o benchmarks/results/scale.csv
python benchmarks/scale.py --write-readme    # also the tables in the README and a picture
"""

import argparse
import math
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import DeepLabV3.model
import fcn.model
import unet.model
from benchmarks.lib.readme import README, read_rows, write_part, write_rows
from benchmarks.lib.scale import report
from benchmarks.lib.scale.network import Network, exposed, hidden_from
from benchmarks.lib.scale.workload import CLASSES, Workload, fake_world, measure
from common.cli import Parser, UserError, number, positive, progress
from common.cli import run as run_main

MODELS: dict[str, tuple[Any, str]] = {
    "unet-resnet34": (unet.model, "resnet34"),
    "fcn-resnet50": (fcn.model, "resnet50"),
    "fcn-resnet101": (fcn.model, "resnet101"),
    "DeepLabV3-mobilenet_v3_large": (DeepLabV3.model, "mobilenet_v3_large"),
    "DeepLabV3-resnet50": (DeepLabV3.model, "resnet50"),
    "DeepLabV3-resnet101": (DeepLabV3.model, "resnet101"),
}
# Dense bf16 on tensor cores, FLOP/s, from NVIDIA's data sheets of the A100 and of the H100 SXM
# (which prints 1,979e12, for matrices with half their entries zero).
PEAK = {"A100": 312e12, "H100": 989e12}
GBIT_PER_S = (25, 100, 400)  # a cloud's Ethernet share, a good one, one NDR InfiniBand card per GPU


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    chosen = _models(args.models)
    rows = []
    with fake_world(args.world_size) as process:
        for name in progress(chosen, desc="models"):
            module, backbone = MODELS[name]
            build = partial(module.build_model, backbone, CLASSES)
            workload = measure(build, module.loss_fn, process)
            for gpu, gbit in product(PEAK, GBIT_PER_S):
                rows.append({"model": name, **row(workload, gpu, gbit, args)})
    write_rows(args.output, rows)
    print(f"{args.output}: {len(chosen)} models at world size {args.world_size}, computed")
    if args.write_readme:
        written = read_rows(args.output)
        write_part(README, "scale", report.tables(written))
        report.draw(written, ROOT / "assets/scale.png")


def row(workload: Workload, gpu: str, gbit: int, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the CSV: `workload` on `args.world_size` GPUs of a kind, at one bandwidth.

    Times are in milliseconds, sizes in bytes. Efficiency is step / (step + exposed). All-reduces go
    through trees unless the name says ring.
    """
    network = Network(args.world_size, gbit * 1e9 / 8, args.alpha * 1e-6)
    per_flop = 1 / (PEAK[gpu] * args.utilisation)  # seconds
    step = args.batch_size * (workload.forward + workload.backward) * per_flop
    step_at_peak = step * args.utilisation
    per_image = [flop * per_flop for flop in workload.ready]
    ready = [args.batch_size * at for at in per_image]
    tree = [network.tree(size) for size in workload.buckets]
    ring = [network.ring(size) for size in workload.buckets]
    tree_bf16 = [network.tree(size / 2) for size in workload.buckets]
    late, late_ring, late_bf16 = (exposed(costs, ready) for costs in (tree, ring, tree_bf16))
    late_at_peak = exposed(tree, [at * args.utilisation for at in ready])
    channels = workload.norm_channels
    return {
        "parameters": workload.parameters,
        "bytes": sum(workload.buckets),
        "all_reduces": len(workload.buckets),
        "broadcasts": workload.broadcasts,
        "bucket_bytes": " ".join(map(str, workload.buckets)),
        "bucket_ready": " ".join(f"{flop / workload.backward:.4f}" for flop in workload.ready),
        "broadcast_buffers_broadcasts": len(workload.buffer_broadcasts),
        "broadcast_buffers_bytes": sum(workload.buffer_broadcasts),
        "sync_bn_collectives": 2 * len(channels),  # a gather forward, an all-reduce backward
        "sync_bn_bytes": sum(map(network.sync_bn_bytes, channels)),
        "forward_gflop": f"{workload.forward / 1e9:.1f}",
        "backward_gflop": f"{workload.backward / 1e9:.1f}",
        "world_size": args.world_size,
        "batch_size": args.batch_size,
        "gpu": gpu,
        "peak_tflops": f"{PEAK[gpu] / 1e12:.0f}",
        "utilisation": args.utilisation,
        "step_at_peak_ms": _ms(step_at_peak),
        "step_ms": _ms(step),
        "backward_ms": _ms(ready[-1]),
        "gbit_per_s": gbit,
        "alpha_us": args.alpha,
        "bucket_ms": " ".join(map(_ms, tree)),
        "tree_ms": _ms(sum(tree)),
        "ring_ms": _ms(sum(ring)),
        "sync_bn_ms": _ms(sum(map(network.sync_bn, channels))),
        "exposed_ms": _ms(late),
        "exposed_at_peak_ms": _ms(late_at_peak),
        "exposed_bf16_ms": _ms(late_bf16),
        "exposed_ring_ms": _ms(late_ring),
        "efficiency": f"{step / (step + late):.4f}",
        "efficiency_at_peak": f"{step_at_peak / (step_at_peak + late_at_peak):.4f}",
        "efficiency_bf16": f"{step / (step + late_bf16):.4f}",
        "efficiency_ring": f"{step / (step + late_ring):.4f}",
        "hidden_from_batch": hidden_from(tree, per_image),
        "grad_accum_for_99": max(1, math.ceil(0.99 / 0.01 * late / step)),
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _models(words: list[str]) -> list[str]:
    """Full names; `unet` selects all its backbones."""
    for word in words:
        if not any(word in (name, name.split("-")[0]) for name in MODELS):
            raise UserError(f"--models {word} is not known; choose from {', '.join(MODELS)}.")
    return [name for name in MODELS if name in words or name.split("-")[0] in words]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="What DDP's all-reduce costs at scale: computed, not measured.")
    add = parser.add_argument
    add("-o", "--output", type=Path, default=ROOT / "benchmarks/results/scale.csv")
    add("--models", nargs="+", default=list(MODELS), help="such as unet, or fcn-resnet50")
    add("--world-size", type=number(int, 2), default=1024, help="GPUs")
    add("-b", "--batch-size", type=positive, default=8, help="tiles per GPU and forward pass")
    add(
        "--utilisation",
        type=number(float, 0.01, 1),
        default=0.4,
        help="share of the GPU's peak a step reaches: an assumption",
    )
    add("--alpha", type=number(float, 0), default=10, help="latency of one message, µs: assumed")
    add("--write-readme", action="store_true", help="renew benchmarks/README.md, assets/scale.png")
    return parser.parse(argv)


if __name__ == "__main__":
    run_main(main)
