"""Pictures of predictions: outlines drawn on an image, and an image reduced while it arrives."""

import cv2
import numpy as np

from common.io.pictures import colour


def outline(
    image: np.ndarray, instances: list[tuple[np.ndarray, int, int, int, float]]
) -> np.ndarray:
    """Draw the outline and the score of each instance in the colour of its class.

    Args:
        image: uint8 [H,W,3], RGB.
        instances: Mask bool [h,w], x and y of its top left pixel, class id, score in 0…1.

    Returns:
        A new uint8 [H,W,3].
    """
    drawn = image.copy()
    width = max(1, round(min(image.shape[:2]) / 500))
    size = max(0.35, min(image.shape[:2]) / 2400)
    for mask, x, y, class_id, score in instances:
        lines, _ = cv2.findContours(
            np.pad(mask, 1).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE
        )
        cv2.drawContours(
            drawn, lines, -1, colour(class_id), width, cv2.LINE_AA, offset=(x - 1, y - 1)
        )
        if not lines:
            continue
        # The score goes to the largest piece of the mask: the first may belong to a neighbour.
        left, top, *_ = cv2.boundingRect(max(lines, key=cv2.contourArea))
        left, top = x - 1 + left, max(10, y - 4 + top)
        # The text itself, shifted, makes the dark rim: OpenCV 5 spaces thicker letters wider.
        around = [(dx, dy, (0, 0, 0)) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
        for dx, dy, ink in [*around, (0, 0, (255, 255, 255))]:
            corner, font = (left + dx, top + dy), cv2.FONT_HERSHEY_SIMPLEX
            cv2.putText(drawn, f"{100 * score:.0f}", corner, font, size, ink, 1, cv2.LINE_AA)
    return drawn


class Reduced:
    """An image that arrives in bands of rows, kept so small that its longest side fits `longest`.

    Args:
        width: Of the image, pixels.
        height: Of the image, pixels.
        longest: Side of the result.
        smooth: Average the pixels, as for a photograph; else take one, as for class ids.
    """

    def __init__(self, width: int, height: int, longest: int, smooth: bool = True) -> None:
        self.factor = -(-max(width, height) // longest)
        self._how = cv2.INTER_AREA if smooth else cv2.INTER_NEAREST
        self._rest: np.ndarray | None = None
        self._parts: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        """Append uint8 [n,W,3] or [n,W]."""
        if self._rest is not None:
            rows = np.concatenate([self._rest, rows])
        whole = len(rows) // self.factor * self.factor
        self._rest = rows[whole:].copy()
        if whole:
            self._parts.append(self._small(rows[:whole]))

    def image(self) -> np.ndarray:
        """All of it; an incomplete row or column of blocks repeats its last pixels."""
        if self._rest is not None and len(self._rest):
            missing = self.factor - len(self._rest)
            border = ((0, missing), *((0, 0),) * (self._rest.ndim - 1))
            self._parts.append(self._small(np.pad(self._rest, border, "edge")))
            self._rest = None
        return np.concatenate(self._parts)

    def _small(self, rows: np.ndarray) -> np.ndarray:
        if self.factor == 1:
            return rows
        border = ((0, 0), (0, -rows.shape[1] % self.factor), *((0, 0),) * (rows.ndim - 2))
        rows = np.pad(rows, border, "edge")
        size = (rows.shape[1] // self.factor, len(rows) // self.factor)
        return cv2.resize(rows, size, interpolation=self._how)
