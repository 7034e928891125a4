"""Seconds of training until the validation score first reaches a level.

    python benchmarks/run.py --to-quality 0.6 --models unet --techniques plain amp --seeds 5

One number for what a technique is worth: start-up, capture, compilation and lost accuracy are in
it. As a script this is one cell, a train.py that ends when the level is reached:

    python benchmarks/lib/to_quality.py unet 0.6 --data-path sample_data --max-steps 400

writes `report.json` into the output folder.
"""

import argparse
import importlib
import json
import math
import os
import sys
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
from benchmarks.lib.matrix import PLAIN, Cell
from benchmarks.lib.measure import Mode
from benchmarks.lib.models import MODELS
from benchmarks.lib.readme import markdown
from benchmarks.lib.results import CELL, CONDITIONS, KEY, Row, newest
from common.cli import Parser, fraction, run
from common.distributed import gather
from common.engine import fit
from common.run.report import Scoring
from common.session import Session, session

SCORES = ("IoU.aircraft", "mIoU", "mask_AP")  # the first that a model has is compared to the level
SETTINGS = ("level", "max_steps", "eval_steps")
# 95 % of Student's t are within this distance of 0, for 1 to 10 degrees of freedom. The last one
# serves for more; their interval is then up to 14 % too wide.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Reached(Exception):
    """Ends `fit`: the score is high enough."""


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="One training, until its validation score reaches a level.")
    parser.add_argument("model")
    parser.add_argument("level", type=fraction)
    arguments = sys.argv[1:] if argv is None else argv
    args = parser.parse(arguments[:2])
    train = importlib.import_module(f"{args.model}.train")
    # Since the imports; without validation, which takes the same time in all cells.
    began = clock()
    report: dict[str, Any] = {"reached_s": "", "at_steps": [], "at_s": [], "scores": []}

    @contextmanager
    def until_reached(*given: Any, **options: Any) -> Iterator[Session]:
        with session(*given, **options) as s:
            try:
                yield s
            except Reached:
                report["reached_s"] = report["at_s"][-1]
        if s.process.is_main:
            (s.output_dir / "report.json").write_text(json.dumps(report) + "\n")

    def fit_until(s: Session, step: Any, views: Any, scoring: Scoring) -> None:
        def judged(*given: Any) -> dict[str, float]:
            nonlocal began
            if s.process.device.type == "cuda":
                torch.cuda.synchronize(s.process.device)
            paused = clock()
            scores = scoring.evaluate(*given)
            report["name"] = next((name for name in SCORES if name in scores), "")
            value = scores.get(report["name"], -1.0)
            report["at_steps"].append(s.step)
            report["at_s"].append(paused - began)
            report["scores"].append(value)
            reached = torch.tensor(value >= args.level)
            if gather(s.process, reached)[0]:  # only rank 0 may know the scores
                raise Reached
            began += clock() - paused
            return scores

        fit(s, step, views, replace(scoring, evaluate=judged))

    train.session, train.fit = until_reached, fit_until  # type: ignore[attr-defined]
    train.main(arguments[2:])


def clock() -> float:
    """Seconds; without a GPU of all CPU cores, so that other programs change them little."""
    return time.perf_counter() if torch.cuda.is_available() else sum(os.times()[:4])


def _train(
    cell: Cell, seed: int, args: argparse.Namespace, timeout: float
) -> tuple[dict[str, Any], str]:
    options = ["--seed", seed, "--max-steps", args.max_steps]
    options += ["--eval-steps", args.eval_steps, "--save-every", 0]
    script = ["benchmarks/lib/to_quality.py", cell.model, args.level]
    # With a cold cache: what compiling costs is a part of the answer.
    row = launch.measured(cell, args, script, options, timeout, cold=True)
    if row["error"]:
        return row, ""
    if row["reached_s"] == "":
        return row, f"not reached, {row['name']} {max(row['scores'], default=0):.3f} at best"
    return row, f"{row['name']} {row['scores'][-1]:.3f} after {row['reached_s']:.0f} s"


def current(rows: list[Row]) -> dict[str, list[Row]]:
    """Model and tiles → its newest runs: as its last in machine, software, commit, level, steps."""
    by_series: dict[str, list[Row]] = {}
    for row in rows:
        by_series.setdefault(f"{row['model']} on {row['data']}", []).append(row)
    return {
        series: [r for r in newest(runs) if all(r[k] == runs[-1][k] for k in SETTINGS)]
        for series, runs in by_series.items()
    }


def table(rows: list[Row]) -> str:
    """Seconds to the level by technique: mean, interval, ratio to plain."""
    head = ["model, tiles, level", "technique", "seeds that reached it", "seconds, mean (95 %)"]
    head += ["steps, mean", "plain's time over its, same seeds (95 %)"]
    lines = []
    for series, runs in current(rows).items():
        good = [row for row in runs if not row["error"]]
        name = next((row["name"] for row in good), "score")
        level = f"{series}, {name} {float(runs[-1]['level']):g}"
        plain = {r["round"]: r for r in good if r["technique"] == PLAIN}
        for technique in dict.fromkeys(row["technique"] for row in runs):
            tried = [row for row in good if row["technique"] == technique]
            reached = {row["round"]: float(row["reached_s"]) for row in tried if row["reached_s"]}
            cells = [level, technique, f"{len(reached)} of {len(tried)}", "", ""]
            if reached and len(reached) == len(tried):
                steps = np.mean([int(row["at_steps"].split()[-1]) for row in tried])
                cells[3:] = [_mean(np.array(list(reached.values()))), f"{steps:.0f}"]
            pairs = [(plain[row["round"]], row) for row in tried if row["round"] in plain]
            lines.append([*cells, _against(pairs) if technique != PLAIN else ""])
    return markdown(head, lines, "llr")


def last_scores(rows: list[Row]) -> str:
    """What each model had at the end, and half the range of its seeds: there may be few.

    The runs should have taken the same time, so each model its own `--max-steps`.
    """
    lines = []
    for runs in current(rows).values():
        good = [row for row in runs if not row["error"]]
        scores = [float(row["scores"].split()[-1]) for row in good]
        seconds = np.mean([float(row["at_s"].split()[-1]) for row in good])
        half = (max(scores) - min(scores)) / 2
        cells = [MODELS[good[0]["model"]].title, good[0]["backbone"], good[0]["max_steps"]]
        cells += [f"{seconds / 60:.1f}", good[0]["name"], f"{np.mean(scores):.3f} ± {half:.3f}"]
        lines.append([*cells, str(len(scores))])
    head = ["model", "backbone", "steps", "CPU minutes", "score", "mean ± half range", "seeds"]
    return markdown(head, lines, "llrrlr")


def _mean(seconds: np.ndarray) -> str:
    if len(seconds) < 2:
        return f"{seconds[0]:.0f}"
    half = _half_width(seconds)
    return f"{seconds.mean():.0f} ({seconds.mean() - half:.0f} to {seconds.mean() + half:.0f})"


def _against(pairs: list[tuple[Row, Row]]) -> str:
    """Geometric mean of paired ratios, and the interval of a t-test on their logarithms.

    A run that never reached the level would have taken longer than it did. With such runs on one
    side the mean is a bound, `>` or `<`, without an interval; with some on both sides nothing is
    known.
    """
    unreached = [any(not row["reached_s"] for row in side) for side in zip(*pairs, strict=True)]
    if not pairs or all(unreached):
        return ""
    seconds = np.array(
        [[float(row["reached_s"] or row["at_s"].split()[-1]) for row in pair] for pair in pairs]
    )
    logs = np.log(seconds[:, 0] / seconds[:, 1])
    if any(unreached) or len(pairs) < 2:
        bound = "> " if unreached[0] else "< " if unreached[1] else ""
        return f"{bound}{np.exp(logs.mean()):.2f}"
    half = _half_width(logs)
    low, mean, high = np.exp([logs.mean() - half, logs.mean(), logs.mean() + half])
    return f"{mean:.2f} ({low:.2f} to {high:.2f}), p {_p_value(logs):.3f}"


def _p_value(logs: np.ndarray) -> float:
    """Of a paired t-test against 0, by the integral of Student's density."""
    n, t = len(logs) - 1, abs(logs.mean()) * math.sqrt(len(logs)) / max(logs.std(ddof=1), 1e-9)
    x = np.linspace(0, math.atan(t / math.sqrt(n)), 2001)  # t = tan(x) · √n makes it finite
    scale = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(math.pi)
    return max(0.0, 1 - 2 * scale * float(np.trapezoid(np.cos(x) ** (n - 1), x)))


def _half_width(values: np.ndarray) -> float:
    """Of the 95 % interval of the mean of at least two values."""
    quantile = T_95[min(len(values) - 1, len(T_95)) - 1]
    return quantile * values.std(ddof=1) / math.sqrt(len(values))


MEASURED = ("name", "reached_s", "at_steps", "at_s", "scores", "wall_s")
COLUMNS = (*KEY, *CELL, *SETTINGS, *MEASURED, *CONDITIONS, "when", "command")
MODE = Mode("to-quality", SETTINGS, COLUMNS, 3600.0, _train, table)


if __name__ == "__main__":
    run(main)
