"""How good the masks are that a UNet draws from four points, beside simpler ways.

    python benchmarks/points.py runs/chips/model_best.pth data/test --name "rendered scenes"
    python benchmarks/points.py --write-readme

The tiles have exact masks (preprocess.py or coco.py); where they have no points, these are taken
from the outlines. Only whole aircraft count. The points are used as they are, and also moved by up
to 1 and 2 pixels.
"""

import json
import sys
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
from pycocotools import mask as rle

from benchmarks.lib import readme
from benchmarks.lib.environment import measured_on, provenance
from common.cli import Parser, UserError, run
from common.io.files import write_atomic
from common.io.tiles import read_index
from preprocessing import chips
from preprocessing.chips import Tile, frame, is_labelled, points_of, tiles_of, warped
from unet import label

PAGE = readme.ROOT / "preprocessing/README.md"
JITTERS = (0, 1, 2)  # pixels
SIZES = {
    "all": (0, 1 << 30),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, 1 << 30),
}
NETWORK = "UNet on chips"
SIDE, PICTURED = 192, 8  # of a picture: pixels of an aircraft, and their number

Annotation = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("model", type=Path, nargs="?", help="model_best.pth of a UNet that was trained on chips")
    add("tiles", type=Path, nargs="?", help="a split with exact masks")
    add("--name", help="what the tiles are called in the table")
    add("--results", type=Path, default=readme.RESULTS / "points.csv", help="rows are added here")
    add(
        "--picture", type=Path, help="draw some aircraft with points, masks and truth into this PNG"
    )
    add("--write-readme", action="store_true", help="only write the table of the results")
    args = parser.parse(argv)
    rows: list[dict] = readme.read_rows(args.results) if args.results.is_file() else []
    if args.write_readme:
        return readme.write_part(PAGE, "points", table(rows))
    if not (args.model and args.tiles and args.name):
        raise UserError("give a model, a split of tiles and --name, or only --write-readme.")
    coco = with_points(read_index(args.tiles))
    tiles = list(tiles_of(args.tiles, coco))
    known = [(tile, a) for tile in tiles for a in tile.annotations if is_labelled(a)]
    truth = [a["segmentation"] for _, a in known]
    masks = {(NETWORK, n): drawn(args.model, args.tiles, coco, known, n) for n in JITTERS}
    for name, draw in OTHERS.items():
        masks[name, 0] = [encoded(draw(tile, a)) for tile, a in known]
    for (way, jitter), drawings in masks.items():
        pairs = list(zip(drawings, truth, strict=True))
        ious = [float(rle.iou([mask], [exact], [0])[0, 0]) for mask, exact in pairs]
        edges = [boundary_f(rle.decode(mask) > 0, rle.decode(exact) > 0) for mask, exact in pairs]
        for size, (least, most) in SIZES.items():
            chosen = [k for k, (_, a) in enumerate(known) if least <= a["area"] < most]
            if chosen:
                rows.append(
                    {"tiles": args.name, "size": size, "aircraft": len(chosen), "way": way}
                    | {"jitter": jitter, "iou": f"{mean(ious[k] for k in chosen):.4f}"}
                    | {"median_iou": f"{median(ious[k] for k in chosen):.4f}"}
                    | {"boundary_f": f"{mean(edges[k] for k in chosen):.4f}"}
                    | provenance(__file__, argv)
                )
        print(f"{way}, jitter {jitter}: mean IoU {mean(ious):.3f}, rim {mean(edges):.3f}")
    readme.write_rows(args.results, rows)
    if args.picture:
        shown = range(0, len(known), max(1, len(known) // PICTURED))[:PICTURED]
        columns = [column(*known[k], masks[NETWORK, 0][k], truth[k]) for k in shown]
        write_atomic(args.picture, cv2.imencode(".png", np.hstack(columns))[1].data)


def with_points(coco: dict[str, Any]) -> dict[str, Any]:
    """The COCO file where aircraft that a tile does not show whole have no points.

    Where there are no points, they are taken from the outline.
    """
    shown = {e["id"]: np.subtract(e["width"], e.get("padded", [0, 0])) for e in coco["images"]}
    annotations = []
    for a in coco["annotations"]:
        x, y, w, h = a["bbox"]
        inside = min(x, y, *(shown[a["image_id"]] - [x + w, y + h])) > 0
        points = a.get("keypoints")
        if inside and points is None and not a["iscrowd"]:
            corners = points_of_outline(rle.decode(a["segmentation"]) > 0)
            points = [value for x, y in corners.tolist() for value in (x, y, 2)]
        whole = inside and points is not None and points[2::3] == [2] * 4 and not a["iscrowd"]
        annotations.append(a | {"keypoints": points, "num_keypoints": 4 if whole else 0})
    return coco | {"annotations": annotations}


def points_of_outline(mask: np.ndarray) -> np.ndarray:
    """Nose, left wing, tail and right wing of an aircraft, from its mask, bool [H,W]: [4,2].

    The axis is the line through the centroid about which the mask is most symmetrical, within half
    a degree. Nose and tail are its ends, and the end at which the aircraft is wider is the tail.
    The wings are what lies farthest from it on either side.
    """
    pixels = np.argwhere(mask)[:, ::-1] + 0.5
    centre = pixels.mean(0)

    def turned(degrees: float) -> np.ndarray:
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        return (pixels - centre) @ np.array([[c, -s], [s, c]])

    def symmetry(degrees: float) -> float:
        along, across = turned(degrees).round().astype(int).T
        one = set(zip(along.tolist(), across.tolist(), strict=True))
        other = set(zip(along.tolist(), (-across).tolist(), strict=True))
        return len(one & other) / len(one | other)

    coarse = max(range(0, 180, 3), key=symmetry)
    degrees = max(np.arange(coarse - 3, coarse + 3.1, 0.5), key=symmetry)
    along, across = turned(degrees).T
    rim = 0.15 * np.ptp(along)
    wide = [np.ptp(across[along > along.max() - rim]), np.ptp(across[along < along.min() + rim])]
    if wide[0] > wide[1]:
        degrees += 180
        along, across = turned(degrees).T
    left, right = across.argmin(), across.argmax()
    ends = [[along.max(), 0], turned(degrees)[left], [along.min(), 0], turned(degrees)[right]]
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return centre + np.array(ends) @ np.array([[c, s], [-s, c]])


def drawn(
    model: Path,
    tiles: Path,
    coco: dict[str, Any],
    known: list[tuple[Tile, Annotation]],
    jitter: int,
) -> list[dict]:
    """The masks of `known` that the network draws, run-length encoded, by the users' commands."""
    random = np.random.default_rng(0)
    moved = {}
    for _, a in known:
        points = points_of(a) + random.uniform(-jitter, jitter, (4, 2))
        moved[a["id"]] = [round(v, 2) for x, y in points.tolist() for v in (x, y)]
    flat = {i: [*p[:2], 2, *p[2:4], 2, *p[4:6], 2, *p[6:], 2] for i, p in moved.items()}
    annotations = [a | {"keypoints": flat.get(a["id"], [])} for a in coco["annotations"]]
    with TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "tiles/test").mkdir(parents=True)
        for name in ("images_tiled", "masks_tiled"):
            (root / "tiles/test" / name).symlink_to((tiles / name).resolve())
        index = json.dumps(coco | {"annotations": annotations})
        (root / "tiles/test/instances_tiled.json").write_text(index)
        cut, paste = [str(root / "tiles"), "-o", str(root / "chips")], str(root / "masks")
        chips.main(cut)
        label.main([str(model), cut[2]])
        chips.main([cut[0], "-o", paste, "--found", cut[2], "--least-iou", "0"])
        pasted = read_index(root / "masks/test")
    scenes = {image["id"]: image["scene"] for image in pasted["images"]}
    found = {
        (scenes[a["image_id"]], *a["keypoints"]): a["segmentation"]
        for a in pasted["annotations"]
        if is_labelled(a)
    }
    entry = coco["images"][0]
    nothing = encoded(np.zeros((entry["height"], entry["width"]), bool))
    return [found.get((tile.stem, *flat[a["id"]]), nothing) for tile, a in known]


def diamond(tile: Tile, a: Annotation) -> np.ndarray:
    return _filled(tile, [points_of(a)])


def silhouette(tile: Tile, a: Annotation) -> np.ndarray:
    """A fuselage, two wings and a tailplane in the proportions of an airliner."""
    nose, left, tail, right = points_of(a)
    ahead = nose - tail
    parts = []
    root = tail + ahead * float(((left + right) / 2 - tail) @ ahead / max(ahead @ ahead, 1e-9))
    for tip in (left, right):
        parts.append([root + 0.22 * ahead, tip + 0.04 * ahead, tip - 0.03 * ahead, root])
        outer = tail + 0.35 * (tip - root)
        parts.append([tail + 0.13 * ahead, outer + 0.05 * ahead, outer, tail + 0.03 * ahead])
    aside = np.array([-ahead[1], ahead[0]]) * 0.055
    parts.append([nose - 0.06 * ahead + aside, nose, nose - 0.06 * ahead - aside, tail])
    parts.append(
        [nose - 0.06 * ahead + aside, nose - 0.06 * ahead - aside, tail - aside, tail + aside]
    )
    return _filled(tile, parts)


def grabcut(tile: Tile, a: Annotation) -> np.ndarray:
    """OpenCV's GrabCut from the box (Rother, Kolmogorov and Blake, SIGGRAPH 2004)."""
    width, height = tile.size
    low, high = points_of(a).min(0).clip(0), points_of(a).max(0)
    (x, y), (w, h) = low.astype(int).tolist(), np.ceil(high - low).astype(int).tolist()
    x1, y1 = max(0, x - w // 2), max(0, y - h // 2)
    part = tile.read()[0][y1 : min(height, y + h + h // 2), x1 : min(width, x + w + w // 2)].copy()
    mask, box = np.zeros(part.shape[:2], np.uint8), (x - x1, y - y1, w, h)
    cv2.setRNGSeed(0)
    cv2.grabCut(part, mask, box, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_RECT)
    whole = np.zeros((height, width), bool)
    h, w = part.shape[:2]
    whole[y1 : y1 + h, x1 : x1 + w] = mask % 2 == 1
    return whole


OTHERS = {
    "diamond": diamond,
    "silhouette from the points": silhouette,
    "GrabCut from the box": grabcut,
}


def _filled(tile: Tile, polygons: list) -> np.ndarray:
    canvas = np.zeros(tile.size[::-1], np.uint8)
    for polygon in polygons:  # OpenCV's whole numbers are the centres of pixels
        cv2.fillPoly(canvas, [((np.array(polygon) - 0.5) * 16).round().astype(int)], 1, shift=4)
    return canvas > 0


def encoded(mask: np.ndarray) -> dict:
    return rle.encode(np.asfortranarray(mask.view(np.uint8)))


def boundary_f(one: np.ndarray, other: np.ndarray) -> float:
    """F of the pixels at the rims of two masks that lie within a pixel of the other's rim."""
    around = np.ones((3, 3), np.uint8)
    rims = [mask & (cv2.erode(mask.astype(np.uint8), around) == 0) for mask in (one, other)]
    near = [cv2.dilate(rim.astype(np.uint8), around) > 0 for rim in rims]
    shares = [(rims[k] & near[1 - k]).sum() / max(rims[k].sum(), 1) for k in (0, 1)]
    return float(2 * shares[0] * shares[1] / max(sum(shares), 1e-9))


def column(tile: Tile, a: Annotation, mask: dict, truth: dict) -> np.ndarray:
    """A chip with its points, and below it with the mask (magenta) and the truth (green)."""
    matrix = frame(points_of(a), SIDE)
    image = warped(tile.read()[0], matrix, (SIDE, SIDE))[..., ::-1].copy()
    with_masks = image.copy()
    for shape, colour in ((truth, (90, 200, 60)), (mask, (220, 40, 220))):
        seen = warped(rle.decode(shape).astype(np.float32), matrix, (SIDE, SIDE)) >= 0.5
        outline = cv2.findContours(seen.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
        cv2.drawContours(with_masks, outline, -1, colour, 1, cv2.LINE_AA)
    to_chip = cv2.invertAffineTransform(matrix)
    for x, y in (points_of(a) @ to_chip[:, :2].T + to_chip[:, 2]).tolist():
        cv2.circle(image, (round(x), round(y)), 4, (0, 200, 255), -1, cv2.LINE_AA)
    return np.vstack([image, with_masks])


def table(rows: list[dict[str, str]]) -> str:
    """The rows as a table, and where they were measured."""
    of_all = [row for row in rows if row["size"] == "all"]
    names = list(dict.fromkeys(row["tiles"] for row in of_all))
    kinds = list(dict.fromkeys((row["way"], row["jitter"]) for row in of_all))
    by = {(row["tiles"], row["way"], row["jitter"]): row for row in of_all}
    head = [
        "IoU / F of the rim at 1 pixel",
        *(f"{n} ({by[n, *kinds[0]]['aircraft']})" for n in names),
    ]
    body = [
        [way + (f", points off by up to {jitter}" if jitter != "0" else "")]
        + [
            f"{float(r['iou']):.2f} / {float(r['boundary_f']):.2f}"
            for n in names
            for r in [by[n, way, jitter]]
        ]
        for way, jitter in kinds
    ]
    return f"{readme.markdown(head, body)}\n\n{measured_on(rows[0])}"


if __name__ == "__main__":
    run(main)
