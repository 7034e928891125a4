"""Seconds of training until the validation score first reaches a level.

    python benchmarks/run.py --to-quality 0.6 --models unet --techniques plain amp --seeds 5

One number for what a technique is worth: start-up, capture, compilation and lost accuracy are in
it. As a script this is one cell, a train.py that ends when the level is reached:

    python benchmarks/lib/to_quality.py report.json unet 0.6 --data-path sample_data --max-steps 400
"""

import argparse
import importlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from benchmarks.lib import launch
from benchmarks.lib.matrix import SHARE, Cell
from benchmarks.lib.readme import read_rows
from benchmarks.lib.results import CELL, KEY, PLACE, PLAIN, Row, append, newest
from common.cli import Parser, UserError, fraction, progress, run, say
from common.distributed import gather
from common.engine import fit
from common.run.report import Scoring
from common.session import Session, session

SETTINGS = ("level", "max_steps", "eval_steps")
MEASURED = ("name", "reached_s", "at_steps", "at_s", "scores")
COLUMNS = (*KEY, *CELL, *SETTINGS, *MEASURED, "wall_s", *PLACE, "when", "command")
PATIENCE = 3600.0  # seconds for a run


class Reached(Exception):
    """Ends `fit`: the score is high enough."""


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="One training, until its validation score reaches a level.")
    parser.add_argument("report", type=Path)
    parser.add_argument("model")
    parser.add_argument("level", type=fraction)
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse(words[:3])
    train = importlib.import_module(f"{args.model}.train")
    # Since the imports; without validation, which takes the same time in all cells.
    began, main_process = time.perf_counter(), True
    report: dict[str, Any] = {"reached_s": "", "at_steps": [], "at_s": [], "scores": []}

    @contextmanager
    def until_reached(*given: Any, **options: Any) -> Iterator[Session]:
        nonlocal main_process
        with session(*given, **options) as opened:
            main_process = opened.process.is_main
            try:
                yield opened
            except Reached:
                report["reached_s"] = report["at_s"][-1]

    def fit_until(s: Session, step: Any, views: Any, scoring: Scoring) -> None:
        report["name"] = scoring.select

        def judged(*given: Any) -> dict[str, float]:
            nonlocal began
            if s.process.device.type == "cuda":
                torch.cuda.synchronize(s.process.device)
            paused = time.perf_counter()
            scores = scoring.evaluate(*given)
            value = scores.get(scoring.select, -1.0)
            report["at_steps"].append(s.step)
            report["at_s"].append(paused - began)
            report["scores"].append(value)
            reached = torch.tensor(value >= args.level)
            if gather(s.process, reached)[0]:  # only rank 0 may know the scores
                raise Reached
            began += time.perf_counter() - paused
            return scores

        fit(s, step, views, replace(scoring, evaluate=judged))

    train.session, train.fit = until_reached, fit_until  # type: ignore[attr-defined]
    train.main(words[3:])
    if main_process:
        args.report.write_text(json.dumps(report) + "\n")


def measure(cells: list[Cell], place: dict[str, Any], args: argparse.Namespace) -> None:
    """Add the missing runs to `to-quality-*.csv`, beside the speeds; a round is a seed.

    Every seed runs plain and all techniques in turns. A seed for which there is not enough time is
    left out as a whole.
    """
    path = args.output.with_name(args.output.name.replace("speed", "to-quality"))
    place |= {"level": args.to_quality, "max_steps": args.max_steps, "eval_steps": args.eval_steps}
    same = (*PLACE, *SETTINGS)
    existing = read_rows(path) if path.is_file() else []
    done = {
        tuple(row[k] for k in KEY)
        for row in existing
        if not row["error"] and all(row[k] == str(place[k]) for k in same)
    }
    launch.start_server()
    end, took = time.monotonic() + 60 * args.budget, 0.0
    for seed in range(args.seeds):
        began = time.monotonic()
        todo = [cell for cell in cells if (cell.model, cell.technique, str(seed)) not in done]
        if seed and began + took > end:
            say(f"left out: seeds {seed} to {args.seeds - 1}: not enough time")
            break
        for cell in progress(todo, desc=f"seed {seed}", unit="run"):
            if cell.technique == SHARE:
                continue
            row = _measured(cell, seed, args, min(PATIENCE, max(1.0, end - time.monotonic())))
            append(path, place | row, COLUMNS)
            say(f"{cell.name}, seed {seed}: {row['error'] or _reached(row)}")
        took = max(took, time.monotonic() - began)
    print(f"wrote {path}")
    if not path.is_file():
        raise UserError("no run was started; give more minutes to --budget.")
    print(table(read_rows(path)))


def _measured(cell: Cell, seed: int, args: argparse.Namespace, timeout: float) -> dict[str, Any]:
    began = time.monotonic()
    row = launch.columns(cell, args) | {"round": seed}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        words = ["benchmarks/lib/to_quality.py", str(report), cell.model, str(args.to_quality)]
        words += launch.train_words(cell, args, f"{folder}/run")
        words += ["--seed", str(seed), "--max-steps", str(args.max_steps)]
        words += ["--eval-steps", str(args.eval_steps), "--save-every", "0"]
        # One cold cache for each run: what compiling costs is a part of the answer.
        cache = Path(folder) / "compiled"
        row["error"] = launch.run(cell, words, cache, timeout, args.dry_run)
        if report.is_file():
            row |= json.loads(report.read_text())
    row |= {"cache": "cold", "wall_s": time.monotonic() - began}
    return row | {"when": time.strftime("%Y-%m-%dT%H:%M:%S")}


def _reached(row: dict[str, Any]) -> str:
    if row["reached_s"] == "":
        return f"not reached, {row['name']} {max(row['scores'], default=0):.3f} at best"
    return f"{row['name']} {row['scores'][-1]:.3f} after {row['reached_s']:.0f} s"


def current(rows: list[Row]) -> dict[str, list[Row]]:
    """Model → its newest runs: as its last one in machine, software, commit, level and steps."""
    by_model = {row["model"]: [r for r in rows if r["model"] == row["model"]] for row in rows}
    return {
        model: [r for r in newest(runs) if all(r[k] == runs[-1][k] for k in SETTINGS)]
        for model, runs in by_model.items()
    }


def table(rows: list[Row]) -> str:
    """Seconds to the level by technique: mean, interval, ratio to plain and its p."""
    lines = [
        "| model, level | technique | seeds that reached it | seconds, mean (95 %) | steps, mean "
        "| plain's time over its, same seeds (95 %) | p |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for model, runs in current(rows).items():
        good = [row for row in runs if not row["error"]]
        name = next((row["name"] for row in good), "score")
        for technique in dict.fromkeys(row["technique"] for row in runs):
            own = {r["round"]: r for r in good if r["technique"] == technique}
            plain = {r["round"]: r for r in good if r["technique"] == PLAIN}
            level = f"{model}, {name} {float(runs[-1]['level']):g}"
            reached = [r for r in own.values() if r["reached_s"]]
            cells = [level, technique, f"{len(reached)} of {len(own)}"]
            if reached and len(reached) == len(own):
                steps = np.mean([int(r["at_steps"].split()[-1]) for r in reached])
                seconds = np.array([float(r["reached_s"]) for r in reached])
                cells += [_mean(seconds), f"{steps:.0f}"]
                pairs = [s for s in own if s in plain and plain[s]["reached_s"]]
                cells += _against(
                    [float(plain[s]["reached_s"]) / float(own[s]["reached_s"]) for s in pairs]
                    if technique != PLAIN
                    else []
                )
            else:
                cells += [""] * 4
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(seconds: np.ndarray) -> str:
    if len(seconds) < 2:
        return f"{seconds[0]:.0f}"
    half = quantile(len(seconds) - 1) * seconds.std(ddof=1) / math.sqrt(len(seconds))
    return f"{seconds.mean():.0f} ({seconds.mean() - half:.0f} to {seconds.mean() + half:.0f})"


def _against(ratios: list[float]) -> list[str]:
    """Geometric mean of paired ratios with its interval, and p of the paired t-test on logs."""
    if not ratios:
        return ["", ""]
    logs, n = np.log(ratios), len(ratios)
    if n < 2:
        return [f"{ratios[0]:.2f}", ""]
    error = logs.std(ddof=1) / math.sqrt(n)
    half = quantile(n - 1) * error
    low, mean, high = np.exp([logs.mean() - half, logs.mean(), logs.mean() + half])
    p = two_sided(logs.mean() / error, n - 1) if error else float(logs.mean() == 0)
    return [f"{mean:.2f} ({low:.2f} to {high:.2f})", f"{p:.3f}"]


def two_sided(t: float, degrees: int) -> float:
    """Probability of a Student's t at least as far from 0: its density, integrated to t."""
    x = np.linspace(0, abs(t), 20_001)
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    density = math.exp(log_scale) / math.sqrt(degrees * math.pi)
    heights = density * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    return max(0.0, 1 - 2 * float(np.trapezoid(heights, x)))


def quantile(degrees: int) -> float:
    """The t within whose distance of 0 are 95 %, by bisection."""
    low, high = 0.0, 13.0  # 12.706 for one degree of freedom
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, degrees) > 0.05 else (low, middle)
    return high


if __name__ == "__main__":
    run(main)
