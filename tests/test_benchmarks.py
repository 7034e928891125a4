"""The small benchmarks run, and the READMEs show their committed results."""

import re
import time
from itertools import count

import pytest
import torch
from helpers.commands import ROOT, run_forked
from torture import run as torture

from benchmarks import loader, operators, overhead, scenes
from benchmarks.lib import flops, results
from benchmarks.lib.readme import README, part, read_rows, write_part


@pytest.mark.parametrize(
    ("name", "show"),
    [
        ("loader", loader.table),
        ("operators", operators.table),
        ("overhead", overhead.sentence),
        ("scenes", scenes.table),
    ],
)
def test_the_readme_shows_the_committed_numbers(name, show):
    assert part(README, name) == show(read_rows(ROOT / f"benchmarks/results/{name}.csv")), (
        f"stale; run: python benchmarks/{name}.py --write-readme"
    )


def test_the_readme_shows_what_the_torture_did():
    totals = torture.totals(read_rows(torture.RESULTS))
    assert part(torture.README, "torture") == totals, "stale; run torture with --write-readme"


def test_scenes_are_measured_beside_the_network(tiled, tmp_path):
    output = tmp_path / "scenes.csv"
    words = ["--parts", "memory", "join", "--sides", "700", "--counts", "200"]
    scenes.main(["--data-path", str(tiled), *words, "-o", str(output)])
    rows = read_rows(output)
    assert [row["part"] for row in rows] == ["memory", "join"]
    assert 0 < float(rows[0]["memory_mb"]) < 600
    # Whole aircraft and parts of them are joined to fewer, and none is lost.
    detected, joined = re.match(r"(\d+) of (\d+) aircraft", rows[1]["case"]).groups()
    assert detected == "200"
    assert 100 < int(joined) < 200


def test_the_operators_are_measured_in_each_layout_and_precision(tmp_path):
    output = tmp_path / "operators.csv"
    words = ["--crop-size", 16, "-b", 1, "--rounds", 2, "--device", "cpu", "-o", output]
    done = run_forked(ROOT / "benchmarks/operators.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_rows(output)
    ways = {(row["operator"], row["way"]) for row in rows}
    assert len(ways) == len(rows) == len(operators.OPERATORS) * len(operators.WAYS)
    plain = [row for row in rows if row["way"] == operators.PLAIN]
    assert all(float(row["ratio"]) == 1 for row in plain)
    for way in operators.WAYS.keys() - {operators.PLAIN}:
        assert any(float(row["ratio_low"]) != 1 for row in rows if row["way"] == way)


def test_the_overhead_is_measured(tmp_path):
    output = tmp_path / "overhead.csv"
    words = ["--model", "unet", "--backbone", "tu-test_resnet", "--crop-size", 64, "--steps", 4]
    done = run_forked(
        ROOT / "benchmarks/overhead.py", *words, "--rounds", 3, "-o", output, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(output)
    assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])
    assert 0 < float(row["bare_ms"]) < 10_000
    assert row["command"].startswith("python benchmarks/overhead.py --model unet")


def test_the_syncs_of_a_model_are_counted(tmp_path):
    done = run_forked(ROOT / "benchmarks/syncs.py", "--models", "DeepLabV3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "DeepLabV3: 0 syncs in a step" in done.stdout


def test_a_part_of_a_readme_is_replaced_and_nothing_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    write_part(readme, "x", "| new |")
    assert readme.read_text() == "a\n<!-- x -->\n| new |\n<!-- /x -->\nb\n"
    assert part(readme, "x") == "| new |"
    with pytest.raises(ValueError, match="no marks"):
        part(readme, "y")


def test_a_limited_processor_has_a_results_file_of_its_own(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    whole = results.file_name("speed", torch.device("cpu"))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert results.file_name("speed", torch.device("cpu")) != whole


def test_a_slow_matrix_product_is_timed_once_not_ten_times(monkeypatch):
    clock = count(0, 3)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert flops.matmul_peak(torch.device("cpu"), None) == 2 * 1024**3 / 3
    assert next(clock) == 6, "a second product was timed"
