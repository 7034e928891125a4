"""Write a trained DeepLabV3 as an ONNX file, which inference.py and onnxruntime read.

python DeepLabV3/export.py runs/deeplabv3/model_best.pth deeplabv3.onnx
python DeepLabV3/inference.py deeplabv3.onnx scene.tif maps
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import run as run_main
from common.predict.folder import export_parser


def main(argv: list[str] | None = None) -> None:
    args = export_parser("Write a trained DeepLabV3 as an ONNX file.").parse(argv)
    from common.predict.onnx_file import export  # imports torch
    from DeepLabV3.model import NAME, from_checkpoint, probabilities

    export(args, NAME, from_checkpoint, probabilities, ("probabilities",))


if __name__ == "__main__":
    run_main(main)
