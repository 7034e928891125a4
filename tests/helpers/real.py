"""The real half of RarePlanes made by code: folders, GeoTIFFs in degrees, all properties.

What is where is computed here from the ellipsoid alone, so that it can be compared with tiles.
"""

import json
from dataclasses import dataclass, field
from math import cos, radians, sin

import numpy as np
from helpers.rasters import raster
from rasterio import Affine

A, E2 = 6_378_137.0, 0.00669437999014  # WGS 84
PIXEL = 3.34e-6  # degrees, both ways: at 65 degrees north 0.158 m across and 0.372 m down
WIDTH, HEIGHT = 1600, 500
ROLES = ("Small Civil Transport/Utility", "Large Civil Transport/Utility")


@dataclass
class Plane:
    """An aircraft; metres to the east and the north of the scene's centre, degrees from north."""

    east: float
    north: float
    heading: float = 0
    length: float = 20
    wingspan: float = 24
    wings: float = 0.35  # where they cross the axis: the share of the length from the nose
    facts: dict = field(default_factory=dict)
    multi: bool = False

    @property
    def points(self):
        """Nose, left wing, tail, right wing: metres [4,2]."""
        ahead = np.array([sin(radians(self.heading)), cos(radians(self.heading))])
        right = np.array([ahead[1], -ahead[0]])
        nose, tail = ahead * self.length / 2, -ahead * self.length / 2
        crossing = nose - ahead * self.length * self.wings
        half = right * self.wingspan / 2
        place = np.array([self.east, self.north])
        return np.array([nose, crossing - half, tail, crossing + half]) + place


PLANES = [
    Plane(-90, 50, 20),
    Plane(-20, 40, 250, 38, 34, 0.6, {"wing_type": "swept", "role": ROLES[1], "num_engines": 2.0}),
    Plane(60, -30, 135, multi=True, facts={"canards": "Yes"}),
    Plane(90, 50, 90, facts={"truncated": 1}),
    Plane(-60, -50, 300, facts={"partialDec": 0.7}),
    Plane(124, -60, 45),  # beyond the border
]
WHOLE = [0, 1, 2]  # of PLANES


@dataclass
class Place:
    """A scene: the lat and lon of its centre, its aircraft, and the order of their corners."""

    split: str
    stem: str
    lon: float = -21.94
    lat: float = 65.0
    planes: list = field(default_factory=lambda: PLANES)
    first: int = 0
    clockwise: bool = False

    def metres_per_degree(self):
        """To the east and to the north, at the centre."""
        w = 1 - E2 * sin(radians(self.lat)) ** 2
        return np.array(
            [radians(A / w**0.5) * cos(radians(self.lat)), radians(A * (1 - E2) / w**1.5)]
        )

    @property
    def corner(self):
        """Longitude and latitude of the top left corner."""
        return np.array([self.lon - WIDTH / 2 * PIXEL, self.lat + HEIGHT / 2 * PIXEL])

    def degrees(self, metres):
        return np.array([self.lon, self.lat]) + metres / self.metres_per_degree()

    def square(self, metres, gsd=0.3):
        """Metres from the centre as pixels of the scene with square ground."""
        from_corner = (self.degrees(metres) - self.corner) * self.metres_per_degree()
        return from_corner * [1, -1] / gsd

    def pixels(self):
        """uint8 [3,H,W]: each aircraft a bright rectangle of its length and wingspan."""
        y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
        lonlat = self.corner + np.stack([x, -y], -1) * PIXEL
        metres = (lonlat - [self.lon, self.lat]) * self.metres_per_degree()
        values = np.full((HEIGHT, WIDTH), 40, np.uint8)
        for plane in self.planes:
            angle = radians(plane.heading)
            ahead, right = [sin(angle), cos(angle)], [cos(angle), -sin(angle)]
            moved = metres - [plane.east, plane.north]
            inside = abs(moved @ ahead) < plane.length / 2
            values[inside & (abs(moved @ right) < plane.wingspan / 2)] = 230
        return np.broadcast_to(values, (3, HEIGHT, WIDTH))

    def feature(self, plane, number):
        order = [0, 3, 2, 1] if self.clockwise else [0, 1, 2, 3]
        ring = np.roll(self.degrees(plane.points)[order], self.first, 0)
        ring = [*ring.tolist(), ring[0].tolist()]
        kind = "MultiPolygon" if plane.multi else "Polygon"
        location, _, catalogue = self.stem.partition("_")
        properties = {
            "image_fname": f"{self.stem}.tif",
            "image_id": self.stem,
            "loc_id": int(location),
            "cat_id": catalogue,
            "location": "Reykjavík, Ísland",
            "role": ROLES[0],
            "role_id": 1,
            "is_plane": 1,
            "num_engines": 1.0,
            "propulsion": "propeller",
            "canards": "no",
            "num_tail_fins": 1,
            "wing_position": "high mounted",
            "wing_type": "straight",
            "length": plane.length,
            "wingspan": plane.wingspan,
            "area": plane.length * plane.wingspan / 2,
            "faa_wingspan_class": 2,
            "Public_Train": int(self.split == "train"),
            "Public_Test": int(self.split == "test"),
            "partialDec": 1.0,
            "truncated": 0,
            "new_area": 1.0,
            "area_pixels": number,
        }
        geometry = {"type": kind, "coordinates": [[ring]] if plane.multi else [ring]}
        return {"type": "Feature", "properties": properties | plane.facts, "geometry": geometry}

    def labels(self):
        urn = {"type": "name", "properties": {"name": "urn:ogc:def:crs:OGC:1.3:CRS84"}}
        features = [self.feature(plane, n) for n, plane in enumerate(self.planes)]
        return {"type": "FeatureCollection", "crs": urn, "features": features}

    def write(self, real):
        """Write the scene and its labels below the folder `real`."""
        folders = [real / self.split / part for part in ("PS-RGB_cog", "geojson_aircraft")]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        transform = Affine(PIXEL, 0, self.corner[0], 0, -PIXEL, self.corner[1])
        options = {"crs": "EPSG:4326", "transform": transform, "compress": "deflate"}
        raster(folders[0] / f"{self.stem}.tif", self.pixels(), tiled=True, **options)
        text = json.dumps(self.labels(), ensure_ascii=False)
        (folders[1] / f"{self.stem}.geojson").write_text(text)
        return folders[0] / f"{self.stem}.tif"


# Two dates of one location, two locations whose ground overlaps, one more, and one that test shows.
PLACES = [
    Place("train", "7_104001000896F900"),
    Place("train", "7_1040010041354E00", first=2, clockwise=True),
    Place("train", "8_10400100202A2200", lat=64.7),
    Place("train", "12_10400100202A2201", lat=64.7005, first=1),
    Place("train", "9_10400100474E7400", lat=51.0),
    Place("train", "10_104001002E47CD00", lat=10.0003),
    Place("test", "20_10400100480E4300", lat=10.0),
]
