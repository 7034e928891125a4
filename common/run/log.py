"""What a run tells: the lines of `log.jsonl`, and numbers as text."""

import json
from pathlib import Path
from typing import Any

import torch

from common.distributed import Process


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


def describe(scores: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in scores.items())


def memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    return f" max mem: {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB"
