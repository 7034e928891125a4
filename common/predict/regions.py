"""Connected regions of a class map that arrives in bands of rows."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import cv2
import numpy as np

LARGEST = 1 << 26  # pixels of a region's box; a larger region ends with its band


@dataclass(frozen=True, eq=False)
class Region:
    """A connected region of one class, or one detected aircraft.

    Its mask is cut to its own box, so that its memory does not depend on the scene.
    """

    label: int
    score: float
    x: int
    y: int
    mask: np.ndarray  # bool [h,w], its top left pixel is (x, y)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2; the last two are exclusive."""
        return self.x, self.y, self.x + self.mask.shape[1], self.y + self.mask.shape[0]

    @property
    def area(self) -> int:
        """In pixels."""
        return int(np.count_nonzero(self.mask))


@dataclass(eq=False)
class _Open:
    """A region that may continue in the next band, as pieces: x, y and mask."""

    label: int
    confidence: float
    area: int
    pieces: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    joined: "_Open | None" = None

    @property
    def root(self) -> "_Open":
        root = self
        while root.joined is not None:
            root = root.joined
        return root

    def join(self, other: "_Open") -> None:
        """Make `other`, a root, a part of this root."""
        if other is not self:
            other.joined = self
            self.confidence += other.confidence
            self.area += other.area
            self.pieces += other.pieces

    def box(self) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2, as `Region.box`."""
        left, top = min(p[0] for p in self.pieces), min(p[1] for p in self.pieces)
        right = max(x + mask.shape[1] for x, _, mask in self.pieces)
        return left, top, right, max(y + mask.shape[0] for _, y, mask in self.pieces)

    def closed(self) -> Region:
        left, top, right, bottom = self.box()
        joined = np.zeros((bottom - top, right - left), bool)
        for x, y, mask in self.pieces:
            height, width = mask.shape
            joined[y - top : y - top + height, x - left : x - left + width] |= mask
        rows, columns = (np.flatnonzero(joined.any(axis)) for axis in (1, 0))
        part = joined[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        x, y = left + int(columns[0]), top + int(rows[0])
        return Region(self.label, self.confidence / self.area, x, y, part)


class Regions:
    """The 8-connected regions of each class except the ground.

    A region's score is the mean probability over it. Aircraft that touch are one region: only an
    instance model can tell them apart.

    Args:
        min_area: In pixels; smaller regions are left out.
        join: In pixels; parts of a class with a gap of less are one region. They are connected
            after every pixel has grown to a disc of this diameter.
    """

    def __init__(self, min_area: int, join: float = 0) -> None:
        self.min_area = max(1, min_area)
        self._radius = join / 2
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []  # that the next band still needs
        self._known = 0  # of these, at the top: they are in regions already
        self._bottom = 0  # the scene's row below them
        self._edges: dict[int, np.ndarray] = {}  # label → of the last row: 1 + index in `_open`
        self._open: list[_Open] = []

    def add(self, y: int, mask: np.ndarray, confidence: np.ndarray) -> Iterator[Region]:
        """The regions that end above this band or in it.

        Args:
            y: The scene's row at which the band begins, where the last one ended.
            mask: uint8 [n,W], class ids.
            confidence: float32 [n,W], the probability of that class.
        """
        self._bottom = y + len(mask)
        self._rows.append((mask, confidence))
        return self._advance(math.ceil(self._radius))

    def end(self) -> Iterator[Region]:
        """The regions that reach the last row, and those of the rows that waited for more."""
        if self._rows:
            yield from self._advance(0)
        yield from self._closed(region.root for region in self._open)

    def _advance(self, waiting: int) -> Iterator[Region]:
        """The regions that end in the rows that are left, but for the last `waiting` ones.

        Whether two parts are one depends on `waiting` rows above and below.
        """
        mask, confidence = self._rows[0]
        if len(self._rows) > 1:
            mask, confidence = map(np.concatenate, zip(*self._rows, strict=True))
        first, last = self._known, max(len(mask) - waiting, self._known)
        grown = {}
        for label in range(1, int(mask.max(initial=0)) + 1):
            near = (mask == label).astype(np.uint8)
            if self._radius and near.any():
                away = cv2.distanceTransform(1 - near, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
                near = (away <= self._radius).astype(np.uint8)
            grown[label] = near[first:last]
        ended = self._connect(
            self._bottom - len(mask) + first, mask[first:last], confidence[first:last], grown
        )
        context = max(last - waiting, 0)
        self._known = last - context
        self._rows = [(mask[context:], confidence[context:])] if context < len(mask) else []
        return ended

    def _connect(
        self, y: int, mask: np.ndarray, confidence: np.ndarray, grown: dict[int, np.ndarray]
    ) -> Iterator[Region]:
        """`add` for rows whose `grown` masks, by label, are known."""
        if not len(mask):
            return iter(())
        edges: dict[int, np.ndarray] = {}
        still_open: list[_Open] = []
        regions = list(self._open)
        for label, near in grown.items():
            _, ids, stats, _ = cv2.connectedComponentsWithStats(near, connectivity=8)
            inside = mask == label
            part_of = ids[inside]
            sums = np.bincount(part_of, confidence[inside], len(stats))
            areas = np.bincount(part_of, minlength=len(stats))
            parts = [_Open(label, float(s), int(a)) for s, a in zip(sums, areas, strict=True)]
            above = self._touching(label, ids[0])
            below = np.unique(ids[-1])
            open_parts = {int(i) for i in below} | {part for _, part in above}
            for i in range(1, len(stats)):
                left, top, width, height = stats[i, :4].tolist()
                if areas[i] >= self.min_area or i in open_parts:
                    box = slice(top, top + height), slice(left, left + width)
                    parts[i].pieces.append((left, y + top, (ids[box] == i) & inside[box]))
                    regions.append(parts[i])
            for index, i in above:
                self._open[index].root.join(parts[i].root)
            numbers = np.zeros(len(stats), np.int64)
            for i in below[below > 0].tolist():
                left, top, right, bottom = parts[i].root.box()
                if (right - left) * (bottom - top) <= LARGEST:
                    still_open.append(parts[i])
                    numbers[i] = len(still_open)
            edges[label] = numbers[ids[-1]]
        open_roots = {part.root for part in still_open}
        self._edges, self._open = edges, still_open
        return self._closed(region.root for region in regions if region.root not in open_roots)

    def _closed(self, roots: Iterable[_Open]) -> Iterator[Region]:
        distinct = dict.fromkeys(roots)
        return (root.closed() for root in distinct if root.area >= self.min_area)

    def _touching(self, label: int, row: np.ndarray) -> set[tuple[int, int]]:
        """Pairs of an index in `_open` and a part's id in the new band's first row that touch."""
        if label not in self._edges:
            return set()
        old = np.pad(self._edges[label], 1)
        pairs: set[tuple[int, int]] = set()
        for shift in range(3):
            above = old[shift : shift + len(row)]
            both = (above > 0) & (row > 0)
            pairs.update(zip((above[both] - 1).tolist(), row[both].tolist(), strict=True))
        return pairs
