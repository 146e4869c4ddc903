"""From an AnnData with a niche record to the pixels of its spots."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from stalign._keys import Key
from stalign._validate import check_positive, get_coordinates, get_library_codes, listing, require_key
from stalign.slide._colour import colour_statistics, spread_over_slide
from stalign.slide._image import SlideImage
from stalign.slide._open import open_image
from stalign.slide._patches import read_patches
from stalign.slide._plan import tile_order

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix


def find_niche_record(adata: AnnData) -> Mapping[str, Any] | None:
    """Return ``uns["stalign"]["niche"]``; ``None`` if :func:`stalign.pp.extract_niches` has not run."""
    return adata.uns.get(Key.UNS, {}).get(Key.uns.NICHE)


def niche_record(adata: AnnData) -> Mapping[str, Any]:
    """Return ``uns["stalign"]["niche"]``, or say that :func:`stalign.pp.extract_niches` must run first."""
    record = find_niche_record(adata)
    if record is None:
        raise KeyError(
            f"`adata.uns[{Key.UNS!r}][{Key.uns.NICHE!r}]` is missing: run `stalign.pp.extract_niches(adata)` first."
        )
    return record


def niche_graph(adata: AnnData) -> csr_matrix:
    """Return the graph that the niche record names; row i is the niche of spot i."""
    key = Key.connectivities(str(niche_record(adata)["params"]["key_added"]))
    return require_key(adata.obsp, key, where="adata.obsp", hint="Run `stalign.pp.extract_niches(adata)` again.")


def recorded_libraries(adata: AnnData) -> tuple[np.ndarray, list[str]]:
    """Return each spot's library number and the libraries' names, with the ``library_key`` of the niche record."""
    record = niche_record(adata)
    key = str(record["params"]["library_key"]) or None
    if key is None:
        return np.zeros(adata.n_obs, dtype=np.intp), [str(name) for name in record["libraries"]][:1]
    codes, names = get_library_codes(adata, key)
    for name in names:
        require_key(
            record["libraries"],
            name,
            where="adata.uns['stalign']['niche']['libraries']",
            hint="Run `stalign.pp.extract_niches` again.",
        )
    return codes, names


def open_library_image(adata: AnnData, library: str) -> SlideImage | None:
    """Open the image that the niche record names for a library; ``None`` if it has none.

    Coordinates × ``uns["stalign"]["niche"]["libraries"][library]["image_scale"]`` are its pixels.
    """
    entry = require_key(niche_record(adata)["libraries"], library, where="adata.uns['stalign']['niche']['libraries']")
    again = "Run `stalign.pp.extract_niches` again, with `image=...` if the image has moved."
    if entry["image"] == "none":
        return None
    if entry["image"] == "path":
        try:
            return open_image(str(entry["image_path"]))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"The image of library {library!r} is gone: {entry['image_path']!r}. {again}"
            ) from error
    spatial = require_key(adata.uns.get(Key.uns.SPATIAL, {}), library, where="adata.uns['spatial']", hint=again)
    where = f"adata.uns['spatial'][{library!r}]['images']"
    return open_image(require_key(spatial.get("images", {}), str(entry["image_key"]), where=where, hint=again))


class PatchReader:
    """Patches of an AnnData's spots at a physical size, from whichever library's image they lie on.

    Images are opened when first read and stay open until :meth:`close`. Reading is safe from several threads.

    Parameters
    ----------
    adata
        With the niche record of :func:`stalign.pp.extract_niches`.

    Attributes
    ----------
    has_image
        (n_obs,) bool: whether the spot's library has an image.
    codes, libraries
        (n_obs,) number of the spot's library, and the names.
    coordinates
        (n_obs, 2) float64 (x, y) in full-resolution pixels.

    Examples
    --------
    >>> with PatchReader(adata) as reader:  # doctest: +SKIP
    ...     niche = reader.read(np.arange(64), um=400.0, pixels=64)
    """

    def __init__(self, adata: AnnData) -> None:
        record = niche_record(adata)
        self._adata = adata
        self._entries = record["libraries"]
        self.coordinates = get_coordinates(adata, str(record["params"]["spatial_key"]))
        self.codes, self.libraries = recorded_libraries(adata)
        with_image = np.array([self._entries[name]["image"] != "none" for name in self.libraries], dtype=bool)
        self.has_image = with_image[self.codes]
        self._images: dict[str, SlideImage] = {}
        self._lock = threading.Lock()

    def image(self, library: str) -> SlideImage | None:
        """Return the open image of a library, ``None`` if it has none."""
        with self._lock:
            if library not in self._images:
                image = open_library_image(self._adata, library)
                if image is None:
                    return None
                self._images[library] = image
            return self._images[library]

    def opened(self, library: str) -> SlideImage:
        """Return the open image of a library, or raise a ValueError if it has none."""
        image = self.image(library)
        if image is None:
            with_image = [name for name in self.libraries if self._entries[name]["image"] != "none"]
            raise ValueError(
                f"Library {library!r} has no image. Libraries with one: {listing(with_image)}. Run "
                "`stalign.pp.extract_niches(adata, image=...)` to give it one."
            )
        return image

    def centers(self, index: np.ndarray, library: str) -> np.ndarray:
        """Return patch centres (x, y) in pixels of the library's image, (n, 2) float64."""
        return self.coordinates[index] * float(self._entries[library]["image_scale"])

    def side(self, um: float, library: str) -> float:
        """Return the side in image pixels of a patch of ``um`` µm."""
        entry = self._entries[library]
        return check_positive("um", um) / float(entry["mpp"]) * float(entry["image_scale"])

    def order(self, patches: Sequence[tuple[float, int]] = ()) -> np.ndarray:
        """Order all spots, library by library, so that the tiles of a file are read once.

        Spots on the same tiles follow each other, whichever patches are cut there and in batches of any size: reading
        batch after batch (spot patches, niche patches, next batch) finds the tiles in the cache.

        Parameters
        ----------
        patches
            Sides in µm and in pixels of the patches that will be read at every spot.

        Returns
        -------
        (n_obs,) positions of the spots. They depend on the coordinates, the image and ``patches`` alone.
        """
        parts = []
        for code, library in enumerate(self.libraries):
            here = np.flatnonzero(self.codes == code)
            if not len(here):
                continue
            if self.has_image[here[0]]:
                sides = [(self.side(um, library), pixels) for um, pixels in patches]
                places = tile_order(self.opened(library), self.centers(here, library), sides)
            else:
                places = tile_order(None, self.coordinates[here], ())
            parts.append(here[places])
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.intp)

    def read(self, index: np.ndarray, um: float, pixels: int) -> np.ndarray:
        """Read the patches of some spots.

        Parameters
        ----------
        index
            Positions of the spots in the AnnData.
        um
            Side of the patches in µm.
        pixels
            Side of the result in pixels.

        Returns
        -------
        (n, pixels, pixels, 3) uint8, in the order of ``index``.

        Raises
        ------
        ValueError
            If a spot's library has no image, or its image is smaller than one patch.
        """
        index = np.asarray(index, dtype=np.intp)
        codes = self.codes[index]
        out = np.empty((len(index), pixels, pixels, 3), dtype=np.uint8)
        for code in np.unique(codes):
            library = self.libraries[code]
            image = self.opened(library)
            side = self.side(um, library)
            self._check_size(image, um, side, library)
            here = np.flatnonzero(codes == code)
            out[here] = read_patches(image, self.centers(index[here], library), side, pixels)
        return out

    def _check_size(self, image: SlideImage, um: float, side: float, library: str) -> None:
        if side > min(image.height, image.width):
            entry = self._entries[library]
            mpp = float(entry["mpp"]) / float(entry["image_scale"])
            raise ValueError(
                f"The image of library {library!r} has {image.height} × {image.width} pixels, less than one patch of "
                f"{um:g} µm, which is {side:.4g} pixels at {mpp:.4g} µm per pixel of the image. Run "
                "`stalign.pp.extract_niches` with another `image=...` or `image_key=...`, or with the right `mpp=...`."
            )

    def colours(self, um: float, pixels: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the colour statistics of every library with an image, from patches spread over its spots.

        See :func:`stalign.slide.colour_statistics`.

        Parameters
        ----------
        um, pixels
            Side of the patches in µm and in pixels.
        """
        statistics = {}
        for code, library in enumerate(self.libraries):
            here = np.flatnonzero((self.codes == code) & self.has_image)
            if len(here):
                sample = here[spread_over_slide(self.coordinates[here])]
                statistics[library] = colour_statistics(self.read(sample, um, pixels))
        return statistics

    def close(self) -> None:
        """Close all images."""
        for image in self._images.values():
            image.close()
        self._images.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
