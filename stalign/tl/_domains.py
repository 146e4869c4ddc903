"""Spatial domains from an embedding, without labels."""

from __future__ import annotations

import importlib.util
import warnings
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from stalign._keys import Key
from stalign._logging import logger
from stalign._settings import settings
from stalign._validate import (
    check_adata,
    check_choice,
    check_positive,
    get_library_codes,
    listing,
    require_key,
)

if TYPE_CHECKING:
    from anndata import AnnData

METHODS: Final = ("gmm", "kmeans", "leiden")

# Mixtures and k-means are fitted on at most so many spots, drawn at random; the others are assigned.
_MAX_FIT: Final = 100_000
_MAX_ITER: Final = 500
_LEIDEN_NEIGHBORS: Final = 15
_LEIDEN_STEPS: Final = 25


class _Clusters(NamedTuple):
    labels: np.ndarray
    converged: bool


def spatial_domains(
    adata: AnnData,
    n_domains: int | None = None,
    *,
    use_rep: str = Key.obsm.EMBEDDING,
    method: Literal["gmm", "kmeans", "leiden"] = "gmm",
    library_key: str | None = None,
    n_components: int = 15,
    n_init: int = 10,
    resolution: float = 1.0,
    refine: bool = False,
    niche_key: str = Key.NICHE,
    random_state: int | None = None,
    key_added: str = Key.obs.DOMAIN,
    copy: bool = False,
) -> AnnData | None:
    """Divide the tissue into domains by clustering an embedding; no labels are used.

    The embedding is reduced to its principal components (not scaled to unit variance: the leading components carry the
    tissue) and clustered. Spots are put in an order of their own before anything random happens, so that the domains do
    not depend on the order of the rows.

    Parameters
    ----------
    adata
        AnnData with an embedding in ``obsm``.
    n_domains
        Number of domains. Only ``method="leiden"`` can do without, and then uses ``resolution``.
    use_rep
        The embedding in ``obsm``.
    method
        ``"gmm"``: Gaussian mixture whose components share one covariance, the best of ``n_init`` starts by likelihood;
        ``"kmeans"``; or ``"leiden"`` on the graph of the 15 nearest neighbours (the resolution is searched for
        ``n_domains``).
    library_key
        Column of ``obs`` with the library of each spot: domains are found in each library on its own and are named
        ``"<library>_<number>"``. Without it all spots are clustered together.
    n_components
        Principal components that are kept.
    n_init
        Starts of ``"gmm"`` and ``"kmeans"``.
    resolution
        Resolution of ``"leiden"`` where ``n_domains`` is not given.
    refine
        Give each spot the most frequent domain of its niche, once (its own in a tie). Needs
        :func:`stalign.pp.extract_niches`.
    niche_key
        ``key_added`` of :func:`stalign.pp.extract_niches`, for ``refine``.
    random_state
        Seed; ``stalign.settings.seed`` by default.
    key_added
        Column of ``obs`` that is written.
    copy
        Return a copy instead of writing into ``adata``.

    Returns
    -------
    ``None``, or the copy. Writes:

    - ``obs["stalign_domain"]``: categorical, ``"0"`` the largest domain, ``"1"`` the next, …
    - ``uns["stalign"]["domains"]``: ``params``, ``n_domains`` (found), ``sizes`` (spots per domain), ``converged``

    Raises
    ------
    KeyError
        If the embedding, the column of libraries or the niche graph is missing.
    ValueError
        If the embedding has NaN or infinite rows or is constant, or ``n_domains`` is not between 2 and the number of
        spots.

    Notes
    -----
    With more than 100,000 spots, ``"gmm"`` and ``"kmeans"`` are fitted on 100,000 of them drawn at random.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.datasets.synthetic_visium()
    >>> sta.tl.embed(adata)  # doctest: +SKIP
    >>> sta.tl.spatial_domains(adata, n_domains=4)  # doctest: +SKIP
    """
    check_adata(adata)
    check_choice("method", method, METHODS)
    for name, value in (("n_components", n_components), ("n_init", n_init)):
        check_positive(name, value, integer=True)
    check_positive("resolution", resolution)
    X = _get_embedding(adata, use_rep)
    codes, libraries = _get_libraries(adata, library_key)
    _check_n_domains(n_domains, method, codes, libraries, library_key)
    graph = _get_graph(adata, niche_key) if refine else None
    seed = _check_seed(random_state)

    labels = np.empty(adata.n_obs, dtype=object)
    converged = True
    categories: list[str] = []
    for code, library in enumerate(libraries):
        spots = np.flatnonzero(codes == code)
        part = None if graph is None else graph[spots][:, spots]
        found = _find_domains(
            X[spots],
            n_domains,
            method=method,
            n_components=n_components,
            n_init=n_init,
            resolution=resolution,
            graph=part,
            seed=seed,
        )
        prefix = "" if library_key is None else f"{library}_"
        names = np.array([f"{prefix}{number}" for number in range(found.labels.max() + 1)], dtype=object)
        labels[spots] = names[found.labels]
        categories.extend(names)
        converged = converged and found.converged
        if n_domains is not None and len(names) != n_domains:
            where = "" if library_key is None else f" in library {library!r}"
            warnings.warn(f"Found {len(names)} domains{where} instead of {n_domains}.", UserWarning, stacklevel=2)

    column = pd.Categorical(labels, categories=categories)
    record = {
        "params": {
            "n_domains": 0 if n_domains is None else int(n_domains),
            "use_rep": use_rep,
            "method": method,
            "library_key": library_key or "",
            "n_components": int(n_components),
            "n_init": int(n_init),
            "resolution": float(resolution),
            "refine": bool(refine),
            "niche_key": niche_key,
            "random_state": int(seed),
            "key_added": key_added,
        },
        "n_domains": len(categories),
        "sizes": np.bincount(column.codes, minlength=len(categories)),
        "converged": bool(converged),
    }
    adata = adata.copy() if copy else adata
    adata.obs[key_added] = column
    adata.uns[Key.UNS] = {**adata.uns.get(Key.UNS, {}), Key.uns.DOMAINS: record}
    logger.info(
        "Added `obs['%s']` (%d domains), `uns['%s']['%s']`.", key_added, len(categories), Key.UNS, Key.uns.DOMAINS
    )
    return adata if copy else None


def _get_embedding(adata: AnnData, use_rep: str) -> np.ndarray:
    hint = "Run `sta.tl.embed(adata)` first." if use_rep.startswith(Key.obsm.EMBEDDING) else "Pass `use_rep=...`."
    values: Any = require_key(adata.obsm, use_rep, where="adata.obsm", hint=hint)
    X = np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=np.float64)
    if X.ndim != 2:
        raise ValueError(f"`adata.obsm[{use_rep!r}]` must be a matrix (n_spots, n_dimensions), got shape {X.shape}.")
    finite = np.isfinite(X).all(axis=1)
    if not finite.all():
        bad = adata.obs_names[~finite]
        raise ValueError(
            f"`adata.obsm[{use_rep!r}]` has NaN or infinite values for {len(bad)} of {adata.n_obs} spots: "
            f"{listing(bad, 5)}. Remove these spots, or compute the embedding again."
        )
    if not np.ptp(X, axis=0).any():
        raise ValueError(
            f"`adata.obsm[{use_rep!r}]` is the same for all {adata.n_obs} spots: there is nothing to divide."
        )
    return X


def _check_seed(random_state: Any) -> int:
    if random_state is None:
        return settings.seed
    if isinstance(random_state, bool) or not isinstance(random_state, int | np.integer) or random_state < 0:
        raise ValueError(f"random_state must be an integer >= 0, got {random_state!r}.")
    return int(random_state)


def _get_libraries(adata: AnnData, library_key: str | None) -> tuple[np.ndarray, list[str]]:
    if library_key is None:
        return np.zeros(adata.n_obs, dtype=np.intp), [""]
    return get_library_codes(adata, library_key)


def _get_graph(adata: AnnData, niche_key: str) -> sparse.csr_matrix:
    key = Key.connectivities(niche_key)
    graph = require_key(
        adata.obsp, key, where="adata.obsp", hint="`refine=True` needs it: run `sta.pp.extract_niches(adata)` first."
    )
    return sparse.csr_matrix(graph)


def _check_n_domains(
    n_domains: Any, method: str, codes: np.ndarray, libraries: list[str], library_key: str | None
) -> None:
    if n_domains is None:
        if method != "leiden":
            raise ValueError(
                f"method={method!r} needs the number of domains: pass `n_domains=...`, "
                "or `method='leiden'`, which finds a number by its `resolution`."
            )
        return
    sizes = np.bincount(codes, minlength=len(libraries))
    smallest = int(sizes.argmin())
    where = "spots" if library_key is None else f"spots of library {libraries[smallest]!r}"
    is_integer = isinstance(n_domains, int | np.integer) and not isinstance(n_domains, bool)
    if not is_integer or not 2 <= n_domains <= sizes[smallest]:
        raise ValueError(
            f"n_domains must be an integer between 2 and the number of {where} ({sizes[smallest]}), got {n_domains!r}."
        )


def _find_domains(
    X: np.ndarray,
    n_domains: int | None,
    *,
    method: str,
    n_components: int,
    n_init: int,
    resolution: float,
    graph: sparse.csr_matrix | None,
    seed: int,
) -> _Clusters:
    """Cluster the rows of ``X``; domain 0 is the largest."""
    order = _canonical_order(X)
    scores = _principal_components(X[order], n_components)
    if method == "leiden":
        clusters = _leiden(scores, n_domains, resolution, seed)
    elif n_domains is None:
        raise ValueError(f"method={method!r} needs n_domains.")
    else:
        clusters = (_gmm if method == "gmm" else _kmeans)(scores, n_domains, n_init, seed)
    labels = _by_size(clusters.labels)
    if graph is not None:
        labels = _by_size(_majority(labels, graph[order][:, order]))
    result = np.empty_like(labels)
    result[order] = labels
    return _Clusters(result, clusters.converged)


def _canonical_order(X: np.ndarray) -> np.ndarray:
    """Return an order of the rows that depends on their values only (lexicographic)."""
    first = X[:, :4]
    order = np.lexsort(first.T[::-1])
    tied = (first[order[1:]] == first[order[:-1]]).all(axis=1).any()
    # The first columns nearly always decide; all of them are costly for a million bins.
    return np.lexsort(X.T[::-1]) if tied and X.shape[1] > first.shape[1] else order


def _principal_components(X: np.ndarray, n_components: int) -> np.ndarray:
    """Return the leading principal components, scaled by one number to mean variance 1."""
    from sklearn.decomposition import PCA

    components = min(n_components, X.shape[1], X.shape[0])
    scores = PCA(
        n_components=components, svd_solver="full" if min(X.shape) <= 2048 else "auto", random_state=0
    ).fit_transform(X)
    # One common factor changes no cluster, but makes the regularisation of the covariance relative to the data.
    spread = np.sqrt(scores.var(axis=0).mean())
    return scores / spread if spread > 0 else scores


def _sample(scores: np.ndarray, seed: int) -> np.ndarray:
    if len(scores) <= _MAX_FIT:
        return scores
    rows = np.random.default_rng(seed).choice(len(scores), _MAX_FIT, replace=False)
    return scores[np.sort(rows)]


def _gmm(scores: np.ndarray, n_domains: int, n_init: int, seed: int) -> _Clusters:
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(
        n_domains, covariance_type="tied", n_init=n_init, max_iter=_MAX_ITER, reg_covar=1e-6, random_state=seed
    )
    mixture.fit(_sample(scores, seed))  # warns itself if the best start did not converge
    return _Clusters(mixture.predict(scores), bool(mixture.converged_))


def _kmeans(scores: np.ndarray, n_domains: int, n_init: int, seed: int) -> _Clusters:
    from sklearn.cluster import KMeans

    means = KMeans(n_domains, n_init=n_init, max_iter=_MAX_ITER, random_state=seed).fit(_sample(scores, seed))
    converged = means.n_iter_ < _MAX_ITER
    if not converged:
        warnings.warn(f"k-means did not converge in {_MAX_ITER} iterations.", UserWarning, stacklevel=2)
    return _Clusters(means.predict(scores), converged)


def _leiden(scores: np.ndarray, n_domains: int | None, resolution: float, seed: int) -> _Clusters:
    """Leiden clusters; with ``n_domains`` the resolution is bisected until their number fits, or comes nearest."""
    if importlib.util.find_spec("igraph") is None:
        raise ImportError("method='leiden' needs igraph: `pip install 'stalign[leiden]'`.")
    import scanpy as sc
    from anndata import AnnData

    work = AnnData(obsm={"scores": scores})
    sc.pp.neighbors(work, use_rep="scores", n_neighbors=min(_LEIDEN_NEIGHBORS, work.n_obs - 1), random_state=seed)

    def cluster(value: float) -> np.ndarray:
        sc.tl.leiden(
            work,
            resolution=value,
            flavor="igraph",
            n_iterations=-1,
            directed=False,
            random_state=seed,
            key_added="found",
        )
        return work.obs["found"].cat.codes.to_numpy()

    if n_domains is None:
        return _Clusters(cluster(resolution), True)
    low, high = 0.0, 1.0
    while (labels := cluster(high)).max() + 1 < n_domains and high < 64:
        low, high = high, 2 * high
    best = labels
    for _ in range(_LEIDEN_STEPS):
        if best.max() + 1 == n_domains:
            break
        middle = (low + high) / 2
        labels = cluster(middle)
        low, high = (middle, high) if labels.max() + 1 < n_domains else (low, middle)
        if abs(labels.max() + 1 - n_domains) < abs(best.max() + 1 - n_domains):
            best = labels
    return _Clusters(best, bool(best.max() + 1 == n_domains))


def _by_size(labels: np.ndarray) -> np.ndarray:
    """Number the labels by falling size, those of equal size by where they first occur; unused numbers disappear."""
    _, first, inverse, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(sizes), dtype=np.intp)
    rank[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return rank[inverse.ravel()]


def _majority(labels: np.ndarray, graph: sparse.csr_matrix) -> np.ndarray:
    """Return the most frequent label in each niche; a spot keeps its own where that is among the most frequent."""
    n, spots = int(labels.max()) + 1, np.arange(len(labels))
    one_hot = sparse.csr_matrix((np.ones(len(labels)), (spots, labels)), shape=(len(labels), n))
    votes = (graph @ one_hot).toarray()
    best = votes.max(axis=1)
    return np.where(votes[spots, labels] >= best, labels, votes.argmax(axis=1))
