"""`report.html` and `compare.py`: what a run's folder says about the run."""

import json
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import pytest
import torch
from helpers.commands import ROOT, training
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torture import children

from benchmarks import compare
from common.cli import UserError
from common.io.pictures import compared, outcomes, printable, sheet
from common.run import checkpoint, machine, report
from common.run.report import Record, Shown
from mask import train as train_mask
from unet import inference, train

# All that a page consists of; the last line of each is the picture of the curves.
TAGS = """
html head meta title style body main h1 h2 h3 p div span b pre table tr th td
details summary figure figcaption img br
svg defs g path text use clippath rect
"""
ATTRIBUTES = """
lang charset name content class src alt title role aria-label
id style type width height viewbox version d x y transform clip-path xlink:href
"""
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The texts of a page by tag, its pictures, and whether all that was opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.open, self.sources = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS.split()
        assert {name for name, _ in attrs} <= set(ATTRIBUTES.split())
        self.sources += [value for name, value in attrs if name == "src"]
        for name, value in attrs:  # only to parts of the page itself
            assert name != "xlink:href" or value.startswith("#")
            assert "url(" not in value.replace("url(#", "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID or "svg" in self.open
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open:
            self.texts.append((self.open[-1], data))

    def of(self, tag):
        return [text for name, text in self.texts if name == tag]


def read(folder):
    parsed = Page((folder / "report.html").read_text())
    assert parsed.open == []
    return parsed


@pytest.fixture(scope="module")
def scored(trained, tiled, tmp_path_factory):
    """A copy of `trained` whose test split has been scored."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("scored") / "run")
    words = ["--data-path", tiled, "--test-only", "--resume", folder / "model_best.pth"]
    train.main(list(map(str, [*words, "-b", 4, "-j", 0, "--device", "cpu"])))
    return folder


def test_the_scores_on_the_page_are_those_of_the_files(scored):
    shown = read(scored)
    log = [json.loads(line) for line in (scored / "log.jsonl").read_text().splitlines()]
    best = checkpoint.load(scored / "model_best.pth")["best"]
    (chosen,) = [line for line in log if line.get("mIoU") == best]
    tested = json.loads((scored / "test_scores.json").read_text())
    values = [v for k, v in chosen.items() if k not in ("step", "epoch")] + list(tested.values())
    known = {f"{value:.3f}" for value in values}
    found = {cell for cell in shown.of("td") if re.fullmatch(r"\d\.\d{3}", cell)}
    settings = json.loads((scored / "run.json").read_text())["settings"]
    assert known <= found <= known | set(map(str, settings.values()))
    assert any(".airport." in name for name in tested)


def test_a_processor_without_avx_512_is_not_taken_for_one_of_the_same_name(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(machine, "cpuinfo", lambda key: "AMD EPYC")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert machine.cpu() == "AMD EPYC"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert machine.cpu() == "AMD EPYC with AVX2"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.cpu() == "AMD EPYC limited to AVX2"


def test_the_page_says_what_the_run_is_made_of(scored, tiled):
    shown = read(scored)
    said = " ".join(text for _, text in shown.texts)
    facts = json.loads((scored / "run.json").read_text())
    settings = checkpoint.load(scored / "checkpoint.pth")["settings"]
    assert settings["train index"] in said
    for value in (facts["command"], facts["commit"], facts["machine"]["cpu"], settings["torch"]):
        assert value in said
    for split in ("train", "val"):
        coco = json.loads((tiled / split / "instances_tiled.json").read_text())
        aircraft = [a for a in coco["annotations"] if not a["iscrowd"]]
        summary = facts["data"][split]
        assert summary["tiles"] == len(coco["images"])
        assert summary["aircraft"] == {"aircraft": len(aircraft)}
        assert summary["tiles_with_aircraft"] == len({a["image_id"] for a in aircraft})
        airports = {image["airport"] for image in coco["images"]}
        assert set(summary["airports"]) == airports <= set(shown.of("td"))
    assert all(source.startswith("data:image/jpeg;base64,") for source in shown.sources)
    assert len(shown.sources) >= 4 * 8
    assert "://" not in (scored / "report.html").read_text()


def test_the_commands_on_the_page_work(scored, tiled, tmp_path):
    predict, score, _ = read(scored).of("pre")
    words = shlex.split(predict)
    assert words[:2] == ["python", "unet/inference.py"]
    words[words.index("IMAGES")] = str(tiled / "test/images")
    words[-1] = str(tmp_path / "predictions")
    inference.main([*words[2:], "-i", "0", "--device", "cpu"])
    assert (tmp_path / "predictions/predictions.json").is_file()
    words = shlex.split(score)
    assert words[:2] == ["python", "unet/train.py"]
    (scored / "test_scores.json").unlink()
    train.main([*words[2:], "-b", "4", "-j", "0", "--device", "cpu"])
    assert (scored / "test_scores.json").is_file()


def test_an_airport_scores_as_its_tiles_alone(scored, tiled_copy, capsys):
    whole = json.loads((scored / "test_scores.json").read_text())
    index = tiled_copy / "test/instances_tiled.json"
    coco = json.loads(index.read_text())
    airport = coco["images"][0]["airport"]
    coco["images"] = [image for image in coco["images"] if image["airport"] == airport]
    kept = {image["id"] for image in coco["images"]}
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in kept]
    index.write_text(json.dumps(coco))
    model = shutil.copy(scored / "model_best.pth", tiled_copy)
    words = ["--data-path", tiled_copy, "--test-only", "--resume", model, "-b", 4, "-j", 0]
    train.main(list(map(str, [*words, "--device", "cpu"])))
    alone = json.loads((tiled_copy / "test_scores.json").read_text())
    for name in ("mIoU", "IoU.aircraft"):
        assert whole[f"{name}.airport.{airport}"] == pytest.approx(alone[name], abs=1e-6)
    assert not any(".airport." in name for name in alone)
    # A checkpoint without its run has no page.
    assert not (tiled_copy / "report.html").exists()
    assert "report.html" not in capsys.readouterr().out


HOSTILE = "<script>alert(1)</script>\"' onerror=x &amp; </td>"


def test_hostile_names_are_shown_as_they_are(few, tmp_path):
    data = shutil.copytree(few, tmp_path / "data")
    for split in ("train", "val"):
        index = data / split / "instances_tiled.json"
        coco = json.loads(index.read_text())
        coco["categories"][0]["name"] = f"class {HOSTILE}"
        for number, image in enumerate(coco["images"]):
            image["airport"] = f"airport {number % 2} {HOSTILE}"
        index.write_text(json.dumps(coco))
    output = tmp_path / "<img src=x> '&'"
    train.main(training(data, output, "--max-steps", 1))
    shown = read(output)
    said = " ".join(text for _, text in shown.texts)
    for text in (f"class {HOSTILE}", f"airport 0 {HOSTILE}", "<img src=x> '&'"):
        assert text in said


def record_of(folder, validations, steps=(), **facts):
    """A record of a run that no command has made."""
    facts = dict.fromkeys(report.KEYS, "") | {
        "classes": ["ground"],
        "settings": {},
        "data": {},
        "machine": {},
        "versions": {},
        "select": "mIoU",
        "total_steps": 1,
        **facts,
    }
    return Record(folder, facts, list(steps), validations, {})


@given(st.text(min_size=1) | st.text("<>&\"'/!-{%}a =", min_size=1))
@example(HOSTILE)
def test_a_page_escapes_its_texts(text):
    with TemporaryDirectory() as folder:
        tile = {"tile": text, "iou": 0.5, "wrong": 1, "pictures": [text]}
        tiles = {"scored": 1, "worst": [tile]}
        (Path(folder) / "val_tiles.json").write_text(json.dumps(tiles))
        split = {"tiles": 1, "tiles_with_aircraft": 1, "scenes": 1, "size": 1, "folder": text}
        split |= {"fingerprint": text, "aircraft": {text: 3}, "airports": {text: 1}}
        scores = {text: 0.5, f"IoU.{text}": 0.5, f"IoU.a.airport.{text}": 0.5}
        record = record_of(
            Path(folder),
            [{"step": 1, "epoch": 0, **scores}],
            classes=["ground", text],
            data={"val": split},
            settings={text: text, "data_path": text},
            machine={text: text},
            versions={text: [text]},
            drawn=["IoU."],
            **dict.fromkeys(("model", "command", "commit", "started", "definition"), text),
        )
        shown = Page(report.render(record, "<svg></svg>"))
    assert shown.open == []
    assert shown.sources == []
    if text.strip():
        for tag in ("title", "p", "td", "th", "span", "pre", "figcaption"):
            assert any(text in said for said in shown.of(tag)), tag


ODD_NAMES = ["_IoU", "$IoU_1$", "$\\frac{$", "\ud800\n\0", HOSTILE]


@settings(max_examples=10)
@given(
    st.lists(st.text(min_size=1), min_size=1, max_size=3, unique=True),
    st.lists(st.floats(), max_size=3),
    st.integers(0, 10**6),
)
@example(ODD_NAMES, [0.5], 1)
@example(ODD_NAMES, [float("nan"), 0.5, float("inf"), 1e308], 0)
def test_curves_of_any_names_and_values_are_drawn(names, values, step):
    lines = [{"step": step + n, **dict.fromkeys(names, v)} for n, v in enumerate(values)]
    losses = [{"step": step + n, "loss": v} for n, v in enumerate(values)]
    record = record_of(Path(), lines, losses, select=names[0], drawn=names)
    png, svg = report.draw(record)
    assert cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR) is not None
    shown = Page(svg)
    assert shown.open == []
    printed = "".join(f"{text}\n" for text in shown.of("text"))
    for name in record.drawn():
        assert printable(record.title(name)[:40]) in printed
    assert report.draw(record) == (png, svg)


def test_long_curves_stay_small(tmp_path):
    noise = np.random.default_rng(0).random(5000)
    losses = [{"step": n, "loss": loss} for n, loss in enumerate(noise)]
    svg = report.draw(record_of(tmp_path, [{"step": 1, "mIoU": 0.5}], losses))[1]
    assert len(svg) < 200_000


def test_the_selected_score_is_drawn_first_and_parts_of_the_set_never():
    names = ["a", "IoU.x", "IoU.x.airport.Oslo", "b", "IoU.y", "recall.size.small", "bs", "c"]
    line = {"step": 1, "epoch": 0} | dict.fromkeys(names, 0.5)
    asked = {"drawn": ["a", "bs", "b", "IoU.", "recall.", "lost"], "labels": {"bs": "b.size.small"}}
    record = record_of(Path(), [line], select="b", **asked)
    assert record.drawn() == ["b", "a", "IoU.x", "IoU.y"]
    assert record.drawn(2) == ["b", "a"]
    # Older versions did not say which scores to draw.
    assert record_of(Path(), [line], select="c").drawn() == ["c"]
    assert record_of(Path(), [], select="c").drawn() == []


def test_inference_does_not_load_what_draws():
    for name in ("common.predict.semantic", "mask.scenes"):
        loaded = f"import sys, {name}; print('matplotlib' in sys.modules)"
        words = [sys.executable, "-c", loaded]
        said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        assert said.stdout.strip() == "False"


def test_a_run_without_validation_has_a_page(few, tmp_path):
    data = shutil.copytree(few, tmp_path / "data")
    shutil.rmtree(data / "val")
    train.main(training(data, tmp_path / "run", "--max-steps", 1))
    said = " ".join(read(tmp_path / "run").of("p"))
    assert "There is no val/ to score; model_best.pth is the last state." in said


def test_a_page_that_cannot_be_written_does_not_end_the_run(few, tmp_path, capsys):
    (tmp_path / "run/report.html").mkdir(parents=True)
    train.main(training(few, tmp_path / "run", "--max-steps", 2, "--eval-steps", 1))
    assert capsys.readouterr().out.count("report.html was not written: IsADirectoryError") == 2
    assert checkpoint.load(tmp_path / "run/checkpoint.pth")["step"] == 2


def refresh_with_little_space(folder, killed):
    """Write the page where no file is as large; if `killed`, the kernel ends the writer there."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if killed else signal.SIG_IGN)
    size = (folder / "report.html").stat().st_size - 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    report.refresh(folder)


@pytest.mark.parametrize("killed", [True, False])
def test_a_page_cut_short_leaves_the_one_before(scored, tmp_path, killed):
    folder = shutil.copytree(scored, tmp_path / "run")
    before = (folder / "report.html").read_bytes()
    child = children.start(partial(refresh_with_little_space, folder, killed), tmp_path / "log")
    assert children.end(child) == (-signal.SIGXFSZ if killed else 0)
    assert (folder / "report.html").read_bytes() == before
    said = (tmp_path / "log").read_text()
    assert ("report.html was not written: OSError" in said) == (not killed)


def rows(text):
    """Cells of a Markdown table by the name in front."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in lines[2:] if cells}


def test_compared_runs_show_the_settings_that_differ_and_no_others(
    trained, tiled, tmp_path, capsys
):
    other = tmp_path / "other"
    words = ["--lr", "3e-3", "--ema", "0.9", "--max-steps", 8]
    train.main(training(tiled, other, *words))
    capsys.readouterr()
    compare.main([str(trained), str(other)])
    shown = rows(capsys.readouterr().out)
    names = list(shown)
    assert set(names[: names.index("steps")]) == {"lr", "ema"}
    assert shown["lr"] == ["0.001", "0.003"]
    assert shown["ema"] == ["None", "0.9"]
    bests = [checkpoint.load(folder / "checkpoint.pth")["best"] for folder in (trained, other)]
    assert [cell.strip("*") for cell in shown["mean IoU, validation"]] == [
        f"{b:.3f}" for b in bests
    ]
    for folder, speed, memory in zip(
        (trained, other), shown["images/s"], shown["MiB"], strict=True
    ):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        speeds = [line["images_per_s"] for line in lines if "images_per_s" in line]
        assert float(speed.strip("*")) == pytest.approx(np.median(speeds), abs=0.051)
        assert float(memory.strip("*")) == pytest.approx(
            max(line.get("memory_mib", 0) for line in lines), abs=0.051
        )
    compare.main([str(trained), str(trained)])
    assert next(iter(rows(capsys.readouterr().out))) == "steps"


def test_compare_wants_the_folders_of_trainings(trained, tmp_path):
    with pytest.raises(UserError, match=r"has no run\.json; give the output folder"):
        compare.main([str(trained), str(tmp_path)])
    (tmp_path / "run.json").write_text('{"model": 1')
    with pytest.raises(UserError, match="is not JSON"):
        compare.main([str(tmp_path)])


def test_a_continued_run_keeps_what_was_tested_and_says_where_it_continued(scored, tiled, tmp_path):
    folder = shutil.copytree(scored, tmp_path / "run")
    train.main(training(tiled, folder, "--resume", "--max-steps", 9))
    facts = json.loads((folder / "run.json").read_text())
    assert facts["from_step"] == 8
    assert facts["tests"]["test"]["step"] == 8
    shown = read(folder)
    assert any("It continued at step 8." in text for text in shown.of("p"))
    assert any("step 9 of 9, finished" in text for text in shown.of("p"))


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_the_kept_tiles_are_the_first_of_all_in_order(pixels, count, batch):
    pixels = [(min(pair), max(pair)) for pair in pixels]
    images = [{"file_name": str(n)} for n in range(len(pixels))]
    found = Shown(images, list(range(len(pixels))), lambda n: pixels[n][1] > 0)
    found.count = count
    image, mask = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8)
    for first in range(0, len(pixels), batch):
        places = list(range(first, min(first + batch, len(pixels))))
        found.offer(places, [pixels[n] for n in places], lambda _: (image, mask, mask))
    there = [n for n, (_, union) in enumerate(pixels) if union]
    worst = sorted(there, key=lambda n: (pixels[n][0] - pixels[n][1], n))
    best = sorted(there, key=lambda n: (-pixels[n][0] / pixels[n][1], -pixels[n][1], n))
    assert [tile["tile"] for _, tile in found.worst] == [str(n) for n in worst[:count]]
    assert [tile["tile"] for _, tile in found.best] == [str(n) for n in best[:count]]
    assert found.offered == len(pixels)
    on_sheet = [int(caption.partition(",")[0]) for caption in found.rows]
    assert set(on_sheet) <= set(there or range(len(pixels)))
    assert len(on_sheet) == min(4, len(there or pixels))


def test_right_missed_and_false_pixels_are_those_of_the_masks():
    ground, first, second, ignore = 0, 1, 2, 255
    truth = np.array([[ground, ground, first, first, first, ignore, 256 + first]])
    prediction = np.array([[ground, second, ground, first, second, first, 512 + first]])
    right, missed, false = (mask[0].nonzero()[0].tolist() for mask in outcomes(truth, prediction))
    assert (right, missed, false) == ([3, 6], [2], [1, 4])


def test_a_sheet_shows_errors_and_a_legend_of_every_colour():
    """The wanted colours are written here, not taken from the code that draws."""
    image = np.full((64, 64, 3), 120, np.uint8)
    truth, prediction = np.zeros((2, 64, 64), np.uint8)
    truth[10:30, 10:30], prediction[10:30, 20:40] = 2, 2
    pictures = sheet({"tile 7": compared(image, truth, prediction)}, "1 of 9", ["g", "a", "b"])
    legend = pictures[:52].reshape(-1, 3).tolist()
    for wanted in ("e10098", "e69f00", "3b82f6", "ffd60a", "e43c2e"):
        assert list(bytes.fromhex(wanted)) in legend
    errors = pictures[-328:-8, 3 * 328 + 8 :].astype(int)
    blue, yellow, red = (errors[100, x] for x in (125, 75, 175))
    assert blue[2] > blue[0] + 50
    assert min(yellow[:2]) > yellow[2] + 50
    assert red[0] > max(red[1:]) + 50
    assert np.ptp(errors[300, 300]) == 0


def mean_of(classes, split, ious):
    scores = {"mIoU": float(np.mean(list(ious.values())))}
    return scores | {f"IoU.{name}": value for name, value in ious.items()}


def test_a_mean_without_a_class_is_marked(tmp_path, capsys):
    """Test has no large aircraft, so its mean is over other classes than the validation's."""
    classes = ["ground", "small", "large"]
    facts = {"classes": classes, "tests": {"test": {"checkpoint": "", "step": 1, "when": ""}}}
    val = mean_of(classes, "val", {"ground": 0.9, "small": 0.5, "large": 0.1})
    tested = mean_of(classes, "test", {"ground": 0.9, "small": 0.5})
    data = {"tiles": 1, "tiles_with_aircraft": 1, "scenes": 1, "size": 1, "folder": "f"}
    data |= {"aircraft": {}, "airports": {}}
    folders = []
    for name in ("a", "b"):
        record = record_of(
            tmp_path / name, [{"step": 1, "epoch": 0, **val}], drawn=["IoU."], **facts
        )
        split = {"train": data | {"fingerprint": name}}
        record.facts.update(command="", commit="", from_step=0, data=split)
        record = Record(record.folder, record.facts, [], record.validations, {"test": tested})
        page = Page(report.render(record, "<svg></svg>"))
        assert page.of("span").count("2 of 3 classes") == 1
        assert "mean IoU, test, 2 of 3 classes" in [" ".join(t.split()) for t in page.of("span")]
        record.folder.mkdir()
        (record.folder / "run.json").write_text(json.dumps(record.facts))
        (record.folder / "log.jsonl").write_text(json.dumps(record.validations[0]))
        better = tested | {"mIoU": tested["mIoU"] + (name == "b") / 10}
        better |= {"IoU.small": tested["IoU.small"] + (name == "b") / 10}
        (record.folder / "test_scores.json").write_text(json.dumps(better))
        folders.append(str(record.folder))
    compare.main(folders)
    said = capsys.readouterr().out
    shown = rows(said)
    assert shown["mean IoU, test"] == ["0.700 (2 of 3 classes)", "0.800 (2 of 3 classes)"]
    assert shown["small IoU, test"] == ["0.500", "**0.600**"]
    assert shown["large IoU, validation"] == ["0.100", "0.100"]
    assert said.splitlines()[-1] == "Different tiles in train: compare with care."
    assert max(map(len, said.splitlines())) < 200


def test_a_class_has_one_colour_in_curves_page_and_pictures():
    line = {"step": 1, "epoch": 0, "mIoU": 0.5, "IoU.ground": 0.5, "IoU.a": 0.5, "IoU.b": 0.5}
    record = record_of(
        Path(), [line, line | {"step": 2}], classes=["ground", "a", "b"], drawn=["IoU."]
    )
    svg = report.draw(record)[1]
    assert [svg.count(f"stroke: {tint}") > 0 for tint in ("#e10098", "#e69f00", "#56b4e9")] == [
        True,
        True,
        False,
    ]
    page = report.render(record, svg)
    assert "background:#e10098" in page
    assert "background:#e69f00" in page


def test_a_mask_run_has_scores_by_size_and_pictures(few, thin, tmp_path):
    folder = tmp_path / "run"
    train_mask.main(training(few, folder, "--max-steps", 1, model="mask"))
    shown = read(folder)
    assert len(shown.sources) == 4 * 2
    assert {"small", "medium"} & set(shown.of("td"))
    assert "mask AP" in shown.of("td")
    assert "mask AP, validation" in shown.of("th")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mIoU", ("", "", "mIoU")),
        ("IoU.Boeing 737.8", ("class", "IoU", "Boeing 737.8")),
        ("IoU.aircraft.airport.St. John's", ("airport", "IoU.aircraft", "St. John's")),
        ("mask_AP.airport.Oslo", ("airport", "mask_AP", "Oslo")),
        ("recall.size.large", ("size", "recall", "large")),
        ("mask_APs", ("size", "mask_AP", "small")),
        ("box_ARl", ("size", "box_AR", "large")),
        ("box_AR100", ("", "", "box_AR100")),
    ],
)
def test_what_a_score_is_of(name, parts):
    labels = {"mask_APs": "mask_AP.size.small", "box_ARl": "box_AR.size.large"}
    assert record_of(Path(), [], labels=labels).split_name(name) == parts


def test_two_processes_score_as_one(scored, tiled, tmp_path):
    folder = shutil.copytree(scored, tmp_path / "run")
    (folder / "test_scores.json").unlink()
    words = ["--data-path", tiled, "--test-only", "--resume", folder / "model_best.pth"]
    words = list(map(str, [*words, "-b", 4, "-j", 0, "--device", "cpu"]))
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = children.start_ranks(partial(train.main, words), logs)
    assert [children.end(rank) for rank in ranks] == [0, 0]
    alone, both = (json.loads((f / "test_scores.json").read_text()) for f in (scored, folder))
    assert both == pytest.approx(alone, abs=1e-3)
    tiles = [json.loads((f / "test_tiles.json").read_text()) for f in (scored, folder)]
    assert tiles[1]["scored"] == -(-tiles[0]["scored"] // 2)
    read(folder)
