"""The training loop: `fit` over epochs, `train_one_epoch` over steps."""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from common.backbones import training_mode
from common.cli import UserError, progress, say
from common.data import Batch
from common.distributed import average_buffers, check_equal, gather
from common.io import files
from common.loader import GlobalBatches, loader_deaths, names, prefetch
from common.run import checkpoint, machine, nonfinite, report, signals
from common.run.report import Log, Scoring, describe
from common.session import Session
from common.speedups import Step

Views = Callable[[Batch, int], tuple[Tensor, Any]]


def fit(s: Session, step: Step, views: Views, scoring: Scoring) -> None:
    """Train to `s.total_steps`; log, validate and save on the way.

    Args:
        step: What `make_step` returned.
        views: (batch on the device, epoch) → (images, targets) of `step`.
        scoring: How the model is scored.

    Raises:
        UserError: The processes disagree about data or steps, or too many losses are not finite.
        SystemExit: With code 75 after SIGTERM or SIGUSR1, 130 after Ctrl-C; the run has been saved.
    """
    process = s.process
    process.print(s.speedups.banner(process, s.args["batch_size"]))
    tiles: Any = s.batches.dataset
    check_equal(process, tiles=len(tiles), steps=s.total_steps, steps_done=s.step)
    if process.is_main:
        files.sweep(s.output_dir)
        if s.step < s.total_steps:
            report.begin(s.output_dir, s.facts() | scoring.facts())
    s.tally.sums = s.tally.sums.to(process.device)
    log = Log(s.output_dir / "log.jsonl", process, s.step)

    def due() -> bool:
        return s.step > 0 and (s.step % s.eval_interval == 0 or s.step >= s.total_steps)

    with signals.Watch(process, s.args["save_every"]) as watch, loader_deaths():
        # The run may have been stopped between a save and the validation after it.
        if due() and s.scored_at != s.step:
            validate(s, scoring, log)
        while s.step < s.total_steps:
            for _ in train_one_epoch(s, step, views, log):
                ended, save = watch.agreed(s.step)
                if ended or save or due():  # before scoring, too: it takes long and may be stopped
                    s.save(s.output_dir)
                    watch.restart()
                if ended:
                    name = signal.Signals(ended).name
                    process.print(f"{name}: saved step {s.step}; --resume continues from it.")
                    interrupted = ended == signal.SIGINT
                    raise SystemExit(signals.INTERRUPTED if interrupted else signals.REQUEUE)
                if due():
                    validate(s, scoring, log)
                    watch.restart()


def validate(s: Session, scoring: Scoring, log: Log) -> None:
    """Score the model, save it, and renew the curves and the page."""
    average_buffers(s.model)
    s.scores, s.scored_at = {}, s.step
    if s.val_batches is not None:  # a rank without a tile takes part, too
        model = s.scored_model()
        s.scores = scoring.evaluate(model, s.val_batches, s.process, s.speedups, s.output_dir)
    if s.scores:
        log.write(step=s.step, epoch=s.epoch, **s.scores)
        s.process.print(f"step {s.step}: {describe(s.scores)}")
    selected = s.scores.get(scoring.select, -math.inf)
    unscored = scoring.select not in s.scores and s.step >= s.total_steps
    better = torch.tensor(selected > s.best or unscored)
    s.best = selected if selected > s.best else s.best  # a score may be nan
    better = gather(s.process, better)[0]  # other ranks may not have the scores
    s.save(s.output_dir, bool(better))
    if s.process.is_main:
        report.refresh(s.output_dir)
        if unscored:
            print(f"nothing to validate on: {checkpoint.BEST} is the last state.", flush=True)


def train_one_epoch(s: Session, step: Step, views: Views, log: Log) -> Iterator[None]:
    """Train on the rest of the epoch, or of `s.total_steps` if that ends first.

    Yields after each step, when the session is complete and can be saved.

    Raises:
        UserError: Too many losses in a row were not finite.
    """
    process, batches, total_steps = s.process, s.batches, s.total_steps
    print_freq = s.args["print_freq"]
    sampler = batches.batch_sampler
    assert isinstance(sampler, GlobalBatches)
    images_per_step = sampler.batch_size * process.world_size
    first = s.seen // images_per_step
    if first >= len(batches):  # resumed with a global batch larger than what is left
        s.epoch, s.seen = s.epoch + 1, 0
        return
    sampler.set_epoch(s.epoch, first)
    training_mode(s.model)
    since, timed_from = time.perf_counter(), first
    timeline = machine.Timeline(process.device)
    waits: list[tuple[Any, Any]] = []
    # Without a terminal the log lines are enough.
    on_terminal = process.is_main and sys.stderr.isatty()
    bar = progress(total=total_steps, initial=s.step, desc="train", enabled=on_terminal)
    idle = timeline.now()  # from when on the device has nothing to do until the next batch comes
    for number, batch in enumerate(prefetch(batches, process.device), first + 1):
        waits.append((idle, timeline.now()))
        s.clock.mark("views")
        images, targets = views(batch, s.epoch)
        loss = step(images, targets)
        s.clock.mark("loop")
        s.step += 1
        s.seen = number * images_per_step
        # Added up on the device and read once per log line, because reading waits for the step.
        s.tally.add(loss, s.step, batch.tile)
        bar.update()
        if s.step == log.first_step:  # it compiles and starts the loader: it is not timed
            since, timed_from, waits = time.perf_counter(), number, []
        last = s.step >= total_steps or number == len(batches)
        if number % print_freq == 0 or last:
            losses, now = account(s), time.perf_counter()
            lr = float(s.optimizer.param_groups[0]["lr"])
            line = {"step": s.step, "epoch": s.epoch, "lr": lr, **losses}
            text = f"Epoch: [{s.epoch}] [{number}/{len(batches)}] step: {s.step}/{total_steps} "
            text += f"lr: {lr:.6f} loss: {losses.get('loss', float('nan')):.4f}"
            if number > timed_from:
                waited = sum(timeline.seconds(begin, end) for begin, end in waits)
                line["images_per_s"] = images_per_step * (number - timed_from) / (now - since)
                line["data_share"] = waited / (now - since)
                text += f" img/s: {line['images_per_s']:.1f} data: {line['data_share']:.0%}"
            line["memory_mib"] = machine.peak_mib(process.device)
            if process.device.type == "cuda":
                text += f" max mem: {line['memory_mib']:.0f} MiB"
            log.write(**line)
            if process.is_main:
                say(text)
            since, timed_from, waits = now, number, []
        if number == len(batches):
            s.epoch, s.seen = s.epoch + 1, 0
        paused = time.perf_counter()
        yield
        if not s.model.training:  # it has been scored
            training_mode(s.model)
        since += time.perf_counter() - paused  # saving and scoring do not count as training
        s.clock.mark("data")
        if last:
            break
        idle = timeline.now()
    bar.close()


def account(s: Session) -> dict[str, float]:
    """Read the counters of the steps since the last log line, of all processes, and reset them.

    Returns:
        `loss`, the mean of the finite losses, and `skipped`, the number of others, if there are
        any.

    Raises:
        UserError: On all processes, after too many skipped steps in a row. With fp16 only if the
            loss scale, which each of them halves, has reached its minimum.
    """
    process = s.process
    by_rank = torch.stack(gather(process, s.tally.sums))
    total, finite, skipped = by_rank[:, :3].sum(0).tolist()
    if skipped:
        rank = int(by_rank[:, 4].argmax())
        in_a_row, last_step, *tiles = by_rank[rank, 4:].long().tolist()
        where = f"last at step {last_step} with {names(s.batches.dataset, tiles)}"
        if s.scaler.is_enabled():
            where += f", loss scale {s.scaler.get_scale():g}"
        if in_a_row >= nonfinite.LIMIT and s.scaler.get_scale() <= 1:  # 1 without a scaler
            raise UserError(
                f"the loss or its gradient was not finite for {in_a_row} steps in a row, {where}; "
                "lower --lr or check these tiles. These steps changed neither the weights nor a "
                "checkpoint."
            )
        process.print(
            f"skipped {skipped:.0f} of {skipped + finite:.0f} losses, as they or their gradients "
            f"were not finite: {where}"
        )
        nonfinite.repair(s.model, s.tally)
    s.tally.clear()
    lost = {"skipped": int(skipped)} if skipped else {}
    return ({"loss": total / finite} if finite else {}) | lost
