"""Aircraft on images of real ground: geometry, light, masks, and what a user may get wrong."""

import json
import shutil
import xml.etree.ElementTree as ET

import cv2
import numpy as np
import pytest
from affine import Affine
from helpers.rasters import raster
from helpers.scenes import decode, read_tiles, tree

from common.cli import UserError
from preprocessing import preprocess
from rareplanes import sample
from rareplanes.render import background

GSD = 0.5
PLACED = {"crs": "EPSG:32631", "transform": Affine(GSD, 0, 500_000, 0, -GSD, 5_000_000)}
RANGE = ("--range", 0, 65535)
NEAR = np.ones((15, 15), np.uint8)  # as far as thin wing tips and the blur reach


class Read:
    """One scene, read from its three files."""

    def __init__(self, xml):
        folder, self.stem, self.split = xml.parents[1], xml.stem, xml.parents[1].name
        self.image = decode(folder / "images" / f"{self.stem}.png")[..., :3].astype(int)
        mask = decode(folder / "masks" / f"{self.stem}_mask.png")[..., :3].astype(int)
        codes = mask[..., 2] << 16 | mask[..., 1] << 8 | mask[..., 0]
        root = ET.parse(xml).getroot()
        colours = [
            o.findtext("object_mask_color_rgba").split(",")
            for o in root.iter("object")
            if o.findtext("category0") == "Airplane"
        ]
        keys = [int(r) << 16 | int(g) << 8 | int(b) for r, g, b, _ in colours]
        self.aircraft = [codes == key for key in keys]
        size = root.findtext("image_resolution/width"), root.findtext("image_resolution/height")
        assert (*map(int, size),) == self.image.shape[1::-1] == mask.shape[1::-1]
        ground = np.bincount(codes.ravel()).argmax()
        self.objects = codes != ground  # aircraft and vehicles
        near = cv2.dilate(self.objects.astype(np.uint8), NEAR)
        # A thin tip of an aircraft beyond the border may be in the picture and not in the mask.
        self.near = (
            cv2.copyMakeBorder(near[3:-3, 3:-3], 3, 3, 3, 3, cv2.BORDER_CONSTANT, value=1) > 0
        )


def render(out, folder, *words):
    sample.main(list(map(str, ["-o", out, "--backgrounds", folder, *words])))
    return [Read(xml) for xml in sorted(out.glob("*/xmls/*.xml"))]


def picture(path, rgb):
    path.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(path), np.ascontiguousarray(rgb[..., ::-1]))
    return path


def patches(seed, side=420, smooth=0.0):
    """Grey rectangles of many sizes: a picture with edges, uint8 [side,side,3]."""
    rng = np.random.default_rng(seed)
    image = np.full((side, side), 120.0, np.float32)
    for x, y, w, h in rng.integers((0, 0, 8, 8), (side, side, 90, 90), (80, 4)):
        image[y : y + h, x : x + w] = rng.uniform(40, 190)
    if smooth:
        image = cv2.GaussianBlur(image, (0, 0), smooth)
    return np.stack([image.astype(np.uint8)] * 3, -1)


def ramps(height=480, width=560):
    """16 bits: red grows by 100 a pixel to the right, green by 100 downwards, blue is 30000."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 100, y * 100, np.full_like(x, 30_000)]).astype(np.uint16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five small pictures, and a smaller one."""
    folder = tmp_path_factory.mktemp("grounds")
    for seed in range(6):
        picture(folder / f"{seed}.png", patches(seed, side=340 if seed else 150))
    return folder


@pytest.fixture(scope="module")
def rendered(folder, tmp_path_factory):
    """24 scenes: their folder, and as they are read."""
    out = tmp_path_factory.mktemp("rendered") / "out"
    return out, render(out, folder, "-n", 24, "--gsd", GSD, "--seed", 1)


def test_ground_is_the_images_own_at_the_scenes_scale(tmp_path):
    """Of a 16-bit GeoTIFF whose colours say where each pixel is, in all orientations."""
    (tmp_path / "in").mkdir()
    raster(tmp_path / "in/a.tif", ramps(), **PLACED)
    words = ["-n", 16, *RANGE, "--size", 500, 400]
    scenes, directions = render(tmp_path / "out", tmp_path / "in", *words), set()
    for scene in scenes:
        height, width = scene.image.shape[:2]
        assert width <= 500
        assert height <= 400
        # Metres right and down in the image: values of 8 bits are steps of 257.
        metres = scene.image[..., 2:0:-1] * 257 / 100 * GSD
        here = np.indices((height, width))[::-1].reshape(2, -1).T
        known = ~scene.near & (scene.image[..., 0] == 117)  # without shadow
        points = np.column_stack((here, np.ones(len(here))))
        fit = np.linalg.lstsq(points[known.ravel()], metres[known], rcond=None)[0]
        rest = np.abs(points @ fit - metres.reshape(-1, 2)).max(1).reshape(height, width)
        # One value of 8 bits; the rim of a shadow may leave blue alone and not red.
        assert rest[known].max() < (3.1 if scene.objects.any() else 1.1) * 257 / 100 * GSD
        turn = np.rint(fit[:2] / np.abs(fit[:2]).max())
        assert sorted(np.abs(turn).ravel()) == [0, 0, 1, 1]  # no other angle
        steps = np.abs(fit[:2]).max(0)
        assert 1 / 2.81 < steps.min() <= steps.max() < 1 / 2.29
        assert steps.max() / steps.min() < 1.01
        directions.add(tuple(turn.ravel()))
        # All other pixels are darker, in the shadow of something.
        assert (scene.image[..., 0][~known & ~scene.near] < 117).all()
    assert len(directions) >= 6


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_nothing_changes_but_aircraft_vehicles_and_shadows(tmp_path, grey):
    picture(tmp_path / "in/a.png", np.full((400, 500, 3), grey, np.uint8))
    scenes = render(tmp_path / "out", tmp_path / "in", "-n", 8, "--gsd", GSD)
    changed = [(scene.image != grey).any(-1) for scene in scenes]
    empty = [scene for scene in scenes if not scene.aircraft]
    assert len(empty) < len(scenes)
    for scene, change in zip(scenes, changed, strict=True):
        shadow = scene.image[change & ~scene.near]
        assert (shadow <= grey).all()
        for aircraft in scene.aircraft:
            # White paint may have the colour of a white ground.
            assert change[aircraft].mean() > (0.3 if grey == 255 else 0.9)
            assert change[aircraft].any()
    shadows = sum((c & ~s.near).sum() for s, c in zip(scenes, changed, strict=True))
    assert (shadows > 0) == (grey > 0)


def test_some_scenes_are_the_bare_image(rendered):
    scenes = rendered[1]
    empty = [scene for scene in scenes if not scene.objects.any()]
    assert 2 <= len(empty) <= 10
    assert all(not scene.aircraft for scene in empty)
    assert sum(len(scene.aircraft) for scene in scenes) > 40


def looks(scenes):
    """Of aircraft: the slope at the edges, the brightest tenth, the share of evenly grey pixels."""
    slopes, lights, evens = [], [], []
    for scene in scenes:
        grey = scene.image.mean(-1).astype(np.float32)
        slope = np.hypot(cv2.Sobel(grey, -1, 1, 0), cv2.Sobel(grey, -1, 0, 1)) / 8
        even = grey == np.roll(grey, 1, 1)
        for aircraft in scene.aircraft:
            edge = cv2.morphologyEx(aircraft.astype(np.uint8), cv2.MORPH_GRADIENT, NEAR[:3, :3]) > 0
            slopes.append(slope[edge].mean())
            lights.append(np.percentile(grey[aircraft], 90))
            evens.append(even[aircraft].mean())
    assert len(slopes) > 12
    return np.mean(slopes), np.mean(lights), np.mean(evens)


def test_aircraft_have_the_sharpness_the_light_and_the_noise_of_the_image(tmp_path):
    kinds = {"sharp": (0.0, 1.0, 0), "soft": (2.5, 1.0, 0), "dark": (0.0, 0.5, 0)}
    results, rng = {}, np.random.default_rng(0)
    for kind, (smooth, light, noise) in {**kinds, "noisy": (0.0, 1.0, 2.5)}.items():
        for seed in range(4):
            image = patches(seed, 300, smooth) * light
            image = image + rng.normal(0, noise, image.shape[:2])[..., None]
            picture(tmp_path / kind / f"{seed}.png", image.clip(0, 255).astype(np.uint8))
        words = [tmp_path / f"{kind}_out", tmp_path / kind, "-n", 12, "--gsd", GSD]
        results[kind] = looks(render(*words))
    slope, light, even = results["sharp"]
    assert results["soft"][0] < 0.7 * slope
    assert results["dark"][1] < light - 10
    assert results["noisy"][2] < 0.5 * even


def test_the_measured_blur_is_the_one_that_was_made():
    """Edges that are drawn as aircraft are, then blurred."""
    for smooth in (1.0, 1.5, 2.0, 3.0):
        fine = cv2.resize(patches(1), None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
        turned = cv2.warpAffine(
            fine,
            cv2.getRotationMatrix2D((840, 840), 30, 1),
            (1680, 1680),
            borderMode=cv2.BORDER_REFLECT,
        )
        sharp = cv2.resize(turned, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)[..., 0]
        soft = cv2.GaussianBlur(sharp.astype(np.float32), (0, 0), smooth).astype(np.uint8)
        assert background._blur(soft) == pytest.approx(smooth, rel=0.15)


def test_pixels_without_data_stay_black_and_bare(tmp_path):
    (tmp_path / "in").mkdir()
    values = np.maximum(ramps(), 1)
    y, x = np.mgrid[: values.shape[1], : values.shape[2]]
    values[:, x + y > 560] = 0
    raster(tmp_path / "in/a.tif", values, nodata=0, **PLACED)
    scenes = render(tmp_path / "out", tmp_path / "in", "-n", 10, *RANGE)
    invalid = [(scene.image == 0).all(-1) for scene in scenes]
    assert sum(map(np.sum, invalid)) > 100_000
    for scene, nothing in zip(scenes, invalid, strict=True):
        inside = cv2.erode(nothing.astype(np.uint8), np.ones((3, 3))) > 0
        assert not (scene.objects & inside).any()
    assert sum(len(scene.aircraft) for scene in scenes) > 10


def test_parts_that_are_all_valid_are_preferred(tmp_path):
    (tmp_path / "in").mkdir()
    values = np.maximum(ramps(900, 900), 1)
    values[:, :300] = 0
    raster(tmp_path / "in/a.tif", values, nodata=0, **PLACED)
    for scene in render(tmp_path / "out", tmp_path / "in", "-n", 8, *RANGE, "--size", 256, 256):
        assert not (scene.image == 0).all(-1).any()


def test_same_bytes_from_copies_of_the_images_and_by_two_processes(folder, tmp_path):
    words = ["-n", 6, "--gsd", GSD, "--seed", 3, "--size", 300, 300]
    render(tmp_path / "a", folder, *words)
    (tmp_path / "in").mkdir()
    for path in folder.iterdir():
        shutil.copy(path, tmp_path / "in" / f"{9 - int(path.stem)} ä.png")
    shutil.copy(folder / "0.png", tmp_path / "in/twice.png")
    render(tmp_path / "b", tmp_path / "in", *words, "-j", 2)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    render(tmp_path / "c", folder, *words, "--seed", 4)
    assert not set(tree(tmp_path / "a").values()) & set(tree(tmp_path / "c").values())


def test_aircraft_stand_at_the_same_places_on_a_slower_processor(folder, tmp_path):
    """OpenCV rounds otherwise without the processor's vector instructions."""
    words = [folder, "-n", 6, "--gsd", GSD, "--seed", 1]
    fast = render(tmp_path / "fast", *words)
    cv2.setUseOptimized(False)
    try:
        slow = render(tmp_path / "slow", *words)
    finally:
        cv2.setUseOptimized(True)
    for one, other in zip(fast, slow, strict=True):
        assert np.abs(one.image - other.image).max() <= 2
        assert (one.objects != other.objects).sum() <= 50
        assert len(one.aircraft) == len(other.aircraft)
    assert sum(len(scene.aircraft) for scene in fast) > 10


def test_a_run_goes_on_with_the_same_images_only(folder, tmp_path):
    words = ["-n", 3, "--gsd", GSD]
    render(tmp_path / "out", folder, *words)
    whole = tree(tmp_path / "out")
    next((tmp_path / "out").glob("*/xmls/*.xml")).unlink()
    render(tmp_path / "out", folder, *words)
    assert tree(tmp_path / "out") == whole
    shutil.copytree(folder, tmp_path / "in")
    picture(tmp_path / "in/0.png", patches(77))
    for others in (
        ["--backgrounds", tmp_path / "in", *words],
        ["--backgrounds", folder, "-n", 3, "--gsd", 0.6],
        ["--backgrounds", folder, *words, "--stretch", 1, 99],
        ["-n", 3],
    ):
        with pytest.raises(UserError, match="other settings"):
            sample.main(list(map(str, ["-o", tmp_path / "out", *others])))
    assert tree(tmp_path / "out") == whole
    assert str(folder) not in (tmp_path / "out/sample.json").read_text()


def test_preprocess_tiles_them_with_each_image_on_one_side(rendered, tmp_path):
    folder, scenes = rendered
    assert len({scene.image.shape for scene in scenes}) > 5
    words = [folder, "-o", tmp_path, "-s", 128, "--negatives", 100, "-n", 1]
    assert preprocess.main(list(map(str, words))) == 0
    airports, stems = {}, {}
    for split in ("train", "val", "test"):
        coco, tiles = read_tiles(tmp_path / split)
        airports[split] = {image["airport"] for image in coco["images"]}
        stems |= {image["scene"]: split for image in coco["images"]}
        assert tiles
    assert sum(map(len, airports.values())) == len(set.union(*airports.values())) == 6
    assert set(stems) == {scene.stem for scene in scenes}
    assert any(not scene.aircraft for scene in scenes)


@pytest.mark.parametrize(("gsd", "side"), [(0.1, 560), (5.0, 12)])
def test_the_extreme_resolutions(tmp_path, gsd, side):
    picture(tmp_path / "in/a.png", patches(0)[:side, :side] if side < 420 else patches(0, side))
    for scene in render(tmp_path / "out", tmp_path / "in", "-n", 3, "--gsd", gsd):
        assert all(128 <= n <= 60 * 2.8 for n in scene.image.shape[:2])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("fraction", [0, 1e-300, 0.5, 0.99])
@pytest.mark.parametrize("images", [1, 2, 5])
def test_any_share_of_test_images_leaves_some_to_train_on(count, fraction, images):
    grounds = [background.Ground(str(i), None, 1, None) for i in range(images)]
    scenes = background.schedule(grounds, count, 0, (128, 128), fraction)
    split = {scene.ground.name: scene.split for scene in scenes}
    assert len({scene.stem for scene in scenes}) == count
    assert all(split[scene.ground.name] == scene.split for scene in scenes)
    assert "train" in split.values()
    assert ("test" in split.values()) == (fraction > 0 and min(count, images) > 1)


def nothing(folder):
    folder.rmdir()


def broken(folder):
    (folder / "a.png").write_bytes(b"no picture")


def plain(folder, side=420):
    picture(folder / "a.png", patches(0, side))


def coarse(folder):
    profile = {**PLACED, "transform": Affine(9, 0, 500_000, 0, -9, 5_000_000)}
    raster(folder / "a.tif", ramps(), **profile)


@pytest.mark.parametrize(
    ("make", "flags", "told"),
    [
        (nothing, ["--gsd", "1"], "there is no image or folder"),
        (lambda folder: None, ["--gsd", "1"], "holds no .png"),
        (broken, ["--gsd", "1"], r"a\.png' is not a PNG"),
        (plain, [], "not georeferenced; give --gsd"),
        (
            lambda folder: plain(folder, 100),
            ["--gsd", "0.5"],
            "a side of 50 metres; .* leave it out",
        ),
        (coarse, [], r"has 9\.\d+ metres of ground per pixel"),
        (plain, ["--gsd", "0.05"], "--gsd: 0.05 is not from 0.1 to 5"),
        (plain, ["--gsd", "1", "--bands", "4"], "has no band 4"),
        (plain, ["--gsd", "1", "--stretch", "9", "1"], "the first must be smaller"),
    ],
)
def test_mistakes_are_answered_before_anything_is_written(tmp_path, make, flags, told):
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    with pytest.raises(UserError, match=told) as caught:
        render(tmp_path / "out", tmp_path / "in", "-n", 1, *flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--gsd", "1"], ["--bands", "1"], ["--range", "0", "1"]])
def test_options_of_the_images_need_images(tmp_path, flags):
    with pytest.raises(UserError, match=f"{flags[0]} is about --backgrounds"):
        sample.main(["-o", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_cut_short_gets_one_sentence_and_keeps_the_rest(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "in")
    data = (tmp_path / "in/0.png").read_bytes()
    (tmp_path / "in/0.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"0\.png' cannot be read"):
        render(tmp_path / "out", tmp_path / "in", "-n", 12, "--gsd", GSD)
    assert "backgrounds" in json.loads((tmp_path / "out/sample.json").read_text())
