"""Connected regions of a class map that arrives in bands of rows."""

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
        return Region(self.label, self.confidence / self.area, left, top, joined)


class Regions:
    """The 8-connected regions of each class except the ground.

    A region's score is the mean probability over it. Aircraft that touch are one region: only an
    instance model can tell them apart.

    Args:
        min_area: In pixels; smaller regions are left out.
    """

    def __init__(self, min_area: int) -> None:
        self.min_area = max(1, min_area)
        self._edge = np.zeros(0, np.int64)  # in the last row: 1 + index in `_open`, else 0
        self._open: list[_Open] = []

    def add(self, y: int, mask: np.ndarray, confidence: np.ndarray) -> Iterator[Region]:
        """The regions that end above this band or in it.

        Args:
            y: The scene's row at which the band begins.
            mask: uint8 [n,W], class ids.
            confidence: float32 [n,W], the probability of that class.
        """
        edge = np.zeros(mask.shape[1], np.int64)
        still_open: list[_Open] = []
        regions = list(self._open)
        for label in range(1, int(mask.max(initial=0)) + 1):
            _, ids, stats, _ = cv2.connectedComponentsWithStats(
                (mask == label).astype(np.uint8), connectivity=8
            )
            inside = ids > 0
            sums = np.bincount(ids[inside], confidence[inside], len(stats))
            parts = [_Open(label, float(s), int(a)) for s, a in zip(sums, stats[:, 4], strict=True)]
            above = self._touching(label, ids[0])
            below = np.unique(ids[-1])
            open_parts = {int(i) for i in below} | {part for _, part in above}
            for i in range(1, len(stats)):
                left, top, width, height, area = stats[i].tolist()
                if area >= self.min_area or i in open_parts:
                    crop = ids[top : top + height, left : left + width] == i
                    parts[i].pieces.append((left, y + top, crop))
                    regions.append(parts[i])
            for index, i in above:
                self._open[index].root.join(parts[i].root)
            numbers = np.zeros(len(stats), np.int64)
            for i in below[below > 0].tolist():
                left, top, right, bottom = parts[i].root.box()
                if (right - left) * (bottom - top) <= LARGEST:
                    still_open.append(parts[i])
                    numbers[i] = len(still_open)
            edge += numbers[ids[-1]]
        open_roots = {part.root for part in still_open}
        self._edge, self._open = edge, still_open
        return self._closed(region.root for region in regions if region.root not in open_roots)

    def end(self) -> Iterator[Region]:
        """The regions that reach the last row."""
        return self._closed(region.root for region in self._open)

    def _closed(self, roots: Iterable[_Open]) -> Iterator[Region]:
        distinct = dict.fromkeys(roots)
        return (root.closed() for root in distinct if root.area >= self.min_area)

    def _touching(self, label: int, row: np.ndarray) -> set[tuple[int, int]]:
        """Pairs of an index in `_open` and a part's id in the new band's first row that touch."""
        if not self._open:
            return set()
        of_class = np.array([False] + [region.label == label for region in self._open])
        old = np.pad(np.where(of_class[self._edge], self._edge, 0), 1)
        pairs: set[tuple[int, int]] = set()
        for shift in range(3):
            above = old[shift : shift + len(row)]
            both = (above > 0) & (row > 0)
            pairs.update(zip((above[both] - 1).tolist(), row[both].tolist(), strict=True))
        return pairs
