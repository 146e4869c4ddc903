"""Gene sets: the GMT format, and the hallmark sets that come with the package."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from stalign._validate import listing, near

GeneSets = Mapping[str, tuple[str, ...]]


class GeneSetCoverage(NamedTuple):
    """How much of the gene sets a vocabulary holds.

    Attributes
    ----------
    n_genes, n_found
        Genes in the union of the sets, and how many of them the vocabulary has.
    share
        Set → share of its genes that the vocabulary has.
    missing
        Genes of the union that the vocabulary lacks, sorted.
    """

    n_genes: int
    n_found: int
    share: dict[str, float]
    missing: tuple[str, ...]


def parse_gmt(text: str, *, what: str = "The GMT text") -> dict[str, tuple[str, ...]]:
    """Read gene sets from GMT text: a line per set, tab-separated: name, description, genes.

    Lines that are blank or start with ``#`` are skipped; a gene named twice in a set counts once.

    Parameters
    ----------
    text
        The content of a GMT file.
    what
        How messages call it.

    Returns
    -------
    Set → its genes, in the text's order.

    Raises
    ------
    ValueError
        For a line with fewer than three fields, a set with no name or no genes, a name used twice, or no set at all;
        the message names the line.

    Examples
    --------
    >>> from stalign.genes import parse_gmt
    >>> parse_gmt(chr(9).join(["T CELL", "markers", "CD3E", "CD2"]))
    {'T CELL': ('CD3E', 'CD2')}
    """
    sets: dict[str, tuple[str, ...]] = {}
    first_line: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split("\t")]
        name = fields[0]
        if not name:
            raise ValueError(f"{what}, line {number}: the gene set has no name.")
        if len(fields) < 2:
            raise ValueError(
                f"{what}, line {number}: {line[:60]!r} has no tabs. A GMT line is: name, description, gene, gene, … "
                "separated by tabs."
            )
        genes = tuple(dict.fromkeys(gene for gene in fields[2:] if gene))
        if not genes:
            raise ValueError(f"{what}, line {number}: gene set {name!r} is empty. Remove the line, or add its genes.")
        if name in sets:
            raise ValueError(f"{what}, line {number}: gene set {name!r} is there already, in line {first_line[name]}.")
        sets[name], first_line[name] = genes, number
    if not sets:
        raise ValueError(f"{what} holds no gene sets.")
    return sets


def read_gmt(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Read gene sets from a GMT file.

    Parameters
    ----------
    path
        Tab-separated text, a line per set: name, description, genes.

    Returns
    -------
    Set → its genes, in the file's order.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If a line is malformed, a set is empty, or a name occurs twice; the message names the line.

    Examples
    --------
    >>> from stalign.genes import read_gmt
    >>> gene_sets = read_gmt("my_sets.gmt")  # doctest: +SKIP
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"There is no GMT file {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). A GMT file is tab-separated text.") from error
    return parse_gmt(text, what=str(path))


@cache
def hallmark() -> GeneSets:
    """Return 25 of the MSigDB hallmark gene sets, name → symbols (Liberzon et al. 2015; MSigDB, CC BY 4.0).

    Returns
    -------
    Set → its gene symbols; read-only.

    Examples
    --------
    >>> from stalign.genes import hallmark
    >>> "HALLMARK_ANGIOGENESIS" in hallmark()
    True
    """
    text = files("stalign.genes").joinpath("_data", "hallmark.gmt").read_text(encoding="utf-8")
    return MappingProxyType(parse_gmt(text, what="hallmark.gmt"))


def select_sets(gene_sets: GeneSets, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the named sets, in the order of ``names``.

    Parameters
    ----------
    gene_sets
        Set → genes.
    names
        Which of them; a string is one name.

    Returns
    -------
    Set → its genes.

    Raises
    ------
    ValueError
        For a name that does not exist (with the nearest that does), one named twice, or none at all.

    Examples
    --------
    >>> from stalign.genes import hallmark, select_sets
    >>> list(select_sets(hallmark(), ["HALLMARK_HYPOXIA", "HALLMARK_ANGIOGENESIS"]))
    ['HALLMARK_HYPOXIA', 'HALLMARK_ANGIOGENESIS']
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in gene_sets:
            raise ValueError(f"Unknown gene set {name!r}.{near(name, gene_sets)} Available: {listing(gene_sets)}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Gene sets must be named once each, and at least one; got {listing(names)}.")
    return {name: tuple(gene_sets[name]) for name in names}


def gene_set_coverage(
    gene_sets: Mapping[str, Sequence[str]], vocabulary: Collection[str], *, minimum: float = 0.5
) -> GeneSetCoverage:
    """Check how much of the gene sets a vocabulary holds.

    Parameters
    ----------
    gene_sets
        Set → genes.
    vocabulary
        Gene symbols.
    minimum
        Least share of a set's genes that must be there.

    Returns
    -------
    :class:`GeneSetCoverage`.

    Raises
    ------
    ValueError
        If a set has a smaller share in the vocabulary; the message names the sets with the least.

    Examples
    --------
    >>> from stalign.genes import gene_set_coverage
    >>> gene_set_coverage({"T cell": ["CD3E", "CD2"]}, ["CD3E", "CD2", "ERBB2"]).share
    {'T cell': 1.0}
    """
    known = set(vocabulary)
    share = {name: sum(gene in known for gene in genes) / max(len(genes), 1) for name, genes in gene_sets.items()}
    low = sorted((name for name, value in share.items() if value < minimum), key=lambda name: share[name])
    if low:
        raise ValueError(
            f"{len(low)} of {len(share)} gene sets have less than {minimum:.0%} of their genes in the vocabulary of "
            f"{len(known)} genes, e.g. {low[0]!r} with {share[low[0]]:.0%}. Check that both use gene symbols, leave "
            f"these sets out, or lower `minimum`: {listing(low)}."
        )
    union = sorted({gene for genes in gene_sets.values() for gene in genes})
    missing = tuple(gene for gene in union if gene not in known)
    return GeneSetCoverage(len(union), len(union) - len(missing), share, missing)
