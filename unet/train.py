"""Train UNet on the tiles of `preprocess.py`.

python unet/train.py --data-path data --output-dir runs/unet --amp --channels-last
torchrun --nproc-per-node=2 unet/train.py --data-path data --output-dir runs/unet
python unet/train.py --data-path data --test-only --resume runs/unet/model_best.pth
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import args as arguments
from common import checkpoint, data, engine
from common.augment import random_view
from common.cli import UserError
from common.cli import run as run_main
from common.distributed import process_group
from common.speedups import make_step, place
from unet.model import STRIDE, build_model, from_checkpoint, loss_fn, predict


def main(argv: list[str] | None = None) -> None:
    parser = arguments.train_parser(
        "Train UNet: every pixel is ground or a class of aircraft.", output_dir="runs/unet"
    )
    parser.add_argument("--encoder", default="resnet34", help="any of segmentation_models_pytorch")
    parser.add_argument(
        "--norm",
        choices=("batch", "group"),
        default="batch",
        help="group: for few tiles per process",
    )
    args = parser.parse(argv)
    if args.test_only:
        return test(args)
    train_tiles, val_tiles = data.training_splits(args.data_path)
    arguments.check(args, STRIDE, train_tiles.size)
    saved = checkpoint.load(args.resume, "unet") if args.resume else None

    with process_group(args.device) as process:
        speedups = arguments.speedups(args, process.device)
        batches = data.training_loader(train_tiles, args, process)
        val_batches = data.scoring_loader(val_tiles, args, process) if val_tiles else None
        total_steps = args.max_steps or args.epochs * len(batches)

        torch.manual_seed(args.seed)  # the same weights on every rank
        model = build_model(
            args.encoder, len(train_tiles.classes), args.weights_backbone, args.norm
        )
        trained = place(model, process, speedups)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True
        )
        schedule = engine.polynomial_schedule(optimizer, total_steps, args.warmup_steps)
        scaler = speedups.scaler(process.device)
        step = make_step(trained, loss_fn, optimizer, schedule, scaler, speedups, process.device)
        run = checkpoint.Run(
            "unet", train_tiles.classes, arguments.plain(args), model, optimizer, schedule, scaler
        )
        if saved:
            run.restore(saved)

        def prepare(batch: data.Batch, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
            images, view = random_view(batch, args.crop_size, args.seed, epoch, args.scale_jitter)
            return images, data.semantic_target(view)

        def score() -> dict[str, float]:
            if val_batches is None:
                return {}
            return engine.evaluate(model, predict, val_batches, run.classes, process, speedups)

        process.print(
            speedups.banner(process), f"global batch {args.batch_size * process.world_size}"
        )
        engine.fit(
            run,
            step,
            batches,
            prepare,
            score,
            process,
            args.output_dir,
            total_steps,
            args.print_freq,
            args.eval_freq,
        )


def test(args: argparse.Namespace) -> None:
    """Score `--resume` on a split of the data; writes scores and a sheet beside the checkpoint."""
    if args.resume is None:
        raise UserError("--test-only scores a checkpoint; add --resume runs/unet/model_best.pth.")
    saved = checkpoint.load(args.resume, "unet")
    tiles = data.scoring_split(args.data_path, args.test_only, saved["classes"])
    with process_group(args.device) as process:
        speedups = arguments.speedups(args, process.device)
        model = from_checkpoint(saved).to(process.device).to(memory_format=speedups.layout)
        batches = data.scoring_loader(tiles, args, process)
        process.print(speedups.banner(process))
        engine.test(model, predict, batches, process, speedups, args.resume.parent)


if __name__ == "__main__":
    run_main(main)
