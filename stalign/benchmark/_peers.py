"""Published methods that are trained on each section, run on request where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
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

    from stalign._keys import Key
    from stalign.benchmark._features import components
    from stalign.benchmark._methods import tied_mixture

    try:
        from GraphST.GraphST import GraphST  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(f"The method 'graphst' needs GraphST: `pip install graphst-modern` ({error}).") from error
    from anndata import AnnData

    adata = AnnData(
        section.adata.X.copy(),
        obs=section.adata.obs[[]].copy(),
        var=section.adata.var[[]].copy(),
        obsm={Key.obsm.SPATIAL: section.coordinates},
    )
    trained = GraphST(adata, device=torch.device("cpu"), epochs=epochs, random_seed=seed).train()
    return tied_mixture(components(np.asarray(trained.obsm["emb"]), 20), n_domains, seed)


PEERS: Final[dict[str, Peer]] = {
    "graphst": Peer("GraphST, trained on the section, PCA(20), Gaussian mixture with one covariance", graphst)
}
"""By name; they run only when they are asked for."""
