"""The benchmark of the techniques: what its cells measure, how it resumes, what it concludes."""

import argparse
import csv
import math
import os
import random
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.commands import ENCODER, PATIENCE, ROOT, losses, run_script, wait_for
from PIL import Image

from benchmarks import run, table
from benchmarks.lib import engagement, launch, measure, plots, sweep, to_quality
from benchmarks.lib.matrix import plan
from benchmarks.lib.readme import part, read_rows
from benchmarks.lib.results import (
    COLUMNS,
    CONDITIONS,
    PHASES,
    append,
    median_interval,
    newest,
    shown_speedup,
    summaries,
)
from benchmarks.lib.techniques import FLAGS
from common.cli import UserError

# In the process that forks the cells: slows down the training of those with --channels-last, and
# leaves --amp without effect.
BROKEN = """
import sys
if "multiprocessing.forkserver" in " ".join(sys.orig_argv):
    import time, torch
    backward, enter = torch.Tensor.backward, torch.autocast.__enter__
    def slow(*args, **kwargs):
        if "--channels-last" in sys.argv:
            time.sleep(0.2)
        backward(*args, **kwargs)
    torch.Tensor.backward = slow
    torch.autocast.__enter__ = torch.autocast.__exit__ = lambda *args: None
"""


@pytest.fixture(scope="module")
def measured(tiled, tmp_path_factory):
    """The CSV of a benchmark killed after its second row and restarted, and its rows until then."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "sitecustomize.py").write_text(BROKEN)
    output = folder / "speed_cpu.csv"
    words = [sys.executable, ROOT / "benchmarks/run.py", "--models", "unet", "--backbone", ENCODER]
    words += ["--techniques", "plain", "channels-last", "cuda-graphs", "--rounds", "2"]
    words += ["--also", "same=--no-amp", "broken=--grad-accum 100", "idle=--amp"]
    words += ["--warmup", "2", "--steps", "8", "--crop-size", "32", "--device", "cpu"]
    words += ["--data-path", tiled, "-o", output, "--cache", folder / "compiled"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    child = subprocess.Popen(list(map(str, words)), env=environment, **pipes)
    wait_for(lambda: child.poll() is not None or (output.is_file() and len(read_rows(output)) > 1))
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=PATIENCE)
    before = output.read_bytes()
    child = subprocess.Popen(list(map(str, words)), env=environment, **pipes)
    printed, _ = child.communicate(timeout=PATIENCE)
    assert child.returncode == 0, printed
    return output, before, printed


def test_a_killed_benchmark_goes_on_where_it_stopped(measured):
    output, before, _ = measured
    assert output.read_bytes().startswith(before)
    rows = read_rows(output)
    good = [(row["technique"], row["round"]) for row in rows if not row["error"]]
    assert sorted(good) == sorted(
        (name, turn) for name in ("plain", "same", "channels-last") for turn in "01"
    )


def test_a_cell_that_fails_is_a_row_and_what_cannot_run_is_named(measured):
    output, _, printed = measured
    failed = [row for row in read_rows(output) if row["error"]]
    errors = {row["technique"]: row["error"] for row in failed}
    assert errors.keys() == {"broken", "idle"}
    assert "the training set has" in errors["broken"]
    assert "was to compute in bfloat16: conv_x is float32 contiguous" in errors["idle"]
    assert "left out: cuda-graphs: there is no CUDA device" in printed


def test_a_sleep_is_found(measured):
    found = {one.technique: one for one in summaries(newest(read_rows(measured[0])), "unet")}
    slow = found["channels-last"]
    assert slow.speedup[0] < 1
    assert slow.ms["backward"] > 200
    assert slow.ms["backward"] > slow.ms["forward"]
    assert slow.pays_after is None


def test_a_row_says_where_its_time_went(measured):
    for row in read_rows(measured[0]):
        if row["error"]:
            continue
        steps = [float(ms) for ms in row["step_ms"].split()]
        phases = [row[f"{p}_ms"] for p in PHASES if p != "captured"]
        assert len(steps) == len(row["no_loader_ms"].split()) == 8
        assert row["tiles"] == "png"
        layout = row["flags"].removeprefix("--").removeprefix("no-amp") or "contiguous"
        assert row["conv_x"] == row["conv_backward_grad"] == f"float32 {layout}"
        assert sum(map(float, phases)) == pytest.approx(sum(steps) / len(steps), rel=0.01)
        assert float(row["memory_mib"]) > 100
        assert row["syncs"] == "0"
        assert all(row[key] for key in ("torch", "commit", "command", "device"))


def rows_of(speeds: dict[str, list[float]], **columns: str) -> list[dict[str, str]]:
    """Rows as `run.py` writes them, of four images a step and these images/s in each round."""
    made = []
    for name, found in speeds.items():
        for turn, speed in enumerate(found):
            row = dict.fromkeys(COLUMNS, "") | dict.fromkeys(CONDITIONS, "x")
            row |= {"model": "unet", "technique": name, "round": str(turn), "images": "4"}
            row |= {"step_ms": " ".join([str(4000 / speed)] * 3), "device": "cpu", "world": "1"}
            row |= {"batch": "4", "threads": "2", "forward_ms": "1", "backward_ms": "2"}
            row |= {"optimizer_ms": "1", "data_ms": "0", "memory_mib": "1000", "start_s": "1"}
            made.append(row | {"warmup_s": "0", "cache": "cold", "backbone": "resnet18"} | columns)
    return made


def test_a_round_that_failed_is_told():
    rows = rows_of({"plain": [1, 1, 1], "amp": [2, 2]})
    rows += rows_of({"amp": [9]}, round="2", error="it did not")
    summary = summaries(rows, "unet")[1]
    assert shown_speedup(summary) == "2.00 (2.00 to 2.00; 2 of 3 rounds)"


def test_images_per_second_count_slow_steps_too():
    """Two of three steps are fast: their median would hide most of the time."""
    rows = rows_of({"plain": [1, 1]}, step_ms="9000 1000 1000", no_loader_ms="7000 1000 1000")
    (summary,) = summaries(rows, "unet")
    assert summary.speed == pytest.approx(12 / 11)
    assert summary.without_loader == pytest.approx(12 / 9)
    assert summary.of_steps[0] < summary.speed < summary.of_steps[1] == 4


def test_intervals_hold_what_they_should_whatever_the_machine_does():
    """The machine drifts by a factor of two; 1 is in the interval of a no-op, not of 5 % slower."""
    rng = random.Random(1)
    missed = found = 0
    for _ in range(60):
        drift = [rng.uniform(50, 100) for _ in range(9)]
        ratios = [speed * rng.gauss(1, 0.01) / (speed * rng.gauss(1, 0.01)) for speed in drift]
        _, low, high = median_interval(ratios)
        missed += not low <= 1 <= high
        _, low, high = median_interval([0.95 * ratio for ratio in ratios])
        found += high < 1
    assert missed <= 8
    assert found >= 55


def test_a_technique_pays_its_start_off_if_five_rounds_say_so():
    rows = rows_of({"plain": [10, 20, 10, 10, 10]})
    rows += rows_of({"compile": [20, 40, 20, 20, 20]}, warmup_s="30")
    fast = summaries(rows, "unet")[1]
    assert fast.speedup == (2, 2, 2)
    assert fast.pays_after == pytest.approx(30 / 0.2)  # 0.4 s per step become 0.2 s
    assert "| speed-up (95 %) |" in table.of_model(rows, "unet")
    assert "in each of 5 rounds, in brackets the 95 % interval." in table.heading(rows)
    # The interval of four ratios is their range, of which nothing is concluded.
    few = [row for row in rows if row["round"] != "0"]
    assert summaries(few, "unet")[1].pays_after is None
    assert table.of_model(few, "unet").splitlines()[-1].endswith("|  |")
    assert "| speed-up (range) |" in table.of_model(few, "unet")
    assert "in each of 4 rounds, in brackets the range." in table.heading(few)


def test_rows_of_a_changed_working_tree_are_not_published(tmp_path):
    path = tmp_path / "speed-x.csv"
    for row in rows_of({"plain": [10]}) + rows_of({"plain": [20]}, commit="y+dirty"):
        append(path, row)
    append(tmp_path / "speed-y.csv", rows_of({"plain": [20]}, commit="y+dirty")[0])
    (of_x,) = table.results(tmp_path, "speed").values()
    assert [row["commit"] for row in of_x] == ["x"]
    assert len(table.results(tmp_path, "speed", clean=False)) == 2


def test_only_the_newest_measurement_counts(tmp_path):
    path = tmp_path / "speed_cpu.csv"
    for row in rows_of({"plain": [10, 11]}) + rows_of({"plain": [20]}, commit="y"):
        append(path, row)
    append(path, rows_of({"plain": [30]}, commit="y")[0])
    (row,) = newest(read_rows(path))
    assert row["step_ms"].split()[0] == str(4000 / 30)
    with path.open() as file:
        assert len(list(csv.reader(file))) == 5


def test_every_combination_that_can_run_is_planned_and_unknown_ones_are_refused(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    cpu = torch.device("cpu")
    cells, left_out = plan(["unet", "mask"], [], {}, cpu, 4)
    names = [cell.technique for cell in cells if cell.model == "mask"]
    # Of all techniques but CUDA graphs, and malloc as it is.
    assert len(names) == len(set(names)) == 2 ** (len(FLAGS) - 1) + 1
    beside = plan(["unet"], ["amp+compile"], {}, cpu, 4)[0]
    assert [c.technique for c in beside] == ["plain", "amp+compile", "amp+channels-last+compile"]
    assert left_out == ["cuda-graphs: there is no CUDA device"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not any(cell.world > 1 for cell in plan(["unet"], [], {}, cpu, 4)[0])
    assert {c.batch for c in cells if c.world == 2} == {2}
    with pytest.raises(UserError, match="'ampere' is not known"):
        plan(["unet"], ["ampere"], {}, cpu, 4)


@pytest.mark.parametrize(
    ("names", "extra", "flags"),
    [
        (["amp+default-malloc"], {}, {"amp+default-malloc": "--amp"}),
        (["amp+accum"], {"accum": "--grad-accum 2"}, {"amp+accum": "--amp --grad-accum 2"}),
        (["x+y"], {"x": "--amp", "y": "--lr 1"}, {"x+y": "--amp --lr 1"}),
        (["amp+amp"], {}, {"amp": "--amp"}),
    ],
)
def test_each_part_of_a_name_is_on_in_its_cell(names, extra, flags):
    cells, _ = plan(["fcn"], names, extra, torch.device("cpu"), 4)
    planned = {cell.technique: " ".join(cell.flags) for cell in cells}
    assert planned == {"plain": "", **extra, **flags}


@pytest.mark.parametrize(
    ("names", "extra", "why"),
    [
        (["plain+amp"], {}, "'plain.amp' is not known"),
        (["default-malloc+ddp"], {}, "'default-malloc.ddp': .*torchrun"),
        (["amp"], {"amp": "--lr 1"}, "--also 'amp' is the name of another technique"),
    ],
)
def test_a_name_that_would_not_be_true_is_refused(names, extra, why):
    with pytest.raises(UserError, match=why):
        plan(["fcn"], names, extra, torch.device("cpu"), 4)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_a_row_says_whether_freed_memory_was_kept(tiled, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["--models", "unet", "--backbone", ENCODER, "--rounds", 1, "--data-path", tiled]
    words += ["--techniques", "plain", "default-malloc+channels-last", "--device", "cpu"]
    words += ["--crop-size", 32, "--steps", 2, "-o", tmp_path / "speed.csv"]
    done = run_script(ROOT / "benchmarks/run.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["technique"]: row for row in read_rows(tmp_path / "speed.csv")}
    assert {name: row["freed_memory"] for name, row in rows.items()} == {
        "plain": "kept",
        "channels-last+default-malloc": "returned",
    }
    assert not any(row["error"] for row in rows.values())


def test_a_cell_that_reported_and_then_crashed_is_an_error(monkeypatch):
    report = {"error": "RuntimeError: late", "step_ms": [1.0], "images": 4} | SEEN
    monkeypatch.setattr(launch, "measured", lambda *given: dict(report))
    cell = plan(["fcn"], ["plain"], {}, torch.device("cpu"), 4)[0][0]
    row, _ = run._time(cell, 0, argparse.Namespace(warmup=2, steps=1), 1.0)
    assert row["error"] == "RuntimeError: late"


@pytest.fixture(scope="module")
def written():
    return table.parts({what: table.results(table.RESULTS, what) for what in table.WHAT})


@pytest.mark.parametrize(("readme", "name"), table.parts({key: {} for key in table.WHAT}))
def test_the_readmes_show_the_committed_numbers(written, readme, name):
    assert part(readme, name) == written[readme, name], "stale; run: python benchmarks/table.py"


def test_a_heading_says_how_many_cores_and_whether_it_was_a_dry_run():
    (row,) = rows_of({"plain": [1]}, cores="1", cpu="EPYC", command="python run.py")
    assert table.heading([row]).startswith("**CPU**: 1 core of EPYC, ")
    dry = table.heading([row | {"cores": "2", "command": "python run.py --dry-run"}])
    assert dry.startswith("**A dry run, with stand-ins")
    assert "**CPU**: 2 cores of EPYC, " in dry


def test_a_cell_that_the_budget_ends_is_left_out_and_is_no_failure(tmp_path, monkeypatch, capsys):
    clock = [0.0]

    def train(cell, turn, args, timeout):
        took = min(timeout, 40.0)
        clock[0] += took
        error = "" if took == 40 else f"stopped after {took:.0f} s"
        row = {"model": cell.model, "technique": cell.technique, "error": error}
        return row | {"wall_s": took}, ""

    monkeypatch.setattr(measure.launch, "start_server", lambda: None)
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    cells, _ = plan(["fcn", "unet"], ["plain"], {}, torch.device("cpu"), 4)
    mode = measure.Mode("speed", (), COLUMNS, 1200.0, train, str)
    args = argparse.Namespace(output=tmp_path / "speed.csv", budget=1.0, crop_size=32)
    path, late = measure.measure(mode, cells, 1, dict.fromkeys(CONDITIONS, "x"), args)
    assert [(row["model"], row["error"]) for row in read_rows(path)] == [("fcn", "")]
    assert late == ["plain of unet: not enough time"]


def test_the_front_page_shows_the_processor_measured_last_and_every_gpu():
    def machine(device, cpu, when):
        return rows_of({"plain": [1]}, device=device, cpu=cpu, when=when)

    old, new = machine("cpu", "Xeon", "2025"), machine("cpu", "EPYC", "2026")
    limited, gpu = machine("cpu", "EPYC limited to AVX2", "2027"), machine("H100", "Xeon", "2024")
    found = {"a": old, "b": new, "c": limited, "d": gpu}
    assert plots.in_front(found) == [new, gpu]
    assert plots.newest_of_kind(found) == {"b": new, "c": limited, "d": gpu}
    found["e"] = machine("cpu", "EPYC with AVX2", "2028")
    assert plots.in_front(found) == [new, gpu]
    assert list(plots.newest_of_kind(found)) == ["b", "d", "e"]


def test_the_pictures_are_drawn_for_light_and_dark_pages(tmp_path):
    rows = rows_of({"plain": [10, 11], "amp": [20, 21], "compile": [5, 6]})
    rows += rows_of({"amp+channels-last": [1]}, error="it did not")
    found = {"speed": rows, "to-quality": to_quality_rows(), "sweep": sweep_rows()}
    written = plots.draw_all({what: {"cpu": rows} for what, rows in found.items()}, tmp_path)
    names = (plots.FRONT, "to-quality", "sweep")
    assert [p.stem for p in written] == [name + dark for name in names for dark in ("", "_dark")]
    light, dark = (Image.open(path).convert("L") for path in written[:2])
    assert light.size == dark.size
    assert light.size[0] > 800
    assert light.getpixel((0, 0)) == 255
    assert dark.getpixel((0, 0)) < 32
    assert "failed: it did not" in table.of_model(rows, "unet")
    broken = [row | {"error": "no"} for row in rows]
    assert plots.draw_all({"speed": {"cpu": broken}, "to-quality": {}, "sweep": {}}, tmp_path)
    assert table.front([broken]).startswith("Find every aircraft in aerial imagery.\n")


def test_neither_the_order_of_cells_nor_their_number_matters(tiled, tmp_path, monkeypatch):
    """Each starts without a model, a compiled code or a seed of those before it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sizes = {"backbone": ENCODER, "device": "cpu", "crop_size": 32, "workers": 0}
    args = argparse.Namespace(data_path=tiled, **sizes)
    wanted = ["plain", "channels-last+cuda-graphs"]
    cells, _ = plan(["unet"], wanted, {}, torch.device("cpu"), 4, dry=True)
    found = []
    for order in (cells, cells[::-1]):
        for cell in order:
            folder = tmp_path / str(len(found))
            train = ["unet/train.py", *launch.train_arguments(cell, args, folder)]
            train += ["--max-steps", "4", "--print-freq", "1"]
            assert launch.run(cell, train, tmp_path / "compiled", PATIENCE, dry=True) == ""
            found.append(losses(folder))
    assert found[0] == found[3]
    assert found[1] == found[2]


def test_a_cell_ends_with_its_loader_processes(tiled, tmp_path, monkeypatch):
    """`timed_train.py` leaves the loop in the middle of an epoch, and they ignore SIGTERM."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sizes = {"backbone": ENCODER, "device": "cpu", "crop_size": 32, "workers": 1}
    args = argparse.Namespace(data_path=tiled, **sizes)
    (cell,), _ = plan(["unet"], ["plain"], {}, torch.device("cpu"), 4, dry=True)
    words = ["benchmarks/lib/timed_train.py", "unet", "2", "4"]
    words += launch.train_arguments(cell, args, tmp_path / "run")
    assert launch.run(cell, words, tmp_path / "compiled", PATIENCE, dry=True) == ""
    # An epoch of eight steps ended among the timed ones; it was neither scored nor saved.
    assert not list((tmp_path / "run").glob("*.pth"))
    assert "mIoU" not in (tmp_path / "run/log.jsonl").read_text()


BF16 = dict.fromkeys(engagement.CONVOLUTIONS, "bfloat16 channels-last")
SEEN = BF16 | {"dtype": "bfloat16", "world": 1, "processes": 1, "replays": 8}
SEEN |= {"technique": "x", "freed_memory": "kept"}


@pytest.mark.parametrize(
    ("flags", "changed", "why"),
    [
        ("--amp --channels-last --cuda-graphs", {}, ""),
        ("--amp", {"dtype": "float32"}, "was to compute in float32: conv_x is bfloat16"),
        ("--channels-last", {"conv_backward_grad": "bfloat16 contiguous"}, "did not reach"),
        ("--cuda-graphs", {"replays": 7}, "7 replays in 8 timed steps"),
        ("--compile", {"compiled_graphs": 0, "graph_breaks": 0}, "0 graphs"),
        ("--compile", {"compiled_graphs": 2, "graph_breaks": 1}, "1 graph breaks"),
        (
            "--compile --channels-last",
            {"compiled_graphs": 1, "graph_breaks": 0, "conv_backward_grad": "bfloat16 contiguous"},
            "",
        ),
        ("", {"world": 2}, "1 processes of 2"),
        ("", {"conv_x": ""}, "conv_x is unknown"),
        ("", {"technique": "amp"}, "amp: the flags lack --amp"),
        ("--amp", {"technique": "amp+channels-last"}, "channels-last: the flags lack"),
        ("", {"technique": "x+default-malloc"}, "default-malloc: freed memory was kept"),
        ("", {"freed_memory": "returned"}, "freed memory was returned"),
    ],
)
def test_a_technique_that_did_not_engage_is_named(flags, changed, why):
    found = engagement.missing(SEEN | changed, tuple(flags.split()), 8)
    assert why in found
    assert bool(found) == bool(why)


def test_the_seconds_to_a_score_are_measured_without_validation(tiled, tmp_path):
    words = ["--to-quality", 0, "--models", "unet", "--backbone", ENCODER, "--techniques", "plain"]
    words += ["--also", "slow=--grad-accum 2", "broken=--grad-accum 100", "--seeds", 2]
    words += ["--max-steps", 4, "--eval-steps", 2, "--crop-size", 32, "--device", "cpu"]
    words += ["--data-path", tiled, "-o", tmp_path / "speed.csv", "--base", "--lr 0.002 --no-amp"]
    done = run_script(ROOT / "benchmarks/run.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(tmp_path / "to-quality.csv")
    assert all(row["flags"].startswith("--lr 0.002 --no-amp") for row in rows)
    assert [row["technique"] for row in rows] == ["plain", "slow", "broken", "plain", "slow"]
    for row in rows:
        if row["technique"] == "broken":
            assert "the training set has" in row["error"]
            continue
        assert row["name"] == "IoU.aircraft"
        assert row["at_steps"] == "2"  # any score will do, and the run ends there
        assert 0 < float(row["reached_s"]) == float(row["at_s"]) < float(row["wall_s"])
    assert f"| unet on {tiled.name}, IoU.aircraft 0 | broken | 0 of 0 |  |  |  |" in done.stdout


@pytest.mark.parametrize("level", [0.0, 1.0, 0.6, 1 / 3])
def test_a_run_that_was_measured_is_known_whatever_its_level(tmp_path, level):
    conditions = rows_of({"plain": [1]})[0] | {"level": level, "max_steps": 9, "eval_steps": 3}
    append(tmp_path / "a.csv", conditions, to_quality.COLUMNS)
    known = measure._finished(tmp_path / "a.csv", conditions, to_quality.MODE)
    assert known == {("unet", "plain", "0", "4", "x")}


def to_quality_rows():
    made = {"plain": [100, 110, 120], "amp": [50, 55, 60], "noise": [90, 121, 118]}
    rows = []
    for name, seconds in (made | {"bad": [9, "", 9]}).items():
        for row, at in zip(rows_of({name: [1] * 3}), seconds, strict=True):
            row |= {"level": "0.5", "max_steps": "9", "eval_steps": "3", "name": "mIoU"}
            curve = {"at_steps": "3 6", "at_s": "4 8", "scores": "0.2 0.6"}
            rows.append(row | {"reached_s": str(at), **curve})
    return rows


def sweep_rows():
    rows = []
    for batch, launch_ms, step_ms in (("1", 9, 10), ("2", 9, 11), ("4", 9, 20)):
        for row in rows_of({"plain": [100], "amp": [200]}, batch=batch, crop="64"):
            rows.append(row | {"launch_ms": str(launch_ms), "no_loader_ms": str(step_ms)})
    return rows


def test_the_curves_to_quality_of_all_machines_are_in_one_picture(tmp_path):
    rows = to_quality_rows()
    others = [row | {"model": "fcn", "cpu": "another"} for row in rows]
    widths = []
    for machines in ({"a": rows}, {"a": rows, "b": others}):
        speed = {"a": rows_of({"plain": [10]})}
        plots.draw_all({"speed": speed, "to-quality": machines, "sweep": {}}, tmp_path)
        widths.append(Image.open(tmp_path / "to-quality.png").width)
    assert widths[1] == 2 * widths[0]


def test_a_sweep_tells_speed_ups_by_batch_and_marks_where_the_device_is_the_limit():
    plain, amp = sweep.table(sweep_rows()).splitlines()[2:]
    assert plain == "| unet | 64 | plain | 100 images/s | 100 images/s ● | 100 images/s ● |"
    assert amp == "| unet | 64 | amp | 2.00 | 2.00 ● | 2.00 ● |"
    assert sweep.sizes("batch=1,2") == ("batch", [1, 2])
    for text in ("batch", "batch=", "batch=0", "side=3"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"is not (of the form|from 1)"):
            sweep.sizes(text)
    cells, _ = sweep.cells_of(
        lambda batch: plan(["unet"], ["amp"], {}, torch.device("cpu"), batch),
        [("batch", [1, 2]), ("crop", [32, 64])],
        *(4, 128),
    )
    assert len({(c.technique, c.batch, c.crop) for c in cells}) == len(cells) == 2 * 2 * 2


def test_a_file_with_fewer_columns_is_widened_and_keeps_its_values(tmp_path):
    path = tmp_path / "speed.csv"
    append(path, {"model": "unet", "device": "cpu"}, ("model", "device"))
    append(path, rows_of({"plain": [10]})[0])
    old, new = read_rows(path)
    assert old == dict.fromkeys(COLUMNS, "") | {"model": "unet", "device": "cpu"}
    assert new["step_ms"].split()[0] == "400.0"


def test_time_to_quality_is_shown_with_its_interval():
    plain, amp, noise, bad = to_quality.table(to_quality_rows()).splitlines()[2:]
    assert plain == "| unet on x, mIoU 0.5 | plain | 3 of 3 | 110 (85 to 135) | 6 |  |"
    assert amp.endswith("| 55 (43 to 67) | 6 | 2.00 (2.00 to 2.00), p 0.000 |")
    ratio, low, high, p = map(float, re.findall(r"\d\.\d+", noise.split("|")[-2]))
    assert 0.5 < p < 1
    assert low < 1 < high
    assert low * high == pytest.approx(ratio**2, rel=0.02)
    assert bad == "| unet on x, mIoU 0.5 | bad | 2 of 3 |  |  | < 12.68 |"


def test_the_same_model_on_other_tiles_is_another_series():
    rows = to_quality_rows()
    others = [row | {"data": "photographs", "level": "0.9"} for row in rows]
    lines = to_quality.table(rows + others).splitlines()[2:]
    assert lines[:4] == to_quality.table(rows).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| unet on photographs, mIoU 0.9"] * 4


def test_the_last_scores_of_all_models_are_told_with_their_time():
    curve = {"level": "1", "max_steps": "6", "eval_steps": "3", "name": "mIoU"}
    rows = [
        row | curve | {"at_steps": "3 6", "at_s": f"60 {end}", "scores": f"0.9 {score}"}
        for row, end, score in zip(rows_of({"plain": [1] * 2}), (110, 130), (0.5, 0.6), strict=True)
    ]
    rows.append(rows_of({"plain": [1]}, round="2", error="it did not")[0] | curve)
    other = {"max_steps": "3", "at_steps": "3", "at_s": "126", "scores": "0.3"}
    rows.append(rows_of({"plain": [1]}, model="fcn", backbone="resnet50")[0] | curve | other)
    unet, fcn = to_quality.last_scores(rows).splitlines()[2:]
    assert unet == "| UNet | resnet18 | 6 | 2.0 | mIoU | 0.550 ± 0.050 | 2 |"
    assert fcn == "| FCN | resnet50 | 3 | 2.1 | mIoU | 0.300 ± 0.000 | 1 |"


def test_a_seed_that_never_reached_the_quality_bounds_the_ratio():
    """Plain ended after 8 s without it: it would have taken longer."""
    rows = to_quality_rows()
    plain = [row for row in rows if row["technique"] == "plain"]
    plain[2]["reached_s"] = ""
    for row in rows:
        row["at_s"] = "4 300"
    _, amp, _, bad = to_quality.table(rows).splitlines()[2:]
    assert amp.endswith("| > 2.71 |")  # (100/50 · 110/55 · 300/60)^(1/3)
    # Seed 1 of the other never reached it either, so there is a bound in neither direction.
    assert bad.endswith("| 2 of 3 |  |  |  |")


@pytest.mark.parametrize("seeds", range(2, 12))
def test_the_quantiles_are_students(seeds):
    """P(|t| < quantile) is 0.95, by the integral of its density."""
    n, x = seeds - 1, np.linspace(-to_quality.T_95[seeds - 2], to_quality.T_95[seeds - 2], 40_001)
    scale = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi)
    density = scale * (1 + x**2 / n) ** (-(n + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(0.95, abs=1e-4)
    logs = np.arange(seeds) - (seeds - 1) / 2
    logs += to_quality.T_95[seeds - 2] * logs.std(ddof=1) / math.sqrt(seeds)
    assert to_quality._p_value(logs) == pytest.approx(0.05, abs=1e-4)


def test_gpu_tests_that_are_ended_by_their_limit_keep_their_results(tmp_path):
    """By the very options of `make benchmark-gpu`."""
    makefile = (ROOT / "Makefile").read_text()
    files = re.search(r"GPU_FILES := ((tests/\S+ )+)", makefile)
    texts = {f"tests/{p.name}": p.read_text() for p in (ROOT / "tests").glob("test_*.py")}
    marked = {
        name for name, text in texts.items() if re.search(r"^@?.*pytest\.mark\.gpu\b", text, re.M)
    }
    assert files
    assert marked - {"tests/test_run.py"} == {*files[1].split()}
    line = re.search(r"timeout (.*) \d+ ", makefile)
    options = re.search(r"GPU_TESTS := -m gpu (.*)", makefile)
    assert line
    assert options
    (tmp_path / "test_x.py").write_text(
        "import time\ndef test_fails(): assert 1 == 2\ndef test_hangs(): time.sleep(999)\n"
    )
    limit = ["timeout", *line[1].split(), str(PATIENCE), sys.executable, "-m", "pytest", "-v", "-p"]
    limit += ["no:cacheprovider", *options[1].split(), str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen(limit, cwd=tmp_path, stdout=log)
    printed = (tmp_path / "log").read_text
    wait_for(lambda: "FAILED test_x.py" in printed() or child.poll() is not None)
    child.send_signal(signal.SIGALRM)  # what `timeout` sends itself when the time is over
    child.wait(PATIENCE)
    assert "assert 1 == 2" in printed()
    assert "1 failed" in printed().splitlines()[-1]
