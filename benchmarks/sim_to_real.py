"""What rendered scenes are worth on real images, and what raises it: a training for each row.

    python benchmarks/sim_to_real.py real/ --weights-backbone lite0.pth --seeds 0 1 2
    python benchmarks/sim_to_real.py real/ --weights-backbone lite0.pth --rows rendered grounds

All trainings of a call have the same number of steps. `rareplanes/README.md` says what is in
`real/`. A training that is in the results file already is not repeated.
"""

import csv
import json
import os
import resource
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torchvision.ops import box_iou

from benchmarks.lib import readme
from benchmarks.lib.environment import measured_on, provenance
from benchmarks.quickstart import timed
from common.args import has_native_bf16
from common.cli import Parser, number, positive, run, seeds
from preprocessing.hard_negatives import read_predictions

FILE = readme.RESULTS / "sim_to_real.csv"
PAGE = readme.ROOT / "rareplanes/README.md"
FRONT = readme.ROOT / "README.md"
NETWORK = {
    "unet": "--encoder tu-efficientnet_lite0 --decoder-channels 128 64 32 16 16",
    "mask": "--backbone tu-efficientnet_lite0 --proposals 200",
}
TRAINING = (
    "--crop-size 256 -b 4 --scale-jitter 1 --lr 1e-3 --warmup-steps 20 --ema 0.99 "
    "-j 0 --eval-tiles 32"
)
SCORE = {"unet": "UNet, IoU", "mask": "Mask R-CNN, mask AP50"}
COLUMNS = {  # of the results file: title and digits in the table
    "rendered": ("unseen rendered scenes", 3),
    "scene": ("RarePlanes' rendered scene", 3),
    "nwpu58": ("NWPU, 58 images", 3),
    "nwpu": ("NWPU, 12 images", 3),
    "airbus": ("Airbus, share of aircraft found", 2),
    "false_per_km2": ("Airbus, false alarms per km²", 1),
}
GSD = 0.5  # metres per pixel of the Airbus scenes
LEAST_AREA = "400"  # pixels of a find there, 100 m²: a sixth of the smallest labelled box
JOIN = {"unet": ["--join", "8"], "mask": []}  # pixels, 4 m: stands have 4.5 m between two wings
LEAST_OVERLAP = 0.5  # of a found box and a labelled one, IoU


class Recipe(NamedTuple):
    """What a row is trained with: data sets beside the rendered scenes, and options."""

    title: str
    data: tuple[str, ...] = ("rendered",)
    options: str = ""
    mined: bool = False
    """The last third of the steps goes on with what was wrongly found on real ground."""
    then: str = ""
    """The last third of the steps is on this data set, with the encoder trained."""


FROZEN = "--freeze-encoder"
# The photographs have about the scale of those that they are scored on.
PHOTOGRAPHS = "--scale-jitter 0.5"
LABELLED = {"nwpu", "few"}  # data sets of photographs, 46 and 8
ROWS = {
    "rendered": Recipe("rendered scenes"),
    "frozen": Recipe("rendered scenes, encoder frozen", options=FROZEN),
    "augmented": Recipe("frozen, and strong augmentation", options=f"{FROZEN} --augment strong"),
    "grounds": Recipe(
        "frozen, and aircraft rendered on real ground", ("rendered", "grounds"), FROZEN
    ),
    "mined": Recipe(
        "frozen, on real ground, and hard negatives", ("rendered", "grounds"), FROZEN, True
    ),
    "few": Recipe("only 8 labelled photographs", ("few",), PHOTOGRAPHS),
    "few_tuned": Recipe(
        "frozen, on real ground, then 8 photographs", ("rendered", "grounds"), FROZEN, then="few"
    ),
    "photographs": Recipe("only 46 labelled photographs", ("nwpu",), PHOTOGRAPHS),
    "tuned": Recipe(
        "frozen, on real ground, then 46 photographs", ("rendered", "grounds"), FROZEN, then="nwpu"
    ),
}


def prepare(real: Path, data: Path, ground_gsd: float) -> None:
    """Render and tile whatever is not there yet."""
    sample = ["rareplanes/sample.py", "-j", "2", "-n", "96", "-o"]
    tile = ["preprocessing/preprocess.py", "-s", "512", "-n", "2"]
    nwpu = real / "nwpu_airplane"
    coco = ["preprocessing/coco.py", str(nwpu / "images"), str(nwpu / "instances.json")]
    coco += ["-s", "512", "--negatives", "100", "--rename", "airplane=aircraft", "-o"]
    if not (data / "rendered/test/instances_tiled.json").exists():
        timed([*sample, str(data / "rendered")])
        timed([*tile, str(data / "rendered")])
    if not (data / "grounds/train/instances_tiled.json").exists():
        grounds = ["--backgrounds", str(real / "negatives"), "--gsd", str(ground_gsd)]
        timed([*sample, str(data / "grounds"), *grounds, "--test-fraction", "0"])
        timed([*tile, str(data / "grounds"), "--negatives", "0.3"])
    if not (data / "nwpu/train/instances_tiled.json").exists():
        timed([*coco, str(data / "nwpu"), "--split", str(nwpu / "split.json")])
        timed([*coco, str(data / "nwpu58"), "--as", "test"])
    if not (data / "few/train/instances_tiled.json").exists():
        split = json.loads((nwpu / "split.json").read_text())
        few = data / "few.json"
        few.write_text(json.dumps(split | {"train": split["train"][::6]}))
        timed([*coco, str(data / "few"), "--split", str(few)])
    if not (data / "scene/test/instances_tiled.json").exists():
        (data / "scene/test").mkdir(parents=True)
        for name in ("images", "masks", "xmls"):  # the tiles are not written beside them
            link = data / "scene/test" / name
            link.symlink_to((real / "rareplanes_example" / name).resolve())
        timed([*tile, str(data / "scene")])


def train(model: str, recipe: Recipe, seed: int, steps: int, folder: Path, args: Any) -> float:
    """Train a row's model into `folder`; CPU minutes."""
    data = args.output_dir / "data"
    before = _cpu_minutes()

    def once(run: Path, count: int, names: tuple[str, ...], options: str, start: list[str]) -> None:
        first, *others = (str(data / name) for name in names)
        words = [f"{model}/train.py", "--data-path", first, "--output-dir", str(run), *start]
        words += ["--extra-data", *others] if others else []
        words += [*NETWORK[model].split(), *TRAINING.split(), *options.split(), *_fast()]
        words += ["--max-steps", str(count), "--eval-steps", str(count)]
        timed([*words, "--seed", str(seed)])

    pretrained = ["--weights-backbone", str(args.weights_backbone)]
    last = steps // 3 if recipe.mined or recipe.then else 0
    start = folder / "first" if last else folder
    once(start, steps - last, recipe.data, recipe.options, pretrained)
    names, options = recipe.data, recipe.options
    if recipe.mined:
        empty, found = str(args.real / "negatives"), folder / "found"
        timed([f"{model}/inference.py", str(start / "model_best.pth"), empty, str(found), *_fast()])
        hard = ["preprocessing/hard_negatives.py", str(found / "predictions.json"), empty]
        timed([*hard, "-o", str(folder / "hard"), "-s", "512"])
        names = (*names, os.path.relpath(folder / "hard", data))
    if recipe.then:
        names, options = (recipe.then,), PHOTOGRAPHS
    if last:
        once(folder, last, names, options, ["--init-from", str(start / "model_best.pth")])
    return _cpu_minutes() - before


def _fast() -> list[str]:
    """The speed-ups of this processor."""
    bf16 = has_native_bf16(torch.device("cpu"))
    return ["--amp", "--channels-last"] if bf16 else ["--channels-last"]


def _cpu_minutes() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


def scores(model: str, folder: Path, args: Any) -> dict[str, float]:
    """The scores of a model on every set; of `nwpu58` it may have been trained on 46 images."""
    best, data = str(folder / "model_best.pth"), args.output_dir / "data"
    result = {}
    splits = {"rendered": "test", "scene": "test", "nwpu58": "test", "nwpu": "val"}
    for name, split in splits.items():
        words = ["--data-path", str(data / name), "--test-only", split, "--resume", best]
        timed([f"{model}/train.py", *words, "--channels-last", "-b", "4", "-j", "0"])
        content = json.loads((folder / f"{split}_scores.json").read_text())
        result[name] = content["IoU.aircraft" if model == "unet" else "mask_AP50"]
    places = folder / "airbus"
    images = args.real / "airbus_scenes/images"
    words = [str(images), str(places), "--min-area", LEAST_AREA, *JOIN[model], *_fast()]
    timed([f"{model}/inference.py", best, *words])
    return result | found_boxes(places / "predictions.json", args.real / "airbus_scenes/boxes.csv")


def found_boxes(predictions: Path, labels: Path) -> dict[str, float]:
    """Recall of the labelled boxes, and false alarms for each labelled aircraft and each km².

    Boxes are matched one to one, those of the largest overlap first. A truncated aircraft may be
    found, and need not be.
    """
    labelled: dict[str, list[list[float]]] = defaultdict(list)
    needed: dict[str, list[bool]] = defaultdict(list)
    with labels.open(newline="") as file:
        for row in csv.DictReader(file):
            corners = [float(row[name]) for name in ("x0", "y0", "x1", "y1")]
            labelled[row["image"]].append(corners)
            needed[row["image"]].append(row["class"] == "Airplane")
    wanted = sum(map(sum, needed.values()))
    hits = false = pixels = 0
    for name, scene in read_predictions(predictions)[1].items():
        found = [[x, y, x + w, y + h] for x, y, w, h in scene.boxes]
        pairs = box_iou(*(torch.tensor(b).reshape(-1, 4) for b in (found, labelled[name])))
        matched: dict[int, int] = {}  # found → labelled
        while pairs.numel() and pairs.max() >= LEAST_OVERLAP:
            i, k = divmod(int(pairs.argmax()), pairs.shape[1])
            matched[i] = k
            pairs[i], pairs[:, k] = 0, 0
        hits += sum(needed[name][k] for k in matched.values())
        false += len(found) - len(matched)
        pixels += scene.width * scene.height
    area = pixels * (GSD / 1000) ** 2
    return {
        "airbus": hits / wanted,
        "false_per_aircraft": false / wanted,
        "false_per_km2": false / area,
    }


def table(rows: list[dict[str, str]]) -> str:
    """The means over the seeds, for each model, row and length."""
    machines = sorted({measured_on(row) for row in rows})
    lines = [_line(same, COLUMNS, "steps") for same in _trainings(rows)]
    return "\n".join([*machines, "", _table(lines, COLUMNS, "steps")])


def front(rows: list[dict[str, str]]) -> str:
    """The front page's table: for each model and row the length with the most seeds."""
    most: dict[tuple[str, str], list[dict[str, str]]] = {}
    for same in _trainings(rows):
        kind = same[0]["model"], same[0]["row"]
        most[kind] = max(most.get(kind, []), same, key=len)
    columns = [name for name in COLUMNS if name != "rendered"]
    lines = [_line(same, columns) for same in most.values()]
    used = [row for same in most.values() for row in same]
    machines, commits = (", ".join(sorted({row[k] for row in used})) for k in ("cpu", "commit"))
    return f"{_table(lines, columns)}\n\n*Measured on {machines}, commits {commits}.*"


def _trainings(rows: list[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    """The rows that differ in nothing but the seed, in the order of the table."""
    lengths = sorted({int(row["steps"]) for row in rows})
    for kind in product(SCORE, ROWS, map(str, lengths)):
        same = [row for row in rows if (row["model"], row["row"], row["steps"]) == kind]
        if same:
            yield same


def _line(same: list[dict[str, str]], columns: Iterable[str], *settings: str) -> list[str]:
    """Cells of a table; no score on what was trained on."""
    row, recipe = same[0], ROWS[same[0]["row"]]
    seen = ["nwpu58"] if LABELLED & {*recipe.data, recipe.then} else []
    shown = [
        "" if name in seen else _spread([float(r[name]) for r in same], COLUMNS[name][1])
        for name in columns
    ]
    minutes = _spread([float(r["cpu_minutes"]) for r in same], 0)
    return [SCORE[row["model"]], recipe.title, *shown, *(row[name] for name in settings), minutes]


def _table(lines: list[list[str]], columns: Iterable[str], *settings: str) -> str:
    titles = [COLUMNS[name][0] for name in columns]
    return readme.markdown(["model", "trained on", *titles, *settings, "CPU minutes"], lines, "llr")


def _spread(values: list[float], digits: int) -> str:
    """`0.518 ± 0.021`: the mean, and half the range of the values."""
    half = (max(values) - min(values)) / 2
    spread = f" ± {half:.{digits}f}" if len(values) > 1 and digits else ""
    return f"{mean(values):.{digits}f}{spread}"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("real", type=Path, help="folder of the real images")
    add("--weights-backbone", type=Path, required=True, help="ImageNet's for efficientnet_lite0")
    add("--models", nargs="+", choices=list(NETWORK), default=list(NETWORK))
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    add("--seeds", type=seeds, nargs="+", default=[0])
    add("--steps", type=positive, default=1500, help="of every training")
    add(
        "--ground-gsd",
        type=number(float, 0.01, 10),
        default=0.5,
        help="metres per pixel of real/negatives",
    )
    add("-o", "--output-dir", type=Path, default=Path("runs/sim_to_real"))
    add("--results", type=Path, default=FILE)
    add("--write-readme", action="store_true", help="also renew the READMEs' tables")
    args = parser.parse(argv)
    prepare(args.real, args.output_dir / "data", args.ground_gsd)
    rows: list[dict[str, Any]] = [*readme.read_rows(args.results)] if args.results.exists() else []
    done = {(r["model"], r["row"], r["seed"], r["steps"]) for r in rows}
    for seed in args.seeds:
        for name in args.rows:
            for model in args.models:
                if (model, name, str(seed), str(args.steps)) in done:
                    continue
                folder = args.output_dir / f"{model}_{name}_{args.steps}_{seed}"
                minutes = train(model, ROWS[name], seed, args.steps, folder, args)
                row = {"model": model, "row": name, "seed": seed, "steps": args.steps}
                scored = scores(model, folder, args)
                row |= {"cpu_minutes": round(minutes, 2)}
                row |= {score: round(value, 4) for score, value in scored.items()}
                rows.append(row | provenance(__file__, argv))
                readme.write_rows(args.results, rows)
    shown = readme.read_rows(args.results)
    print(table(shown))
    if args.write_readme:
        readme.check_clean(rows)
        readme.write_part(PAGE, "sim-to-real", table(shown))
        readme.write_part(FRONT, "real-images", front(shown))


if __name__ == "__main__":
    run(main)
