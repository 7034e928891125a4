"""What a prediction costs beside the network: memory, time, the joining of instances.

    python benchmarks/scenes.py
    python benchmarks/scenes.py --parts memory --sides 2000 10000

memory:   peak memory and time of scenes of growing size, each in a new process, with a network of
          one layer: a real one takes most of the time and the same memory for every size.
overhead: a scene through UNet and through Mask R-CNN, against the bare networks on the same
          windows, in turns.
join:     instances as windows find them, joined, encoded and written as COCO and GeoJSON.
seams:    aircraft that are lost, doubled or cut where windows meet, if the network is the truth.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

CPU = torch.device("cpu")
PARTS = ("memory", "overhead", "join", "seams")
