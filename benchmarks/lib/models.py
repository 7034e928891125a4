"""The models that are measured, one row each."""

import importlib
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Model:
    """A model's folder and the backbones it is measured on."""

    folder: str
    option: str  # of train.py, which chooses the backbone
    backbone: str  # train.py's default
    light: str  # for a CPU
    light_flags: tuple[str, ...] = ()  # of train.py, for a CPU
    semantic: bool = True  # every pixel is labelled

    @property
    def module(self) -> ModuleType:
        """Its model.py."""
        return importlib.import_module(f"{self.folder}.model")

    @property
    def picture(self) -> str:
        """Name of its pictures in assets/, without the ending."""
        return f"{self.folder.lower().removesuffix('v3')}_benchmark"


MODELS = {
    model.folder: model
    for model in (
        Model("fcn", "--backbone", "resnet50", "resnet50"),
        Model("DeepLabV3", "--backbone", "resnet50", "mobilenet_v3_large"),
        Model("unet", "--encoder", "resnet34", "resnet18"),
        Model("mask", "--backbone", "resnet50", "resnet18", ("--proposals", "200"), semantic=False),
    )
}
