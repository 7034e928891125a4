"""How much more a step through our engine takes than one of a bare, hand-written loop: at most 3 %.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --model fcn --crop-size 64 --rounds 20

Both train the same network on the same batch with the same optimizer in one process, in turns, so
that a drift of the machine affects both. A round's figure is the mean time from the start of a
step to the start of the next. It includes the loader, the loss's sum and the log lines, but not
what `fit` does once at its end: the checkpoint and the curves.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import DataLoader

from benchmarks.lib.environment import measured_on, provenance
from benchmarks.lib.models import MODELS
from benchmarks.lib.readme import README, add_output, publish
from benchmarks.lib.synthetic import bare_session, noise_tiles
from benchmarks.lib.turns import in_turns, ratio_columns, shown_ratio
from common import engine
from common.args import Speedups
from common.augment import normalise
from common.cli import Parser, positive, run
from common.distributed import Process, pick_device
from common.loader import GlobalBatches
from common.run.nonfinite import Tally
from common.run.report import Scoring
from common.semantic import semantic_target
from common.speedups import make_step, place


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse(argv)
    process = Process(0, 1, pick_device(args.device))
    module = MODELS[args.model].module
    torch.manual_seed(0)
    model = module.build_model(args.backbone or MODELS[args.model].backbone, 2)
    batch = noise_tiles(args.batch_size, args.crop_size, process.device)
    images, targets = normalise(batch.images).contiguous(), semantic_target(batch)
    objective = place(model, module.loss_fn, process, Speedups())
    optimizer = AdamW(model.parameters(), lr=1e-4, fused=True)

    def bare() -> Tensor:
        optimizer.zero_grad()
        loss = module.loss_fn(model, images, targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    # The same batch again and again, so that no reading of files is measured.
    batches: Any = [batch.to(torch.device("cpu"))] * args.steps
    sampler = GlobalBatches(args.steps, 1, process, 0)
    loader = DataLoader(batches, batch_sampler=sampler, collate_fn=lambda batches: batches[0])
    s = bare_session(process, Speedups(), loader, total_steps=args.steps)
    s.start(model, optimizer)
    ours = make_step(objective, s)
    model.train()
    unscored = Scoring(lambda *_: {}, "", (), "")
    begins: list[float] = []  # of the steps of a round

    def timed(step: Callable[..., Tensor], *given: Any) -> Tensor:
        if process.device.type == "cuda":
            torch.cuda.synchronize(process.device)
        begins.append(time.perf_counter())
        return step(*given)

    def loop() -> None:
        for _ in range(args.steps):
            timed(bare)

    def fit() -> None:
        s.step = s.epoch = s.seen = 0
        s.tally = Tally()
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            s.output_dir = Path(folder)
            views = images, targets
            engine.fit(s, partial(timed, ours), lambda _batch, _epoch: views, unscored)

    def period(train: Callable[[], None]) -> float:
        """The mean time from the start of a step to the start of the next, seconds."""
        begins.clear()
        train()
        return (begins[-1] - begins[0]) / (len(begins) - 1)

    arms = {"bare": partial(period, loop), "fit": partial(period, fit)}
    row = summary(in_turns(arms, args.rounds)) | provenance(__file__, argv)
    publish([row], sentence, README, "overhead", args)


def summary(rounds: dict[str, list[float]]) -> dict[str, Any]:
    """Median milliseconds of a step, and the ratio."""
    medians = {f"{name}_ms": round(1e3 * statistics.median(s), 3) for name, s in rounds.items()}
    ratio = ratio_columns(rounds["fit"], rounds["bare"])
    return medians | ratio | {"rounds": len(rounds["fit"])}


def sentence(rows: list[dict[str, str]]) -> str:
    """The results in words."""
    (row,) = rows
    return (
        f"{measured_on(row)} A step takes {float(row['bare_ms']):.1f} ms in a bare loop and "
        f"{float(row['fit_ms']):.1f} ms through `fit`. The ratio is {shown_ratio(row, 3)}, the "
        f"median of {row['rounds']} paired rounds with its 95 % interval."
    )


def _parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=[m for m in MODELS if MODELS[m].semantic], default="unet")
    add("--backbone", default="resnet18", help="or the UNet's encoder")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--crop-size", type=positive, default=128, help="pixels")
    add("-b", "--batch-size", type=positive, default=4, help="tiles in a step")
    add("--steps", type=positive, default=20, help="in a round, of each")
    add("--rounds", type=positive, default=15, help="pairs, after one for warm-up")
    add_output(parser, "overhead", README)
    return parser


if __name__ == "__main__":
    run(main)
