"""File systems without locks or hard links, logs that end in the middle of a line, full disks."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from helpers.commands import ROOT, losses, training
from helpers.scenes import make_scene

from benchmarks import compare
from common import semantic
from common.cli import UserError, run
from common.distributed import pick_device
from common.io import files
from common.run import checkpoint, checkpoint_file, report, resume, signals
from preprocessing import preprocess
from unet import train

# --- locks -------------------------------------------------------------------------------------


def failing(number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    return flock


def start(command, few, tmp_path):
    if command == "train":
        train.main(training(few, tmp_path / "run", "--max-steps", 1))
        return tmp_path / "run/checkpoint.pth"
    make_scene(tmp_path / "data", "s")
    assert preprocess.main([str(tmp_path / "data"), "-n", "1"]) == 0
    return tmp_path / "data/instances_tiled.json"


@pytest.mark.parametrize("command", ["train", "tile"])
@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "EINVAL"])
def test_without_locks_a_line_says_so(few, tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.setattr(fcntl, "flock", failing(getattr(errno, name)))
    assert start(command, few, tmp_path).exists()
    said = capsys.readouterr().out
    assert said.count("start no second run there") == 1
    assert "another run" not in said


@pytest.mark.parametrize("command", ["train", "tile"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOMEM])
def test_other_errors_of_a_lock_are_told_truly(few, tmp_path, monkeypatch, command, number):
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.raises(UserError) as caught:
        start(command, few, tmp_path)
    assert "cannot lock" in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert "another run" not in str(caught.value)


def test_a_dead_runs_name_is_no_reason_for_a_refusal(tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text("process 1 on elsewhere")
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with files.locked(tmp_path, tmp_path / ".lock"):
        pass


# --- hard links --------------------------------------------------------------------------------

CALLS = ("open", "replace", "rename", "unlink", "remove", "link", "fsync")


def saved(step):
    return {
        "format": checkpoint_file.FORMATS[-1],
        "model_name": "unet",
        "classes": ["ground", "aircraft"],
        "args": {},
        "model": {"w": torch.full((40,), float(step))},
        "step": step,
    }


def killed_after(number, folder, step, links):
    """Save `step` in a process that dies after `number` calls of the file system.

    Returns whether it died.
    """
    child = os.fork()
    if child == 0:
        left = [number]

        def counted(function):
            def call(*args, **kwargs):
                result = function(*args, **kwargs)
                left[0] -= 1
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        if not links:
            os.link = failing(errno.EPERM)
        try:
            paths = [folder / n for n in (checkpoint.LATEST, checkpoint.PREVIOUS, checkpoint.BEST)]
            checkpoint_file.write(saved(step), *paths)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("links", [True, False])
def test_a_kill_at_any_call_of_a_save_leaves_a_checkpoint_that_is_found(tmp_path, links, capsys):
    """In the second and in the third save, before and after the sweep of the next run."""
    deaths = 0
    for before in (1, 2):
        for number in range(1, 100):
            folder = tmp_path / f"{before}-{number}"
            folder.mkdir()
            for step in range(1, before + 1):
                killed_after(10_000, folder, step, links)
            died = killed_after(number, folder, before + 1, links)
            deaths += died
            for _ in range(2):
                found = resume.find(resume.AUTO, folder, "unet", saved(0)["classes"])
                assert found["step"] in (before, before + 1)
                assert (found["model"]["w"] == found["step"]).all()
                assert died or found["step"] == before + 1
                with pytest.raises(UserError, match="holds a run already"):
                    resume.find(None, folder, "unet", saved(0)["classes"])
                files.sweep(folder)
            if not died:
                assert checkpoint.load(folder / checkpoint.PREVIOUS)["step"] == before
                break
    assert deaths >= 10


# --- logs --------------------------------------------------------------------------------------


def test_a_log_that_ends_anywhere_is_read_and_repaired(few, tmp_path):
    folder = tmp_path / "run"
    train.main(training(few, folder, "--max-steps", 3))
    whole = (folder / "log.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for length in range(len(whole) - len(lines[-1]), len(whole)):
        (folder / "log.jsonl").write_bytes(whole[:length])
        kept = report.read_log(folder / "log.jsonl")
        assert [json.dumps(line) for line in kept] == whole[:length].decode().splitlines()[
            : len(kept)
        ]
        assert len(kept) >= len(lines) - 1
        table = compare.table([report.read(folder)] * 2)
        assert "3 of 3" in table
    (folder / "log.jsonl").write_bytes(whole[:-5])
    train.main(training(few, folder, "--max-steps", 4, "--resume"))
    after = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in after] == [1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    "odd", [b"\0" * 30, b"12", b"[]", b'{"no": 1}', b"\xff\xfe", b'{"step": 1}{"a']
)
def test_an_odd_line_is_skipped(tmp_path, odd):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + odd + b'\n{"step": 2}\n')
    assert [line["step"] for line in report.read_log(tmp_path / "log.jsonl")] == [1, 2]


def test_a_run_whose_disk_is_full_at_a_log_line_goes_on_later(few, tmp_path, monkeypatch, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train.main(training(few, whole, "--max-steps", 6))
    write = report.Log.write

    def full(log, **values):
        if values["step"] < 4:
            return write(log, **values)
        with log.path.open("a") as file:
            file.write(json.dumps(values)[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    words = training(few, folder, "--max-steps", 6, "--save-every", 2)
    with monkeypatch.context() as patch:
        patch.setattr(report.Log, "write", full)
        with pytest.raises(SystemExit) as end:
            run(lambda: train.main(words))
    assert end.value.code == 2
    assert "error: No space left on device" in capsys.readouterr().err
    train.main([*words, "--resume"])
    assert losses(folder) == losses(whole)


def test_make_clean_keeps_what_was_trained(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("runs/unet/model_best.pth", "predictions/a.tif", "data/a", ".ruff_cache/b"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("kept")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {"Makefile", "runs/unet/model_best.pth", "predictions/a.tif", "data/a"}


# --- what a run says ---------------------------------------------------------------------------


def collecting(monkeypatch, found):
    """Append the loss of each step of a training."""
    make_step = train.make_step

    def watched(objective, s):
        step = make_step(objective, s)

        def watch(*given):
            loss = step(*given)
            found.append(loss.item())
            return loss

        return watch

    monkeypatch.setattr(train, "make_step", watched)


def ended_at(step, monkeypatch):
    agreed = signals.Watch.agreed

    def end(watch, now):
        agreed(watch, now)
        return (signal.SIGTERM, True) if now == step else (0, False)

    monkeypatch.setattr(signals.Watch, "agreed", end)


@pytest.mark.parametrize("change", ["print-freq", "seed", "tiles", "processes"])
def test_the_loss_of_a_line_is_the_mean_of_the_losses_since_the_one_before(
    tiled_copy, tmp_path, monkeypatch, change
):
    found, folder = [], tmp_path / "run"
    collecting(monkeypatch, found)
    words = training(tiled_copy, folder, "-b", 2, "--max-steps", 14, "--print-freq", 4)
    with monkeypatch.context() as patch:
        ended_at(6, patch)
        with pytest.raises(SystemExit):
            train.main(words)
    more = {"print-freq": ["--print-freq", "5"], "seed": ["--seed", "3"]}.get(change, [])
    first = 4  # the step of the last line
    if change == "tiles":
        index = tiled_copy / "train/instances_tiled.json"
        index.write_bytes(index.read_bytes() + b" ")
    if change == "processes":
        content = checkpoint.load(folder / "checkpoint.pth")
        content["settings"]["world_size"] = 2
        content["ranks"] = {name: values * 2 for name, values in content["ranks"].items()}
        checkpoint_file.write(content, folder / "checkpoint.pth")
        first = 6  # the losses before are those of other processes
    train.main([*words, *more, "--resume"])
    assert len(found) == 14
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert lines[0]["step"] == 4
    assert lines[0]["loss"] == pytest.approx(sum(found[:4]) / 4)
    for line in lines[1:]:
        expected = found[first : line["step"]]
        assert line["loss"] == pytest.approx(sum(expected) / len(expected)), line
        first = line["step"]
    assert first == 14


def test_a_checkpoint_that_did_not_count_its_losses_is_continued(few, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    content = checkpoint.load(folder / "checkpoint.pth")
    old = [torch.cat([tally[:1], tally[2:]]) for tally in content["ranks"]["tally"]]
    content["ranks"]["tally"] = old
    checkpoint_file.write(content, folder / "checkpoint.pth")
    train.main(training(few, folder, "--max-steps", 9, "--resume"))
    assert len(losses(folder)) == 9


@pytest.mark.parametrize("print_freq", [1, 2])
def test_the_first_step_is_not_in_the_speed(few, tmp_path, monkeypatch, capsys, print_freq):
    """It compiles, for minutes."""
    make_step = train.make_step

    def slow(objective, s):
        step, calls = make_step(objective, s), []

        def first_slow(*given):
            time.sleep(0 if calls else 8)
            calls.append(1)
            return step(*given)

        return first_slow

    monkeypatch.setattr(train, "make_step", slow)
    train.main(training(few, tmp_path / "run", "--max-steps", 4, "--print-freq", print_freq))
    lines = [json.loads(s) for s in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    speeds = [line["images_per_s"] for line in lines if "images_per_s" in line]
    assert len(speeds) == 4 // print_freq - (print_freq == 1)
    assert min(speeds) > max(speeds) / 10
    assert "img/s: 0." not in capsys.readouterr().out


def test_scoring_says_what_it_does_without(few, trained, tmp_path, capsys):
    checkpoint_path = shutil.copy(trained / "checkpoint.pth", tmp_path)
    words = ["--test-only", "val", "--resume", checkpoint_path]
    train.main(training(few, tmp_path, *words, "--compile", "--cuda-graphs"))
    said = capsys.readouterr().out
    banner = next(line for line in said.splitlines() if line.startswith("device cpu"))
    assert "compiled" not in banner
    assert "graph" not in banner
    assert "--compile speeds up training; scoring is without it" in said
    assert "--cuda-graphs speeds up training; scoring is without it" in said
    with pytest.raises(UserError, match="does nothing without --amp"):
        train.main(training(few, tmp_path, *words, "--amp-dtype", "bf16"))


@pytest.mark.parametrize(
    "device", ["mps", "meta", "xpu:0", "cuda:x", "cuda:-1", "cpu:1", "", "gpu"]
)
def test_a_device_that_cannot_be_used_is_a_sentence(few, tmp_path, device):
    with pytest.raises(UserError, match="use auto, cpu, cuda or cuda:N"):
        pick_device(device)
    with pytest.raises(UserError, match="use auto, cpu, cuda or cuda:N"):
        train.main(training(few, tmp_path / "run", "--device", device))
    assert not (tmp_path / "run").exists()


def test_a_selected_score_may_be_negative_or_missing(few, tmp_path, monkeypatch):
    scores = iter([float("nan"), -5.0, -3.0, float("nan"), -4.0, -2.0])
    monkeypatch.setattr(semantic, "evaluate", lambda *_: {"minus_loss": next(scores)})
    scoring = train.scoring

    def by_loss(predict):
        made = scoring(predict)
        return report.Scoring(semantic.evaluate, "minus_loss", made.drawn, made.definition)

    monkeypatch.setattr(train, "scoring", by_loss)
    folder = tmp_path / "run"
    best = []
    for step in range(1, 7):
        words = ["--max-steps", step, "--eval-steps", 1, "--resume"]
        train.main(training(few, folder, *words))
        path = folder / checkpoint.BEST
        best.append(checkpoint.load(path)["step"] if path.exists() else None)
    assert best == [None, 2, 3, 3, 3, 6]
    assert report.read(folder).best["minus_loss"] == -2.0
