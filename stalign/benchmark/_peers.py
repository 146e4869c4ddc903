"""Published methods that learn from each section, run on request where they are installed."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

    from stalign.benchmark._section import Section


class Peer(NamedTuple):
    """A published method: what it is, and from a section, a number of domains and a seed to (n,) domains."""

    description: str
    domains: Callable[[Section, int, int], np.ndarray]


GRAPHST_EPOCHS: Final = 600


def graphst(section: Section, n_domains: int, seed: int, *, epochs: int = GRAPHST_EPOCHS) -> np.ndarray:
    """(n,) domains of GraphST (Long et al., Nat Commun 14:1155, 2023), trained on the section on the CPU.

    The embedding is reduced to 20 components and divided by a Gaussian mixture with one covariance, as the authors do
    with mclust; no refinement.

    Raises
    ------
    ImportError
        If GraphST is not installed.
    """
    import torch

    try:
        from GraphST.GraphST import GraphST  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(f"The method 'graphst' needs GraphST: `pip install graphst-modern` ({error}).") from error
    adata = _bare(section)
    trained = GraphST(adata, device=torch.device("cpu"), epochs=epochs, random_seed=seed).train()
    return _divide(trained.obsm["emb"], n_domains, seed)


BANKSY_NEIGHBOURS: Final = 18
BANKSY_LAMBDA: Final = 0.2
BANKSY_GENES: Final = 2000


def banksy(section: Section, n_domains: int, seed: int) -> np.ndarray:
    """(n,) domains of BANKSY (Singhal et al., Nat Genet 56:431, 2024), by its own package.

    Log-normalised expression of 2,000 variable genes, its mean and azimuthal Gabor filter over 18 neighbours with a
    weight (lambda) of 0.2, 20 components, a Gaussian mixture with one covariance. These settings are ours: one for all
    sections, not tuned on any.

    Raises
    ------
    ImportError
        If BANKSY is not installed.
    """
    import scanpy as sc

    from stalign._keys import Key

    try:
        from banksy.embed_banksy import generate_banksy_matrix  # type: ignore[import-not-found]
        from banksy.initialize_banksy import initialize_banksy  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(f"The method 'banksy' needs BANKSY: `pip install pybanksy` ({error}).") from error
    adata = _bare(section)
    sc.pp.filter_genes(adata, min_cells=1)
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    if adata.n_vars > BANKSY_GENES:
        sc.pp.highly_variable_genes(adata, n_top_genes=BANKSY_GENES)
        adata = adata[:, adata.var["highly_variable"]].copy()
    adata.obs["x"], adata.obs["y"] = adata.obsm[Key.obsm.SPATIAL].T
    plots = dict.fromkeys(("plt_edge_hist", "plt_nbr_weights", "plt_agf_angles", "plt_theta"), False)
    with redirect_stdout(io.StringIO()):  # its progress, and the names of all genes
        graphs = initialize_banksy(adata, ("x", "y", Key.obsm.SPATIAL), BANKSY_NEIGHBOURS, **plots)
        _, matrix = generate_banksy_matrix(adata, graphs, [BANKSY_LAMBDA], max_m=1, verbose=False)
    return _divide(matrix.X, n_domains, seed)


def _divide(embedding: np.ndarray, n_domains: int, seed: int) -> np.ndarray:
    from stalign.benchmark._features import components
    from stalign.benchmark._methods import tied_mixture

    return tied_mixture(components(np.asarray(embedding), 20), n_domains, seed)


def _bare(section: Section) -> AnnData:
    """Counts, names and coordinates: a peer may write into it."""
    from anndata import AnnData

    from stalign._keys import Key

    return AnnData(
        section.adata.X.copy(),
        obs=section.adata.obs[[]].copy(),
        var=section.adata.var[[]].copy(),
        obsm={Key.obsm.SPATIAL: section.coordinates},
    )


PEERS: Final[dict[str, Peer]] = {
    "graphst": Peer("GraphST, trained on the section, PCA(20), Gaussian mixture with one covariance", graphst),
    "banksy": Peer("BANKSY (18 neighbours, lambda 0.2), PCA(20), Gaussian mixture with one covariance", banksy),
}
"""By name; they run only when they are asked for."""
