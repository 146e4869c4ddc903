"""A drawn H&E section: regions, nuclei and fibres in µm, mixed by the Beer–Lambert law."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial import KDTree

REGIONS = ("tumour", "immune", "stroma", "adipose", "normal epithelium")
TUMOUR, IMMUNE, STROMA, ADIPOSE, EPITHELIUM = range(5)
OUTSIDE = -1

UM_PER_PIXEL = 2.5
_COARSE = 4
"""The region map is drawn on a grid this many times coarser than the image."""

# Optical density of the two stains in red, green, blue (directions of Ruifrok and Johnston, Anal Quant Cytol Histol
# 23:291, 2001; haematoxylin a little more violet, as scanners show it).
_HAEMATOXYLIN = np.array([0.62, 0.70, 0.32], dtype=np.float32)
_EOSIN = np.array([0.08, 0.74, 0.34], dtype=np.float32)
_LAMP = np.array([243.0, 241.0, 244.0], dtype=np.float32)


@dataclass(frozen=True)
class Histology:
    """A drawn section.

    Attributes
    ----------
    image
        (height, width, 3) uint8 at ``UM_PER_PIXEL``.
    regions
        (height, width) int8: position in ``REGIONS``, or ``OUTSIDE``.
    """

    image: np.ndarray
    regions: np.ndarray


@dataclass
class _Canvas:
    """Concentrations of both stains while the section is drawn."""

    haematoxylin: np.ndarray
    eosin: np.ndarray
    regions: np.ndarray
    rng: np.random.Generator

    @property
    def shape(self) -> tuple[int, int]:
        return self.regions.shape  # type: ignore[return-value]

    def noise(self, scale_um: float, stretch: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
        """Smooth noise, mean 0 and SD about 1, with blobs of about ``scale_um``."""
        return _noise(self.rng, self.shape, scale_um / UM_PER_PIXEL, stretch)


def draw_section(width_um: float, height_um: float, margin_um: float, rng: np.random.Generator) -> Histology:
    """Draw a section on a slide of the given size; the tissue keeps about ``margin_um`` from the borders."""
    shape = (round(height_um / UM_PER_PIXEL), round(width_um / UM_PER_PIXEL))
    regions = _region_map(shape, margin_um / UM_PER_PIXEL, rng)
    empty = np.zeros(shape, dtype=np.float32)
    canvas = _Canvas(empty, empty.copy(), regions, rng)
    fibres, direction = _fibres(canvas)
    _draw_stroma(canvas, fibres, direction)
    _draw_tumour(canvas, direction)
    _draw_immune(canvas)
    _draw_epithelium(canvas)
    _draw_adipose(canvas)
    return Histology(_develop(canvas), regions)


# --- where is what -----------------------------------------------------------------------------------------------


def _resize(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(array, dtype=np.float32))
    return np.asarray(picture.resize(shape[::-1], Image.Resampling.BICUBIC))


def _noise(
    rng: np.random.Generator, shape: tuple[int, int], scale: float, stretch: tuple[float, float] = (1.0, 1.0)
) -> np.ndarray:
    cells = [max(2, int(np.ceil(side / (scale * factor))) + 1) for side, factor in zip(shape, stretch, strict=True)]
    return 1.4 * _resize(rng.standard_normal(cells), shape)


def _region_map(shape: tuple[int, int], margin: float, rng: np.random.Generator) -> np.ndarray:
    """Curved layers: fat, stroma with lobules of normal glands, an immune front and the tumour."""
    coarse = (max(4, shape[0] // _COARSE), max(4, shape[1] // _COARSE))
    rows, columns = np.mgrid[: coarse[0], : coarse[1]].astype(np.float32)
    pad = margin / _COARSE
    y = (rows - pad) / max(1.0, coarse[0] - 2 * pad)
    x = (columns - pad) / max(1.0, coarse[1] - 2 * pad)
    wobble = _noise(rng, coarse, 0.22 * coarse[1])
    ripple = _noise(rng, coarse, 0.07 * coarse[1])
    phase = rng.uniform(-0.4, 0.4)
    depth = x + 0.16 * np.sin(np.pi * (1.2 * y + phase)) - 0.08 + 0.030 * wobble + 0.012 * ripple

    outline = (np.abs(x - 0.5) / 0.5) ** 3.2 + (np.abs(y - 0.5) / 0.49) ** 3.2
    tissue = 0.97 - outline + 0.10 * wobble + 0.05 * ripple

    front = 0.52
    lobules = _bumps(x, y, rng.uniform([0.26, 0.16], [0.34, 0.30]), 0.125)
    lobules = np.maximum(lobules, _bumps(x, y, rng.uniform([0.30, 0.62], [0.38, 0.76]), 0.135))
    follicles = np.full(coarse, -1.0, dtype=np.float32)
    for level in (0.14, 0.42, 0.68, 0.9):
        at = np.array([front - 0.16 * np.sin(np.pi * (1.2 * level + phase)) + 0.08, level + rng.uniform(-0.04, 0.04)])
        follicles = np.maximum(follicles, _bumps(x, y, at, rng.uniform(0.055, 0.085)))
    follicles = np.maximum(follicles, 0.035 + 0.022 * wobble - np.abs(depth - front))

    scores = np.stack(
        [
            depth - front,
            3.0 * follicles + 0.02 * ripple,
            np.minimum(depth - 0.17, front - depth),
            0.17 - depth,
            3.0 * lobules + 0.02 * ripple,
        ]
    )
    full = np.stack([_resize(score, shape) for score in scores])
    regions = full.argmax(axis=0).astype(np.int8)
    regions[_resize(tissue, shape) < 0] = OUTSIDE
    return regions


def _bumps(x: np.ndarray, y: np.ndarray, at: np.ndarray, radius: float) -> np.ndarray:
    return radius - np.hypot(x - at[0], y - at[1])


def _fibres(canvas: _Canvas) -> tuple[np.ndarray, np.ndarray]:
    """Wavy collagen: (how much fibre there is, -1 to 1; its direction in radians)."""
    rows, columns = np.mgrid[: canvas.shape[0], : canvas.shape[1]].astype(np.float32) * UM_PER_PIXEL
    tilt = canvas.rng.uniform(-0.35, 0.35)
    bend = 120.0 * canvas.noise(520.0) + 9.0 * canvas.noise(75.0, (2.0, 1.0))
    across = np.cos(tilt) * columns + np.sin(tilt) * rows + bend
    down, right = np.gradient(across)
    thick = np.sin((across + 6.0 * canvas.noise(40.0)) * np.float32(2 * np.pi / 52.0))
    thin = np.sin(across * np.float32(2 * np.pi / 17.0) + 1.5 * canvas.noise(120.0))
    coarse = np.clip(0.5 + 0.35 * canvas.noise(180.0), 0, 1)
    return coarse * thick + 0.45 * (1 - 0.5 * coarse) * thin, np.arctan2(-right, down)


# --- tissue ------------------------------------------------------------------------------------------------------


def _draw_stroma(canvas: _Canvas, fibres: np.ndarray, direction: np.ndarray) -> None:
    where = canvas.regions != OUTSIDE
    patchy = canvas.noise(220.0)
    canvas.eosin[where] += (0.34 + 0.06 * patchy + 0.15 * fibres)[where]
    canvas.haematoxylin[where] += (0.045 + 0.02 * fibres)[where]
    _clefts(canvas, fibres, canvas.regions == STROMA)
    centers = _scatter(canvas, canvas.regions == STROMA, per_mm2=900)
    along = _at(direction, centers) + canvas.rng.normal(0, 0.2, len(centers))
    _nuclei(canvas, centers, length_um=7.5, breadth_um=2.3, strength=0.85, angle=along)


def _clefts(canvas: _Canvas, fibres: np.ndarray, where: np.ndarray) -> None:
    """Fixation tears fibres apart: slits of empty slide between bundles."""
    slit = where & (fibres < -0.55) & (canvas.noise(110.0) > 0.3)
    canvas.eosin[slit] *= 0.15
    canvas.haematoxylin[slit] *= 0.15


def _draw_tumour(canvas: _Canvas, direction: np.ndarray) -> None:
    where = canvas.regions == TUMOUR
    nests = where & (canvas.noise(150.0) + 0.45 * canvas.noise(55.0) > -0.62)
    soft = gaussian_filter(nests.astype(np.float32), 1.2)
    cytoplasm = 0.27 + 0.05 * canvas.noise(40.0) + 0.03 * canvas.noise(15.0)
    canvas.eosin += soft * (cytoplasm - canvas.eosin)
    canvas.haematoxylin += soft * (0.17 + 0.03 * canvas.noise(80.0))
    dead = nests & (canvas.noise(420.0) > 2.0) & (gaussian_filter(nests.astype(np.float32), 12) > 0.75)
    blurred = gaussian_filter(dead.astype(np.float32), 3)
    canvas.eosin += blurred * (0.50 + 0.08 * canvas.noise(30.0) - canvas.eosin)
    canvas.haematoxylin -= 0.14 * blurred
    alive = nests & ~dead
    centers = _spaced(canvas, _scatter(canvas, alive, per_mm2=9000), 9.5)
    size = canvas.rng.uniform(0.8, 1.35, len(centers))
    turn = canvas.rng.uniform(0, np.pi, len(centers))
    strength = canvas.rng.uniform(0.65, 1.15, len(centers))
    _nuclei(canvas, centers, length_um=5.4 * size, breadth_um=4.3 * size, strength=strength, angle=turn)
    septa = _scatter(canvas, where & ~nests, per_mm2=1500)
    along = _at(direction, septa) + canvas.rng.normal(0, 0.2, len(septa))
    _nuclei(canvas, septa, length_um=7.0, breadth_um=2.2, strength=0.85, angle=along)
    debris = _scatter(canvas, dead, per_mm2=1200)
    _nuclei(canvas, debris, length_um=2.2, breadth_um=1.8, strength=0.9, angle=0.0)


def _draw_immune(canvas: _Canvas) -> None:
    where = canvas.regions == IMMUNE
    inner = gaussian_filter(where.astype(np.float32), 80.0 / UM_PER_PIXEL)
    germinal = where & (inner > 0.86)
    soft = gaussian_filter(where.astype(np.float32), 2.0)
    canvas.eosin += soft * (0.16 + 0.03 * canvas.noise(40.0) - canvas.eosin)
    canvas.haematoxylin += 0.16 * soft
    dense = _spaced(canvas, _scatter(canvas, where & ~germinal, per_mm2=18_000), 5.0)
    _nuclei(canvas, dense, length_um=3.3, breadth_um=3.1, strength=1.25, angle=0.0)
    pale = _spaced(canvas, _scatter(canvas, germinal, per_mm2=9000), 6.5)
    _nuclei(canvas, pale, length_um=4.2, breadth_um=3.8, strength=0.75, angle=0.0)


def _draw_epithelium(canvas: _Canvas) -> None:
    """Lobules of round glands: an open lumen, two rows of nuclei, loose stroma between."""
    where = canvas.regions == EPITHELIUM
    canvas.eosin[where] *= 0.72
    centers = _spaced(canvas, _scatter(canvas, where, per_mm2=900), 112.0)
    if len(centers) == 0:
        return
    radius = canvas.rng.uniform(40.0, 62.0, len(centers))
    rows, columns = np.nonzero(where)
    pixels = np.column_stack([columns, rows]) * UM_PER_PIXEL
    query = KDTree(centers * UM_PER_PIXEL).query(pixels, distance_upper_bound=90.0)
    distance, nearest = np.asarray(query[0]), np.asarray(query[1])
    found = np.isfinite(distance)
    rows, columns = rows[found], columns[found]
    wobble = 1 + 0.13 * canvas.noise(45.0)[rows, columns]
    relative = distance[found] / (radius[nearest[found]] * wobble)
    lumen, wall = relative < 0.42, (relative >= 0.42) & (relative < 1.0)
    canvas.eosin[rows[lumen], columns[lumen]] = 0.03
    canvas.haematoxylin[rows[lumen], columns[lumen]] = 0.0
    canvas.eosin[rows[wall], columns[wall]] = 0.34
    canvas.haematoxylin[rows[wall], columns[wall]] = 0.20
    for ring, spacing_um, strength in ((0.66, 6.5, 0.95), (0.93, 10.0, 0.85)):
        _nuclei_on_rings(canvas, centers, ring * radius, spacing_um, strength)
    loose = _scatter(canvas, where, per_mm2=500)
    _nuclei(canvas, loose, length_um=6.0, breadth_um=2.2, strength=0.6, angle=canvas.rng.uniform(0, np.pi, len(loose)))


def _nuclei_on_rings(
    canvas: _Canvas, centers: np.ndarray, radius_um: np.ndarray, spacing_um: float, strength: float
) -> None:
    """Row nuclei along circles, their long axis towards the centre."""
    counts = np.maximum(6, (2 * np.pi * radius_um / spacing_um).astype(int))
    gland = np.repeat(np.arange(len(centers)), counts)
    step = np.arange(len(gland)) - np.repeat(np.cumsum(counts) - counts, counts)
    angle = 2 * np.pi * step / counts[gland] + canvas.rng.normal(0, 0.04, len(gland))
    reach = radius_um[gland] / UM_PER_PIXEL * canvas.rng.normal(1, 0.04, len(gland))
    at = centers[gland] + reach[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    inside = ((at >= 0) & (at < np.array(canvas.shape[::-1]))).all(axis=1)
    _nuclei(canvas, at[inside], length_um=4.8, breadth_um=3.2, strength=strength, angle=angle[inside])


def _draw_adipose(canvas: _Canvas) -> None:
    """Vacuoles between thin membranes: the borders of the cells' Voronoi polygons."""
    where = canvas.regions == ADIPOSE
    rows, columns = np.nonzero(where)
    if len(rows) == 0:
        return
    cells = _spaced(canvas, _scatter(canvas, where, per_mm2=700), 36.0)
    if len(cells) < 2:
        return
    bent = np.column_stack([columns, rows]) + np.column_stack(
        [2.0 * canvas.noise(25.0)[rows, columns], 2.0 * canvas.noise(25.0)[rows, columns]]
    )
    distance = np.asarray(KDTree(cells).query(bent, k=2)[0])
    wall = np.exp(-(((distance[:, 1] - distance[:, 0]) / 2.0) ** 2))
    canvas.eosin[rows, columns] = 0.02 + 0.40 * wall
    canvas.haematoxylin[rows, columns] = 0.05 * wall
    membrane = np.zeros(canvas.shape, dtype=bool)
    membrane[rows, columns] = wall > 0.8
    nuclei = _scatter(canvas, membrane, per_mm2=2200)
    turn = canvas.rng.uniform(0, np.pi, len(nuclei))
    _nuclei(canvas, nuclei, length_um=5.5, breadth_um=2.0, strength=0.95, angle=turn)


# --- nuclei ------------------------------------------------------------------------------------------------------


def _scatter(canvas: _Canvas, where: np.ndarray, *, per_mm2: float) -> np.ndarray:
    """(n, 2) random positions (x, y) in pixels, at a density."""
    rows, columns = np.nonzero(where)
    n = round(len(rows) * (UM_PER_PIXEL / 1000) ** 2 * per_mm2)
    if n == 0:
        return np.empty((0, 2))
    chosen = canvas.rng.integers(len(rows), size=n)
    return np.column_stack([columns[chosen], rows[chosen]]) + canvas.rng.random((n, 2))


def _spaced(canvas: _Canvas, points: np.ndarray, distance_um: float) -> np.ndarray:
    """Keep points that no earlier point is nearer to than ``distance_um``: nuclei do not overlap."""
    if len(points) < 2:
        return points
    kept = _without_rivals(points, distance_um / UM_PER_PIXEL)
    # A second chance for those whose rivals went themselves.
    late = np.flatnonzero(~kept)
    if len(late):
        late = late[np.asarray(KDTree(points[kept]).query(points[late])[0]) > distance_um / UM_PER_PIXEL]
        kept[late[_without_rivals(points[late], distance_um / UM_PER_PIXEL)]] = True
    return points[kept]


def _without_rivals(points: np.ndarray, distance: float) -> np.ndarray:
    """(n,) bool: points that no earlier point is nearer to than ``distance``."""
    kept = np.ones(len(points), dtype=bool)
    if len(points) > 1:
        kept[KDTree(points).query_pairs(distance, output_type="ndarray").max(axis=1)] = False
    return kept


def _at(field: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return values of a field at points (x, y)."""
    index = points.astype(np.intp)
    return field[index[:, 1].clip(0, field.shape[0] - 1), index[:, 0].clip(0, field.shape[1] - 1)]


def _nuclei(
    canvas: _Canvas,
    centers: np.ndarray,
    *,
    length_um: np.ndarray | float,
    breadth_um: np.ndarray | float,
    strength: np.ndarray | float,
    angle: np.ndarray | float,
) -> None:
    """Stamp soft ellipses of haematoxylin (half axes in µm) where the tissue is; overlaps keep the darker."""
    if len(centers) == 0:
        return
    centers = centers.astype(np.float32)
    n = len(centers)
    half = np.stack([np.broadcast_to(np.asarray(v, np.float32), n) for v in (length_um, breadth_um)]) / UM_PER_PIXEL
    turn = np.broadcast_to(np.asarray(angle, dtype=np.float32), n)
    strong = np.broadcast_to(np.asarray(strength, dtype=np.float32), n)
    reach = int(np.ceil(half.max() + 0.8))
    step = np.arange(-reach, reach + 1)
    dx, dy = (axis.ravel() for axis in np.meshgrid(step, step))
    base = np.floor(centers).astype(np.intp)
    columns, rows = base[:, :1] + dx, base[:, 1:] + dy
    x, y = columns + 0.5 - centers[:, :1], rows + 0.5 - centers[:, 1:]
    cos, sin = np.cos(turn)[:, None], np.sin(turn)[:, None]
    radius = np.hypot((x * cos + y * sin) / half[0][:, None], (y * cos - x * sin) / half[1][:, None])
    edge = np.minimum(*half)[:, None]
    value = strong[:, None] * np.clip((1 - radius) * edge + 0.5, 0, 1)
    drawn = (value > 0) & (rows >= 0) & (rows < canvas.shape[0]) & (columns >= 0) & (columns < canvas.shape[1])
    flat = rows[drawn] * canvas.shape[1] + columns[drawn]
    ink = np.zeros(canvas.shape[0] * canvas.shape[1], dtype=np.float32)
    np.maximum.at(ink, flat, value[drawn].astype(np.float32))
    ink = ink.reshape(canvas.shape)
    ink[canvas.regions == OUTSIDE] = 0
    canvas.haematoxylin += ink
    canvas.eosin *= 1 - 0.35 * np.minimum(ink, 1)


def _develop(canvas: _Canvas) -> np.ndarray:
    """Beer–Lambert: light falls off with stain and thickness; then the blur and noise of a scanner."""
    outside = canvas.regions == OUTSIDE
    for stain in (canvas.haematoxylin, canvas.eosin):
        stain[outside] = 0
        np.maximum(stain, 0, out=stain)
    thickness = 1 + 0.06 * canvas.noise(600.0)
    haematoxylin = gaussian_filter(canvas.haematoxylin, 0.5) * thickness
    eosin = gaussian_filter(canvas.eosin, 0.5) * thickness
    grain = canvas.rng.normal(0, 1.6, canvas.shape).astype(np.float32)
    image = np.empty((*canvas.shape, 3), dtype=np.uint8)
    for channel in range(3):
        density = _HAEMATOXYLIN[channel] * haematoxylin + _EOSIN[channel] * eosin
        light = _LAMP[channel] * np.exp(-np.float32(np.log(10)) * density * np.float32(0.8)) + grain
        image[..., channel] = np.clip(light, 0, 255)
    return image
