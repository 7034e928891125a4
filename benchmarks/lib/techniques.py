"""The techniques that are measured, one row each: the name and the flag of train.py."""

PLAIN = "plain"
FLAGS = {
    "amp": "--amp",
    "channels-last": "--channels-last",
    "cuda-graphs": "--cuda-graphs",
    "compile": "--compile",
    "ddp": "",  # torchrun is its flag
}
# The way most people would switch them on: measured first, for where time is short.
FIRST = [PLAIN, "amp", "amp+channels-last", "amp+channels-last+cuda-graphs", "channels-last", "ddp"]
# The rows of the front page; the pages of the models have all combinations.
SHOWN = [*FIRST, "compile", "amp+channels-last+compile"]
