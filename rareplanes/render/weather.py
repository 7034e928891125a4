"""Grain and snow on the ground, sun and shadow, clouds, haze and the sensor's noise."""

import cv2
import numpy as np

from rareplanes.render.plan import Airport, Material
from rareplanes.render.view import TILE, Canvas, View, texture, textures

# How strongly each material shows the textures: (coarse, middle, fine, slabs).
GRAIN = {
    Material.GROUND: (0.10, 0.10, 0.06, 0),
    Material.SOIL: (0.08, 0.10, 0.06, 0),
    Material.RUNWAY: (0.06, 0.05, 0.03, 0),
    Material.TAXIWAY: (0.06, 0.05, 0.03, 0.01),
    Material.SHOULDER: (0.08, 0.07, 0.04, 0),
    Material.APRON: (0.05, 0.05, 0.025, 0.01),
    Material.SLABS: (0.04, 0.04, 0.02, 0.05),
    Material.ROAD: (0.03, 0.04, 0.02, 0),
    Material.CARPARK: (0.05, 0.06, 0.03, 0),
    Material.WATER: (0.03, 0.02, 0.02, 0),
    Material.ROOF: (0.02, 0.03, 0.015, 0),
}


def weather_ground(
    view: View, airport: Airport, canvas: Canvas, weather: str, rng: np.random.Generator
) -> np.ndarray:
    """Texture, stains and snow on the ground: [H,W,3] float32."""
    amount = np.zeros((4, 256), np.float32)
    for material, strength in GRAIN.items():
        amount[:, material] = strength
    strong = rng.uniform((0.6, 0.6, 0.8, 0.3), (1.4, 1.7, 3.0, 3.5)).astype(np.float32)
    if not airport.plain:
        amount *= strong[:, None]
    shift = rng.uniform(-400, 400, 2)  # each scene shows another part of this texture
    coarse = texture(view, "coarse", 0.7, shift, shrink=2)
    middle = texture(view, "middle", 0.3)
    factor = 1 - canvas.dirt * np.float32(rng.uniform(0.5, 1.3) / 255)
    fine, slabs = texture(view, "fine", 0.36), texture(view, "slabs", 0.234)
    for strengths, field in zip(amount, (coarse, middle, fine, slabs), strict=True):
        factor += cv2.LUT(canvas.material, strengths) * field
    image = canvas.image * factor[..., None]
    patch = np.clip(coarse * 0.35 + 0.3 * middle + rng.uniform(-0.3, 0.4), 0, 1)
    patch *= canvas.material == Material.GROUND
    image += patch[..., None] * (np.array(airport.soil, np.float32) - image)
    if weather == "Snow":
        drifts = texture(view, "coarse", 0.25, rng.uniform(-400, 400, 2), shrink=2)
        depth = drifts + rng.uniform(0.05, 0.35) * middle - rng.uniform(-0.2, 1.2)
        cover = np.clip(depth * rng.uniform(0.35, 1.5), 0, rng.uniform(0.5, 0.95))
        white = np.float32(rng.uniform(168, 205 if airport.plain else 245)) * (1 + 0.04 * middle)
        image += cover[..., None] * (white[..., None] - image)
    return image


def cast_light(
    canvas: Canvas, image: np.ndarray, building_shadow: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Darken `image` by the canvas's shadows.

    Returns:
        The light [H,W] that aircraft get: buildings shade them, their own shadows do not.
    """
    softness, depth = float(rng.uniform(0.7, 1.8)), np.float32(rng.uniform(0.5, 0.9) / 255)
    canvas.shadow[canvas.material == Material.ROOF] = 0
    light = 1 - cv2.GaussianBlur(canvas.shadow, (0, 0), softness) * depth
    image *= light[..., None] ** np.array((0.88, 0.97, 1.0), np.float32)  # shadows are bluish
    return 1 - cv2.GaussianBlur(building_shadow, (0, 0), softness) * depth


def develop(
    view: View, image: np.ndarray, weather: str, rng: np.random.Generator, plain: bool = False
) -> np.ndarray:
    """Clouds and their shadows, haze, the colour of the light, blur and the sensor's noise."""
    image = image.astype(np.float32)
    if rng.random() < (0.6 if weather == "Overcast" else 0.25):
        cloud = texture(view, "cloud", rng.uniform(0.4, 1.2), rng.uniform(-500, 500, 2), 4)
        image *= 1 - np.clip(cloud - rng.uniform(0, 0.8), 0, 1)[..., None] * rng.uniform(0.15, 0.4)
        if rng.random() < 0.5:
            veil = texture(view, "cloud", rng.uniform(0.3, 0.8), rng.uniform(-500, 500, 2), 4)
            veil = np.clip(veil - rng.uniform(0.3, 1.2), 0, 1)[..., None] * rng.uniform(
                0.2, 0.4 if plain else 0.8
            )
            image += veil * (240 - image)
    murky = weather in ("Haze", "Dust", "Rain", "Snow")
    dense = rng.uniform(0.1, 0.34 if plain else 0.42) if murky else rng.uniform(0, 0.15)
    warm = rng.normal(0, 6) - (20 if weather == "Dust" else 0)
    haze = rng.uniform(150, 205) + np.array((warm, 0, -warm))
    elevation = view.sun[2]
    gain = np.array((0.82 + 0.18 * elevation, 0.92 + 0.08 * elevation, 1.04 - 0.04 * elevation))
    if plain:
        gain *= rng.uniform(0.88, 1.2)
    else:
        image -= rng.uniform(0, 20)  # contrast
        bright = np.percentile(image[::8, ::8, 1], 90)  # images are stretched by such a quantile
        gain *= np.clip(rng.normal(178, 38) / bright, 0.65, 2)
    gain *= 1 + rng.normal(0, 0.03, 3)
    image *= (gain * (1 - dense)).astype(np.float32)
    image += (haze * dense).astype(np.float32)
    if rng.random() < (0.5 if plain else 0.7):
        soft = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.3, 0.8 if plain else 1.0)))
        sharpen = rng.uniform(0.3, 1.2)  # as the makers of images do; else their optics blur
        if plain or rng.random() < 0.5:
            image = soft
        else:
            image = cv2.addWeighted(image, 1 + sharpen, soft, -sharpen, 0)
    y, x = rng.integers(0, TILE, 2)
    tile = np.roll(textures()["white"], (y, x), (0, 1)) * np.float32(rng.uniform(0.4, 2.2))
    reps = (-(-view.height // TILE), -(-view.width // TILE))
    image += np.tile(tile, reps)[: view.height, : view.width, None]
    return np.clip(image, 0, 255).astype(np.uint8)
