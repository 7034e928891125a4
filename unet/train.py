"""Train UNet on the tiles of `preprocess.py`.

python unet/train.py --data-path data --output-dir runs/unet --amp --channels-last
torchrun --nproc-per-node=2 unet/train.py --data-path data --output-dir runs/unet
python unet/train.py --data-path data --test-only --resume runs/unet/model_best.pth
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.args import train_parser
from common.backbones import parameter_groups
from common.cli import positive
from common.cli import run as run_main
from common.engine import fit
from common.predict.score import score_checkpoint
from common.semantic import scoring, training_views
from common.session import session
from common.speedups import make_step, place
from unet.model import DECODER, NAME, STRIDE, build_model, from_checkpoint, loss_fn, predict


def main(argv: list[str] | None = None) -> None:
    parser = train_parser(f"Train {NAME}: every pixel is ground or an aircraft.", "runs/unet")
    add = parser.add_argument
    add("--encoder", default="resnet34", help="name in segmentation_models_pytorch")
    help, stages = "width of the decoder, from the coarsest stage to the finest", len(DECODER)
    add("--decoder-channels", type=positive, nargs=stages, default=DECODER, metavar="C", help=help)
    args = parser.parse(argv)
    if args.test_only:
        return score_checkpoint(args, NAME, from_checkpoint, scoring(predict))

    with session(args, NAME, STRIDE) as s:
        model = build_model(
            args.encoder, len(s.classes), args.weights_backbone, args.norm, args.decoder_channels
        )
        groups = parameter_groups(model, model.encoder, args.lr, args.lr_encoder)
        objective = place(model, loss_fn, s.process, s.speedups)
        optimizer = torch.optim.AdamW(
            groups, lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        s.start(model, optimizer)
        fit(s, make_step(objective, s), training_views(args), scoring(predict))


if __name__ == "__main__":
    run_main(main)
