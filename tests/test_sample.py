"""The rendered scenes: format, agreement of XML, mask and image, and what a user may get wrong."""

import subprocess
import sys
import xml.etree.ElementTree as ET

import cv2
import numpy as np
import pytest
from helpers.commands import ROOT, SHARED
from helpers.scenes import decode, tree

from common.cli import UserError
from preprocessing import preprocess
from rareplanes import sample
from rareplanes.render import aircraft
from rareplanes.render.makes import Livery, makes
from rareplanes.render.view import View

WIDTH, HEIGHT = 960, 540
SCENES = 16


class Read:
    """One scene, read from its three files."""

    def __init__(self, xml):
        folder, self.stem = xml.parents[1], xml.stem
        self.image = decode(folder / "images" / f"{self.stem}.png")
        self.mask = decode(folder / "masks" / f"{self.stem}_mask.png")
        self.root = ET.parse(xml).getroot()
        self.objects = list(self.root.iter("object"))
        b, g, r = (self.mask[..., k].astype(int) for k in range(3))
        self.codes = r << 16 | g << 8 | b

    def pixels(self, thing):
        r, g, b, a = map(int, thing.findtext("object_mask_color_rgba").split(","))
        assert a == 255
        return self.codes == (r << 16 | g << 8 | b)

    def planes(self):
        return [o for o in self.objects if o.findtext("category0") == "Airplane"]


def box(thing):
    return tuple(int(thing.findtext(f"bndbox2D/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))


def sockets(thing):
    return {
        bone.tag.rsplit("_", 1)[1]: np.array(
            [float(part.split("=")[1]) for part in bone.findtext("screen").split()]
        )
        for bone in thing.find("Sockets")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "out"
    sample.main(
        ["-o", str(out), "-n", str(SCENES), "--seed", "4", "--size", str(WIDTH), str(HEIGHT)]
    )
    return out


@pytest.fixture(scope="module")
def scenes(folder):
    return [Read(xml) for xml in sorted(folder.glob("*/xmls/*.xml"))]


def drawn(sun):
    """An airliner with its nose to the right in the light of `sun`: brightness and alpha."""
    make = next(make for make in makes() if make.name == "Boeing_767")
    paint = Livery(*(np.full(3, 200.0) for _ in Livery._fields))
    view = View(400, 400, 2.5, (0, 0), 0.0, np.zeros(2), np.array(sun) / np.linalg.norm(sun))
    plane = aircraft.draw(aircraft.build(make, paint), 0.0, np.zeros(2), view, 0, 0.4)
    return plane.colour[..., 0], plane.alpha


def test_the_wing_behind_the_fuselage_is_in_its_shadow():
    """Both wings have the same angle to a sun beside the aircraft; one is behind the fuselage."""

    def roots(sun):
        light, alpha = drawn(sun)
        np.testing.assert_array_equal(alpha, outline)  # the light changes no outline
        middle, x = len(light) // 2, int(0.56 * light.shape[1])
        return light[middle - 13 : middle - 9, x].mean(), light[middle + 10 : middle + 14, x].mean()

    outline = drawn((0, 0, 1))[1]
    above, below = roots((0, 0, 1))
    assert above == pytest.approx(below, rel=0.02)
    above, below = roots((0, 1, 0.5))
    assert above < 0.5 * below
    above, below = roots((0, -1, 0.5))
    assert below < 0.5 * above
    above, below = roots((1, 0, 0.5))
    assert above == pytest.approx(below, rel=0.02)


def test_files_and_format(folder, scenes):
    assert len(scenes) == SCENES
    assert not list(folder.rglob("*.tmp"))
    for scene in scenes:
        assert scene.image.shape == scene.mask.shape == (HEIGHT, WIDTH, 4)
        assert (scene.image[..., 3] == 255).all()
        assert (scene.mask[..., 3] == 255).all()
        assert scene.root.findtext("filename") == f"{scene.stem}.png"
        assert scene.root.findtext("image_resolution/width") == str(WIDTH)
        assert scene.image[..., :3].std() > 5


def test_every_airport_is_in_both_splits(folder):
    names = {
        split: {p.stem.split("_Airport_")[0] for p in (folder / split / "images").iterdir()}
        for split in ("train", "test")
    }
    assert names["train"] == names["test"]
    assert len(names["train"]) >= 6


def test_test_fraction_is_kept():
    scenes = sample.schedule(400, 0, (640, 360), 0.2)
    assert sum(s.split == "test" for s in scenes) == 80
    assert {s.split for s in sample.schedule(400, 0, (640, 360), 0.0)} == {"train"}
    assert {s.split for s in sample.schedule(2, 0, (640, 360), 0.2)} == {"train", "test"}


def test_scenes_without_a_test_split_can_be_tiled(tmp_path):
    """No folder of a split is there without a scene: `preprocess.py` would refuse it."""
    words = ["-o", str(tmp_path), "-n", "9", "--size", "384", "256", "--test-fraction", "0"]
    sample.main(words)
    assert not (tmp_path / "test").exists()
    assert preprocess.main([str(tmp_path), "-s", "128", "-n", "1", "--negatives", "100"]) == 0


def test_boxes_are_the_extent_of_the_mask(scenes):
    count = 0
    for scene in scenes:
        for thing in scene.objects:
            ys, xs = np.nonzero(scene.pixels(thing))
            if len(xs):
                assert box(thing) == (xs.min(), ys.min(), xs.max(), ys.max())
                count += 1
            else:
                assert thing.findtext("category0") == "Airplane"
                x0, y0, x1, y1 = box(thing)
                assert 0 <= x0 <= x1 < WIDTH
                assert 0 <= y0 <= y1 < HEIGHT
    assert count > 3 * SCENES


def test_colours_are_unique_and_differ_from_the_ground(scenes):
    for scene in scenes:
        colours = [thing.findtext("object_mask_color_rgba") for thing in scene.objects]
        assert len(set(colours)) == len(colours)
        listed = np.zeros((HEIGHT, WIDTH), bool)
        for thing in scene.objects:
            here = scene.pixels(thing)
            # Pixels of an object's colour stay close together: no ground has its colour.
            assert not (here & listed).any()
            listed |= here
            x0, y0, x1, y1 = box(thing)
            assert (x1 - x0) < 260
            assert (y1 - y0) < 260


def test_mask_has_no_blended_colours(scenes):
    """There are few colours around an aircraft; anti-aliasing would add hundreds."""
    grown = np.ones((3, 3), np.uint8)
    for scene in scenes:
        greyish = np.ptp(scene.mask[..., :3].astype(int), axis=-1) <= 4  # the ground's texture
        for thing in scene.planes():
            here = scene.pixels(thing).astype(np.uint8)
            rim = (cv2.dilate(here, grown) > here) & ~greyish
            assert len(np.unique(scene.codes[rim])) <= 16


def test_ground_of_the_mask_is_coloured_and_textured(scenes):
    for scene in scenes:
        listed = np.any([scene.pixels(thing) for thing in scene.objects], axis=0)
        assert (scene.codes[~listed] != 0).all()
    assert max(len(np.unique(scene.codes)) for scene in scenes) > 40


def bright_ground(scenes):
    """Of each scene the share of ground brighter than 192, and the ground's median."""
    shares, medians = [], []
    for scene in scenes:
        grey = cv2.cvtColor(scene.image, cv2.COLOR_BGRA2GRAY)
        ground = ~np.any([scene.pixels(thing) for thing in scene.planes()], axis=0)
        shares.append((grey[ground] > 192).mean())
        medians.append(np.median(grey[ground]))
    return shares, medians


def test_ground_is_as_bright_and_as_dark_as_in_real_images(scenes):
    """Aircraft are not the only bright things, and some scenes are dark and some are bright."""
    shares, medians = bright_ground(scenes)
    assert 0.04 < np.mean(shares) < 0.25  # 0.05 to 0.16 in three sets of real images
    assert min(shares) < 0.005
    assert max(shares) > 0.15
    assert min(medians) < 110
    assert max(medians) > 145


def test_ground_of_plain_scenes_is_hardly_ever_bright(tmp_path):
    out = tmp_path / "out"
    sample.main(["-o", str(out), "-n", "8", "--plain", "--size", "640", "360"])
    shares, _ = bright_ground([Read(xml) for xml in out.glob("*/xmls/*.xml")])
    assert np.mean(shares) < 0.02
    with pytest.raises(UserError, match="other settings"):
        sample.main(["-o", str(out), "-n", "8", "--size", "640", "360"])


def test_wing_spans_of_whole_aircraft(scenes):
    seen = 0
    for scene in scenes:
        for thing in scene.planes():
            x0, y0, x1, y1 = box(thing)
            if x0 > 0 and y0 > 0 and x1 < WIDTH - 1 and y1 < HEIGHT - 1:
                at = sockets(thing)
                assert 25 <= np.hypot(*(at["RightWing"] - at["LeftWing"])) <= 170
                seen += 1
    assert seen > SCENES


def test_sockets_fit_the_mask(scenes):
    """Nose and wing tips lie at the aircraft's pixels, with right and left as the nose points."""
    near = total = 0
    for scene in scenes:
        for thing in scene.planes():
            at, here = sockets(thing), scene.pixels(thing)
            ahead, right = at["Nose"] - at["Tail"], at["RightWing"] - at["LeftWing"]
            assert ahead[0] * right[1] - ahead[1] * right[0] > 0  # y points down
            wide = cv2.dilate(here.astype(np.uint8), np.ones((13, 13), np.uint8))
            for x, y in (at["Nose"], at["RightWing"], at["LeftWing"]):
                if 8 <= x < WIDTH - 8 and 8 <= y < HEIGHT - 8 and here.any():
                    total += 1
                    near += wide[int(y), int(x)]
    assert near > 0.9 * total > 50


def test_image_and_mask_agree(scenes):
    """Moving the masks by a few pixels lowers the contrast along the aircraft's edges."""

    def contrast(shift):
        sums = []
        for scene in scenes:
            grey = cv2.cvtColor(scene.image, cv2.COLOR_BGRA2GRAY)
            slope = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
            slope = np.roll(slope, shift, (0, 1))
            for thing in scene.planes():
                here = scene.pixels(thing).astype(np.uint8)
                edge = cv2.morphologyEx(here, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
                if edge.any():
                    sums.append(slope[edge].mean())
        return np.mean(sums)

    still = contrast((0, 0))
    for shift in ((3, 0), (-3, 0), (0, 3), (0, -3)):
        assert contrast(shift) < 0.9 * still


def test_quirks_of_rareplanes_scenes_occur(scenes):
    kinds = [o.findtext("category0") for scene in scenes for o in scene.objects]
    assert kinds.count("Airport") >= 3
    cut = parts = 0
    for scene in scenes:
        for thing in scene.planes():
            x0, y0, x1, y1 = box(thing)
            cut += x0 == 0 or y0 == 0 or x1 == WIDTH - 1 or y1 == HEIGHT - 1
            parts += cv2.connectedComponents(scene.pixels(thing).astype(np.uint8))[0] > 2
    assert cut >= 3
    assert parts >= 1


def test_makes_are_those_of_the_table(scenes):
    table = SHARED / "aircraft_attributes.csv"
    if not table.is_file():
        pytest.skip(f"needs {table}")
    known = {line.split(",")[0] for line in table.read_text().splitlines()}
    for scene in scenes:
        for thing in scene.planes():
            assert f"{thing.findtext('category3')}_{thing.findtext('category4')}" in known


def test_same_bytes_for_any_number_of_workers(tmp_path):
    for workers in ("1", "2"):
        arguments = ["-n", "3", "--seed", "9", "--size", "320", "240", "--workers", workers]
        command = [sys.executable, str(ROOT / "rareplanes" / "sample.py")]
        subprocess.run([*command, "-o", str(tmp_path / workers), *arguments], check=True)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


def test_seeds_differ_and_a_cut_run_goes_on(tmp_path):
    arguments = ["-n", "2", "--size", "256", "256"]
    sample.main(["-o", str(tmp_path / "a"), *arguments, "--seed", "1"])
    sample.main(["-o", str(tmp_path / "b"), *arguments, "--seed", "2"])
    whole = tree(tmp_path / "a")
    images = [name for name in whole if "/images/" in name]
    assert all(whole[name] != tree(tmp_path / "b")[name] for name in images)
    for xml in (tmp_path / "a").glob("train/xmls/*.xml"):
        xml.unlink()
    sample.main(["-o", str(tmp_path / "a"), *arguments, "--seed", "1"])
    assert tree(tmp_path / "a") == whole


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["-n", "0"], "--scenes: 0"),
        (["--seed", "-1"], "--seed: -1"),
        (["--size", "64", "64"], "--size: 64"),
        (["--size", "640", "9000"], "--size: 9000"),
        (["--test-fraction", "1"], "--test-fraction: 1"),
        (["--workers", "0"], "--workers: 0"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_written(tmp_path, flags, told):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=told):
        sample.main(["-o", str(out), *flags])
    assert not out.exists()


def test_scenes_of_other_settings_are_not_mixed(tmp_path):
    out, arguments = tmp_path / "out", ["-n", "1", "--size", "256", "256"]
    sample.main(["-o", str(out), *arguments, "--seed", "1"])
    before = tree(out)
    with pytest.raises(UserError, match="other settings"):
        sample.main(["-o", str(out), *arguments, "--seed", "2"])
    assert tree(out) == before


def test_foreign_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UserError):
            sample.main(["-o", str(target), "-n", "1"])
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unwritable_folder_gets_one_sentence():
    command = [
        sys.executable,
        str(ROOT / "rareplanes" / "sample.py"),
        "-o",
        "/proc/none",
        "-n",
        "1",
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert answer.stderr.startswith("error: ")
    assert "/proc/none" in answer.stderr
