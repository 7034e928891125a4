"""Faults of a training on two hosts; it must end with an undisturbed run's weights."""

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path

from multinode.hosts import Hosts
from multinode.job import ROOT, Job
from torture.children import PATIENCE

from common.run import checkpoint

STEPS = 24
FLAGS = ["--encoder", "tu-test_resnet", "--weights-backbone", "none", "--device", "cpu", "-j", "0"]
FLAGS += ["-b", "4", "--crop-size", "64", "--print-freq", "1", "--max-steps", STEPS]
FLAGS += ["--dist-timeout", "60"]  # after a cut of 25 s TCP may need twice as long to recover


def clean(hosts: Hosts, job: Job, rng: random.Random) -> None:
    """Nothing happens."""


def worker_killed(hosts: Hosts, job: Job, rng: random.Random) -> None:
    lines, host = len(job.lines()), rng.randrange(2)
    (worker,) = (p for p in job.hosts.processes(host, "train.py") if is_worker(p))
    subprocess.run(["kill", "-9", str(worker)], check=True)
    job.wait(lambda: len(job.lines()) < lines)  # restarted: the log goes back to its step


def link_cut_and_healed(hosts: Hosts, job: Job, rng: random.Random) -> None:
    hosts.cut()
    time.sleep(rng.uniform(5, 25))
    hosts.heal()


def node_replaced(hosts: Hosts, job: Job, rng: random.Random) -> None:
    hosts.kill(1)
    time.sleep(rng.choice([5, 30]))
    job.start(1)


def silent_for_good(hosts: Hosts, job: Job, rng: random.Random) -> None:
    """Neither waits for the other for ever; after the cable is repaired both are started again."""
    hosts.cut()
    ended = job.finish()
    assert 0 not in ended, ended
    hosts.heal()
    job.start(0)
    job.start(1)


def rendezvous_lost(hosts: Hosts, job: Job, rng: random.Random) -> None:
    """The other host does not wait for it."""
    hosts.kill(0)
    assert 0 not in job.finish()
    job.start(0)
    job.start(1)


SCENARIOS = [
    *(clean, worker_killed, link_cut_and_healed, node_replaced),
    *(silent_for_good, rendezvous_lost),
]


def is_worker(pid: int) -> bool:
    return b"torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def tiles(folder: Path) -> Path:
    """A small tiled data set in `folder`."""
    data = folder / "data"
    if not data.exists():
        for words in (
            ["rareplanes/sample.py", "-o", data, "-n", 24, "--seed", 1, "--size", 384, 256],
            ["preprocessing/preprocess.py", data, "-s", 128, "-n", 1],
        ):
            subprocess.run(
                [sys.executable, *map(str, words)], cwd=ROOT, check=True, timeout=PATIENCE
            )
    return data


def scenario(number: int, folder: Path) -> str:
    """One of `SCENARIOS` after a random step; it must end with the clean scenario's weights."""
    what, rng = SCENARIOS[number % len(SCENARIOS)], random.Random(number)
    output, reference = (folder / f"{name}" / "run" for name in (number, "clean"))
    if what is clean or not reference.exists():
        run(clean, tiles(folder), reference, rng)
    if what is not clean:
        run(what, tiles(folder), output, rng)
        expected, actual = (weights(path) for path in (reference, output))
        assert actual == expected, f"{what.__name__}: other weights than an undisturbed run's"
    return what.__name__.replace("_", " ")


def run(what, data: Path, output: Path, rng: random.Random) -> None:
    subprocess.run(["rm", "-rf", output.parent], check=True)
    output.parent.mkdir()
    with Hosts() as hosts:
        job = Job(hosts, output, "--data-path", data, *FLAGS)
        first = rng.randrange(5, STEPS - 8)
        job.wait(lambda: job.step() >= first)
        what(hosts, job, rng)
        codes = job.finish()
    assert codes == [0, 0], f"{what.__name__}: {codes}\n{job.tail()}"
    assert job.step() == STEPS


def weights(output: Path) -> str:
    model = checkpoint.load(output / "checkpoint.pth")["model"]
    sha = hashlib.sha256()
    for name, tensor in model.items():
        sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()
