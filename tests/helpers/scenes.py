"""Makes small scenes in the format of RarePlanes, and reads what the tiling wrote."""

import json
from pathlib import Path

import cv2
import numpy as np
from helpers.commands import SHARED

EXAMPLE = SHARED / "rareplanes_example"  # one scene of the rendered half
MAKES = ["Boeing_737", "Cessna", "PiperAircraft_PA-28", "Tupolev_154", "ATR_ATR-72"]

OBJECT = """<object id="{n}"><category0>{kind}</category0><category1>Civil</category1>
<category2>Transport</category2>{names}<object_mask_color_rgba>{colour},255</object_mask_color_rgba>
<Sockets>{sockets}</Sockets><bndbox2D><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>
<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax><ratio_visible>0.0</ratio_visible></bndbox2D></object>"""


def random_ids(rng, width, height, count):
    """Overlapping ellipses, later ones on top; some may be hidden."""
    ids = np.zeros((height, width), np.uint16)
    for k in range(1, count + 1):
        centre = (int(rng.integers(0, width)), int(rng.integers(0, height)))
        axes = (int(rng.integers(1, 16)), int(rng.integers(1, 16)))
        cv2.ellipse(ids, centre, axes, int(rng.integers(0, 180)), 0, 360, k, -1)
    return ids


def random_colours(rng, count):
    """Distinct colours; every second one differs from its predecessor by one step."""
    colours = rng.permutation(np.arange(1, 1 << 21))[: (count + 1) // 2] * 4
    codes = np.stack([colours, colours + 1], 1).ravel()[:count].tolist()
    return [(c >> 16 & 255, c >> 8 & 255, c & 255) for c in codes]


def colour_mask(rng, ids, colours):
    """RGBA. The ground is textured: its colours often differ from an aircraft's by one step."""
    near = np.array([(r, g, b ^ 2) for r, g, b in colours] + [(0, 0, 0), (9, 9, 9)], np.uint8)
    mask = np.full((*ids.shape, 4), 255, np.uint8)
    mask[..., :3] = near[rng.integers(0, len(near), ids.shape)]
    for k, colour in enumerate(colours, start=1):
        mask[ids == k, :3] = colour
    return mask


def xml(width, height, planes, others=""):
    """`planes`: one (make, colour, box) for each."""
    sockets = "".join(
        f"<Bone_PlaneAnnotation_{s}><world>X=1.0 Y=2.0 Z=3.0</world><screen>X={i}.500 Y=-{i}.250"
        f"</screen></Bone_PlaneAnnotation_{s}>"
        for i, s in enumerate(("Nose", "RightWing", "Tail", "LeftWing"))
    )
    objects = ""
    for n, (make, colour, box) in enumerate(planes):
        names = "".join(
            f"<category{i}>{name}</category{i}>" for i, name in enumerate(make.split("_", 1), 3)
        )
        colour = ",".join(map(str, colour))
        objects += OBJECT.format(
            n=n, kind="Airplane", names=names, colour=colour, box=box, sockets=sockets
        )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><image><image_resolution>'
        f"<width>{width}</width><height>{height}</height></image_resolution>{others}{objects}</image>"
    )


def write_png(path, rgb):
    path.parent.mkdir(parents=True, exist_ok=True)
    order = [2, 1, 0, 3][: rgb.shape[2]]
    path.write_bytes(cv2.imencode(".png", np.ascontiguousarray(rgb[..., order]))[1].tobytes())


def make_scene(folder, stem, seed=0, width=100, height=70, count=6, ids=None, makes=MAKES):
    """Write the three files of a scene; returns its id map and its RGB image."""
    rng = np.random.default_rng(seed)
    ids = random_ids(rng, width, height, count) if ids is None else ids
    height, width = ids.shape
    colours = random_colours(rng, count)
    image = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    image[..., 3] = 255
    planes = []
    for k, colour in enumerate(colours, start=1):
        ys, xs = np.nonzero(ids == k)
        box = (xs.min(), ys.min(), xs.max(), ys.max()) if len(xs) else (0, 0, 0, 0)
        planes.append((makes[k % len(makes)], colour, box))
    write_png(folder / "images" / f"{stem}.png", image)
    write_png(folder / "masks" / f"{stem}_mask.png", colour_mask(rng, ids, colours))
    (folder / "xmls").mkdir(exist_ok=True)
    (folder / "xmls" / f"{stem}.xml").write_text(xml(width, height, planes))
    return ids, image[..., :3]


def make_dataset(root, train=("A", "A", "A", "B", "C"), test=("D",), **options):
    """Scenes of the airports named; returns ids and image by stem."""
    made = {}
    for split, airports in (("train", train), ("test", test)):
        for i, airport in enumerate(airports):
            stem = f"{airport}_Airport_0_0_{i}"
            made[stem] = make_scene(root / split, stem, seed=len(made), **options)
    return made


def decode(path):
    """The pixels as stored, colours in OpenCV's order."""
    return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)


def read_png(path):
    """RGB or single-channel, as stored."""
    pixels = decode(path)
    return pixels[..., ::-1] if pixels.ndim == 3 else pixels


def read_tiles(folder):
    """The COCO file and, for each of its images: entry, annotations, RGB, mask."""
    coco = json.loads((folder / "instances_tiled.json").read_text())
    tiles = []
    for entry in coco["images"]:
        name = entry["file_name"]
        annotations = [a for a in coco["annotations"] if a["image_id"] == entry["id"]]
        rgb = read_png(folder / "images_tiled" / name)
        mask = read_png(folder / "masks_tiled" / f"{Path(name).stem}_mask.png")
        tiles.append((entry, annotations, rgb, mask))
    return coco, tiles


def tree(folder):
    """Every file below a folder, also hidden ones, by its relative path."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
