"""The quick start in small, through its own commands; and the README's table of it."""

from pathlib import Path

import pytest
from helpers.commands import NETWORKS, ROOT, run_forked

from benchmarks import quickstart
from benchmarks.lib.readme import part, read_rows

SMALL = {
    "render": ["-n", "12", "--size", "384", "256"],
    "tile": ["-s", "128"],
    "train": [*NETWORKS["unet"], "--crop-size", "64", "--max-steps", "4", "--eval-steps", "2"],
}


def test_the_readme_shows_the_committed_times():
    written = part(ROOT / "README.md", "quickstart")
    stale = "stale; run: python benchmarks/quickstart.py --seeds 0 1 2 --write-readme"
    assert written == quickstart.table(read_rows(quickstart.RESULTS)), stale


def test_every_part_runs_and_the_end_names_what_there_is(tmp_path, monkeypatch, capfd):
    whole = quickstart.commands
    readme = tmp_path / "README.md"
    readme.write_text("<!-- quickstart -->\n<!-- /quickstart -->\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "RESULTS", tmp_path / "quickstart.csv")
    monkeypatch.setattr(quickstart, "FRONT_PAGE", readme)
    monkeypatch.setattr(
        quickstart,
        "commands",
        lambda seed, fast: {k: [*v, *SMALL.get(k, [])] for k, v in whole(seed, []).items()},
    )
    monkeypatch.setattr(
        quickstart.subprocess,
        "call",
        lambda words: run_forked(Path(words[1]), *words[2:], cwd=tmp_path).returncode,
    )
    monkeypatch.setattr(quickstart, "check_clean", lambda rows: None)
    quickstart.main(["--seeds", "3", "--write-readme"])
    printed = capfd.readouterr().out
    (row,) = read_rows(tmp_path / "quickstart.csv")
    assert f"Aircraft IoU {float(row['IoU']):.3f}"[:-1] in printed
    for name in ("val_sheet.jpg", "test_sheet.jpg", "curves.png", "predictions/predictions.json"):
        assert (tmp_path / quickstart.RUN / name).is_file()
    # Each command is shown as it can be typed.
    assert sum(line.startswith("$ ") for line in printed.splitlines()) == len(quickstart.PARTS)
    assert row["seed"] == "3"
    assert all(float(row[name]) > 0 for name in quickstart.PARTS)
    assert f"| {float(row['train']):.0f} |" in readme.read_text()


def test_a_command_that_fails_ends_the_quick_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(quickstart.UserError, match=r"preprocess\.py ended with code 2"):
        quickstart.timed(["preprocessing/preprocess.py", "nowhere"])
