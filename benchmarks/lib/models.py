"""The models, one row each: what is measured, and what the tests train."""

import importlib
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Model:
    """A model's folder and its backbones. The smallest is for tests; by default the light one."""

    folder: str
    title: str  # in tables of the README
    option: str  # of train.py, which chooses the backbone
    backbone: str  # train.py's default
    light: str  # for a CPU
    light_flags: tuple[str, ...] = ()  # of train.py, for a CPU
    semantic: bool = True  # every pixel is labelled
    smallest: str = ""
    smallest_flags: tuple[str, ...] = ()

    @property
    def tiny(self) -> list[str]:
        """The options of train.py for the smallest network."""
        return [self.option, self.smallest or self.light, *self.smallest_flags]

    @property
    def module(self) -> ModuleType:
        """Its model.py."""
        return importlib.import_module(f"{self.folder}.model")


MODELS = {
    model.folder: model
    for model in (
        Model("fcn", "FCN", "--backbone", "resnet50", "resnet50"),
        Model("DeepLabV3", "DeepLabV3", "--backbone", "resnet50", "mobilenet_v3_large"),
        Model(
            "unet",
            "UNet",
            *("--encoder", "resnet34", "resnet18"),
            smallest="tu-test_resnet",
            smallest_flags=("--decoder-channels", "32", "32", "16", "16", "16"),
        ),
        Model(
            "mask",
            "Mask R-CNN",
            *("--backbone", "resnet50", "resnet18"),
            light_flags=("--proposals", "200"),
            semantic=False,
            smallest="tu-test_resnet",
            smallest_flags=("--proposals", "40"),
        ),
    )
}
