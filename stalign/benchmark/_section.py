"""A section to measure on: spots, labels, and the embeddings made of them, each once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stalign._keys import Key
from stalign._validate import check_adata, get_coordinates, require_key

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from stalign.models import STAlign

UNLABELLED: Final = ("NA", "nan", "None", "")
UNDETERMINED: Final = "undetermined"
"""A label that is a class for domains and none for names."""

_KEYS: Final = {
    ("image", "gene"): Key.obsm.EMBEDDING,
    ("gene",): "X_genes_alone",
    ("image",): "X_image_alone",
}


@dataclass
class Section:
    """A section, and what was computed of it.

    Attributes
    ----------
    name
        As it stands in the table.
    adata
        Spots with raw counts; those without a label are left out where others have one.
    labels
        (n,) names as str, or ``None``.
    """

    name: str
    adata: AnnData
    labels: np.ndarray | None = None
    _cache: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, adata: AnnData, name: str = "section", *, label_key: str | None = None) -> Section:
        """Take a section from an AnnData, which is not changed.

        Parameters
        ----------
        adata
            Spots with raw counts.
        name
            As it stands in the table.
        label_key
            Column of ``obs`` with the labels; missing values, ``"NA"`` and empty text are none.

        Raises
        ------
        KeyError
            If there is no such column.

        Examples
        --------
        >>> import stalign as sta
        >>> section = Section.of(sta.datasets.synthetic_visium(n_rows=8, n_cols=8), label_key="region")
        >>> section.n_classes
        5
        """
        check_adata(adata)
        if label_key is None:
            return cls(name, adata.copy())
        values = require_key(adata.obs, label_key, where=f"{name}: obs", hint="Name the column with the labels.")
        labels = values.astype(str).to_numpy()
        known = values.notna().to_numpy() & ~np.isin(labels, UNLABELLED)
        if not known.any():
            return cls(name, adata.copy())
        return cls(name, adata[known].copy(), labels[known])

    @classmethod
    def read(cls, path: Path, name: str, *, label_key: str | None = None) -> Section:
        """Read a section from a file; a column of labels that is not there means no labels."""
        from stalign.io._slides import read_slide

        adata = read_slide(path)
        return cls.of(adata, name, label_key=label_key if label_key in adata.obs else None)

    @property
    def coordinates(self) -> np.ndarray:
        """(n, 2) positions."""
        return get_coordinates(self.adata)

    @property
    def names(self) -> np.ndarray:
        """(n,) labels of a section that has them.

        Raises
        ------
        ValueError
            If it has none.
        """
        if self.labels is None:
            raise ValueError(f"{self.name} has no labels. Name their column: `Section.of(adata, label_key=...)`.")
        return self.labels

    @property
    def n_classes(self) -> int:
        """Number of labels; 0 without."""
        return 0 if self.labels is None else len(np.unique(self.labels))

    @property
    def patient(self) -> str:
        """``obs["patient"]`` of the first spot; the name of the section where there is no such column."""
        return str(self.adata.obs["patient"].iloc[0]) if "patient" in self.adata.obs else self.name

    @property
    def blocks(self) -> np.ndarray:
        """(n,) spatial block of each spot."""
        from stalign.benchmark._metrics import spatial_blocks

        return self.remember("blocks", lambda: spatial_blocks(self.coordinates))

    @property
    def has_image(self) -> bool:
        """Whether ``uns["spatial"]`` holds an image or names its file."""
        entries = self.adata.uns.get(Key.uns.SPATIAL, {}).values()
        return any(
            bool(entry.get("images")) or bool(entry.get("metadata", {}).get("source_image_path")) for entry in entries
        )

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return what was computed under this name, or compute it."""
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]

    def log_expression(self) -> csr_matrix:
        """(n, genes) CSR, log1p of counts per 10,000."""
        from stalign.genes import normalise_log1p

        return self.remember("log", lambda: normalise_log1p(self.adata.X))

    def prepare(self, model: STAlign) -> None:
        """Make the niches of the model's geometry, which patches are cut by."""
        from stalign import pp
        from stalign.slide._library import find_niche_record

        shape = {name: getattr(model.geometry, name) for name in ("n_neighbors", "spot_um", "niche_um")}
        record = find_niche_record(self.adata)
        if record is None or any(record["params"][name] != value for name, value in shape.items()):
            pp.extract_niches(self.adata, **shape)

    def embed(self, model: STAlign, modalities: tuple[str, ...] = ("image", "gene")) -> str:
        """Embed with some modalities, once, and return the ``key_added``."""
        from stalign import tl
        from stalign.tl._runtime import identify
        from stalign.tl._slots import embed_record

        key = _KEYS[modalities]
        if embed_record(self.adata, key).get("sha256") != identify(model).sha256:
            tl.embed(self.adata, model=model, modalities=modalities, key_added=key)
        return key

    def side(self, model: STAlign, part: str) -> np.ndarray | None:
        """(n, d) one output of the embedding from both modalities; ``None`` where the section lacks what it needs."""
        name = Key.embedding(part, self.embed(model))
        return np.asarray(self.adata.obsm[name]) if name in self.adata.obsm else None

    def blind(self) -> AnnData:
        """Return the embeddings without the counts."""
        from anndata import AnnData

        return AnnData(
            obs=self.adata.obs[[]].copy(), obsm=dict(self.adata.obsm), obsp=dict(self.adata.obsp), uns=self.adata.uns
        )
