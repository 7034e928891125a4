"""The training loop: `fit` over epochs, `train_one_epoch` over steps."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from common.backbones import training_mode
from common.cli import UserError, progress, say
from common.data import Batch
from common.distributed import Process, average_buffers, check_equal, gather
from common.io import files
from common.loader import GlobalBatches, loader_deaths, names, prefetch
from common.run import checkpoint, heartbeat, machine, nonfinite, report, resume, signals
from common.run.checkpoint import Run
from common.run.report import Log, describe, memory
from common.semantic import DEFINITION
from common.session import Session
from common.speedups import Step

Prepare = Callable[[Batch, int], tuple[Tensor, Any]]
Score = Callable[..., dict[str, float]]
T = TypeVar("T")


def fit(
    session: Session,
    run: Run,
    step: Step,
    prepare: Prepare,
    score: Score,
    select: str = "mIoU",
    definition: str = DEFINITION,
) -> None:
    """Train to `session.total_steps`, from `session.saved` if there is one; validate and save.

    Writes `checkpoint.pth` (latest; the one before it is kept), `model_best.pth` (highest
    `select`; the last state if there is nothing to validate on), `log.jsonl` (a line per log
    line and per score), `curves.png`, `run.json` and `report.html` (all of it on a page), and what
    `score` writes into `session.output_dir`.

    Args:
        session: The data, this process, and how often to log, validate and save.
        run: What `session.run` returned.
        step: What `make_step` returned.
        prepare: (batch on the device, epoch) → (images, targets) of `step`.
        score: (bare model, batches, process, speed-ups, folder) → its scores over the batches.
        select: The score that chooses the best checkpoint; higher is better.
        definition: What the scores are, in a sentence.

    Raises:
        UserError: The processes disagree about data or steps, or too many losses are not finite.
        SystemExit: With code 75 after SIGTERM or SIGUSR1, 130 after Ctrl-C; the run has been saved.
    """
    process, batches, total_steps = session.process, session.batches, session.total_steps
    resume.restore(run, session.saved, process, total_steps)
    process.print(session.speedups.banner(process, session.args.get("batch_size")))
    check_equal(
        process,
        tiles=len(batches.dataset),  # type: ignore[arg-type]
        steps=total_steps,
        steps_done=run.step,
    )
    if process.is_main:
        files.sweep(session.output_dir)
        if run.step < total_steps:
            scores = {"select": select, "definition": definition, "from_step": run.step}
            report.begin(session.output_dir, session.facts() | scores)
    latest = session.output_dir / checkpoint.LATEST
    run.tally.sums = run.tally.sums.to(process.device)
    log = Log(session.output_dir / "log.jsonl", process, run.step)

    def due() -> bool:
        return run.step > 0 and (run.step % session.eval_interval == 0 or run.step >= total_steps)

    def validate() -> None:
        average_buffers(run.model)
        run.scores, run.scored_at = {}, run.step
        if session.val_batches:
            model, folder = run.scored_model(), session.output_dir
            run.scores = score(model, session.val_batches, process, session.speedups, folder)
        if run.scores:
            log.write(step=run.step, epoch=run.epoch, **run.scores)
            process.print(f"step {run.step}: {describe(run.scores)}")
        selected = run.scores.get(select, -1.0)
        unscored = select not in run.scores and run.step >= total_steps
        better = torch.tensor(selected > run.best or unscored)
        run.best = max(selected, run.best)
        better = gather(process, better)[0]  # only rank 0 may know the scores
        # model_best.pth first: checkpoint.pth records its score.
        best = [session.output_dir / checkpoint.BEST] if better else []
        run.save([*best, latest], process)
        if process.is_main:
            report.refresh(session.output_dir)
            if unscored:
                print(f"nothing to validate on: {checkpoint.BEST} is the last state.", flush=True)

    with signals.Watch(process, session.save_every) as watch, loader_deaths():
        # The run may have been stopped between a save and the validation after it.
        if due() and run.scored_at != run.step:
            validate()
        while run.step < total_steps:
            for _ in train_one_epoch(session, run, step, prepare, log):
                ended, save = watch.agreed(run.step)
                if ended or save or due():  # before scoring, too: it takes long and may be stopped
                    run.save([latest], process)
                    watch.restart()
                if ended:
                    name = signal.Signals(ended).name
                    process.print(f"{name}: saved step {run.step}; --resume continues from it.")
                    interrupted = ended == signal.SIGINT
                    raise SystemExit(signals.INTERRUPTED if interrupted else signals.REQUEUE)
                if due():
                    validate()
                    watch.restart()


def train_one_epoch(
    session: Session, run: Run, step: Step, prepare: Prepare, log: Log
) -> Iterator[None]:
    """Train on the rest of the epoch, or of `session.total_steps` if that ends first.

    Yields after each step, when `run` is complete and can be saved.

    Raises:
        UserError: Too many losses in a row were not finite.
    """
    process, batches, total_steps = session.process, session.batches, session.total_steps
    print_freq = session.print_freq
    sampler = batches.batch_sampler
    assert isinstance(sampler, GlobalBatches)
    images_per_step = sampler.batch_size * process.world_size
    first = run.seen // images_per_step
    if first >= len(batches):  # resumed with a global batch larger than what is left
        run.epoch, run.seen = run.epoch + 1, 0
        return
    sampler.set_epoch(run.epoch, first)
    training_mode(run.model)
    since, logged = time.perf_counter(), first
    timeline = machine.Timeline(process.device)
    waits: list[tuple[Any, Any]] = []
    # Without a terminal the log lines are enough.
    shown = process.is_main and sys.stderr.isatty()
    bar = progress(total=total_steps, initial=run.step, desc="train", enabled=shown)
    batch: Batch
    arriving = timed(prefetch(batches, process.device), timeline)
    for number, (batch, wait) in enumerate(arriving, first + 1):
        waits.append(wait)
        run.clock.mark("views")
        images, targets = prepare(batch, run.epoch)
        loss = run.clock.step(step, images, targets)
        run.clock.mark("loop")
        run.step += 1
        run.seen = number * images_per_step
        heartbeat.STEP = run.step
        # Added up on the device and read once per log line, because reading waits for the step.
        run.tally.add(loss, run.step, batch.tile)
        bar.update()
        last = run.step >= total_steps or number == len(batches)
        if number % print_freq == 0 or last:
            count = (number - 1) % print_freq + 1
            mean, skipped = account(run, count, batches.dataset, process)
            now = time.perf_counter()
            waited = sum(timeline.seconds(begin, end) for begin, end in waits)
            line = {
                "step": run.step,
                "epoch": run.epoch,
                "lr": float(run.optimizer.param_groups[0]["lr"]),
                **mean,
                **skipped,
                "images_per_s": images_per_step * (number - logged) / (now - since),
                "data_share": waited / (now - since),
                "memory_mib": machine.peak_mib(process.device),
            }
            log.write(**line)
            if process.is_main:
                say(
                    f"Epoch: [{run.epoch}] [{number}/{len(batches)}] "
                    f"step: {run.step}/{total_steps} lr: {line['lr']:.6f} "
                    f"loss: {mean.get('loss', float('nan')):.4f} "
                    f"img/s: {line['images_per_s']:.1f} data: {line['data_share']:.0%}"
                    f"{memory(process.device)}"
                )
            since, logged, waits = now, number, []
        if number == len(batches):
            run.epoch, run.seen = run.epoch + 1, 0
        paused = time.perf_counter()
        yield
        if not run.model.training:  # it has been scored
            training_mode(run.model)
        since += time.perf_counter() - paused  # saving and scoring do not count as training
        run.clock.mark("data")
        if last:
            break
    bar.close()


def account(
    run: Run, count: int, tiles: Any, process: Process
) -> tuple[dict[str, float], dict[str, float]]:
    """Read the counters of the last `count` steps of all processes, and reset them.

    Returns:
        The mean of the finite losses, and the number of skipped ones, both as parts of a log line:
        each is empty if there were no such losses.

    Raises:
        UserError: On all processes, after too many losses in a row that were not finite.
    """
    by_rank = torch.stack(gather(process, run.tally.sums))
    total, skipped = float(by_rank[:, 0].sum()), int(by_rank[:, 1].sum())
    finite = count * process.world_size - skipped
    if skipped:
        rank = int(by_rank[:, 3].argmax())
        at, shown = int(by_rank[rank, 4]), by_rank[rank, 5:].long().tolist()
        where = f"last at step {at} with {names(tiles, shown)}"
        if run.scaler.is_enabled():
            where += f", loss scale {run.scaler.get_scale():g}"
        if by_rank[:, 3].max() >= nonfinite.LIMIT:
            raise UserError(
                f"the loss was not finite for {int(by_rank[:, 3].max())} steps in a row, {where}; "
                "lower --lr or check these tiles. These steps changed neither the weights nor a "
                "checkpoint."
            )
        process.print(
            f"skipped {skipped} of {count * process.world_size} losses, not finite: {where}"
        )
        nonfinite.repair(run.model, run.tally)
    run.tally.clear()
    return ({"loss": total / finite} if finite else {}), ({"skipped": skipped} if skipped else {})


def timed(items: Iterator[T], timeline: machine.Timeline) -> Iterator[tuple[T, tuple[Any, Any]]]:
    """Each item, and between which moments the device had nothing to do until it came."""
    while True:
        idle = timeline.now()
        try:
            item = next(items)
        except StopIteration:
            return
        yield item, (idle, timeline.now())
