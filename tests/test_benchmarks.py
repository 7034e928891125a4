"""The small benchmarks run, and the READMEs show their committed results."""

import time
from itertools import count, pairwise

import pytest
import torch
from helpers.commands import ROOT, run_forked
from torch import nn
from torture import run as torture

from benchmarks import loader, onnx_speed, operators, overhead, parts, scenes
from benchmarks.lib import convolutions, flops, results
from benchmarks.lib.readme import README, part, read_rows, write_part


@pytest.mark.parametrize(
    ("name", "show"),
    [
        ("loader", loader.table),
        ("onnx_speed", onnx_speed.table),
        ("operators", operators.table),
        ("overhead", overhead.sentence),
        ("parts", parts.table),
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


def test_the_parts_are_measured_beside_the_plain_way(tiled, tmp_path):
    output = tmp_path / "parts.csv"
    words = ["--data-path", tiled, "--rounds", 2, "--scene", 128, 192, "--window", 64]
    words += ["--encoder", "tu-test_resnet", "-o", output]
    done = run_forked(ROOT / "benchmarks/parts.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["part"]: row for row in read_rows(output)}
    assert set(rows) == {"preprocessing", "inference, tiles", "inference, scene", "evaluation"}
    assert float(rows["preprocessing"]["ratio_low"]) > 3  # else the table of colours is useless
    for row in rows.values():
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"])


def test_an_exported_network_is_measured_beside_pytorch(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    output = tmp_path / "onnx_speed.csv"
    words = ["--models", "unet", "--backbone", "tu-test_resnet", "--window", 64, "--rounds", 2]
    done = run_forked(ROOT / "benchmarks/onnx_speed.py", *words, "-o", output, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_rows(output)
    assert [row["model"] for row in rows] == ["unet"]
    assert float(rows[0]["ratio_low"]) <= float(rows[0]["ratio"]) <= float(rows[0]["ratio_high"])
    assert "| unet, tu-test_resnet |" in onnx_speed.table(rows)


def test_scenes_are_measured_beside_the_network(tiled, tmp_path):
    output = tmp_path / "scenes.csv"
    scenes.main(
        ["--data-path", str(tiled), "--parts", "memory", "join", "seams", "-o", str(output)]
        + ["--sides", "700", "--counts", "60", "--aprons", "1"]
    )
    rows = read_rows(output)
    assert [row["part"] for row in rows[:2]] == ["memory", "join"]
    assert 0 < float(rows[0]["memory_mb"]) < 600
    ours = [row for row in rows if row["case"].startswith("ours")]
    assert len(ours) == 3
    for row in ours:
        assert 0.9 * int(row["aircraft"]) <= int(row["found"]) <= int(row["aircraft"])
        assert int(row["whole"]) <= int(row["found"])


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


def test_every_convolution_of_a_model_is_measured_in_both_layouts(capsys):
    words = ["--model", "unet", "--backbone", "tu-test_resnet", "--rounds", "1"]
    operators.main([*words, "-b", "2", "--crop-size", "64"])
    *rows, total, optimizer = capsys.readouterr().out.splitlines()[2:]
    model, seen = convolutions.of_model("unet", "tu-test_resnet", 2, 64)
    assert sum(seen.values()) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert len(rows) == len(seen)
    values = [[float(cell) for cell in row.split("|")[2:6]] for row in (*rows, total)]
    assert values[-1] == pytest.approx([sum(v) for v in zip(*values[:-1], strict=True)], abs=2)
    lost = [backward - last for *_, backward, last in values[:-1]]
    # Sorted before they are rounded to a tenth.
    assert all(before < after + 0.25 for before, after in pairwise(lost))
    assert all(float(cell) > 0 for cell in optimizer.split("|")[2:4])


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
