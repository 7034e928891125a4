"""Two hosts with a cable between them, and faults of either: `make test-hosts`."""

import pytest
from multinode import scenarios
from multinode.hosts import why_not


@pytest.mark.hosts
@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
@pytest.mark.parametrize(
    "what", [scenarios.node_replaced, scenarios.silent_for_good, scenarios.rendezvous_lost]
)
def test_the_run_ends_as_if_nothing_had_happened(what, tiled, tmp_path):
    (tmp_path / "data").symlink_to(tiled)
    scenarios.scenario(scenarios.SCENARIOS.index(what), tmp_path)
