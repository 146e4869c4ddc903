"""Programmes of genes that rise and fall together over tissue, learned from sections with and without an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import eigsh, svds

# Leading components that stand for a section: a few times the programmes that are ever asked for.
_KEPT = 64
# A gene of less variance than this share of its mean square is constant but for rounding.
_ROUNDING = 1e-9


class Coexpression(NamedTuple):
    """How genes vary together on one section.

    Attributes
    ----------
    components
        (components, genes) whose inner products are the covariance of the genes' niche means, but for what is small.
    variance
        (genes,) variance of the expression of single spots.
    measured
        (genes,) one where the section measured the gene, zero elsewhere.
    """

    components: np.ndarray
    variance: np.ndarray
    measured: np.ndarray


class Programmes(NamedTuple):
    """(genes, programmes) orthonormal loadings of genes in units of their spread, the strongest first; the spread."""

    loadings: np.ndarray
    spread: np.ndarray

    def confine(self, weight: np.ndarray, n: int) -> np.ndarray:
        """Return (features, genes) weights whose predictions are sums of the ``n`` strongest programmes."""
        loadings = self.loadings[:, :n]
        return np.asarray((weight / self.spread) @ loadings @ (loadings * self.spread[:, None]).T)


def coexpression(expression: sp.csr_matrix, connectivities: sp.csr_matrix) -> Coexpression:
    """Summarise how genes vary together over the niches of a section.

    Niche means are what an image can tell of: the noise of single spots would hide what genes share.

    Parameters
    ----------
    expression
        (n, genes) log-normalised expression.
    connectivities
        (rows, n) niche graph whose rows sum to one, or some of its rows.
    """
    mean = np.asarray(expression.mean(axis=0)).ravel()
    squares = np.asarray(expression.multiply(expression).mean(axis=0)).ravel()
    variance = np.where(squares - mean**2 > _ROUNDING * squares, squares - mean**2, 0.0)
    spread = np.sqrt(variance)
    niches = (connectivities @ expression).toarray().astype(np.float64) - mean
    # Genes of any level alike, so that what is cut off is what is weak, and not what is lowly expressed.
    scaled = np.divide(niches, spread, out=np.zeros_like(niches), where=spread > 0)
    components = _leading(scaled / np.sqrt(len(niches))) * spread
    return Coexpression(components, variance, (squares > 0).astype(np.float64))


def _leading(values: np.ndarray) -> np.ndarray:
    """Return (components, genes) what a truncated singular value decomposition keeps of ``values``."""
    if min(values.shape) // 4 > _KEPT:
        _, size, directions = svds(values, k=_KEPT, v0=np.ones(min(values.shape)))
    else:
        _, size, directions = np.linalg.svd(values, full_matrices=False)
    return np.asarray(size[:, None] * directions)


def find_programmes(sections: Sequence[Coexpression], patients: Sequence[str], n: int) -> Programmes | None:
    """Return the ``n`` strongest programmes of the sections, each patient counting alike; None where nothing varies.

    A gene is scaled by its spread, and a programme counts by how much of the niches' variation it explains. A gene that
    a section did not measure takes nothing from that section.

    Parameters
    ----------
    sections
        What :func:`coexpression` says of each.
    patients
        Whose they are.
    n
        Number of programmes at most.
    """
    if not any(section.components.any() for section in sections):
        return None
    share = np.array([1 / patients.count(patient) for patient in patients])
    measured = np.array([section.measured for section in sections])
    variance = share @ np.array([section.variance for section in sections]) / np.maximum(share @ measured, 1e-12)
    spread = np.where(variance > 0, np.sqrt(variance), 1.0)
    covariance = np.zeros((len(spread), len(spread)))
    for section, part in zip(sections, share, strict=True):
        components = section.components / spread
        # Deep and shallow counts leave more and less noise in a niche's mean: what varies in all has one size.
        size = (components**2).sum() / max(section.measured.sum(), 1.0)
        covariance += part / max(size, 1e-12) * components.T @ components
    pairs = measured.T @ (share[:, None] * measured)
    covariance = np.divide(covariance, pairs, out=covariance, where=pairs > 0)
    return Programmes(_strongest(covariance, n), spread)


def _strongest(covariance: np.ndarray, n: int) -> np.ndarray:
    """Return (genes, n) eigenvectors of the largest eigenvalues, without those of none."""
    if n < len(covariance) // 4:
        size, directions = eigsh(covariance, k=n, which="LA", v0=np.ones(len(covariance)))
    else:
        size, directions = np.linalg.eigh(covariance)
    order = np.argsort(-size)[:n]
    return np.ascontiguousarray(directions[:, order[size[order] > 1e-9 * max(size.max(), 1e-12)]])
