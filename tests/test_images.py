"""Pictures are read as every viewer shows them, whatever else their files hold."""

import io
import json
import struct

import cv2
import numpy as np
import pytest
import rasterio
from helpers.rasters import pixels_of, raster
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from common.cli import UserError
from common.io.images import turned
from common.io.raster import NEUTRAL, open_scene
from preprocessing.coco import main


def pixels(width=37, height=23, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def exif(orientation, order="<", kind=3, before=2):
    """An EXIF block with some other tags before and after the orientation."""
    value = {3: "HH", 4: "I"}[kind]
    tags = [
        (0x0100 + n, struct.pack(order + "HHIHH", 0x0100 + n, 3, 1, 7, 0)) for n in range(before)
    ]
    own = (orientation, 0) if kind == 3 else (orientation,)
    tags.append((0, struct.pack(order + "HHI" + value, 0x0112, kind, 1, *own)))
    body = b"".join(entry for _, entry in tags)
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    return b"Exif\0\0" + start + struct.pack(order + "H", len(tags)) + body + bytes(4)


def encoded(image, suffix, block=b""):
    data = io.BytesIO()
    kind = {".jpg": "JPEG", ".png": "PNG"}[suffix]
    smooth = {".jpg": {"quality": 95, "subsampling": 0}, ".png": {}}[suffix]
    Image.fromarray(image).save(data, kind, exif=block, **smooth)
    return data.getvalue()


def shown(data):
    """What Pillow makes of a file as a viewer would."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@given(
    st.integers(0, 9), st.sampled_from("<>"), st.integers(0, 30), st.sampled_from([".jpg", ".png"])
)
def test_a_picture_is_turned_as_viewers_turn_it(
    tmp_path_factory, orientation, order, before, suffix
):
    data = encoded(pixels(), suffix, exif(orientation, order, before=before))
    path = tmp_path_factory.getbasetemp() / f"turned{suffix}"
    path.write_bytes(data)
    wanted = shown(data)
    turned_as_shown = pixels_of(path)
    assert turned_as_shown.shape == wanted.shape
    assert np.abs(turned_as_shown.astype(int) - wanted).max() <= 3 * (suffix == ".jpg")
    stored = np.asarray(Image.open(io.BytesIO(data)))
    unturned = pixels_of(path, upright=False)
    assert unturned.shape == stored.shape
    assert np.abs(unturned.astype(int) - stored).max() <= 3 * (suffix == ".jpg")


@given(st.binary(max_size=80), st.booleans())
def test_any_exif_block_leaves_the_picture_readable(tmp_path_factory, block, with_start):
    path = tmp_path_factory.getbasetemp() / "block.jpg"
    data = encoded(pixels(), ".jpg")
    body = b"Exif\0\0" + (b"II*\0" if with_start else b"") + block
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:])
    assert sorted(pixels_of(path).shape[:2]) == [23, 37]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_twice_by_opposites_is_nothing(orientation):
    opposite = {6: 8, 8: 6}.get(orientation, orientation)
    image = pixels()[..., 0]
    assert np.array_equal(turned(turned(image, orientation), opposite), image)


def jpeg_of(parts):
    """A JPEG with some bytes before its segments."""
    data = encoded(pixels(), ".jpg")
    at = data.index(b"\xff\xdb")
    return data[:at] + parts + data[at:]


@pytest.mark.parametrize(
    "parts",
    [
        b"\0", b"stray", b"\xff" * 9, b"\xff\0", b"\xff\xd0",
        b"\xff\xe2" + struct.pack(">H", 60_000) + bytes(59_998),
        (b"\xff\xe2" + struct.pack(">H", 60_000) + b"\xff\xd9" * 29_999) * 5,
    ],
    ids=["zero", "text", "fill bytes", "stuffed byte", "bare marker", "long", "profile"],
)  # fmt: skip
def test_jpegs_that_other_readers_read(tmp_path, parts):
    path = tmp_path / "a.jpg"
    data = jpeg_of(parts)
    path.write_bytes(data)
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    assert np.abs(pixels_of(path).astype(int) - decoded[..., ::-1]).max() <= 3


@given(st.lists(st.sampled_from([b"\0", b"a", b"\xff", b"\xff\0"]), max_size=6))
def test_stray_bytes_between_segments_are_skipped_as_opencv_skips_them(tmp_path_factory, parts):
    path = tmp_path_factory.getbasetemp() / "stray.jpg"
    data = jpeg_of(b"".join(parts))
    path.write_bytes(data)
    if cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is not None:
        assert pixels_of(path).shape == (23, 37, 3)


def segments(count, body):
    return (b"\xff\xe5" + struct.pack(">H", len(body) + 2) + body) * count


def with_scans(count):
    """A progressive JPEG whose last scan is repeated."""
    buffer = io.BytesIO()
    Image.fromarray(pixels()).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


@pytest.mark.parametrize(
    "data",
    [
        with_scans(80),
        encoded(pixels(), ".jpg", exif(6)) + b"\xff\xda\0\x0c" * 1_000 + pixels(999, 999).tobytes(),
        jpeg_of(segments(30_000, b"x" * 20)),
        jpeg_of(segments(200, b"\xff\xda" * 30_000)),
    ],
    ids=["scans", "motion photo", "small segments", "large segments"],
)
def test_a_jpeg_may_have_many_scans_many_segments_and_a_film_behind_it(tmp_path, data):
    (tmp_path / "a.jpg").write_bytes(data)
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    assert pixels_of(tmp_path / "a.jpg").shape == decoded.shape


def test_a_jpeg_of_more_scans_than_any_program_writes_is_refused_for_that_reason(tmp_path):
    (tmp_path / "a.jpg").write_bytes(with_scans(1_000))
    with pytest.raises(UserError, match=r"scans.*convert it with `gdal_translate -of COG`"):
        pixels_of(tmp_path / "a.jpg")


def test_a_png_may_hold_a_long_text(tmp_path):
    """Programs write XMP there. Pillow's own limit is 1 MB, unpacked."""
    info = PngImagePlugin.PngInfo()
    info.add_text("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
    Image.fromarray(np.full((4, 6, 3), 7, np.uint8)).save(tmp_path / "a.png", pnginfo=info)
    assert (pixels_of(tmp_path / "a.png") == np.full((4, 6, 3), 7)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_that_is_not_georeferenced_is_turned_as_viewers_turn_it(tmp_path, orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.fromarray(pixels()).save(tmp_path / "a.tif", exif=tags)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.tif")))
    assert np.array_equal(pixels_of(tmp_path / "a.tif"), wanted)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["palette", "alpha", "two bits"])
def test_turning_keeps_everything_else_of_a_picture(tmp_path, orientation, kind):
    values = pixels(seed=1)[..., 0] % 4
    picture = Image.fromarray(values, "P")
    picture.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 1, 2, 250])
    if kind == "alpha":
        layers = [*Image.fromarray(pixels()).split(), Image.fromarray((values > 0) * np.uint8(255))]
        picture = Image.merge("RGBA", layers)
    tags = Image.Exif()
    tags[0x0112] = orientation
    bits = {"bits": 2} if kind == "two bits" else {}
    picture.save(tmp_path / "a.png", exif=tags, **bits)
    with open_scene(tmp_path / "a.png") as scene:
        read, valid = scene.read(0, 0, scene.width, scene.height)
        part, _ = scene.read(3, 4, 11, 7)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")).convert("RGBA"))
    seen = wanted[..., 3] > 0
    assert np.array_equal(seen, np.ones(seen.shape, bool) if valid is None else valid)
    assert np.array_equal(read, np.where(seen[..., None], wanted[..., :3], NEUTRAL))
    assert np.array_equal(part, read[4:11, 3:14])


def test_a_jpeg_without_a_frame_is_called_damaged(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(pixels(), ".jpg")[:100])
    with pytest.raises(UserError, match="damaged or truncated"):
        pixels_of(path)


def coco_of(tmp_path, name, size, **more):
    """A set of one picture with a bright square at 20…60."""
    square = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 1600}
    square |= {"bbox": [20, 20, 40, 40], "segmentation": [[20, 20, 60, 20, 60, 60, 20, 60]]} | more
    image = {"id": 1, "file_name": name, "width": size[0], "height": size[1]}
    categories = [{"id": 1, "name": "aircraft"}]
    content = {"images": [image], "annotations": [square], "categories": categories}
    (tmp_path / "a.json").write_text(json.dumps(content))
    words = [tmp_path / "images", tmp_path / "a.json", "-o", tmp_path / "out", "-n", 1, "-s", 128]
    return list(map(str, words))


def photograph(tmp_path, orientation, width, height, as_drawn):
    """A stored picture whose square is at 20…60 as it is shown, or as it is stored."""
    drawn = np.full((height, width, 3), 40, np.uint8)
    drawn[20:60, 20:60] = 230
    back = {6: 8, 8: 6}.get(orientation, orientation)
    (tmp_path / "images").mkdir()
    path = tmp_path / "images/a.jpg"
    stored = drawn if as_drawn else np.moveaxis(turned(np.moveaxis(drawn, 2, 0), back), 0, 2)
    path.write_bytes(encoded(stored, ".jpg", exif(orientation)))


def grey_under_label(tmp_path):
    image = np.asarray(Image.open(tmp_path / "out/train/images_tiled/a_tile_0.png").convert("L"))
    mask = np.asarray(Image.open(tmp_path / "out/train/masks_tiled/a_tile_0_mask.png"))
    return image[mask == 1].mean()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_outlines_drawn_on_what_a_viewer_shows_are_learnt_there(tmp_path, orientation):
    photograph(tmp_path, orientation, 128, 100, as_drawn=False)
    assert main(coco_of(tmp_path, "a.jpg", (128, 100))) == 0
    assert grey_under_label(tmp_path) == pytest.approx(230, abs=3)


@pytest.mark.parametrize("orientation", [3, 6])
def test_outlines_drawn_on_the_stored_pixels_need_an_option(tmp_path, capsys, orientation):
    photograph(tmp_path, orientation, 128, 100, as_drawn=True)
    words = coco_of(tmp_path, "a.jpg", (128, 100))
    if orientation == 6:  # the sides show it
        with pytest.raises(UserError, match="none of the 1 scenes"):
            main(words)
        assert "shown as 100x128" in (said := capsys.readouterr().err)
        assert "--ignore-exif" in said
    assert main([*words, "--ignore-exif"]) == 0
    assert grey_under_label(tmp_path) == pytest.approx(230, abs=3)


def test_the_option_is_named_where_it_is_wrong(tmp_path, capsys):
    photograph(tmp_path, 6, 128, 100, as_drawn=False)
    with pytest.raises(UserError, match="none of the 1 scenes"):
        main([*coco_of(tmp_path, "a.jpg", (128, 100)), "--ignore-exif"])
    assert "leave out --ignore-exif" in capsys.readouterr().err


def test_a_picture_without_a_tag_keeps_its_pixels(tmp_path):
    (tmp_path / "images").mkdir()
    image = pixels(128, 100)
    (tmp_path / "images/a.png").write_bytes(encoded(image, ".png"))
    assert main(coco_of(tmp_path, "a.png", (128, 100))) == 0
    tile = np.asarray(Image.open(tmp_path / "out/train/images_tiled/a_tile_0.png"))
    assert np.array_equal(tile[:100], image)


def files_of_all_kinds(folder):
    """Pictures that two readers might read differently, 128 wide and 100 high as they are shown."""
    rng = np.random.default_rng(0)
    colours = pixels(128, 100)
    grey = colours[..., 0]
    eleven_bits = rng.integers(200, 2048, (100, 128)).astype(np.uint16)
    turned_tag = Image.Exif()
    turned_tag[0x0112] = 6
    palette = Image.fromarray(grey % 4, "P")
    palette.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0, 1, 2, 250])
    hole = np.full((100, 128), 255, np.uint8)
    hole[30:50, 30:70] = 0
    many = rng.integers(0, 3000, (8, 100, 128)).astype(np.uint16)
    with_nan = rng.random((1, 100, 128), np.float32)
    with_nan[:, 40:60, 40:60] = np.nan
    layers = [*Image.fromarray(colours).split(), Image.fromarray(hole)]
    save = {
        "plain.png": lambda f: Image.fromarray(colours).save(f),
        "eleven_bits.png": lambda f: Image.fromarray(eleven_bits).save(f),
        "eight_bits_grey.png": lambda f: Image.fromarray(grey).save(f),
        "one_bit.png": lambda f: Image.fromarray(grey > 99).save(f),
        "palette.png": lambda f: palette.save(f, transparency=2),
        "alpha.png": lambda f: Image.merge("RGBA", layers).save(f),
        "grey_alpha.png": lambda f: Image.merge("LA", [layers[0], layers[3]]).save(f),
        "turned.png": lambda f: Image.fromarray(np.rot90(colours)).save(f, exif=turned_tag),
        "turned.jpg": lambda f: Image.fromarray(np.rot90(colours)).save(f, exif=turned_tag),
        "progressive.jpg": lambda f: Image.fromarray(colours).save(f, progressive=True),
        "cmyk.jpg": lambda f: Image.fromarray(colours).convert("CMYK").save(f),
        "eleven_bits.tif": lambda f: raster(f, eleven_bits[None]),
        "one_bit.tif": lambda f: raster(f, (grey > 99)[None].astype(np.uint8), nbits=1),
        "eight_bands.tif": lambda f: raster(f, many, nodata=7, compress="deflate"),
        "nan.tif": lambda f: raster(f, with_nan),
        "plain.jp2": lambda f: raster(f, np.moveaxis(colours, 2, 0), "JP2OpenJPEG"),
    }
    for name, write in save.items():
        write(folder / name)
    return list(save)


def test_tiles_hold_what_inference_reads(tmp_path):
    """Of every kind of file, and what is not valid there is neither ground nor aircraft."""
    (tmp_path / "images").mkdir()
    names = files_of_all_kinds(tmp_path / "images")
    square = {"category_id": 1, "segmentation": [[20, 20, 60, 20, 60, 60, 20, 60]], "iscrowd": 0}
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "aircraft"}]}
    for i, name in enumerate(names, start=1):
        content["images"].append({"id": i, "file_name": name, "width": 128, "height": 100})
        content["annotations"].append(square | {"id": i, "image_id": i})
    (tmp_path / "a.json").write_text(json.dumps(content))
    words = [tmp_path / "images", tmp_path / "a.json", "-o", tmp_path / "out", "-n", 2, "-s", 128]
    assert main(list(map(str, words))) == 0
    index = json.loads((tmp_path / "out/train/instances_tiled.json").read_text())
    assert len(index["images"]) == len(names)
    for entry in index["images"]:
        tile = np.asarray(Image.open(tmp_path / "out/train/images_tiled" / entry["file_name"]))
        stem = entry["file_name"].removesuffix(".png")
        mask = np.asarray(Image.open(tmp_path / f"out/train/masks_tiled/{stem}_mask.png"))
        (name,) = [n for n in names if entry["scene"] in (n.split(".")[0], n.replace(".", "_"))]
        with open_scene(tmp_path / "images" / name) as scene:
            read, valid = scene.read(0, 0, 128, 100)
            assert entry["look"] == scene.record()
        assert np.array_equal(tile[:100], read), name
        assert read[25:55, 25:55].max() > 90, name
        assert np.array_equal(
            mask[:100] == 255, ~(np.ones((100, 128), bool) if valid is None else valid)
        )
        assert (mask[100:] == 255).all()
    limits = {e["scene"]: e["look"].get("limits") for e in index["images"]}
    assert limits["plain_png"] is None
    assert limits["one_bit_png"] == [[0], [1]]
    assert limits["eleven_bits_png"] == limits["eleven_bits_tif"]
    assert 200 < limits["eleven_bits_png"][0][0] < limits["eleven_bits_png"][1][0] < 2048


def test_an_image_may_have_over_a_hundred_million_pixels(tmp_path):
    (tmp_path / "images").mkdir()
    image = np.full((8_000, 13_000, 3), 40, np.uint8)
    image[20:60, 20:60] = 230
    assert cv2.imwrite(str(tmp_path / "images/a.png"), image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert main(coco_of(tmp_path, "a.png", (13_000, 8_000))) == 0
    assert grey_under_label(tmp_path) == 230


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    shape = {"count": 1, "height": 30_000, "width": 20_000, "dtype": "uint8"}
    with rasterio.open(
        tmp_path / "images/a.tif", "w", "GTiff", **shape, SPARSE_OK=True, tiled=True
    ):
        pass
    with pytest.raises(UserError, match="none of the 1 scenes"):
        main(coco_of(tmp_path, "a.tif", (20_000, 30_000)))
    assert "up to 500,000,000 are read here" in capsys.readouterr().err
