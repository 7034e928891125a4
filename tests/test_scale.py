"""benchmarks/scale.py: the script on the smallest model, its time model, and its tables."""

import pytest
from helpers.commands import ROOT, run_forked
from torch import nn

from benchmarks import scale
from benchmarks.lib.readme import README, part, read_rows
from benchmarks.lib.scale import report, workload
from benchmarks.lib.scale.network import Network, exposed, hidden_from
from common.cli import UserError


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[report.Row]:
    """In a separate process: the fake process group must not affect other tests."""
    folder = tmp_path_factory.mktemp("scale")
    done = run_forked(
        ROOT / "benchmarks/scale.py", "-o", "new/scale.csv", "--models", "unet", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return read_rows(folder / "new/scale.csv")


def test_every_gradient_is_sent_once_and_nothing_else(rows):
    assert {row["model"] for row in rows} == {"unet-resnet34"}
    for row in rows:
        sizes = [int(size) for size in row["bucket_bytes"].split()]
        assert sum(sizes) == int(row["bytes"]) == 4 * int(row["parameters"])
        assert len(sizes) == int(row["all_reduces"]) > 1  # rebuilt
        assert row["broadcasts"] == "0"
        assert int(row["broadcast_buffers_broadcasts"]) > 0  # so they would be counted
        assert row["bucket_ready"].split()[-1] == "1.0000"


def test_efficiency_rises_with_bandwidth_and_falls_with_faster_gpus(rows):
    of = {(row["gpu"], int(row["gbit_per_s"])): float(row["efficiency"]) for row in rows}
    for gpu in scale.PEAK:
        efficiencies = [of[gpu, gbit] for gbit in sorted(scale.GBIT_PER_S)]
        assert 0 < efficiencies[0] < efficiencies[1] < efficiencies[2] < 1
    assert all(of["H100", gbit] < of["A100", gbit] for gbit in scale.GBIT_PER_S)


def test_the_readme_shows_the_committed_numbers():
    committed = read_rows(ROOT / "benchmarks/results/scale.csv")
    assert {row["model"] for row in committed} == set(scale.MODELS)
    assert part(README, "scale") == report.tables(committed), (
        "stale; run: python benchmarks/scale.py --write-readme"
    )


def test_exposed_is_what_a_queue_would_leave():
    costs, ready = [3.0, 1.0, 4.0, 1.5], [2.0, 2.5, 7.0, 9.0]
    clock = 0.0
    for cost, at in zip(costs, ready, strict=True):
        clock = max(clock, at) + cost
    assert exposed(costs, ready) == pytest.approx(clock - ready[-1])
    assert exposed([5.0], [9.0]) == 5.0


def test_from_the_named_batch_only_the_last_bucket_shows():
    costs, image = [30.0, 10.0, 40.0, 1.5], [2.0, 2.5, 7.0, 9.0]
    batch = hidden_from(costs, image)
    assert exposed(costs, [batch * at for at in image]) == pytest.approx(costs[-1])
    assert exposed(costs, [(batch - 1) * at for at in image]) > costs[-1]


def test_two_gpus_exchange_what_one_has():
    network = Network(world_size=2, bandwidth=1e9, alpha=0.5)
    assert network.ring(1e9) == network.tree(1e9) == 2.0  # 1 s of bytes, two messages


def test_a_grouped_convolution_costs_twice_its_forward_to_reverse():
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8))

    forward, total, done = workload._flops(build, lambda model, images, _: model(images).sum())
    first, grouped = (2 * 512**2 * n for n in (3 * 8, 8 * 9))
    assert forward == first + grouped
    assert total - forward == first + 2 * grouped  # images need no gradient
    assert done == {"1.weight": total - first, "1.bias": total - first} | dict.fromkeys(
        ("0.weight", "0.bias"), total
    )


def test_an_unknown_model_is_named_with_those_there_are():
    with pytest.raises(UserError, match="resnet18 is not known; choose from unet-resnet34"):
        scale.main(["--models", "unet-resnet18"])
