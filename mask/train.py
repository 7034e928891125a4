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
from common.session import session
from common.speedups import make_step, place
from mask.coco import DEFINITION
from mask.evaluate import evaluate, test
from mask.model import BACKBONES, MASK_ROIS, NAME, STRIDE, build_model, loss_fn
from mask.targets import MAX_AIRCRAFT, training_views, warn_of_crowds


def main(argv: list[str] | None = None) -> None:
    parser = train_parser("Train Mask R-CNN: every aircraft is found and outlined.", "runs/mask")
    add = parser.add_argument
    add("--backbone", choices=BACKBONES, default="resnet50")
    add("--proposals", type=positive, default=1000, help="RPN proposals per tile")
    add("--mask-rois", type=positive, default=MASK_ROIS, help="of these for the mask head")
    add("--max-aircraft", type=positive, default=MAX_AIRCRAFT, help="per crop, the largest ones")
    args = parser.parse(argv)
    if args.test_only:
        return test(args)

    with session(args, NAME, STRIDE) as s:
        options = args.weights_backbone, args.norm, args.proposals, args.mask_rois
        model = build_model(args.backbone, len(s.classes), *options)
        body = model.dense["backbone"].body
        weights = parameter_groups(model, body, args.lr, args.lr_encoder)
        objective = place(model, loss_fn, s.process, s.speedups)
        optimizer = torch.optim.AdamW(
            weights, lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        run = s.run(model, optimizer)
        step = make_step(objective, run, s.speedups, args.clip_grad_norm)
        warn_of_crowds(s.batches, args.max_aircraft, s.process)
        views = training_views(args.crop_size, args.seed, args.scale_jitter, args.max_aircraft)
        fit(s, run, step, views, evaluate, "mask_AP", DEFINITION)


if __name__ == "__main__":
    run_main(main)
