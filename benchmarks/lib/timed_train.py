"""One cell of the benchmark: a model's train.py with a clock between the phases of its steps.

    python benchmarks/lib/timed_train.py unet 3 8 --data-path sample_data --crop-size 128 -j 0

trains as `python unet/train.py --data-path …` would, three steps for warm-up, eight that are timed
and eight more on one batch, which need no loader, and ends before the first checkpoint. It writes
`report.json` into the output folder.
`benchmarks/run.py` starts each in its own process, under torchrun for DDP. What is timed is
`engine.fit` itself: the session gets a clock that takes the time at each phase, so there is no
second loop to maintain.
"""

import argparse
import importlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from benchmarks.lib import engagement
from benchmarks.lib.environment import clock_mhz
from benchmarks.syncs import census, waits
from common import args as arguments
from common.cli import Parser, number, positive, run
from common.data import Batch
from common.io.tiles import Packed
from common.run.machine import Timeline, peak_mib
from common.session import Clock, Session, session
from common.speedups import Step, make_step


class Enough(Exception):
    """Ends `fit`: everything is measured."""


class Repeating:
    """A loader that, once `repeats` is set, gives its last batch again and again, on the device."""

    def __init__(self, batches: Any, device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.repeats = False
        self.last: Batch | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        delivered = iter(self.batches)
        for _ in range(len(self)):
            if not self.repeats or self.last is None:
                self.last = next(delivered)
            elif self.last.images.device != self.device:
                self.last = self.last.to(self.device)
            yield self.last


class Watch(Clock):
    """Records when each phase of each step starts, after the warm-up.

    A step is `views` (crops, turns, normalisation), `forward`, `backward`, `optimizer`, `loop`
    (sums, log lines) and `data` (the wait for the next batch); with accumulation some alternate.
    A captured step is all `forward`: nothing in it calls Python.
    """

    def __init__(self, warmup: int, steps: int, began: float) -> None:
        self.warmup, self.steps, self.began = warmup, steps, began
        self.without = warmup + steps  # the first step without the loader
        self.end = warmup + 2 * steps
        self.number = -1  # of the current step
        self.launched = began  # when the device last began a part of the cell
        self.marks: list[list[tuple[str, Any]]] = []
        self.report: dict[str, Any] = {}
        self.counter = engagement.count_replays()

    def open(self, s: Session) -> None:
        """Take what the report needs of a training, and give it a loader that can repeat."""
        self.process, self.args, self.world = s.process, s.args, s.process.world_size
        self.device, self.timeline = s.process.device, Timeline(s.process.device)
        sampler: Any = s.batches.batch_sampler
        self.images = sampler.batch_size * s.process.world_size
        stored = s.batches.dataset.stored  # type: ignore[attr-defined]
        self.report["tiles"] = "packed" if isinstance(stored, Packed) else "png"
        self.loader = Repeating(s.batches, self.device)
        s.batches, s.clock = self.loader, self  # type: ignore[assignment]

    def around(self, step: Step) -> Step:
        """`step`, which begins the phase `forward` and is looked at."""

        def timed(images: Tensor, targets: Any) -> Tensor:
            self.mark("forward")
            if self.number == self.end:
                self._inspect(lambda: step(images, targets))
                raise Enough
            if self.number == 1:  # a warm-up step: compiled by now, not captured yet
                loss, seen = engagement.watch_convolutions(lambda: step(images, targets))
                self.report |= seen
                return loss
            return step(images, targets)

        return timed

    def mark(self, phase: str) -> None:
        if phase == "views":
            self._begin()
        elif self.warmup <= self.number < self.without:
            self.marks[-1].append((phase, self.timeline.now()))

    def _begin(self) -> None:
        """Start of a step. The CPU waits for the GPU only where a part of the cell begins."""
        self.number += 1
        if self.timeline.on_gpu and self.number == self.warmup - 1:
            torch.cuda.empty_cache()  # what cuDNN's search needed is not training's memory
        if self.timeline.on_gpu and self.number == self.without + 1:
            self.report["launch_ms"] = 1e3 * (time.perf_counter() - self.launched)
        if self.number in (0, self.warmup, self.without, self.end):
            if self.timeline.on_gpu:
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            if self.number == 0:
                self.report["start_s"], self.first = now - self.began, now
            elif self.number == self.warmup:
                self.report["warmup_s"] = now - self.first
                if self.timeline.on_gpu:
                    torch.cuda.reset_peak_memory_stats(self.device)
            self._memory()
            self.loader.repeats = self.number == self.without
            self.launched = time.perf_counter()
        if self.number >= self.warmup:
            self.marks.append([("views", self.timeline.now())])

    def _memory(self) -> None:
        """Peak so far."""
        self.report["memory_mib"] = peak_mib(self.device)
        if self.timeline.on_gpu:
            self.report["reserved_mib"] = torch.cuda.max_memory_reserved(self.device) / 2**20

    def _inspect(self, step: Callable[[], Any]) -> None:
        """Count syncs in the step after the timed ones: counting takes time."""
        if self.timeline.on_gpu:
            self.report["syncs"] = waits(step)
        elif self.world == 1 and not (self.args["compile"] or self.args["cuda_graphs"]):
            # Not of compiled and captured operators, which cannot be seen, nor of DDP, which
            # divides a CPU's gradients by a number that it reads from a tensor.
            self.report["syncs"] = census(step).total()

    def summarise(self) -> None:
        """Complete the report."""
        seconds = self.timeline.seconds
        begins = [marks[0][1] for marks in self.marks]
        periods = [seconds(a, b) for a, b in pairwise(begins)]
        loaded, repeated = periods[: self.steps], periods[self.steps :]
        spent: dict[str, float] = defaultdict(float)
        for marks, end in zip(self.marks[: self.steps], begins[1:], strict=False):
            moments = [moment for _, moment in marks] + [end]
            for (phase, _), (a, b) in zip(marks, pairwise(moments), strict=True):
                spent[phase] += seconds(a, b) / self.steps
        if "backward" not in spent:  # captured: the parts of a step cannot be told apart
            spent["captured"] = spent.pop("forward")
        steady = sum(loaded) / len(loaded)
        dtype = arguments.amp_dtype(argparse.Namespace(**self.args), self.device)
        self.report |= {f"{phase}_ms": 1e3 * value for phase, value in spent.items()}
        self.report |= {
            "images": self.images,
            "step_ms": [1e3 * period for period in loaded],
            "no_loader_ms": [1e3 * period for period in repeated],
            # Extra time of the first steps: compiling, capturing, choosing algorithms.
            "warmup_s": self.report["warmup_s"] - self.warmup * steady,
            "clock_mhz": clock_mhz(self.device),
            "dtype": str(dtype or torch.float32).removeprefix("torch."),
            "processes": self.world,
            "replays": self.counter["replays"],
            "freed_memory": "" if self.timeline.on_gpu else engagement.freed_memory(),
        }
        if self.args["compile"]:
            self.report |= engagement.compilations()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("warmup", type=number(int, 2))
    parser.add_argument("steps", type=positive)
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse(words[:3])
    train = importlib.import_module(f"{args.model}.train")
    watch = Watch(args.warmup, args.steps, time.perf_counter())

    @contextmanager
    def watched(*given: Any, **options: Any) -> Iterator[Session]:
        with session(*given, **options) as s:
            watch.open(s)
            try:
                yield s
            except Enough:
                watch.summarise()
        if s.process.is_main:
            (s.output_dir / "report.json").write_text(json.dumps(watch.report) + "\n")

    train.session = watched  # type: ignore[attr-defined]
    train.make_step = lambda objective, s: watch.around(make_step(objective, s))  # type: ignore[attr-defined]
    # One extra step for `_inspect`, and one more so that `fit` does not reach its last checkpoint.
    # With --eval-freq no epoch ends with a checkpoint or a validation either.
    steps = str(watch.end + 2)
    train.main([*words[3:], "--max-steps", steps, "--eval-freq", steps])


if __name__ == "__main__":
    run(main)
