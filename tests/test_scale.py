"""benchmarks/scale.py: what it counts on the smallest model, its time model, and its table."""

from functools import partial

import pytest
import torch
from helpers.commands import ROOT
from torch import nn
from torch._subclasses import FakeTensorMode
from torture import children

from benchmarks import scale
from benchmarks.lib import flops
from benchmarks.lib.readme import METHOD, part, read_rows
from common.cli import UserError


def count(output, broadcast_buffers):
    """In a process of its own: the fake process group must not affect other tests."""
    place = scale.place

    def place_with(*given):
        objective = place(*given)
        objective.broadcast_buffers = broadcast_buffers
        return objective

    scale.place = place_with
    scale.main(["-o", str(output), "--models", "unet"])


def counted(folder, broadcast_buffers):
    output, log = folder / f"new/{broadcast_buffers}.csv", folder / "log"
    assert children.end(children.start(partial(count, output, broadcast_buffers), log)) == 0, (
        log.read_text()
    )
    return read_rows(output)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return counted(tmp_path_factory.mktemp("scale"), broadcast_buffers=False)


def test_every_gradient_is_sent_once_and_nothing_else(rows, tmp_path):
    assert {row["model"] for row in rows} == {"unet-resnet34"}
    for row in rows:
        sizes = [int(size) for size in row["bucket_bytes"].split()]
        assert len(sizes) > 1  # rebuilt
        assert sum(sizes) == 4 * int(row["parameters"])
        assert row["other_collectives"] == "0"
        assert float(row["bucket_ready"].split()[-1]) == 1
    with_broadcasts = counted(tmp_path, broadcast_buffers=True)
    assert int(with_broadcasts[0]["other_collectives"]) > 0


def test_efficiency_rises_with_bandwidth_and_falls_with_faster_gpus(rows):
    of = {(row["gpu"], int(row["gbit_per_s"])): float(row["efficiency"]) for row in rows}
    for gpu in scale.PEAK:
        efficiencies = [of[gpu, gbit] for gbit in sorted(scale.GBIT_PER_S)]
        assert 0 < efficiencies[0] < efficiencies[1] < efficiencies[2] < 1
    assert all(of["H100", gbit] < of["A100", gbit] for gbit in scale.GBIT_PER_S)


def test_two_gpus_exchange_what_one_has():
    """A second for the bytes, two messages of a half, and nothing computed meanwhile."""
    workload = {"forward_gflop": "1", "backward_gflop": "1"}
    workload |= {"bucket_bytes": str(10**9), "bucket_ready": "1"}
    args = scale._parse(["--world-size", "2", "--alpha", "500000"])
    assert scale.costs(workload, "A100", 8, args)["all_reduce_ms"] == "2000.000"


def test_exposed_is_what_a_queue_would_leave():
    sends, ready = [3.0, 1.0, 4.0, 1.5], [2.0, 2.5, 7.0, 9.0]
    clock = 0.0
    for send, at in zip(sends, ready, strict=True):
        clock = max(clock, at) + send
    assert scale.exposed(sends, ready) == pytest.approx(clock - ready[-1])
    assert scale.exposed([5.0], [9.0]) == 5.0


def test_a_grouped_convolution_costs_twice_its_forward_to_reverse():
    with FakeTensorMode():
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8))
        images = torch.zeros(2, 3, 512, 512)
        forward, backward, done = flops.of_step(model, lambda m, x, _: m(x).sum(), images, images)
    first, grouped = (2 * 512**2 * n for n in (3 * 8, 8 * 9))
    assert forward == first + grouped
    assert backward == first + 2 * grouped  # images need no gradient
    ready = {"0": backward, "1": 2 * grouped}
    assert done == {f"{i}.{kind}": ready[i] for i in "01" for kind in ("weight", "bias")}


def test_an_unknown_model_is_named_with_those_there_are():
    with pytest.raises(UserError, match=r"unet-resnet18.*choose from.*unet-resnet34"):
        scale.main(["--models", "unet-resnet18"])


def test_the_method_shows_the_committed_numbers():
    committed = read_rows(ROOT / "benchmarks/results/scale.csv")
    assert {row["model"] for row in committed} == set(scale.NAMES)
    assert part(METHOD, "scale") == scale.table(committed), (
        "stale; run: python benchmarks/scale.py --write-readme"
    )
