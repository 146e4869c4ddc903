"""Tiles: decoded once, kept within bounds, averaged where the target is coarse."""

from __future__ import annotations

import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile

import stalign
from stalign.slide import ArrayImage, LazyImage, TiffImage, open_image, read_patches
from stalign.slide._cache import TileCache
from stalign.slide._colour import spread_over_slide
from stalign.slide._library import PatchReader
from stalign.slide._plan import tile_order
from stalign.slide._tiles import TileGrid


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (1000, 1300, 3), dtype=np.uint8)


@pytest.fixture
def flat(tmp_path, noise):
    tifffile.imwrite(tmp_path / "flat.tif", noise, photometric="rgb", tile=(128, 128), compression="deflate")
    return tmp_path / "flat.tif"


# --- the cache ---------------------------------------------------------------------------------------------------


def block(size: int) -> np.ndarray:
    return np.zeros(size, dtype=np.uint8)


def test_the_least_recently_used_goes_first():
    cache = TileCache(limit=3 * (1000 + 512))
    made = []
    for key in ("a", "b", "c", "a", "d", "a", "b"):
        cache.get(("x", key), lambda key=key: made.append(key) or block(1000))
        assert cache.nbytes <= cache.limit
    assert made == ["a", "b", "c", "d", "b"]  # "d" takes the place of "b", which was not used for longest


def test_what_is_too_large_is_handed_out_and_not_kept():
    cache = TileCache(limit=5000)
    cache.get(("x", 1), lambda: block(1000))
    assert cache.get(("x", 2), lambda: block(9000)).nbytes == 9000
    made = []
    cache.get(("x", 1), lambda: made.append(1) or block(1000))
    assert not made
    assert cache.nbytes == 1512


def test_an_owner_is_forgotten():
    cache = TileCache(limit=10_000)
    for owner in ("x", "y"):
        cache.get((owner, 1), lambda: block(1000))
    cache.drop("x")
    assert cache.nbytes == 1512
    assert cache.get(("y", 1), lambda: block(1)).nbytes == 1000


def test_the_limit_follows_the_setting(monkeypatch):
    cache = TileCache()
    assert cache.limit == stalign.settings.tile_cache_bytes == 256 * 2**20
    monkeypatch.setattr(stalign.settings, "tile_cache_bytes", 2000)
    for number in range(5):
        cache.get(("x", number), lambda: block(1000))
    assert cache.nbytes <= 2000
    with pytest.raises(ValueError, match="tile_cache_bytes"):
        stalign.settings.tile_cache_bytes = 0


def test_threads_that_want_the_same_wait_for_one():
    cache = TileCache(limit=10_000)
    entered, go, made = threading.Event(), threading.Event(), []

    def slowly() -> np.ndarray:
        made.append(1)
        entered.set()
        assert go.wait(10)
        return block(100)

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(cache.get, ("x", 1), slowly)
        assert entered.wait(10)
        others = [pool.submit(cache.get, ("x", 1), slowly) for _ in range(3)]
        assert cache.get(("x", 2), lambda: block(5)).nbytes == 5  # other tiles are not held up
        go.set()
        assert len({id(task.result()) for task in (first, *others)}) == 1
    assert made == [1]


def test_a_failure_reaches_all_and_is_not_kept():
    cache = TileCache(limit=10_000)

    def fails() -> np.ndarray:
        raise ValueError("broken tile")

    for _ in range(2):
        with pytest.raises(ValueError, match="broken tile"):
            cache.get(("x", 1), fails)
    assert cache.get(("x", 1), lambda: block(7)).nbytes == 7


# --- the grid ----------------------------------------------------------------------------------------------------


def test_grid_touches_what_it_should():
    grid = TileGrid.regular(100, 250, 30, 100)
    assert grid.shape == (4, 3)
    assert grid.tile_size == (30, 100)
    assert grid.window(3, 2) == (90, 200, 10, 50)
    assert grid.touched(0, 0, 30, 100) == (range(1), range(1))
    assert grid.touched(29, 99, 2, 2) == (range(2), range(2))
    assert grid.touched(99, 249, 1, 1) == (range(3, 4), range(2, 3))


def test_grid_is_reduced_at_multiples():
    grid = TileGrid(np.array([0, 48, 100, 128, 200]), np.array([0, 64, 128, 131]))
    reduced = grid.reduced(8)
    assert reduced.rows.tolist() == [0, 6, 16, 25]  # 100 is no multiple of 8
    assert reduced.columns.tolist() == [0, 8, 16, 17]
    huge = TileGrid.regular(60_000, 60_000, 7, 60_000)
    assert huge.reduced(2).tile_size == (7, 30_000)
    assert huge.reduced(64) is None  # a piece would have 448 × 60,000 pixels


# --- reading -----------------------------------------------------------------------------------------------------


def test_a_tile_is_decoded_once_whatever_touches_it(flat):
    """Both patch sizes, many batches, several threads, and a small step between patches."""
    x, y = np.meshgrid(np.arange(60, 1240, 16.0), np.arange(60, 940, 16.0))
    centers = np.column_stack([x.ravel(), y.ravel()])
    cache = TileCache(64 * 2**20)
    with TiffImage(flat, cache=cache) as image, ThreadPoolExecutor(4) as pool:
        order = tile_order(image, centers, [(30.0, 16), (200.0, 16)])
        batches = [centers[part] for part in np.array_split(order, 40)]
        tasks = [
            pool.submit(read_patches, image, part, *patch) for part in batches for patch in ((30.0, 16), (200.0, 16))
        ]
        for task in tasks:
            task.result()
        with tifffile.TiffFile(flat) as file:
            sizes = file.pages.first.databytecounts
        assert image.counters.tiles_decoded == len(sizes) == 88
        assert image.counters.bytes_read == sum(sizes)


def test_in_the_planned_order_little_is_read_twice(flat):
    """With a cache of little more than three rows of tiles of the eight that the slide has."""
    x, y = np.meshgrid(np.arange(40, 1260, 10.0), np.arange(40, 960, 10.0))
    centers = np.random.default_rng(0).permutation(np.column_stack([x.ravel(), y.ravel()]))
    patches = [(30.0, 32), (60.0, 32)]

    def bytes_read(order: np.ndarray) -> int:
        with TiffImage(flat, cache=TileCache(37 * (3 * 128**2 + 512))) as image:
            for start in range(0, len(order), 200):
                for side, pixels in patches:
                    read_patches(image, centers[order[start : start + 200]], side, pixels)
            return image.counters.bytes_read

    with tifffile.TiffFile(flat) as file:
        total = sum(file.pages.first.databytecounts)
    with open_image(flat) as image:
        order = tile_order(image, centers, patches)
    assert bytes_read(order) <= 1.1 * total
    assert bytes_read(np.arange(len(centers))) > 5 * total


def test_memory_does_not_grow_with_the_slide():
    class Endless:
        """A slide of 40,000 × 40,000 pixels that is drawn when it is read."""

        shape, dtype, chunks = (40_000, 40_000, 3), np.dtype(np.uint8), (512, 512, 3)

        def __getitem__(self, index):
            rows, columns, _ = (range(*part.indices(side)) for part, side in zip(index, self.shape, strict=True))
            return np.full((len(rows), len(columns), 3), (rows.start // 512 + columns.start // 512) % 251, np.uint8)

    x, y = np.meshgrid(np.arange(1000, 30_000, 400.0), np.arange(1000, 7_000, 400.0))
    centers = np.column_stack([x.ravel(), y.ravel()])
    limit = 24 * 2**20
    with LazyImage([Endless()], cache=TileCache(limit)) as image:
        order = tile_order(image, centers, [(448.0, 32), (1792.0, 64)])
        tracemalloc.start()
        for start in range(0, len(order), 100):
            for side, pixels in ((448.0, 32), (1792.0, 64)):
                read_patches(image, centers[order[start : start + 100]], side, pixels)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert image._cache.nbytes <= limit
        assert peak < limit + 70 * 2**20  # the windows of a batch, and one piece of tiles that is averaged
        assert image.counters.tiles_decoded <= 1.1 * 61 * 16


@pytest.mark.parametrize("options", [{"rowsperstrip": 1, "compression": "lzw"}, {"rowsperstrip": 7}, {}])
def test_strips_are_read_in_bands(tmp_path, noise, options):
    tifffile.imwrite(tmp_path / "a.tif", noise, photometric="rgb", **options)
    with TiffImage(tmp_path / "a.tif", cache=TileCache(10**7)) as image:
        patch = read_patches(image, np.array([[600.0, 500.0]]), 40.0, 40)[0]
        np.testing.assert_array_equal(patch, noise[480:520, 580:620])
        assert image.counters.tiles_decoded <= 2
        assert image.counters.bytes_read <= 2 * 128 * 1300 * 3 * (2 if options.get("compression") else 1)


def test_a_single_large_piece_stays_until_the_image_is_closed(tmp_path, noise):
    tifffile.imwrite(tmp_path / "a.tif", noise, photometric="rgb", rowsperstrip=1000, compression="deflate")
    with TiffImage(tmp_path / "a.tif", cache=TileCache(1000)) as image:
        for x in range(100, 1200, 100):
            read_patches(image, np.array([[float(x), 500.0]]), 40.0, 40)
        assert image.counters.tiles_decoded == 1
    assert image._whole.nbytes == 0


def test_a_closed_image_gives_nothing(flat):
    image = open_image(flat)
    before = image.read_region(0, 0, 0, 10, 10)
    image.close()
    with pytest.raises(ValueError, match=r"'flat\.tif' is closed"):
        image.read_region(0, 0, 0, 10, 10)
    assert before.shape == (10, 10, 3)


def test_what_is_read_belongs_to_the_reader(flat, noise):
    with open_image(flat) as image:
        window = image.read_region(0, 10, 10, 50, 50)
        window[...] = 0
        np.testing.assert_array_equal(image.read_region(0, 10, 10, 50, 50), noise[10:60, 10:60])


# --- averages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(384, 512), (389, 515)])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_averages_of_tiles_are_those_of_the_whole(noise, shape, factor, tmp_path):
    """Also for tiles that the averages do not fit into, and at odd borders."""
    picture = noise[: shape[0], : shape[1]]
    levels = ArrayImage(picture)
    expected = levels._levels[0]
    for _ in range(factor.bit_length() - 1):
        height, width = expected.shape[:2]
        even = np.pad(expected, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge").astype(int)
        expected = ((even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2] + 2) // 4).astype(np.uint8)
    da = pytest.importorskip("dask.array")
    tifffile.imwrite(tmp_path / "a.tif", picture, photometric="rgb", tile=(128, 128))
    sources = (
        tmp_path / "a.tif",
        da.from_array(picture, chunks=(97, 250, 3)),
        da.from_array(picture, chunks=(60, 64, 3)),
    )
    for source in sources:
        for earlier in (0, 2):
            with open_image(source) as image:
                if earlier and earlier < factor:
                    image.reduction_for(2.0 * earlier)  # another patch size that uses finer averages
                assert image.reduction_for(2.0 * factor) == (0, factor)
                height, width = expected.shape[:2]
                np.testing.assert_array_equal(image._window(0, factor, 0, 0, height, width), expected)
                np.testing.assert_array_equal(image._window(0, factor, 9, 20, 30, 17), expected[9:39, 20:37])


def test_a_flat_file_gives_what_memory_gives(flat, noise):
    centers = np.random.default_rng(1).uniform(-50, 1250, (200, 2))
    for side, pixels in ((500.0, 32), (250.0, 32), (90.0, 16), (33.3, 40)):
        with open_image(flat) as image, open_image(noise) as memory:
            image._background = memory.background
            np.testing.assert_array_equal(
                read_patches(image, centers, side, pixels), read_patches(memory, centers, side, pixels)
            )


def test_averages_come_from_the_level_that_fits(tmp_path):
    """A pyramid with a wide gap: 1 and 4; a target of 40 level-0 pixels takes level 4, averaged by 4."""
    blocks = np.random.default_rng(0).integers(0, 255, (40, 40, 3))
    full = np.kron(blocks, np.ones((40, 40, 1))).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "p.tif") as tif:
        tif.write(full, photometric="rgb", tile=(64, 64), subifds=1)
        tif.write(full[::4, ::4], photometric="rgb", tile=(64, 64), subfiletype=1)
    with open_image(tmp_path / "p.tif") as image:
        assert image.reduction_for(40.0) == (1, 4)
        patch = read_patches(image, np.array([[800.0, 800.0]]), 800.0, 20)[0]
        assert np.abs(patch.astype(int) - blocks[10:30, 10:30]).max() <= 45  # a block has 2.5 averages a side
        exact = read_patches(image, np.array([[800.0, 800.0]]), 800.0, 20, level=0)[0]
        np.testing.assert_array_equal(exact, blocks[10:30, 10:30])
        assert image.counters.tiles_decoded < 49 + 625


def test_thumbnail_in_bands(flat, noise, monkeypatch):
    with open_image(flat) as image:
        whole, factor = image.thumbnail(260)
    assert whole.shape == (200, 260, 3)
    assert factor == 5
    monkeypatch.setattr("stalign.slide._image._BAND_PIXELS", 20_000)
    with open_image(flat) as image:
        np.testing.assert_array_equal(image.thumbnail(260)[0], whole)
    expected = noise.reshape(200, 5, 260, 5, 3).mean(axis=(1, 3))
    assert np.abs(whole - expected).mean() < 12  # from averages of two pixels, which five do not hold exactly


# --- the order ---------------------------------------------------------------------------------------------------


def test_order_is_a_permutation_by_library(hexagonal, section_maker, hexagon_array):
    import anndata as ad

    rows, cols, um = hexagon_array()
    bare = section_maker(rows, cols, um / 0.5 + 100.0, library="S2", spot_diameter=130.0)
    both = ad.concat([hexagonal, bare], label="slide", keys=["S1", "S2"], uns_merge="first")
    both.uns["spatial"] = {**hexagonal.uns["spatial"], **bare.uns["spatial"]}
    stalign.pp.extract_niches(both, library_key="slide")
    with PatchReader(both) as reader:
        order = reader.order([(112.0, 32), (448.0, 64)])
        assert sorted(order) == list(range(both.n_obs))
        assert (np.diff(reader.codes[order]) >= 0).all()
        np.testing.assert_array_equal(order, reader.order([(112.0, 32), (448.0, 64)]))
        assert len(reader.order()) == both.n_obs


def test_spots_on_a_tile_follow_each_other(flat):
    centers = np.random.default_rng(0).uniform(0, [1300, 1000], (5000, 2))
    with open_image(flat) as image:
        order = tile_order(image, centers, [(10.0, 10)])
    assert sorted(order) == list(range(5000))
    tiles = (centers[order] // 128) @ [1, 100]
    runs = 1 + np.count_nonzero(np.diff(tiles))
    assert runs == len(np.unique(tiles))  # each tile is one run
    assert len(tile_order(None, np.empty((0, 2)), ())) == 0


def test_colours_of_very_many_spots_are_looked_up_in_groups():
    grid = np.stack(np.meshgrid(np.arange(300.0), np.arange(200.0)), axis=-1).reshape(-1, 2)
    chosen = spread_over_slide(grid)
    assert len(chosen) == len(np.unique(chosen)) == 1024
    tiles = np.unique(grid[chosen] // 10, axis=0)
    assert 100 <= len(tiles) <= 260  # of 600; one by one they would lie on almost all
    for axis, length in ((0, 300), (1, 200)):  # all over the slide
        assert np.histogram(grid[chosen, axis], bins=10, range=(0, length))[0].min() > 40
    shuffled = np.random.default_rng(0).permutation(len(grid))
    np.testing.assert_array_equal(grid[shuffled][spread_over_slide(grid[shuffled])], grid[chosen])
