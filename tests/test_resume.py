"""Interrupted and resumed runs: bit-exact, whatever happened in between."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.commands import PATIENCE, ROOT, training, wait_for
from helpers.networks import session_of, train_thin
from helpers.scenes import tree
from torch import nn
from torch.utils.data import get_worker_info
from torture import children, kills

from common import data, distributed, loader, semantic
from common.args import Speedups
from common.cli import UserError, interval, run
from common.distributed import Process
from common.io import files
from common.run import checkpoint, checkpoint_file, nonfinite, signals
from common.speedups import make_step, place
from unet import train

ALONE = Process(0, 1, torch.device("cpu"))


def lines(folder: Path) -> int:
    path = folder / "log.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


# Functions that run in a separate process.


def hold_lock(folder: Path) -> None:
    with files.locked(folder, folder / ".lock"):
        time.sleep(600)


def launch(up: Path) -> None:
    multiprocessing.get_context("fork").Process(target=work, args=(up,)).start()
    time.sleep(600)


def work(up: Path) -> None:
    distributed.die_with_parent()
    up.write_text(str(os.getpid()))
    time.sleep(600)


# --- bit-exact ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_run_ends_where_an_undisturbed_one_does(few, tmp_path, number):
    assert "equal" in kills.killed_run(number, tmp_path, kills=4, data=few)


@pytest.mark.parametrize(("model", "schedule"), [("fcn", "cosine"), ("mask", "constant")])
def test_a_signal_in_an_epoch_and_a_resume_change_no_bit(few, tmp_path, model, schedule):
    log = tmp_path / "log"
    shutil.copytree(few / "train", tmp_path / "extra/train")
    for name in ("whole", "cut"):
        more = ("--max-steps", "6", "--save-every", "0", "--extra-data", str(tmp_path / "extra"))
        more += ("--augment", "strong", "--lr-schedule", schedule, "--foreground", "0.5")
        train_it = partial(train_thin, model, kills.arguments(model, few, tmp_path / name, *more))
        child = children.start(train_it, log)
        if name == "cut":
            wait_for(lambda: lines(tmp_path / "cut") >= 1)  # the line of step 2
            os.kill(child.pid, signal.SIGUSR1)
            assert children.end(child) == signals.REQUEUE, log.read_text()
            child = children.start(train_it, log)
        assert children.end(child) == 0, log.read_text()
    assert "SIGUSR1: saved step" in log.read_text()
    assert "not bit-exact" not in log.read_text()
    assert kills.outcome(tmp_path / "cut") == kills.outcome(tmp_path / "whole")


def interrupted_twice():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with signals.Watch(ALONE, None):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)


def test_ctrl_c_saves(tiled, tmp_path):
    """A terminal sends it to all processes, also to those that load."""
    words = ["--max-steps", 9999, "--save-every", 0, "--eval-freq", 9999, "-j", 1]
    process = subprocess.Popen(
        [sys.executable, ROOT / "unet/train.py", *training(tiled, tmp_path / "run", *words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A background job, perhaps these tests, ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: lines(tmp_path / "run") >= 1 or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors.count("\n")) == (signals.INTERRUPTED, 2), errors
    assert "saving after this step" in errors
    assert checkpoint.load(tmp_path / "run/checkpoint.pth")["step"] >= 1


def test_a_second_ctrl_c_ends_a_run_at_once(tmp_path):
    child = children.start(interrupted_twice, tmp_path / "log")
    assert children.end(child) == signals.INTERRUPTED
    assert (tmp_path / "log").read_text().count("Ctrl-C again ends") == 1


def test_ctrl_c_before_the_first_step_is_a_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run(interrupted)
    assert end.value.code == signals.INTERRUPTED
    assert capsys.readouterr().err == "stopped.\n"


def test_a_run_that_is_ended_while_it_is_scored_is_scored_when_it_goes_on(
    tiled, tmp_path, monkeypatch
):
    base = ["--max-steps", "9", "--eval-steps", "2", "--eval-tiles", "3", "--ema", "0.9"]
    train.main(training(tiled, tmp_path / "whole", *base))
    evaluate, calls = semantic.evaluate, []

    def ended(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(semantic, "evaluate", ended)
    with pytest.raises(KeyboardInterrupt):
        train.main(training(tiled, tmp_path / "cut", *base))
    assert checkpoint.load(tmp_path / "cut/checkpoint.pth")["step"] == 6
    train.main(training(tiled, tmp_path / "cut", *base, "--resume"))

    def scores(folder):
        log = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
        return [line for line in log if "mIoU" in line]

    assert len(scores(tmp_path / "cut")) == 5
    assert scores(tmp_path / "cut") == scores(tmp_path / "whole")
    assert kills.outcome(tmp_path / "cut") == kills.outcome(tmp_path / "whole")


@pytest.mark.parametrize("model", ["unet", "mask"])
def test_a_process_without_a_validation_tile_takes_part_in_the_validation(tiled, tmp_path, model):
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    words = ["-b", 2, "--max-steps", 1, "--eval-tiles", 1, "--dist-timeout", 60]
    words = training(tiled, tmp_path / "run", *words, model=model)
    ranks = children.start_ranks(partial(train_thin, model, words), logs)
    assert [children.end(rank) for rank in ranks] == [0, 0], logs[0].read_text()
    assert "step 1: " in logs[0].read_text()


def test_two_processes_end_together_and_go_on_to_the_bit(tiled, tmp_path):
    """DeepLabV3: each process has its own dropout and BatchNorm statistics."""

    def start(name):
        logs = [tmp_path / f"{name}{rank}.log" for rank in range(2)]
        model = kills.command("DeepLabV3", tiled, tmp_path / name, "-b", "2", "--augment", "strong")
        return children.start_ranks(model, logs)

    assert [children.end(child) for child in start("whole")] == [0, 0]
    cut = start("cut")
    wait_for(lambda: lines(tmp_path / "cut") >= 1)
    os.kill(cut[1].pid, signal.SIGTERM)  # only one of them
    assert [children.end(child) for child in cut] == [signals.REQUEUE] * 2
    saved = checkpoint.load(tmp_path / "cut/checkpoint.pth")
    assert 0 < saved["step"] < 11
    assert not torch.equal(*saved["ranks"]["rng"])
    assert [children.end(child) for child in start("cut")] == [0, 0]
    assert kills.outcome(tmp_path / "cut") == kills.outcome(tmp_path / "whole")


def test_other_settings_go_on_and_say_so(tiled, trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    train.main(
        training(tiled, folder, "--max-steps", 9, "--resume", "--grad-accum", 1, "--lr", 1e-4)
    )
    said = capsys.readouterr().out
    assert "not bit-exact, because max_steps was 8 and is 9, lr was 0.001 and is 0.0001" in said
    assert "learning rate and weight decay stay the checkpoint's" in said
    assert checkpoint.load(folder / "checkpoint.pth")["step"] == 9


@pytest.mark.parametrize("words", [(), ("--max-steps", 5), ("--lr", 1e-4)])
def test_a_run_that_has_ended_says_so_when_it_is_resumed(tiled, trained, tmp_path, capsys, words):
    folder = shutil.copytree(trained, tmp_path / "run")
    before = tree(folder)
    train.main(training(tiled, folder, "--max-steps", 8, *words, "--resume"))
    steps = words[1] if words[:1] == ("--max-steps",) else 8
    said = capsys.readouterr().out
    assert f"all {steps} steps are done: the checkpoint is at step 8; to train more, give" in said
    assert "continuing" not in said
    assert tree(folder) | {".lock": b""} == before | {".lock": b""}


@pytest.mark.parametrize("key", ["optimizer", "lr_scheduler", "step", "best", "ranks"])
def test_a_checkpoint_without_a_part_is_answered_by_one_sentence(tiled, trained, tmp_path, key):
    content = checkpoint.load(trained / "checkpoint.pth")
    del content[key]
    checkpoint_file.write(content, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"does not fit this run|weights alone"):
        train.main(training(tiled, tmp_path / "run", "--resume", tmp_path / "part.pth"))
    assert not (tmp_path / "run/checkpoint.pth").exists()


def test_changed_tiles_are_noticed(tiled_copy, trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    index = tiled_copy / "train/instances_tiled.json"
    index.write_bytes(index.read_bytes() + b" ")
    train.main(training(tiled_copy, folder, "--max-steps", 9, "--resume", "auto"))
    assert "the training tiles have changed" in capsys.readouterr().out


def test_auto_starts_where_there_is_nothing(tiled, tmp_path):
    train.main(training(tiled, tmp_path / "run", "--max-steps", 1, "--resume", "auto"))
    assert checkpoint.load(tmp_path / "run/checkpoint.pth")["step"] == 1


def test_save_every_counts_steps_or_minutes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def saves(text):
        watch, saved = signals.Watch(ALONE, interval(text)), []
        for step in range(1, 8):
            clock[0] += 30
            if watch.agreed(step)[1]:
                saved.append(step)
                watch.restart()
        return saved

    assert saves("3") == [3, 6]
    assert saves("1.4m") == [3, 6]  # a step takes half a minute
    assert saves("0") == saves("0m") == []


# --- falling back, refusing --------------------------------------------------------------------


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiled, trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    latest = folder / "checkpoint.pth"
    latest.write_bytes(latest.read_bytes()[:-1000])
    train.main(training(tiled, folder, "--max-steps", 8, "--resume"))
    said = capsys.readouterr().out
    assert "is damaged" in said
    assert "Continuing from" in said
    assert checkpoint_file.digest(checkpoint.load(latest)["model"]) == checkpoint_file.digest(
        checkpoint.load(trained / "checkpoint.pth")["model"]
    )
    latest.write_bytes(b"")
    (folder / "checkpoint.previous.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"previous.*is damaged"):
        train.main(training(tiled, folder, "--max-steps", 8, "--resume"))


def test_settings_of_a_checkpoint_are_printed_escaped(tiled, trained, tmp_path, capsys):
    content = checkpoint.load(trained / "checkpoint.pth")
    content["settings"]["norm"] = "\x1b[2J"
    checkpoint_file.write(content, tmp_path / "odd.pth")
    train.main(
        training(tiled, tmp_path / "run", "--max-steps", 9, "--resume", tmp_path / "odd.pth")
    )
    said = capsys.readouterr().out
    assert "norm was '\\x1b[2J' and is 'batch'" in said
    assert said.replace("\n", "").isprintable()


def test_a_checkpoint_of_another_model_is_named_itself(tiled, trained, tmp_path):
    """And not the one before it, which is there for a damaged one."""
    folder = shutil.copytree(trained, tmp_path / "run")
    saved = checkpoint.load(folder / "checkpoint.pth") | {"model_name": "fcn"}
    checkpoint_file.write(saved, folder / "checkpoint.pth")
    with pytest.raises(UserError, match=r"/checkpoint\.pth' holds a fcn model"):
        train.main(training(tiled, folder, "--resume"))


def test_a_second_run_is_refused_and_a_dead_ones_lock_is_free(tiled, tmp_path):
    child = children.start(partial(hold_lock, tmp_path), tmp_path / "log")
    wait_for(lambda: (tmp_path / ".lock").exists() and (tmp_path / ".lock").read_text())
    with pytest.raises(UserError, match=rf"another run \('process {child.pid} on"):
        train.main(training(tiled, tmp_path, "--max-steps", 1))
    children.kill(child)
    with files.locked(tmp_path, tmp_path / ".lock"):
        pass


def test_a_world_that_shrank_must_keep_its_global_batch(tiled, trained, tmp_path, monkeypatch):
    folder = shutil.copytree(trained, tmp_path / "run")
    saved = checkpoint.load(folder / "checkpoint.pth")
    saved["settings"] |= {"world_size": 2, "global_batch": 8}
    checkpoint_file.write(saved, folder / "checkpoint.pth")
    with pytest.raises(
        UserError, match=r"batch of 8 on 2 .* that 1 processes x -b x --grad-accum is 8\."
    ):
        train.main(training(tiled, folder, "--max-steps", 9, "--resume"))


# --- processes ---------------------------------------------------------------------------------


def test_workers_die_with_their_launcher(tmp_path):
    up = tmp_path / "up"
    parent = children.start(partial(launch, up), tmp_path / "log")
    wait_for(lambda: up.exists() and up.read_text())
    worker = int(up.read_text())
    assert children.alive(worker)
    children.kill(parent)
    wait_for(lambda: not children.alive(worker))


def test_a_stopped_process_is_named(tiled, tmp_path):
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    model = kills.command("unet", tiled, tmp_path / "run", "-b", "2", "--dist-timeout", "10")
    first, second = children.start_ranks(model, logs)
    wait_for(lambda: (tmp_path / "run/checkpoint.pth").exists())
    os.kill(second.pid, signal.SIGSTOP)
    try:
        assert children.end(first) == 2, logs[0].read_text()
    finally:
        children.kill(second)
    said = logs[0].read_text().splitlines()[-1]
    assert said.startswith("error: rank 1 (")
    assert f"process {second.pid}) has been silent since step" in said
    assert checkpoint.load(tmp_path / "run/checkpoint.pth")["step"] >= 2


def test_a_damaged_tile_is_named_without_its_readers_traceback(tiled_copy, tmp_path):
    for image in (tiled_copy / "train/images_tiled").iterdir():
        image.write_bytes(b"no png")
    with pytest.raises(UserError) as caught:
        train.main(training(tiled_copy, tmp_path / "run", "--max-steps", 2, "-j", 1))
    assert "\n" not in str(caught.value)
    assert "images_tiled" in str(caught.value)


def kill_loaders() -> None:
    time.sleep(1)  # until they are idle: one killed while it holds a lock would leave it locked
    for worker in multiprocessing.active_children():
        worker.kill()
    time.sleep(60)  # torch's handler of SIGCHLD raises in here


def test_a_killed_loader_process_is_answered_by_one_sentence(tiled, tmp_path, monkeypatch):
    agreed = signals.Watch.agreed

    def kill(watch, step):
        if step == 2:
            kill_loaders()
        return agreed(watch, step)

    monkeypatch.setattr(signals.Watch, "agreed", kill)
    with pytest.raises(UserError, match=r"a loader process died .* lower --workers"):
        train.main(training(tiled, tmp_path / "run", "--max-steps", 8, "-j", 1))


def test_a_loader_process_killed_while_scoring_is_answered_too(
    tiled, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(semantic, "normalise", lambda images: kill_loaders())
    words = ["--test-only", "--resume", trained / "checkpoint.pth", "-j", 1]
    with pytest.raises(UserError, match=r"a loader process died .* lower --workers"):
        train.main(training(tiled, tmp_path, *words))


def test_no_loader_process_is_left_for_torch_to_complain_of_later(tiled):
    """Two loaders, as for training and scoring: torch raises for one of them at a time."""
    tiles = data.Tiles(tiled / "val")
    loaders = [loader.scoring_loader(tiles, 4, 1, ALONE) for _ in range(2)]
    for batches in loaders:
        next(iter(batches))
    assert len(multiprocessing.active_children()) >= 2
    loader.lost_worker(RuntimeError("timed out"))
    for _ in loaders:
        signal.raise_signal(signal.SIGCHLD)
    assert not multiprocessing.active_children()


def test_a_loader_process_without_shared_memory_is_told_from_one_without_memory():
    """A container's 64 MB: the worker gets SIGBUS when it writes beyond them."""
    worker = subprocess.Popen(["sleep", "60"])
    torch._C._set_worker_pids(0, (worker.pid,))

    def kill():
        """Once a loader has installed torch's handler of SIGCHLD, that may raise in here, too."""
        worker.send_signal(signal.SIGBUS)
        wait_for(torch._C._error_if_any_worker_fails)

    try:
        with pytest.raises(RuntimeError) as caught:
            kill()
    finally:
        torch._C._remove_worker_pids(0)
        worker.wait()
    outer = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    outer.__cause__ = caught.value
    for error in (outer, caught.value):
        assert "ran out of shared memory" in str(loader.lost_worker(error))
        assert "--shm-size=8g or --ipc=host" in str(loader.lost_worker(error))


class Stuck(data.Tiles):
    """Like a network disk that is gone: a loader process never finishes reading a tile."""

    def __getitems__(self, indices):
        if get_worker_info():
            time.sleep(600)
        return super().__getitems__(indices)


def test_a_loader_process_that_hangs_is_answered_by_one_sentence(tiled, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "Tiles", Stuck)
    monkeypatch.setattr(loader, "PATIENCE", 10)
    with pytest.raises(UserError, match=r"a loader process hung for 10 s .* lower --workers"):
        train.main(training(tiled, tmp_path / "run", "--max-steps", 8, "-j", 1))


def test_an_output_folder_that_goes_away_is_named(tiled, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    agreed = signals.Watch.agreed

    def remove(watch, step):
        if step == 2:
            shutil.rmtree(folder)
        return agreed(watch, step)

    monkeypatch.setattr(signals.Watch, "agreed", remove)
    with pytest.raises(SystemExit) as end:
        run(lambda: train.main(training(tiled, folder, "--max-steps", 4)))
    assert end.value.code == 2
    assert f"error: No such file or directory: {folder}" in capsys.readouterr().err


# --- losses that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_lost_step_changes_no_weight(dtype, clip):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    process = Process(0, 1, torch.device("cpu"))
    settings = Speedups(amp_dtype=dtype)
    objective = place(model, lambda m, x, y: (m(x) * y).square().mean(), process, settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    s = session_of(model, optimizer, schedule, settings, clip)
    step = make_step(objective, s)
    x, tally = torch.randn(2, 3, 8, 8), nonfinite.Tally()
    for number in range(4):
        tally.add(step(x, torch.ones(2, 1, 1, 1)), number, torch.tensor([7, 8]))
    nonfinite.repair(model, tally)

    def state():
        return checkpoint_file.digest([list(model.parameters()), optimizer.state_dict()["state"]])

    before = state()
    for number, broken in enumerate([torch.inf, torch.nan, -torch.inf] * 60, start=4):
        bad = x.clone()
        bad[1, 0, 3, 3] = broken
        tally.add(step(bad, torch.ones(2, 1, 1, 1)), number, torch.tensor([9, 10]))
    assert state() == before
    assert tally.sums[1:8].tolist() == [4, 180, 180, 180, 183, 9, 10]
    nonfinite.repair(model, tally)
    nonfinite.check(model)
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert not s.scaler.is_enabled() or s.scaler.get_scale() >= 1
    assert step(x, torch.ones(2, 1, 1, 1)).isfinite()
    nonfinite.check(model)
    assert state() != before


def test_lost_losses_are_counted_and_too_many_end_the_run(tiled, tmp_path, monkeypatch, capsys):
    taken = 0

    def loss_fn(model, images, targets):
        nonlocal taken
        taken += 1
        spoilt = torch.nan if taken == 3 or taken > 9 else 1.0
        return train_loss(model, images * spoilt, targets)

    train_loss = train.loss_fn
    monkeypatch.setattr(train, "loss_fn", loss_fn)
    monkeypatch.setattr(nonfinite, "LIMIT", 4)
    folder = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train.main(training(tiled, folder, "--max-steps", 40, "--save-every", 1))
    sentence = str(caught.value)
    assert "not finite for 4 steps in a row, last at step 13 with '" in sentence
    assert "_tile_" in sentence
    said = "skipped 1 of 1 losses, as they or their gradients were not finite: last at step 3"
    assert said in capsys.readouterr().out
    saved = checkpoint.load(folder / "checkpoint.pth")
    assert saved["step"] == 12
    assert all(value.isfinite().all() for value in saved["model"].values())
    ahead = shutil.copytree(folder, tmp_path / "ahead")
    monkeypatch.setattr(train, "loss_fn", train_loss)
    train.main(training(tiled, ahead, "--max-steps", 13, "--resume"))
