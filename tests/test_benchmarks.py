"""The small benchmarks run, and the READMEs show their committed results."""

import re
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import PATIENCE, ROOT, run_forked
from torch import nn
from torture import run as torture

from benchmarks import scenes
from benchmarks.lib import engagement, results, turns
from benchmarks.lib.readme import README, RESULTS, check_clean, part, read_rows, write_part
from common.cli import UserError


def test_the_readme_shows_the_committed_numbers():
    assert part(README, "scenes") == scenes.table(read_rows(RESULTS / "scenes.csv")), (
        "stale; run: python benchmarks/scenes.py --write-readme"
    )


def test_every_published_row_can_be_reproduced():
    """Rows that were measured with uncommitted changes are not taken."""
    for path in [*RESULTS.glob("*.csv"), torture.RESULTS]:
        assert "+dirty" not in path.read_text(), path
    with pytest.raises(UserError, match="uncommitted changes"):
        check_clean([{"commit": "abc"}, {"commit": "abc+dirty"}])


def test_the_readme_shows_what_the_torture_did():
    totals = torture.totals(read_rows(torture.RESULTS))
    assert part(torture.README, "torture") == totals, "stale; run torture with --write-readme"


@pytest.mark.parametrize(
    ("before", "only", "first"),
    [({}, "ab", "a"), ({"a": 3}, "ab", "b"), ({"a": 3, "b": 5}, "ab", "a"), ({"b": 5}, "b", "b")],
)
def test_torture_uses_its_time_also_when_all_goals_are_reached(
    tmp_path, monkeypatch, before, only, first
):
    """Goals come first; a case is never run twice."""
    tried, clock = [], [0.0]
    monkeypatch.setattr(torture, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def case(name, number, folder):
        tried.append((name, number))
        clock[0] += 1
        return "fine"

    parts = {
        name: torture.Part(partial(case, name), goal, name) for name, goal in (("a", 3), ("b", 5))
    }
    monkeypatch.setattr(torture, "PARTS", parts)
    output = tmp_path / "results.csv"
    for name in before:
        row = torture.torment(name, parts[name], 0, PATIENCE)
        torture.append(row | torture.provenance(torture.__file__, []), output)
        assert torture.done(name, output) == before[name]
    tried.clear()
    words = ["--budget", "1", "--only", *only, "-o", str(output)]
    assert torture.main(words) == 0
    assert tried[0] == (first, before.get(first, 0))
    assert len(set(tried)) == len(tried)
    counts = Counter(name for name, _ in tried)
    for name in only:
        assert counts[name] + before.get(name, 0) > parts[name].goal
        assert torture.done(name, output) == counts[name] + before.get(name, 0)


def test_scenes_are_measured_beside_the_network(tiled, tmp_path):
    output = tmp_path / "scenes.csv"
    words = ["--scene", "300", "--rounds", "1", "--sides", "700", "--counts", "200"]
    scenes.main(["--data-path", str(tiled), *words, "-o", str(output)])
    *reading, memory, join = read_rows(output)
    assert {row["part"] for row in reading} == {"reading"}
    assert len(reading) == len({row["case"] for row in reading}) == 8
    assert 0 < float(memory["memory_mb"]) < 600
    # Whole aircraft and parts of them are joined to fewer, and none is lost.
    detected, joined = re.match(r"(\d+) of (\d+) aircraft", join["case"]).groups()
    assert detected == "200"
    assert 100 < int(joined) < 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtype_and_layout_of_the_first_convolution_are_seen(dtype, layout):
    first, second = (nn.Conv2d(8, 8, 3, padding=1).to(memory_format=layout) for _ in "ab")
    x = torch.ones(2, 8, 16, 16).to(memory_format=layout)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = second(first(x).float().relu()).sum()
        loss.backward()
        return loss

    _, seen = engagement.watch_convolutions(step)
    name = "channels-last" if layout is torch.channels_last else "contiguous"
    assert seen["conv_x"] == seen["conv_backward_x"] == f"{str(dtype)[6:]} {name}"


def test_ways_take_turns_and_the_first_round_warms_up():
    called = []

    def measure(name):
        called.append(name)
        return len(called)

    measured = turns.in_turns({name: partial(measure, name) for name in "ab"}, 3)
    assert "".join(called) == "baabbaab"
    assert measured == {"a": [3, 6, 7], "b": [4, 5, 8]}


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
    with pytest.raises(UserError, match="no place for its part 'y'"):
        part(readme, "y")


def test_a_limited_processor_has_a_results_file_of_its_own(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    whole = results.file_name(torch.device("cpu"))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert results.file_name(torch.device("cpu")) != whole
