"""What a run reports: `log.jsonl`, `run.json`, `curves.png`, and `report.html`, made of these.

The page refers to no other file and to no network. matplotlib and jinja2 are imported where they
are used: inference loads this module and needs neither.
"""

import base64
import io
import json
import math
import re
import shlex
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np

from common.cli import UserError
from common.distributed import Process
from common.io.files import read_json, write_atomic
from common.io.pictures import OUTCOMES, class_colours, compared, printable, save, sheet

FACTS, CURVES, PAGE = "run.json", "curves.png", "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")
KEYS = {"model", "classes", "select", "definition", "from_step", "settings", "data", "machine"}
KEYS |= {"started", "total_steps", "command", "commit", "versions"}
ROWS = 4  # of a sheet
STYLE = Path(__file__).with_name("curves.mplstyle")
Scores = dict[str, float]


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
        """All but `evaluate`, for `run.json`."""
        return {name: value for name, value in vars(self).items() if name != "evaluate"}


class Log:
    """`log.jsonl`: one JSON object per line, from rank 0; a resumed run drops what it repeats.

    `first_step` is the first one of this process, after the `step` that it continues from.
    """

    def __init__(self, path: Path, process: Process, step: int) -> None:
        self.path, self.enabled, self.first_step = path, process.is_main, step + 1
        if self.enabled:
            kept = [line for line in read_log(path) if line["step"] <= step] if step else []
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, **values: float) -> None:
        if self.enabled:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a full disk or a power cut left incomplete is skipped."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def describe(scores: Scores) -> str:
    """Scores as a line; those of the airports, which may be many, are in the files alone."""
    shown = {name: value for name, value in scores.items() if ".airport." not in name}
    return "  ".join(f"{name} {value:.4f}" for name, value in shown.items())


@dataclass(frozen=True)
class Record:
    """What the files of a run's folder say.

    `facts` is the content of `run.json`. `steps` and `validations` are the lines of `log.jsonl`.
    `tests` has the content of each `<split>_scores.json` that `--test-only` wrote, by the split.
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
        scored = [line for line in self.validations if line.get(select, math.nan) > -math.inf]
        return max(scored or self.validations[:1], key=lambda line: line.get(select, 0), default={})

    def speed(self) -> dict[str, float]:
        """Medians over the log lines of `images_per_s` and `data_share`; the peak, `memory_mib`."""
        kinds: dict[str, Any] = {"images_per_s": median, "data_share": median, "memory_mib": max}
        values = {name: [line[name] for line in self.steps if name in line] for name in kinds}
        return {name: kinds[name](found) for name, found in values.items() if found}

    def drawn(self, limit: int = 8) -> list[str]:
        """The first scores to draw over the steps: the selected one, then those of `drawn`.

        An entry of `drawn` in `run.json` is a name, or a prefix that ends in a dot. The scores of
        an airport or a size are never drawn.
        """
        select, entries = self.facts["select"], self.facts.get("drawn", [])
        prefixes = tuple(entry for entry in entries if entry.endswith("."))
        names = dict.fromkeys(name for line in self.validations for name in line)
        listed = [name for name in names if name in entries or name.startswith(prefixes)]
        listed = [name for name in listed if self.split_name(name)[0] in ("", "class")]
        return [name for name in dict.fromkeys([select, *listed]) if name in names][:limit]

    def split_name(self, name: str) -> tuple[str, str, str]:
        """What a score is of (`class`, `airport`, `size` or '' for all), its measure, and of which.

        `IoU.aircraft.airport.Oslo` is `airport`, `IoU.aircraft`, `Oslo`. `labels` in `run.json`
        maps names that are not dotted to names that are.
        """
        name = self.facts.get("labels", {}).get(name, name)
        if part := re.fullmatch(r"(.+?)\.(airport|size)\.(.+)", name, re.DOTALL):
            return part[2], part[1], part[3]
        measure, _, label = name.partition(".")
        return ("class", measure, label) if label else ("", "", name)

    def title(self, name: str) -> str:
        """A score in words: `aircraft IoU`, `mean IoU`, `mask AP, small`."""
        kind, measure, of = self.split_name(name)
        if kind in ("airport", "size"):
            return f"{self.title(measure)}, {of}"
        words = re.sub("^m(?=[A-Z])", "mean ", measure or of).replace("_", " ")
        return f"{of} {words}" if kind else words

    def averaged(self, scores: Scores, name: str) -> str:
        """`2 of 3 classes` if the mean `name` leaves classes out that do not occur; '' if not."""
        measure, classes = re.sub("^m(?=[A-Z])", "", name), self.facts["classes"]
        found = [n for n in scores if self.split_name(n)[:2] == ("class", measure)]
        total = len(classes) - (f"{measure}.{classes[0]}" not in found)
        return f"{len(found)} of {total} classes" if 0 < len(found) < total else ""

    def columns(self) -> dict[str, Scores]:
        """The splits that were tested, and the validation that chose `model_best.pth`."""
        best = {name: value for name, value in self.best.items() if name not in ("step", "epoch")}
        return self.tests | ({"validation": best} if best else {})


def begin(folder: Path, facts: dict[str, Any]) -> None:
    """Write `run.json` at the start of a training, also of one that continues."""
    before = _read_object(folder / FACTS) if facts["from_step"] else {}
    write(folder / FACTS, {"tests": before.get("tests", {}), **facts})


def tested(folder: Path, split: str, facts: dict[str, Any], scoring: Scoring) -> bool:
    """Note in `run.json` with which checkpoint a split was scored, and what the scores are.

    Returns:
        Whether the folder has a `run.json`. A checkpoint that was copied elsewhere is without it.
    """
    known = _read_object(folder / FACTS)
    if known:
        tests = known.get("tests", {}) | {split: facts}
        write(folder / FACTS, scoring.facts() | known | {"tests": tests})
    return bool(known)


def read(folder: Path) -> Record:
    """The record of a run.

    Raises:
        UserError: The folder has no `run.json` of ours.
    """
    facts = _read_object(folder / FACTS)
    if not facts.keys() >= KEYS:
        raise UserError(
            f"{str(folder)!r} has no {FACTS}; give the output folder of a train.py (older versions "
            "wrote none: continue such a run with --resume)."
        )
    log = read_log(folder / "log.jsonl")
    steps = [line for line in log if "lr" in line]
    validations = [line for line in log if "lr" not in line]
    tests = {name: _read_object(folder / f"{name}_scores.json") for name in facts.get("tests", {})}
    return Record(folder, facts, steps, validations, {k: v for k, v in tests.items() if v})


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, as `read_json`; {} if it is missing or holds something else."""
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def write(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def refresh(folder: Path) -> None:
    """Write `curves.png` and `report.html`, each completely or not at all.

    A failure is printed and ends no run.
    """
    try:
        run = read(folder)
        png, svg = draw(run)
        write_atomic(folder / CURVES, png)
        write_atomic(folder / PAGE, render(run, svg).encode("utf-8", "replace"))
    except RuntimeError:
        raise  # the death of a loader process is raised as one anywhere, and must end the run
    except Exception as error:
        print(f"{PAGE} was not written: {type(error).__name__}: {error}", flush=True)


def draw(run: Record) -> tuple[bytes, str]:
    """The training loss and the drawn scores over the steps, as a PNG and as an SVG for HTML.

    Equal logs give equal pictures.
    """
    import matplotlib
    from matplotlib.figure import Figure

    colours = class_colours(run.facts["classes"])
    curves = [("loss", run.steps)] + [(name, run.validations) for name in run.drawn()]
    with matplotlib.rc_context(fname=STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # letters of a score's name
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, (name, lines) in enumerate(curves):
            lines = [line for line in lines if name in line]
            label = re.sub(r" \((box|diamond)\)$", "", run.split_name(name)[2])
            (right if number else left).plot(
                [line["step"] for line in lines],
                [line[name] for line in lines],
                linewidth=2.2 if name == run.facts["select"] else 1.3,
                marker="o" if len(lines) < 20 else None,
                # matplotlib before 3.10 does not show a label that begins with _.
                label=" " + printable(run.title(name)[:40]),
                **({"color": colours[label], "linestyle": "-"} if label in colours else {}),
            )
        for axes, what, top in ((left, "training loss", None), (right, "validation score", 1)):
            axes.set(xlabel="step", xlim=(0, None), ylabel=what, ylim=(0, top))
            axes.xaxis.get_major_locator().set_params(integer=True, steps=[1, 2, 5, 10])
        right.set_visible(len(curves) > 1)
        figure.legend(handles=right.get_lines(), loc="outside lower center", ncols=3)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=140)
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=no_metadata)
    # HTML needs neither the header of an XML file nor name spaces.
    text = svg.getvalue()[svg.getvalue().index("<svg") :]
    return png.getvalue(), re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=2)


def render(run: Record, curves: str) -> str:
    """The page, with the curves as an SVG."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["quote"] = shlex.quote
    data = run.facts["data"]
    splits = dict.fromkeys([*data, *run.tests])
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        run=run,
        facts=run.facts,
        speed=run.speed(),
        curves=curves,
        colours=class_colours(run.facts["classes"]),
        outcomes=OUTCOMES,
        tiles={split: _read_object(run.folder / f"{split}_tiles.json") for split in splits},
        airports=sorted({name for of in data.values() for name in of["airports"]}),
    )


class Shown:
    """Pictures of scored tiles: some on a sheet, the worst and the best for the page.

    Those on the sheet are spread evenly over the tiles that show an aircraft, or over all if none
    does. The worst have the most wrong aircraft pixels, the best the highest IoU.

    Args:
        images: The entries of the set's tiles in its COCO file.
        scored: The indices of the tiles that will be offered.
        shows_aircraft: Whether the tile at an index shows an aircraft.
    """

    count = 3  # of the worst, and of the best

    def __init__(
        self, images: list[dict], scored: list[int], shows_aircraft: Callable[[int], bool]
    ) -> None:
        self.images, self.offered = images, 0
        tiles = [tile for tile in scored if shows_aircraft(tile)] or scored
        self.on_sheet = {tiles[k * len(tiles) // ROWS] for k in range(ROWS) if tiles}
        self.rows: dict[str, list[np.ndarray]] = {}  # pictures by caption
        # Sorted; an entry is the order of a tile, in which the first ones are kept, and the tile.
        self.worst: list[tuple[tuple[float, ...], dict[str, Any]]] = []
        self.best: list[tuple[tuple[float, ...], dict[str, Any]]] = []

    def offer(
        self, tiles: list[int], pixels: Sequence[Sequence[int]], row: Callable[[int], tuple]
    ) -> None:
        """Look at the tiles of a batch; one without aircraft in truth and prediction has no IoU.

        Args:
            tiles: Their indices in the set.
            pixels: Of each tile two numbers: the aircraft pixels that are predicted as their class,
                and those that are aircraft in truth or prediction.
            row: Index in the batch → what `compared` takes. Called for a tile that is kept.
        """
        for i, (tile, (hits, union)) in enumerate(zip(tiles, pixels, strict=True)):
            self.offered += 1
            name, iou = self.images[tile]["file_name"], hits / union if union else 0.0
            if tile in self.on_sheet:
                caption = f"{name}, IoU {iou:.2f}" if union else name
                self.rows[caption] = compared(*row(i))
            orders = (hits - union, tile), (-iou, -union, tile)
            for kept, order in zip((self.worst, self.best), orders, strict=True):
                if union and (len(kept) < self.count or order < kept[-1][0]):
                    shown = {"tile": name, "iou": iou, "wrong": union - hits}
                    kept.append((order, shown | {"pictures": _uris(compared(*row(i)))}))
                    kept.sort(key=lambda entry: entry[0])
                    del kept[self.count :]

    def write(self, folder: Path, split: str, classes: list[str]) -> None:
        """Write `<split>_sheet.jpg` and `<split>_tiles.json`.

        The latter has `scored`, the number of offered tiles, `worst` and `best`: `tile` (its name),
        `iou`, `wrong` (aircraft pixels) and `pictures` (image, truth, prediction, errors: JPEGs).
        """
        worst, best = ([tile for _, tile in kept] for kept in (self.worst, self.best))
        names = {tile["tile"] for tile in worst}
        best = [tile for tile in best if tile["tile"] not in names]
        content = {"scored": self.offered, "worst": worst, "best": best}
        write_atomic(folder / f"{split}_tiles.json", json.dumps(content).encode())
        if self.rows:
            title = f"{len(self.rows)} of {len(self.images)} {split} tiles"
            save(sheet(self.rows, title, classes), folder / f"{split}_sheet.jpg")


def _uris(pictures: list[np.ndarray]) -> list[str]:
    uris = []
    for picture in pictures:
        jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
        uris.append("data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode())
    return uris
