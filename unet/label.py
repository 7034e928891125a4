"""Write what a trained UNet finds in tiles: the probability of aircraft, into found_tiled/.

python unet/label.py runs/chips/model_best.pth data/real_chips

`preprocessing/chips.py` makes masks of it. 255 is a probability of 1; pixels to ignore are 0.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import Parser, UserError, add_precision, positive, progress
from common.cli import run as run_main
from common.io.files import write_atomic
from common.predict.folder import there


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("model", type=there, help="model_best.pth of a training run, or what export.py made of it")
    add("data", type=there, help="folder with the tiled train/, val/ or test/")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("-b", "--batch-size", type=positive, default=16, help="tiles per forward pass")
    add_precision(parser.add_argument_group("speed-ups"))
    parser.set_defaults(channels_last=None, cuda_graphs=False, grad_accum=1, window=None)
    args = parser.parse(argv)
    splits = [args.data / s for s in ("train", "val", "test") if (args.data / s).is_dir()]
    if not splits:
        raise UserError(f"there is no train/, val/ or test/ in {str(args.data)!r}.")
    import cv2  # these take seconds
    import torch

    from common.data import Tiles
    from common.io.tiles import FOUND
    from common.predict.network import load_network
    from unet.model import NAME, from_checkpoint, probabilities

    sets = [Tiles(split) for split in splits]
    network, _ = load_network(args, NAME, from_checkpoint, probabilities, lambda p, size: p)
    side = sets[0].size
    if args.model.suffix == ".onnx" and args.window != side:
        raise UserError(
            f"{args.model.name!r} takes images of {args.window} pixels and the tiles have {side}; "
            f"export it again with --window {side}."
        )
    for tiles in sets:
        folder = tiles.folder / FOUND
        folder.mkdir(exist_ok=True)
        starts = range(0, len(tiles), args.batch_size)
        for start in progress(starts, desc=tiles.folder.name, unit="batch"):
            chosen = list(range(start, min(start + args.batch_size, len(tiles))))
            batch = tiles.__getitems__(chosen)
            with torch.inference_mode():
                aircraft = (1 - network(batch.images)[:, 0]).mul(255).round().byte().cpu()
                aircraft[batch.ids == tiles.ignore] = 0
            for i, found in zip(chosen, aircraft.numpy(), strict=True):
                png = cv2.imencode(".png", found)[1].data
                write_atomic(folder / tiles.images[i]["file_name"], png)
        print(f"wrote {len(tiles)} masks into {str(folder)!r}")


if __name__ == "__main__":
    run_main(main)
