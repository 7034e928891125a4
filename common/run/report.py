"""`report.html`: a run's folder explained on one page, made of the files that are in it.

These are `run.json`, `log.jsonl`, `<split>_scores.json` and `<split>_tiles.json`. The page refers
to no other file and to no network.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.io.files import write_atomic
from common.run import page
from common.run.log import headline
from common.run.record import Record, Scores, read, read_object, split_name

PAGE = "report.html"


@dataclass(frozen=True)
class Scoring:
    """How a model is scored, and what its scores mean.

    `evaluate` is (bare model, batches, process, speed-ups, folder) → scores over the batches; it
    may write pictures into the folder. `select` is the score that chooses `model_best.pth`; higher
    is better. `drawn` are the scores that are drawn over the steps: names, or beginnings that end
    in a dot. `definition` says in a sentence what the scores are. `labels` maps the name of a score
    to a dotted one, `mask_APs` to `mask_AP.size.small`, where the name itself is not.
    """

    evaluate: Callable[..., dict[str, float]]
    select: str
    drawn: tuple[str, ...]
    definition: str
    labels: dict[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """All but `evaluate`, as plain values for `run.json`."""
        return {
            "select": self.select,
            "drawn": list(self.drawn),
            "definition": self.definition,
            "labels": self.labels,
        }


# A full disk, or files that are not as expected. Not RuntimeError: the death of a loader process is
# raised as one wherever the program is, and must end the run.
FAILURES = (OSError, UserError, ArithmeticError, LookupError, TypeError, ValueError)
TITLES = {
    "": "All",
    "class": "By class",
    "airport": "By airport",
    "size": "By size of the aircraft",
}


def refresh(folder: Path) -> None:
    """Write `report.html`, completely or not at all; a failure is printed and ends no run."""
    try:
        write_atomic(folder / PAGE, render(read(folder)).encode("utf-8", "replace"))
    except FAILURES as error:
        print(f"{PAGE} was not written: {type(error).__name__}: {error}", flush=True)


def render(run: Record) -> str:
    """The page."""
    facts, best = run.facts, run.best
    done, total = max([0, *(line["step"] for line in run.steps)]), facts["total_steps"]
    state = f"step {done} of {total}" + ("" if done < total else ", finished")
    return page.document(
        f"{run.folder.resolve().name} · {facts['model']}",
        [
            page.element("h1", run.folder.resolve().name),
            page.element("p", f"{facts['model']} · {state} · started {facts['started']}", "soft"),
            page.cards(_cards(run)),
            *_scores(run),
            '<h2>Curves</h2>\n<div class="two">',
            page.chart("training loss over the steps", {"loss": _curve(run.steps, "loss")}),
            page.chart(
                "validation scores over the steps",
                {name: _curve(run.validations, name) for name in headline(best)[:8]},
                top=1,
            ),
            "</div>",
            *_tiles(run),
            *_data(run),
            *_how(run),
        ],
    )


def _curve(lines: list[dict[str, Any]], name: str) -> page.Points:
    return [(line["step"], line[name]) for line in lines if name in line]


def _cards(run: Record) -> list[tuple[str, str]]:
    select, best, speed = run.facts["select"], run.best, run.speed()
    shown = [select] + [f"IoU.{name}" for name in run.facts["classes"][1:2]]
    found = [
        (f"{name}, step {best['step']}", f"{best[name]:.4f}") for name in shown if name in best
    ]
    if "images_per_s" in speed:
        found.append(("images/s", f"{speed['images_per_s']:.1f}"))
    if "memory_mib" in speed:
        found.append(("MiB of memory at most", f"{speed['memory_mib']:.0f}"))
    return found


def _scores(run: Record) -> list[str]:
    columns, notes = dict[str, Scores](), []
    if run.best:
        columns["validation"] = {k: v for k, v in run.best.items() if k not in ("step", "epoch")}
        notes.append(f"validation: at step {run.best['step']}, which chose model_best.pth.")
    for split, scores in run.tests.items():
        of = run.facts["tests"][split]
        columns[split] = scores
        notes.append(f"{split}: {of['checkpoint']} of step {of['step']}, scored {of['when']}.")
    if not columns:
        notes.append("There is no val/ to score; model_best.pth is the last state.")
    parts = ["<h2>Scores</h2>", *(page.element("p", note, "soft") for note in notes)]
    for kind, title in TITLES.items():
        cells: dict[str, dict[str, float]] = {}
        for column, scores in columns.items():
            for name, value in scores.items():
                of_what, measure, row = split_name(name)
                if of_what == kind:
                    cells.setdefault(row, {})[f"{column} {measure}".strip()] = value
        header = list(dict.fromkeys(key for row in cells.values() for key in row))
        rows = [[row, *(_score(found.get(key)) for key in header)] for row, found in cells.items()]
        if rows:
            parts += [page.element("h3", title), page.table(rows, ["", *header])]
    return [*parts, page.element("p", f"{run.facts['definition']}.", "soft")]


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _tiles(run: Record) -> list[str]:
    parts = []
    scored = [split for split in run.facts["data"] if split != "train"]
    for split in dict.fromkeys([*scored, *run.tests]):
        tiles = read_object(run.folder / f"{split}_tiles.json")
        for kind, order in (("worst", "the most wrong aircraft pixels"), ("best", "the best IoU")):
            shown = tiles.get(kind, [])
            if not shown:
                continue
            sentence = f"Image, truth and prediction. Of {tiles['scored']} tiles those with {order}"
            parts.append(page.element("h2", f"The {kind} tiles of {split}"))
            parts.append(page.element("p", f"{sentence}, when {split} was last scored.", "soft"))
            for tile in shown:
                names = ("image", "truth", "prediction")
                pictures = dict(zip(names, tile["pictures"], strict=True))
                caption = f"{tile['tile']}, IoU {tile['iou']:.4f}, {tile['wrong']} wrong pixels"
                parts.append(page.pictures(pictures, caption))
    return parts


def _data(run: Record) -> list[str]:
    splits = run.facts["data"]
    classes = run.facts["classes"][1:]
    header = ["", "tiles", "with aircraft", "scenes", *classes]
    rows = [
        [split, of["tiles"], of["tiles_with_aircraft"], of["scenes"]]
        + [of["aircraft"].get(name, 0) for name in classes]
        for split, of in splits.items()
    ]
    names = sorted({name for of in splits.values() for name in of["airports"]})
    airports = [[name, *(of["airports"].get(name, 0) for of in splits.values())] for name in names]
    where = [
        [split, f"{of['folder']} · tiles of {of['size']} pixels · fingerprint {of['fingerprint']}"]
        for split, of in splits.items()
    ]
    note = "An aircraft is counted in each tile that shows a part of it."
    if run.facts["settings"].get("eval_tiles"):
        note += " Of val the tiles are counted that validations score."
    if not names:
        note += " The data do not say which airport a scene shows."
    return [
        "<h2>Data</h2>",
        page.table(rows, header),
        page.element("p", note, "soft"),
        page.folded(f"Tiles of {len(names)} airports", page.table(airports, ["", *splits])),
        page.folded("Folders and fingerprints", page.table(where, kind="text")),
    ]


def _how(run: Record) -> list[str]:
    facts, speed = run.facts, run.speed()
    best, model = str(run.folder / "model_best.pth"), facts["model"]
    data = str(facts["settings"].get("data_path", "data"))
    predict = ["python", f"{model}/inference.py", best, "IMAGES", "predictions"]
    score = ["python", f"{model}/train.py", "--data-path", data, "--test-only", "--resume", best]
    machine = [[key, value] for key, value in facts["machine"].items()]
    machine += [["commit", facts["commit"] or "unknown"]]
    machine += [[key, value] for key, value in facts["versions"].items()]
    measured = []
    if "images_per_s" in speed:
        measured.append(
            ["images/s in training, median of the log lines", f"{speed['images_per_s']:.1f}"]
        )
        measured.append(["share of the time spent waiting for data", f"{speed['data_share']:.1%}"])
    if "memory_mib" in speed:
        measured.append(["most memory of the first process, MiB", f"{speed['memory_mib']:.0f}"])
    settings = [[key, _plain(value)] for key, value in sorted(facts["settings"].items())]
    since = f"It continued at step {facts['from_step']}." if facts["from_step"] else ""
    return [
        "<h2>Use it</h2>",
        page.element("p", "Find the aircraft in other images:", "soft"),
        page.command(predict),
        page.element("p", "Score the test split, which also adds it to this page:", "soft"),
        page.command(score),
        "<h2>How it was trained</h2>",
        page.command(shlex.split(facts["command"])),
        page.element("p", since, "soft"),
        page.table(measured + machine, kind="text"),
        page.folded("All settings", page.table(settings, kind="text")),
    ]


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
