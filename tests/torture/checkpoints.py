"""Checkpoints that are cut short, flipped, swapped or made up."""

import io
import os
import random
import resource
import signal
import time
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from common.cli import UserError
from common.run import checkpoint, checkpoint_file
from unet.model import build_model, from_checkpoint


def content(step: int) -> dict:
    """A small checkpoint whose tensors hold its step."""
    made = {
        "format": 1,
        "model_name": "unet",
        "classes": ["ground", "aircraft"],
        "args": {"encoder": "resnet18"},
        "model": {f"layer{i}.weight": torch.full((64, 257), float(step)) for i in range(8)},
        "step": step,
    }
    return made


def killed_save(number: int, folder: Path) -> str:
    """A process that saves again and again is killed at a random moment: its last save loads."""
    path = folder / f"{number}.pth"
    checkpoint_file.write(content(0), path)
    ready, begun = os.pipe()
    child = os.fork()
    if child == 0:  # only numbers and files from here on; it never returns
        try:
            for step in range(1, 10_000):
                checkpoint_file.write(content(step), path)
                os.write(begun, b"%d\n" % step)
        finally:
            os._exit(1)
    os.close(begun)
    time.sleep(random.Random(number).uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(ready) as reported:
        last = max((int(line) for line in reported), default=0)
    loaded = checkpoint.load(path, "unet")
    assert loaded["step"] in (last, last + 1), f"saved {last}, loaded {loaded['step']}"
    for tensor in loaded["model"].values():
        assert bool((tensor == loaded["step"]).all()), "a tensor of another step"
    return "loaded"


def corrupted(number: int, folder: Path) -> str:
    """A bit flips, the end is missing, a page is zero or two pages are swapped."""
    path = folder / "damaged.pth"
    checkpoint_file.write(content(number), path)
    data = bytearray(path.read_bytes())
    rng = random.Random(number)
    kind = ("flip", "cut", "zeros", "swap")[number % 4]
    at, other = (rng.randrange(0, len(data) - 4096) for _ in range(2))
    before = bytes(data)
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "zeros":
        data[at : at + 4096] = bytes(4096)
    else:
        page = data[at : at + 4096]
        data[at : at + 4096] = data[other : other + 4096]
        data[other : other + 4096] = page
    path.write_bytes(data)
    try:
        loaded = checkpoint.load(path, "unet")
    except UserError:
        return f"{kind} refused"
    # Bytes without meaning, such as the padding between the parts of the archive, may change.
    expected = checkpoint_file.digest(content(number))
    assert checkpoint_file.digest(loaded) == expected, f"{kind}: wrong values accepted"
    return f"{kind} without effect" if bytes(data) != before else f"{kind} changed nothing"


@cache
def network() -> dict[str, Any]:
    """The checkpoint of a small UNet that loads and predicts."""
    width = [16] * 5
    model = build_model("tu-test_resnet", 2, decoder_channels=width)
    args = {"encoder": "tu-test_resnet", "norm": "batch", "decoder_channels": width}
    whole = content(0) | {
        "args": args,
        "model": model.state_dict(),
        "format": checkpoint_file.FORMATS[-1],
    }
    return whole | {"settings": {}, "seen": 0, "best": 0.5, "scores": {}}


class Evil:
    """Runs code if its pickle is loaded without checks."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return open, (str(self.marker), "w")


def hostile(rng: random.Random, marker: Path) -> Any:
    """A value that does not belong where it is put."""
    values = [None, -1, 10**30, float("nan"), "", "../../etc/passwd", "tu-hf-hub:evil/x", [], {}]
    values += [b"bytes", 1j, Path("x"), Evil(marker), torch.zeros(()), torch.empty(0)]
    return rng.choice(values)


def dense(value: Any) -> bool:
    """Whether it can be sliced and cast: an earlier change may have replaced it."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or not value.ndim:
        return False
    return value.is_contiguous()


def deflated(data: bytearray) -> bytearray:
    """The same archive, compressed."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return bytearray(packed.getvalue())


def flipped(data: bytearray, rng: random.Random) -> bytearray:
    """Its pickle, which comes first, with some bytes changed, under the old CRC of the archive."""
    for _ in range(rng.randrange(1, 8)):
        data[rng.randrange(64, min(len(data), 8000))] = rng.randrange(256)
    return data


def fuzzed(number: int, folder: Path) -> str:
    """An untrusted checkpoint with a right checksum gives our error or the same network.

    None of its code runs, nothing else is raised, and memory grows by at most 256 MiB.
    """
    rng = random.Random(number)
    path, marker = folder / "fuzzed.pth", folder / "ran"
    made = {k: dict(v) if isinstance(v, dict) else v for k, v in network().items()}
    for _ in range(rng.choice((1, 1, 2, 3))):
        group = rng.choice([made, made.get("args"), made.get("model")])
        group = group if isinstance(group, dict) and group else made
        key = rng.choice(list(group))
        change = rng.randrange(5)
        if change == 0:
            del group[key]
        elif change == 1 and dense(group[key]):
            group[key] = rng.choice([group[key][:1], group[key].half(), group[key][None]])
        elif change == 2:
            group[rng.choice(["", "a.b", "../x", "weight"])] = group[key]
        else:
            group[key] = hostile(rng, marker)
    buffer = io.BytesIO()
    torch.save(checkpoint_file.sealed(made), buffer)
    data = bytearray(buffer.getvalue())
    if number % 5 == 0:  # its archive, compressed, or its pickle, flipped
        data = deflated(data) if rng.random() < 0.5 else flipped(data, rng)
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        loaded = checkpoint.load(path, "unet")
        checkpoint.rebuild(loaded, from_checkpoint)
        result, sentence = "without effect", ""
    except UserError as error:
        result, sentence = "refused", str(error)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    assert sentence.isprintable(), repr(sentence)
    assert not marker.exists(), "its code ran"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 256 * 1024, f"{grown // 1024} MiB more"
    return result
