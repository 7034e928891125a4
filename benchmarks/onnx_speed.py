"""Images per second of an exported network through onnxruntime, against PyTorch, in turns.

    python benchmarks/onnx_speed.py --write-readme

Both as inference.py runs them on a CPU, from uint8 windows to results: PyTorch channels-last,
with freed memory kept (`common.cli.keep_freed_memory`). Weights are random. Mask
R-CNN's file always outlines as many boxes as it may report; with random weights PyTorch does, too.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.lib.environment import hardware, provenance, seconds
from benchmarks.lib.models import MODELS, Model
from benchmarks.lib.readme import README, read_rows, write_part, write_rows
from benchmarks.lib.results import median_interval
from common.augment import normalise
from common.cli import Parser, positive, progress, run
from common.predict.folder import window
from common.predict.onnx_file import OnnxNetwork, to_onnx

CPU = torch.device("cpu")
PROPOSALS = 200  # of Mask R-CNN, as in the other benchmarks on a CPU


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    rows = []
    for name in args.models:
        torch.manual_seed(0)
        model = MODELS[name]
        network = model.module.build_model(
            args.backbone or model.light, 2, **({} if model.semantic else {"proposals": PROPOSALS})
        )
        ways = _ways(model, network.eval(), args.window)
        windows = torch.randint(
            0, 256, (args.batch_size, args.window, args.window, 3), dtype=torch.uint8
        )
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in progress(range(args.rounds + 1), desc=name, unit="round"):
            for way, call in ways.items():
                taken = seconds(partial(call, windows), CPU)
                if turn:  # the first round warms up
                    times[way].append(taken)
        row: dict[str, Any] = {"model": name, "backbone": args.backbone or model.light}
        row |= {"window": args.window, "batch": args.batch_size, "rounds": args.rounds}
        row |= {"threads": torch.get_num_threads(), "onnxruntime": _version()}
        for way, taken_all in times.items():
            p10, p50, p90 = np.percentile([args.batch_size / t for t in taken_all], [10, 50, 90])
            row |= {way: f"{p50:.4g}", f"{way}_p10": f"{p10:.4g}", f"{way}_p90": f"{p90:.4g}"}
        ratios = [a / b for a, b in zip(*times.values(), strict=True)]
        names = ("ratio", "ratio_low", "ratio_high")
        row |= {k: f"{v:.4g}" for k, v in zip(names, median_interval(ratios), strict=True)}
        rows.append(row | hardware(CPU) | provenance(__file__, argv))
    write_rows(args.output, rows)
    print(f"wrote {args.output}")
    written = table(read_rows(args.output))
    print(written)
    if args.write_readme:
        write_part(README, "onnx_speed", written)


def _ways(model: Model, network: nn.Module, side: int) -> dict[str, Callable[[Tensor], Any]]:
    """uint8 windows → results: through PyTorch, and through the file."""
    module = model.module
    if model.semantic:
        predict = outputs = module.probabilities
        names: tuple[str, ...] = ("probabilities",)
    else:
        predict, outputs, names = module.predict, module.outputs, module.OUTPUTS
    exported = OnnxNetwork(to_onnx(network, outputs, names, side, {}))
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def pytorch(windows: Tensor) -> Any:
        images = normalise(windows).contiguous(memory_format=torch.channels_last)
        return predict(network, images)

    @torch.inference_mode()
    def onnx(windows: Tensor) -> Any:
        found = exported(windows)
        return found if model.semantic else module.from_outputs(*found, size=side)

    return {"pytorch": pytorch, "onnx": onnx}


def _version() -> str:
    import onnxruntime

    return onnxruntime.__version__


def table(rows: list[dict[str, str]]) -> str:
    """The results in Markdown."""
    first = rows[0]
    lines = [
        f"{first['cpu']}, {first['threads']} threads, torch {first['torch']}, onnxruntime "
        f"{first['onnxruntime']}; {first['batch']} windows of {first['window']} pixels at a time.",
        "",
        "| model | PyTorch, images/s (p10 to p90) | ONNX, images/s | ratio (95 %) |",
        "|---|--:|--:|--:|",
    ]
    for r in rows:
        ways = (f"{r[w]} ({r[f'{w}_p10']} to {r[f'{w}_p90']})" for w in ("pytorch", "onnx"))
        ratio, *interval = (float(r[k]) for k in ("ratio", "ratio_low", "ratio_high"))
        lines.append(
            f"| {r['model']}, {r['backbone']} | {' | '.join(ways)} | {ratio:.2f} "
            f"({interval[0]:.2f} to {interval[1]:.2f}) |"
        )
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--backbone", help="or encoder; default: each model's light one")
    add("-b", "--batch-size", type=positive, default=4, help="windows at a time")
    add("--window", type=window, default=256, help="side of a window, pixels")
    add("--rounds", type=positive, default=9, help="of each, after one for warm-up")
    add("-o", "--output", type=Path, default=ROOT / "benchmarks/results/onnx_speed.csv")
    add("--write-readme", action="store_true", help="also renew the table in benchmarks/README.md")
    return parser.parse(argv)


if __name__ == "__main__":
    run(main)
