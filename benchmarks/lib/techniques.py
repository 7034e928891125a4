"""The techniques that are measured, one row each: the name and the flag of train.py."""

PLAIN = "plain"
FLAGS = {
    "amp": "--amp",
    "channels-last": "--channels-last",
    "cuda-graphs": "--cuda-graphs",
    "compile": "--compile",
    "ddp": "",  # torchrun is its flag
}
# On a CPU: plain without `common.cli.keep_freed_memory`. All other rows have it.
DEFAULT_MALLOC = "default-malloc"
# In case time is short: plain, all techniques together, each alone.
FIRST = [
    PLAIN,
    "amp+channels-last+cuda-graphs",
    "amp+channels-last+cuda-graphs+ddp",
    "amp+channels-last",
    *("amp", "channels-last", "cuda-graphs", "ddp"),
    DEFAULT_MALLOC,
]
# The rows of the main README; the READMEs of the models have all combinations.
SHOWN = [*FIRST, "compile", "channels-last+compile", "amp+channels-last+compile"]
