"""What a run's folder says about the run: `run.json`, the log and the scores as plain values."""

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.io.coco import read_json
from common.io.files import write_atomic
from common.run.log import read_log

FACTS = "run.json"
KEYS = {"model", "classes", "select", "definition", "from_step", "settings", "data", "machine"}
KEYS |= {"started", "total_steps", "command", "commit", "versions"}
# Score names: `IoU.aircraft`, `IoU.aircraft.airport.Oslo`, `recall.size.small`, `mask_APs`.
_OF_A_PART = re.compile(r"(.+?)\.(airport|size)\.(.+)", re.DOTALL)
_BY_SIZE = re.compile(r"([a-z]+_A[PR])([sml])")
_SIZES = {"s": "small", "m": "medium", "l": "large"}
Scores = dict[str, float]


@dataclass(frozen=True)
class Record:
    """What the files of a run's folder say.

    `steps` and `validations` are the lines of `log.jsonl`. `tests` has the content of
    `<split>_scores.json` for each split that was scored with `--test-only`.
    """

    folder: Path
    facts: dict[str, Any]
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    tests: dict[str, Scores]

    @property
    def best(self) -> dict[str, Any]:
        """The log line of the validation that chose `model_best.pth`; {} without any."""
        select = self.facts["select"]
        return max(self.validations, key=lambda line: line.get(select, -1), default={})

    def speed(self) -> dict[str, float]:
        """Medians over the log lines of `images_per_s` and `data_share`; the peak, `memory_mib`."""
        found = {}
        for name in ("images_per_s", "data_share"):
            if values := [line[name] for line in self.steps if name in line]:
                found[name] = statistics.median(values)
        if peaks := [line["memory_mib"] for line in self.steps if "memory_mib" in line]:
            found["memory_mib"] = max(peaks)
        return found


def begin(folder: Path, facts: dict[str, Any]) -> None:
    """Write `run.json` at the start of a training, also of one that continues."""
    before = read_object(folder / FACTS) if facts["from_step"] else {}
    _write(folder / FACTS, {"tests": before.get("tests", {}), **facts})


def tested(folder: Path, split: str, facts: dict[str, Any]) -> bool:
    """Note in `run.json` with which checkpoint a split was scored.

    Returns:
        Whether the folder has a `run.json`. A checkpoint that was copied elsewhere is without it.
    """
    known = read_object(folder / FACTS)
    if known:
        _write(folder / FACTS, known | {"tests": known.get("tests", {}) | {split: facts}})
    return bool(known)


def read(folder: Path) -> Record:
    """The record of a run.

    Raises:
        UserError: The folder has no `run.json` of ours.
    """
    facts = read_object(folder / FACTS)
    if not facts.keys() >= KEYS:
        raise UserError(
            f"{str(folder)!r} has no {FACTS}; give the output folder of a train.py (older versions "
            "wrote none: continue such a run with --resume)."
        )
    log = read_log(folder / "log.jsonl")
    scored = {
        split: read_object(folder / f"{split}_scores.json") for split in facts.get("tests", {})
    }
    return Record(
        folder,
        facts,
        [line for line in log if "lr" in line],
        [line for line in log if "lr" not in line],
        {split: scores for split, scores in scored.items() if scores},
    )


def split_name(name: str) -> tuple[str, str, str]:
    """What a score is of (`class`, `airport`, `size` or '' for all), its measure, and of which."""
    if found := _BY_SIZE.fullmatch(name):
        return "size", found[1], _SIZES[found[2]]
    if found := _OF_A_PART.fullmatch(name):
        return found[2], found[1], found[3]
    measure, _, label = name.partition(".")
    return ("class", measure, label) if label else ("", "", name)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if the file is missing or holds something else.

    Raises:
        UserError: The file is not JSON.
    """
    if not path.is_file():
        return {}
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
