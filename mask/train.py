"""Train Mask R-CNN on the tiles of `preprocess.py`.

python mask/train.py --data-path data --output-dir runs/mask --amp --channels-last
torchrun --nproc-per-node=2 mask/train.py --data-path data --output-dir runs/mask
python mask/train.py --data-path data --test-only --resume runs/mask/model_best.pth
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
from common.session import session
from common.speedups import make_step, place
from mask.evaluate import scoring
from mask.model import BACKBONES, MASK_ROIS, NAME, STRIDE, build_model, from_checkpoint, loss_fn
from mask.targets import MAX_AIRCRAFT, training_views, warn_of_crowds


def main(argv: list[str] | None = None) -> None:
    parser = train_parser("Train Mask R-CNN: every aircraft is found and outlined.", "runs/mask")
    add = parser.add_argument
    help = f"{', '.join(BACKBONES)}, or a name in segmentation_models_pytorch"
    add("--backbone", default="resnet50", help=help)
    add("--proposals", type=positive, default=1000, help="RPN proposals per tile")
    help = "positive proposals per tile for the mask head"
    add("--mask-rois", type=positive, default=MASK_ROIS, help=help)
    help = "aircraft per crop; if more, the largest"
    add("--max-aircraft", type=positive, default=MAX_AIRCRAFT, help=help)
    args = parser.parse(argv)
    if args.test_only:
        return score_checkpoint(args, NAME, from_checkpoint, scoring(""))

    with session(args, NAME, STRIDE) as s:
        warn_of_crowds(s.batches, args.max_aircraft, s.process)
        model = build_model(
            args.backbone,
            len(s.classes),
            weights_backbone=args.weights_backbone,
            norm=args.norm,
            proposals=args.proposals,
            mask_rois=args.mask_rois,
        )
        groups = parameter_groups(model, model.dense["backbone"].body, args.lr, args.lr_encoder)
        objective = place(model, loss_fn, s.process, s.speedups)
        optimizer = torch.optim.AdamW(
            groups, lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        s.start(model, optimizer)
        fit(s, make_step(objective, s), training_views(args), scoring(s.args["labels"]))


if __name__ == "__main__":
    run_main(main)
