"""What a run reports: the lines of `log.jsonl`, their curves, and numbers as text."""

import json
from pathlib import Path
from typing import Any

import matplotlib
import torch

from common.distributed import Process
from common.io.files import whole_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt

INK, BLUE = "#222222", "#0072B2"
MAIN = ("mIoU", "mask_AP")


class Log:
    """`log.jsonl`: one JSON object per line, from rank 0; a resumed run drops what it repeats."""

    def __init__(self, path: Path, process: Process, step: int) -> None:
        self.path, self.enabled = path, process.is_main
        if not self.enabled:
            return
        kept = [line for line in read_log(path) if line["step"] <= step] if step else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values: float) -> None:
        if self.enabled:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def curves(log: Path, path: Path) -> None:
    """Draw a run's `log.jsonl`: the loss of the steps and the validation scores."""
    lines = read_log(log)
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    scored = [line for line in lines if "lr" not in line]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", dpi=140)
    if losses:
        axes[0].plot(*zip(*losses, strict=True), color=BLUE, linewidth=1.4)
    axes[0].set(xlabel="step", ylabel="training loss", ylim=(0, None))
    names = headline(scored[-1]) if scored else []
    for name in names:
        points = [(line["step"], line[name]) for line in scored if name in line]
        style = {"color": INK, "linewidth": 2.0} if name in MAIN else {"linewidth": 1.2}
        axes[1].plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
    axes[1].set(xlabel="step", ylabel="validation score", ylim=(0, 1))
    if names:
        axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", linewidth=0.6)
    with whole_file(path) as file:
        figure.savefig(file, format="png")
    plt.close(figure)


def headline(scores: dict[str, float]) -> list[str]:
    """The names of the scores that are drawn over the steps."""
    shown = (*MAIN, "mask_AP50", "box_AP")
    return [n for n in scores if n in shown or (n.startswith("IoU.") and ".airport." not in n)]


def describe(scores: dict[str, float]) -> str:
    """Scores as a line; those of the airports, which may be many, are in the files alone."""
    shown = {name: value for name, value in scores.items() if ".airport." not in name}
    return "  ".join(f"{name} {value:.4f}" for name, value in shown.items())


def memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f" max mem: {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB"
