"""What was read, what is in the tiles, and what was left out and why: a sentence."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from preprocessing.scene_tiles import Shown


@dataclass
class Summary:
    """Counts of scenes and of objects: all that was read, and those left out, by the reason."""

    scenes: int = 0
    objects: int = 0
    scenes_left_out: Counter[str] = field(default_factory=Counter)
    objects_left_out: Counter[str] = field(default_factory=Counter)

    def add(self, shown: Collection[Shown], used: int, bad: int) -> None:
        """Count a split: its scenes, how many of them have a tile, and how many are unreadable."""
        self.scenes += len(shown) + bad
        self.scenes_left_out["that cannot be read"] += bad
        self.scenes_left_out["without aircraft (--negatives 100 keeps them)"] += len(shown) - used
        for scene in shown:
            self.objects += scene.things
            self.objects_left_out.update(scene.left_out)

    def __str__(self) -> str:
        scenes, objects = self.scenes_left_out, self.objects_left_out
        return (
            f"{self.scenes - scenes.total()} of {self.scenes} scenes and "
            f"{self.objects - objects.total()} of {self.objects} objects are in the tiles"
            + _listed("scenes", scenes)
            + _listed("objects", objects)
        )


def _listed(what: str, left_out: Counter[str]) -> str:
    reasons = ", ".join(f"{count} {why}" for why, count in left_out.most_common() if count)
    return f"; {what} left out: {reasons}" if reasons else ""
