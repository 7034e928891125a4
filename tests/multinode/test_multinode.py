"""Two hosts with a cable between them, of which one is lost and replaced."""

import pytest
from multinode.hosts import why_not
from multinode.scenarios import SCENARIOS, node_replaced, scenario


@pytest.mark.hosts
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_a_lost_host_is_replaced_and_the_run_ends_as_if_nothing_had_happened(tiled, tmp_path):
    (tmp_path / "data").symlink_to(tiled)
    assert scenario(SCENARIOS.index(node_replaced), tmp_path) == "node replaced"
