"""What every script does before its own work."""

import subprocess
import sys

import pytest
from helpers.commands import ROOT

FAULTS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from common.cli import keep_freed_memory
if sys.argv[2] == "kept":
    keep_freed_memory()
for _ in range(20):
    np.ones(64 << 20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


# By default numpy asks for huge pages, and each of them is a single fault.
ENVIRONMENT = {"NUMPY_MADVISE_HUGEPAGE": "0"}


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_large_blocks_are_faulted_in_once():
    def page_faults(how):
        words = [sys.executable, "-c", FAULTS, str(ROOT), how]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=ENVIRONMENT)
        return int(done.stdout)

    assert page_faults("kept") < page_faults("returned") / 3
