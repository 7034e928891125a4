"""The output folder of one run at a time, and `--resume`: which file, and whether bit-exact."""

import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.cli import UserError
from common.distributed import Process
from common.run import checkpoint, checkpoint_file

AUTO = Path("auto")
# Options that do not change the training.
FREE = {"config", "data_path", "output_dir", "resume", "test_only", "device", "workers"}
FREE |= {"print_freq", "save_every", "dist_timeout", "init_from", "weights_backbone"}


@contextmanager
def locked(folder: Path, process: Process) -> Iterator[None]:
    """Be the only run that writes into `folder`; the lock ends with the process, even a killed one.

    Raises:
        UserError: On rank 0, if another run holds the lock.
    """
    if not process.is_main:
        yield
        return
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UserError(
                f"{str(folder)!r} is in use by another run ({file.read().strip() or error}); "
                "wait until it ends or choose another --output-dir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def find(wanted: Path | None, output_dir: Path, model_name: str) -> dict[str, Any] | None:
    """The checkpoint that `--resume` names, or the previous one if that is damaged.

    Args:
        wanted: The value of `--resume`: a file, `AUTO`, or None if it was not given.
        output_dir: Where `AUTO` looks.
        model_name: What the checkpoint must hold.

    Returns:
        What `checkpoint.load` returns; None for None, and for `AUTO` if there is no checkpoint.

    Raises:
        UserError: The folder holds a run that is not continued, neither file can be read, or the
            checkpoint is of another model.
    """
    continued = wanted is not None and (wanted == AUTO or wanted.parent == output_dir)
    if not continued and (output_dir / checkpoint.LATEST).exists():
        raise UserError(
            f"{str(output_dir)!r} holds a run already; continue it with --resume auto or "
            "choose another --output-dir."
        )
    if wanted is None:
        return None
    latest = output_dir / checkpoint.LATEST if wanted == AUTO else wanted
    previous = latest.with_name(checkpoint.PREVIOUS)
    if wanted == AUTO and not latest.exists() and not previous.exists():
        return None
    source = latest
    try:
        saved = checkpoint_file.read(latest)
    except UserError as error:
        if latest.name != checkpoint.LATEST or not previous.exists():
            raise
        source, saved = previous, checkpoint_file.read(previous)
        if int(os.environ.get("RANK", 0)) == 0:
            print(
                f"{error} Continuing from {str(previous)!r}, step {saved.get('step')!r:.20}.",
                flush=True,
            )
    checkpoint_file.check_model(saved, source, model_name)
    return saved


def settings(args: dict[str, Any], process: Process, tiles: Path) -> dict[str, Any]:
    """What must be equal for a bit-exact run besides its state, as plain values for a checkpoint.

    Args:
        args: The options, as `arguments.plain` returns them.
        process: This process.
        tiles: Folder of the training tiles.
    """
    device = process.device
    on_gpu = device.type == "cuda"
    chosen = {k: v for k, v in args.items() if k not in FREE}
    return chosen | {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "world_size": process.world_size,
        "global_batch": args["batch_size"] * args["grad_accum"] * process.world_size,
        "torch": str(torch.__version__),
        "training tiles": fingerprint(tiles),
    }


def fingerprint(folder: Path) -> str:
    """SHA-256 of a split's index and of the names and sizes of its files: no pixel is read."""
    sha = hashlib.sha256((folder / "instances_tiled.json").read_bytes())
    for directory in sorted(path for path in folder.iterdir() if path.is_dir()):
        if directory.name in ("images_tiled", "masks_tiled"):
            with os.scandir(directory) as entries:
                files = sorted((entry.name, entry.stat().st_size) for entry in entries)
            sha.update(repr(files).encode())
    for path in sorted(folder.glob("*.npy")):
        sha.update(f"{path.name} {path.stat().st_size}".encode())
    return sha.hexdigest()


def restore(state: checkpoint.State, saved: dict[str, Any], total_steps: int) -> None:
    """Continue from `saved`, which `find` returned; print the step, and whether it is bit-exact.

    If all of `total_steps` are done, that is what is printed.

    Raises:
        UserError: It does not fit, or another number of processes would change the global batch.
    """
    before, now = saved.get("settings", {}), state.settings
    # An option that the checkpoint does not name is newer than the checkpoint.
    changed = [name for name in now if name in before and before[name] != now[name]]
    if "world_size" in changed and "global_batch" in changed:
        wanted = before.get("global_batch")
        raise UserError(
            f"the run had a global batch of {wanted} on {before.get('world_size')} processes and "
            f"would continue with {now['global_batch']} on {now['world_size']}; choose -b and "
            f"--grad-accum so that their product is {wanted} / {now['world_size']}."
        )
    kept = before.get("lr_encoder", 1.0)  # earlier checkpoints do not name it
    if kept != now.get("lr_encoder", 1.0):
        raise UserError(
            f"the run had --lr-encoder {kept!r:.20} and keeps it; to change it, "
            "start a new run with --init-from this checkpoint."
        )
    state.restore(saved)
    if "training tiles" in changed or "seed" in changed:
        state.seen = 0  # the current epoch had another order
    if state.step >= total_steps:
        state.process.print(
            f"all {total_steps} steps are done: the checkpoint is at step {state.step}; to train "
            "more, give a larger --epochs or --max-steps."
        )
        return
    message = f"continuing at step {state.step}, {state.seen} tiles into epoch {state.epoch}"
    differences = [_difference(name, before.get(name), now[name]) for name in changed]
    if differences:
        message += f"; not bit-exact, because {', '.join(differences)}"
    if {"lr", "weight_decay"} & set(changed):
        message += "; learning rate and weight decay stay the checkpoint's"
    state.process.print(message + ".")


def _difference(name: str, before: Any, now: Any) -> str:
    if name == "training tiles":
        return "the training tiles have changed (the current epoch starts again)"
    return f"{name} was {before!r:.80} and is {now!r:.80}"  # `before` is untrusted
