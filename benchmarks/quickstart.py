"""The quick start: a UNet from rendered scenes to its pictures, each command shown and timed.

    python benchmarks/quickstart.py                                  # what `make quickstart` runs
    python benchmarks/quickstart.py --seeds 0 1 2 --write-readme     # the README's table
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/quickstart.py --seeds 0 1 2

The last one measures as on a processor without bf16 instructions.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.lib.environment import provenance
from benchmarks.lib.readme import ROOT, check_clean, markdown, read_rows, write_part, write_rows
from common.args import has_native_bf16
from common.cli import Parser, UserError, run, seeds

DATA, RUN = "sample_data", "runs/quickstart"
PARTS = ("render", "tile", "train", "score", "predict")
RESULTS = ROOT / "benchmarks/results/quickstart.csv"
FRONT_PAGE = ROOT / "README.md"


def commands(seed: int, fast: list[str]) -> dict[str, list[str]]:
    """Each part's script and arguments.

    Args:
        seed: Of weights, order and augmentation.
        fast: Options that make the training faster on this machine.
    """
    best = f"{RUN}/model_best.pth"
    return {
        "render": f"rareplanes/sample.py -o {DATA} -n 64 --plain --test-fraction 0.125 "
        "-j 2".split(),
        "tile": f"preprocessing/preprocess.py {DATA} -s 512 -n 2".split(),
        "train": f"unet/train.py --data-path {DATA} --output-dir {RUN} --seed {seed} "
        "--encoder tu-regnetx_002 --weights-backbone none --decoder-channels 128 64 32 16 16 "
        "--crop-size 256 -b 4 --lr 1.2e-3 --warmup-steps 20 --max-steps 350 "
        "--eval-steps 50 --eval-tiles 16 -j 0".split()
        + fast,
        "score": f"unet/train.py --data-path {DATA} --test-only --resume {best} --channels-last "
        "-b 4 -j 0".split(),
        "predict": f"unet/inference.py {best} {DATA}/test/images {RUN}/predictions -i 3".split(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=seeds, nargs="+", default=[0], help="a training for each")
    parser.add_argument(
        "--write-readme", action="store_true", help=f"add to {RESULTS.name} and renew the README"
    )
    args = parser.parse(argv)
    cpu = torch.device("cpu")
    fast = torch.cuda.is_available() or has_native_bf16(cpu)
    took: dict[str, float] = {}
    rows = []
    for seed in args.seeds:
        # A training never writes over another; what was rendered and tiled is kept.
        shutil.rmtree(RUN, ignore_errors=True)
        for part, command in commands(seed, ["--amp", "--channels-last"] if fast else []).items():
            if part in took and part in ("render", "tile"):
                continue
            if part == "train":
                print(f"(watch {RUN}/val_sheet.jpg: each validation draws it again)")
            took[part] = timed(command)
        scores = json.loads(Path(RUN, "test_scores.json").read_text())
        rows.append(
            {
                "bf16": "yes" if has_native_bf16(cpu) else "no",
                "switched_off": os.environ.get("ATEN_CPU_CAPABILITY", ""),
                "seed": seed,
                **{part: round(seconds, 1) for part, seconds in took.items()},
                "IoU": round(scores["IoU.aircraft"], 4),
                **provenance(__file__, argv),
            }
        )
    if args.write_readme:
        check_clean(rows)
        before = read_rows(RESULTS) if RESULTS.exists() else []
        write_rows(RESULTS, [*before, *rows])
        write_part(FRONT_PAGE, "quickstart", table(read_rows(RESULTS)))
    print(summary(took, scores["IoU.aircraft"]))


def timed(command: list[str]) -> float:
    """Run a script of the repository and show it as a command to type; seconds.

    Raises:
        UserError: It failed, and has said why.
    """
    script, *arguments = command
    print(f"\n$ {shlex.join([os.path.relpath(sys.executable), *command])}", flush=True)
    since = time.perf_counter()
    # In the folder where this script was started, with the scripts of its own checkout.
    code = subprocess.call([sys.executable, str(ROOT / script), *arguments])
    if code:
        raise UserError(f"{script} ended with code {code}; see above, and start again.")
    return time.perf_counter() - since


def summary(took: dict[str, float], score: float) -> str:
    """The last lines: the score, the pictures, the times, and what to type next."""
    python = os.path.relpath(sys.executable)
    parts = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in took.items())
    return f"""
Aircraft IoU {score:.3f} on 8 scenes of which the training saw nothing.
{parts}: {sum(took.values()):.0f} s in all.

Look at
  {RUN}/report.html        the run on a page: scores, curves, best and worst tiles
  {RUN}/test_sheet.jpg     tiles: image, truth, prediction
  {RUN}/curves.png         loss and validation score over the steps
  {RUN}/predictions/       a whole scene with its aircraft, its mask, a JSON

Type next
  {python} unet/inference.py {RUN}/model_best.pth FOLDER_OF_IMAGES predictions
  {python} unet/train.py --data-path {DATA} --output-dir runs/longer --encoder tu-regnetx_002 \\
      --weights-backbone none --crop-size 256 -b 4 --lr 1.2e-3 --max-steps 1000 -j 0"""


def table(rows: list[dict[str, str]]) -> str:
    """Seconds of each part and scores, the newest runs with and without bf16."""
    head = ["seconds", *PARTS, "in all", "aircraft IoU, each seed"]
    lines, measured = [], []
    for bf16 in ("yes", "no"):
        of_kind = [row for row in rows if row["bf16"] == bf16]
        if not of_kind:
            continue
        newest = {row["seed"]: row for row in of_kind}.values()
        seconds = [median(float(row[part]) for row in newest) for part in PARTS]
        name = f"{of_kind[-1]['cpu']}, " + ("with bf16" if bf16 == "yes" else "without bf16")
        if of_kind[-1]["switched_off"]:
            name += " (switched off)"
        measured.append(f"{of_kind[-1]['cpu']}, commit {of_kind[-1]['commit']}")
        cells = [f"{value:.0f}" for value in [*seconds, sum(seconds)]]
        lines.append([name, *cells, ", ".join(row["IoU"][:5] for row in newest)])
    told = f"{'; '.join(measured)}; `{rows[-1]['command']}`."
    return f"{told}\n\n{markdown(head, lines, 'lrrrrrrl')}"


if __name__ == "__main__":
    run(main)
