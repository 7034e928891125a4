"""The scene reader: every pixel against a plain reference, and untrusted files."""

import csv
import resource
import struct
import zlib
from itertools import product

import cv2
import numpy as np
import pytest
from helpers.scenes import EXAMPLE, make_scene, random_ids, write_png, xml
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cli import UserError
from rareplanes import attributes
from rareplanes import scene as scene_reader
from rareplanes.scene import read_scene, read_scene_image, read_xml


def reference_ids(mask, colours):
    """The definition, pixel by pixel."""
    ids = np.zeros(mask.shape[:2], int)
    for y, x in product(*map(range, mask.shape[:2])):
        pixel = tuple(mask[y, x].tolist())
        for k, colour in enumerate(colours, start=1):
            if pixel[:3] == colour and (len(pixel) == 3 or pixel[3] == 255):
                ids[y, x] = k
    return ids


@pytest.mark.parametrize("seed", range(8))
def test_ids_equal_a_plain_reference(tmp_path, seed):
    rng = np.random.default_rng(seed)
    drawn, image = make_scene(
        tmp_path, "s", seed, width=41, height=29, count=int(rng.integers(0, 9))
    )
    path = tmp_path / "masks" / "s_mask.png"
    mask = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), -1)[..., [2, 1, 0, 3]]
    see_through = rng.random(mask.shape[:2]) < 0.05
    mask[see_through, 3] = 254  # no longer exactly an aircraft's colour
    mask = mask[..., :3] if seed % 2 else mask
    write_png(path, mask)

    scene = read_scene(tmp_path, "s")
    np.testing.assert_array_equal(
        scene.ids, reference_ids(mask, [a.colour for a in scene.aircraft])
    )
    np.testing.assert_array_equal(scene.ids, drawn if seed % 2 else np.where(see_through, 0, drawn))
    assert scene.ids.dtype == np.uint8
    assert [a.pixels for a in scene.aircraft] == [
        int((scene.ids == k).sum()) for k in range(1, len(scene.aircraft) + 1)
    ]
    found = read_scene_image(tmp_path, "s", (scene.width, scene.height))
    np.testing.assert_array_equal(found[..., ::-1], image)


def test_scenes_do_not_leak_into_one_another(tmp_path):
    """The colour table is reused: a colour of another scene must be ground in this one."""
    ids = random_ids(np.random.default_rng(0), 40, 40, 4)
    make_scene(tmp_path, "a", seed=1, ids=ids, count=4)
    make_scene(tmp_path, "b", seed=2, ids=ids, count=4)
    assert read_scene(tmp_path, "a").ids.any()
    (tmp_path / "masks" / "b_mask.png").write_bytes(
        (tmp_path / "masks" / "a_mask.png").read_bytes()
    )
    assert not read_scene(tmp_path, "b").ids.any()


def test_hidden_aircraft_keeps_its_number(tmp_path):
    ids = random_ids(np.random.default_rng(0), 60, 60, 3)
    ids[ids == 2] = 0
    make_scene(tmp_path, "s", ids=ids, count=3)
    scene = read_scene(tmp_path, "s")
    assert scene.aircraft[1].pixels == 0
    assert set(np.unique(scene.ids)) == {0, 1, 3}


def test_more_aircraft_than_a_byte_counts(tmp_path):
    ids = np.zeros((40, 60), np.uint16)
    ids.ravel()[: 2 * 300 : 2] = np.arange(1, 301)
    make_scene(tmp_path, "s", ids=ids, count=300)
    scene = read_scene(tmp_path, "s")
    assert scene.ids.dtype == np.uint16
    np.testing.assert_array_equal(scene.ids, ids)


def test_aircraft_are_read_from_the_xml(tmp_path):
    bus = (
        "<object><category0>Airport</category0><category3>Bus</category3>"
        "<object_mask_color_rgba>9,9,9,255</object_mask_color_rgba></object>"
    )
    text = xml(
        50, 40, [("Cessna", (1, 2, 3), (4, 5, 49, 39)), ("A_b_c", (1, 2, 4), (0, 0, 0, 0))], bus
    )
    text = text.replace("</category4>", "</category4><category5>35-A</category5>")
    (tmp_path / "s.xml").write_text(text)
    width, height, (one, two) = read_xml(tmp_path / "s.xml")
    assert (width, height) == (50, 40)
    assert (one.make, one.colour, one.box) == ("Cessna", (1, 2, 3), (4, 5, 49, 39))
    assert one.diamond == ((0.5, -0.25), (3.5, -3.25), (2.5, -2.25), (1.5, -1.25))
    assert two.make == "A_b_c"


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="the example scene of RarePlanes is not here")
def test_a_scene_of_rareplanes():
    scene = read_scene(EXAMPLE, "Adelaide_Airport_0_0_101")
    assert (scene.width, scene.height, len(scene.aircraft)) == (1920, 1080, 15)
    assert scene.aircraft[3].make == "Bombardier_Learjet"  # whose category5 is 35-A
    for k, plane in enumerate(scene.aircraft, start=1):
        ys, xs = np.nonzero(scene.ids == k)
        assert plane.box == (xs.min(), ys.min(), xs.max(), ys.max())
        assert plane.make in attributes.makes()


GOOD = xml(50, 40, [("Cessna", (1, 2, 3), (4, 5, 6, 7)), ("Boeing_737", (3, 2, 1), (4, 5, 6, 7))])
LAUGHS = "<!DOCTYPE a [<!ENTITY a0 'ha'>" + "".join(
    f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in range(1, 10)
)
BAD_XML = {
    "empty": "",
    "text": "no xml at all",
    "cut": GOOD[:-20],
    "other root": "<html/>",
    "nul": GOOD.replace("Cessna", "Ces\0sna"),
    "laughs": LAUGHS + "]><image>&a9;</image>",
    "bare dtd": GOOD.replace("<image>", "<!DOCTYPE image><image>", 1),
    "external": "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><image>&x;</image>",
    "deep": "<image>" + "<a>" * 700_000 + "</a>" * 700_000 + "</image>",
    "siblings": "<image>" + "<a/>" * 1_000_000 + "</image>",
    "large": GOOD + " " * (6 << 20),
    "encoding": GOOD.replace("UTF-8", "klingon"),
    "no size": GOOD.replace("width", "wide"),
    "no box": GOOD.replace("bndbox2D", "box"),
    "no maker": GOOD.replace("Cessna", " "),
    "colour of three": GOOD.replace("1,2,3,255", "1,2,3"),
    "colour range": GOOD.replace("1,2,3,255", "1,2,256,255"),
    "transparent": GOOD.replace("1,2,3,255", "1,2,3,0"),
    "ground": GOOD.replace("1,2,3,255", "0,0,0,255"),
    "box turned": GOOD.replace("<xmin>4<", "<xmin>9<"),
    "box outside": GOOD.replace("<xmax>6<", "<xmax>50<"),
    "socket": GOOD.replace("X=1.500", "X=nan"),
} | {
    f"xmin {number!r}": GOOD.replace("<xmin>4<", f"<xmin>{number}<")
    for number in ("nan", "inf", "1e1", "-1", "4.0", "0_4", "４", "٤", "", "4 4", "0x4", "9" * 5000)
}


@pytest.mark.parametrize("case", BAD_XML)
def test_bad_xml_is_refused_by_name_and_cheaply(tmp_path, monkeypatch, case):
    path = tmp_path / "scene\x1b[2J.xml"
    path.write_text(BAD_XML[case], encoding="utf-8")
    parse, parsed = scene_reader.fromstring, [b""]
    monkeypatch.setattr(
        scene_reader, "fromstring", lambda data, **kw: parsed.append(data) or parse(data, **kw)
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        read_xml(path)
    assert len(parsed[-1]) < 100_000  # what is longer, or has more tags, is not parsed
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10
    assert "scene\\x1b[2J.xml" in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def test_good_xml_is_accepted(tmp_path):
    (tmp_path / "s.xml").write_text(GOOD)
    assert len(read_xml(tmp_path / "s.xml")[2]) == 2


def test_shared_colour_names_both_aircraft(tmp_path):
    (tmp_path / "s.xml").write_text(GOOD.replace("3,2,1", "1,2,3"))
    with pytest.raises(UserError, match=r"1 \(Cessna\) and aircraft 2 \(Boeing_737\).*\(1, 2, 3\)"):
        read_xml(tmp_path / "s.xml")


@settings(max_examples=150)
@given(st.data())
def test_mutated_xml_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "s.xml"
    raw = bytearray(GOOD.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(raw)
    try:
        width, height, aircraft = read_xml(path)
    except UserError:
        return
    for plane in aircraft:
        xmin, ymin, xmax, ymax = plane.box
        assert 0 <= xmin <= xmax < width
        assert 0 <= ymin <= ymax < height


def bomb(width, height):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("which", ["images/s.png", "masks/s_mask.png"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "bomb", "webp", "size", "flip"])
def test_bad_images_are_refused_by_name(tmp_path, which, damage):
    make_scene(tmp_path, "s")
    path = tmp_path / which
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    elif damage == "size":
        write_png(path, np.full((70, 99, 4), 255, np.uint8))
    else:
        path.write_bytes(
            {
                "empty": b"",
                "cut": data[: len(data) // 2],
                "bomb": bomb(50_000, 50_000),
                "webp": b"RIFF\0\0\0\0WEBPVP8 " + bytes(40),
                "flip": bytes(flipped),
            }[damage]
        )

    def read():
        scene = read_scene(tmp_path, "s")
        read_scene_image(tmp_path, "s", (scene.width, scene.height))

    with pytest.raises(UserError) as error:
        read()
    assert repr(str(path)) in str(error.value)


def test_grey_mask_is_refused(tmp_path):
    make_scene(tmp_path, "s")
    png = cv2.imencode(".png", np.zeros((70, 100), np.uint8))[1].tobytes()
    (tmp_path / "masks" / "s_mask.png").write_bytes(png)
    with pytest.raises(UserError, match="8-bit RGB"):
        read_scene(tmp_path, "s")


def test_table_of_facts():
    assert len(attributes.makes()) == 57
    assert attributes.category("Tupolev_154", "role") == "Large Civil Transport/Utility"
    assert attributes.categories(None) == ["aircraft"]
    for attribute in attributes.ATTRIBUTES:
        names = attributes.categories(attribute)
        assert len(set(names)) == len(names)
        if attribute != "role":
            more = attributes.REAL.get(attribute, ())  # those of the real half, which come last
            known = names[: len(names) - len(more)]
            assert names == sorted(known) + list(more)
        for make in attributes.makes():
            assert attributes.category(make, attribute) in names
    with pytest.raises(UserError, match="'Sopwith_Camel'"):
        attributes.category("Sopwith_Camel", "role")


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="the published table is not here")
def test_table_agrees_with_the_published_one():
    with (EXAMPLE.parent / "aircraft_attributes.csv").open(newline="") as file:
        published = {row["reverie_make"]: row for row in csv.DictReader(file)}
    assert published.keys() == attributes.makes().keys()
    for make, row in published.items():
        for attribute in set(attributes.ATTRIBUTES) - {"make"}:
            assert attributes.category(make, attribute) == row[attribute]
        role_id = attributes.ROLES.index(row["role"]) + 1
        assert role_id == int(row["role_id"]) or make == "Tupolev_154"
