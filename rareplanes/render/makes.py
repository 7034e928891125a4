"""The makes of aircraft that are rendered, with their real dimensions, and how they are painted."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

# Published dimensions in metres, rounded; names are keys of RarePlanes' table of attributes.
# Positions along x are fractions of the length, from the nose. Traits: H high wing, T tail on
# top of the fin, W winglets, K trailing edge with a kink, M military paint. RarePlanes
# has no fighter and no bomber: the last three shapes have the name of the make nearest in size.
# make kind (see KINDS) length span radius | wing at, root, tip, sweep | tail span, fin | traits |
# engines as x,y,z,length,radius[,propeller]: y 0 is the centre line, other engines are in pairs
KINDS = {"T": "Transport", "P": "Private", "S": "Sport", "F": "Fighter", "B": "Bomber"}
TABLE = """
Airbus_A320 T 37.6 35.8 2 .31 7.2 1.6 8.3 .36 .13 KW .30,5.7,1.9,4.4,1.15
Boeing_737-300 T 33.4 28.9 1.9 .33 7 1.6 6.6 .4 .17 K .31,4.9,1.9,4.2,1.05
Boeing_737 T 29 28 1.9 .32 6.6 1.6 6.3 .4 .18 K .33,4.8,1.9,5.2,.7
Boeing_757-300 T 54.4 38 1.95 .36 8.2 1.7 8.6 .38 .12 K .34,6.5,1.9,5.6,1.4
Tupolev_Tu-204 T 46.1 41.8 1.95 .33 8 1.7 9.4 .36 .13 KW .32,6.7,1.9,5.2,1.3
Boeing_767 T 54.9 47.6 2.5 .32 9.4 2.2 13 .38 .13 K .31,7.9,2.1,5.6,1.5
Airbus_A300 T 53.6 44.8 2.8 .31 10 2.9 10.5 .36 .13 K .30,7.9,2.1,5.6,1.5
Airbus_A330-300 T 58.8 60.3 2.8 .31 10.8 2.4 15.4 .33 .12 KW .31,9.4,2.1,6,1.6
Airbus_A-340 T 59.4 60.3 2.8 .31 10.8 2.4 15.6 .33 .12 KW .33,9.4,2.1,4.8,1.2 .42,19,2.6,4.8,1.2
Boeing_747 T 56.3 59.6 3.2 .24 14 3.2 18.6 .36 .13 K .29,11.7,2.3,5.4,1.35 .42,21,2.9,5.4,1.35
Boeing_707 T 44.2 39.9 1.9 .29 8.6 1.9 13.2 .36 .14 K .33,7.6,1.9,4.6,.85 .45,13,2.3,4.6,.85
McDonnellDouglas_MD-11 T 61 52 3 .34 10.4 2.2 14 .36 .12 KW .33,8.3,2.1,5.8,1.4 .83,0,8,9.5,1.5
Boeing_727 T 40.6 32.9 1.9 .37 7.6 1.8 9 .33 .15 KT .7,3.2,3.4,5,.95 .75,0,5.6,8,.95
Tupolev_154 T 48 37.6 1.95 .4 8 1.9 10.5 .36 .14 KT .74,3.4,3.4,5.4,1 .78,0,5.8,8.6,1
Boeing_717-200 T 37.8 28.4 1.75 .42 6.2 1.4 6.2 .38 .13 KT .7,3.1,3.4,5.8,1
McDonnellDouglas_DC-9-30 T 36.4 28.4 1.75 .41 6.2 1.4 6.2 .38 .13 KT .7,3,3.4,5.6,.85
Fokker_100 T 35.5 28.1 1.7 .4 5.8 1.5 4.6 .36 .13 KT .68,3,3.4,5,.95
SudAviation_Caravelle T 32 34.3 1.65 .37 6.6 1.7 6.4 .32 .17 K .7,2.7,3.4,5,.8
BAE_146-100 T 26.2 26.3 1.8 .35 5.4 1.6 3.4 .42 .2 HT .35,4.2,3.6,2.9,.75 .41,7.6,3.6,2.9,.75
BAE_146-300 T 31 26.3 1.8 .37 5.4 1.6 3.4 .42 .17 HT .36,4.2,3.6,2.9,.75 .41,7.6,3.6,2.9,.75
ATR_ATR-72 T 27.2 27.1 1.4 .4 2.7 1.6 .5 .28 .2 HT .32,4.05,3.6,5.4,.6,1.95
Dornier_Do-228 T 16.6 17 .9 .32 2.2 1.1 .5 .38 .2 H .24,2.4,2.4,3,.45,1.35
Douglas_DC-3 T 19.4 29.1 1.2 .24 4.6 1.3 2.9 .28 .15 M .14,2.9,2.1,5,.75,1.75
Bombardier_CRJ-705 P 32.3 23.2 1.35 .42 5 1.3 5 .36 .14 KTW .7,2.5,2.8,4.2,.8
Embraer_ERJ-135 P 26.3 20 1.15 .42 4.4 1 4 .36 .16 KT .68,2.1,2.6,3.8,.7
Bombardier_BD-700-GlobalExpress P 29.5 28.7 1.3 .36 6.2 1.3 7.6 .33 .14 KTW .67,2.4,2.8,4.6,.8
Bombardier_Challenger-300 P 20.9 19.5 1.15 .38 4.6 1.1 4.2 .36 .16 KTW .64,2.1,2.4,3.6,.7
Bombardier_Challenger-604 P 20.9 19.6 1.3 .38 4.6 1.2 4.2 .36 .16 KTW .64,2.3,2.5,3.6,.75
Gulfstream_GIII P 25.3 23.7 1.2 .38 5.6 1.5 6 .36 .16 KTW .65,2.2,2.6,4.4,.8
Dassault_Falcon-900 P 20.2 19.3 1.2 .36 4.6 1.1 4.6 .4 .16 K .65,2,2.4,3,.6 .7,0,3.4,4.4,.6
Cessna_Citation-CJ4 P 16.3 15.5 .85 .4 2.9 1.1 1.5 .4 .17 T .63,1.5,1.9,2.6,.5
Bombardier_Learjet P 14.8 12 .85 .44 2.8 1.3 1.1 .38 .17 T .62,1.4,1.9,2.6,.45
Let_L-200Morova S 8.6 12.3 .65 .26 1.9 1 .3 .36 .13 - .16,1.9,1.3,2,.35,1
Cessna_310 S 8.2 10.7 .65 .3 1.8 1.1 .25 .46 .16 - .2,1.8,1.3,2.3,.35,1
Cessna_172 S 8.3 11 .6 .24 1.7 1.2 .2 .32 .14 H 0,0,1.2,.9,.5,.95
PiperAircraft_PA-28 S 7.2 9.2 .6 .3 1.7 1.3 .2 .36 .14 - 0,0,1.1,.9,.5,.95
DeHavillandCanada_DHC-2-Beaver S 9.2 14.6 .7 .24 1.6 1.5 .1 .33 .14 H 0,0,1.4,1.1,.6,1.2
Bombardier_Learjet F 14.8 12 .8 .3 9.2 .8 7.8 0 .19 KM .86,0,1.6,1.8,.6
SudAviation_Caravelle B 32 34.3 1.6 .2 21 2.6 17 0 .16 M
Douglas_DC-3 T 19.4 29.1 1.7 .34 3.6 1.8 .7 .38 .24 HM .26,4,3.4,4.6,.6,1.8
"""


class Engine(NamedTuple):
    x: float
    y: float
    z: float
    length: float
    radius: float
    propeller: float = 0.0


@dataclass(frozen=True)
class Make:
    """One type of aircraft; metres, and fractions of the length along x."""

    name: str
    kind: str
    length: float
    span: float
    radius: float
    wing_at: float
    root: float
    tip: float
    sweep: float
    tail_span: float
    fin: float
    traits: str
    engines: tuple[Engine, ...]


class Livery(NamedTuple):
    """BGR colours of the parts."""

    body: np.ndarray
    wing: np.ndarray
    tail: np.ndarray
    engine: np.ndarray
    stripe: np.ndarray
    tip: np.ndarray


@cache
def makes() -> tuple[Make, ...]:
    rows = []
    for line in TABLE.strip().splitlines():
        name, kind, *numbers = line.split()
        engines = tuple(Engine(*map(float, text.split(","))) for text in numbers[10:])
        a, b, c, d, e, f, g, h, i = map(float, numbers[:9])
        rows.append(Make(name, KINDS[kind], a, b, c, d, e, f, g, h, i, numbers[9], engines))
    return tuple(rows)


def livery(make: Make, rng: np.random.Generator, plain: bool = False) -> Livery:
    """Paint: mostly white or light grey with a coloured tail; some all coloured, some dark."""
    if "M" in make.traits:
        colours = ((118, 116, 112), (84, 98, 92), (140, 136, 130), (128, 160, 176))
        body = np.array(colours[rng.integers(4)]) * rng.uniform(1.2, 1.7)
        return Livery(body, body * 0.97, body, body * 0.8, body * 1.05, body)
    accent = _vivid(rng)
    white = rng.uniform(228, 255) - np.array((1, 0.4, 0)) * rng.uniform(0, 14)
    grey = np.full(3, rng.uniform(150, 205))
    bodies = (white, grey, _vivid(rng), np.full(3, rng.uniform(45, 100)))
    body = bodies[rng.choice(4, p=(0.82, 0.08, 0.08, 0.02) if plain else (0.74, 0.12, 0.1, 0.04))]
    # Most wings are grey, whatever colour the fuselage has.
    tones, alike = ((200, 245), 0.6) if plain else ((125, 225), 0.3)
    wing = (np.full(3, rng.uniform(*tones)), body)[int(rng.random() < alike)]
    tail = (accent, body)[int(rng.random() < 0.4)]
    engine = (white, wing * 0.9, accent, body)[rng.integers(4)]
    stripe = (body, accent)[int(rng.random() < 0.4)]
    return Livery(body, wing, tail, engine, stripe, (wing, accent)[int(rng.random() < 0.15)])


def _vivid(rng: np.random.Generator) -> np.ndarray:
    """Airlines prefer blues and reds, then yellows and teals."""
    hues = ((108, 9), (0, 6), (20, 8), (92, 10), (60, 60))  # mean and deviation
    hue = rng.normal(*hues[rng.choice(5, p=(0.38, 0.24, 0.16, 0.12, 0.1))]) % 180
    hsv = np.array([[[hue, rng.uniform(80, 200), rng.uniform(160, 245)]]]).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(float)
