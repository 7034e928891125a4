"""The techniques that are measured, one row each: the name and the flag of train.py."""

PLAIN = "plain"
FLAGS = {
    "amp": "--amp",
    "channels-last": "--channels-last",
    "cuda-graphs": "--cuda-graphs",
    "compile": "--compile",
    "ddp": "",  # torchrun is its flag
}
# The most common ones: measured first, in case time is short.
FIRST = [PLAIN, "amp", "amp+channels-last", "amp+channels-last+cuda-graphs", "channels-last", "ddp"]
# The rows of the main README; the READMEs of the models have all combinations.
SHOWN = [*FIRST, "compile", "amp+channels-last+compile"]
