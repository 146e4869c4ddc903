"""scGPT's zero-shot cell embedding in plain PyTorch.

Facts on the checkpoints and the embedding: Cui et al., Nature Methods 21:1470 (2024) and its public code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from scipy import sparse
from torch import nn

from stalign._logging import logger
from stalign._settings import settings
from stalign._validate import check_choice, check_positive, listing, near
from stalign.models._config import Provenance
from stalign.models.encoders._base import GeneEncoder

Binning = Literal["upper", "middle", "lower", "random"]

N_BINS = 51
MAX_LENGTH = 1200
_MAX_VALUE = 512.0
_CELLS_PER_BLOCK = 8192
_SPECIALS = ("<pad>", "<cls>", "<eoc>")
# Heads for other tasks, and the flag of generative pretraining: the cell embedding does not pass through them.
_UNUSED = ("decoder.", "mvc_decoder.", "cls_decoder.", "flag_encoder.")
_REFUSED = ("bn.", "dsbn.")


class ScGPTReport(NamedTuple):
    """What :meth:`ScGPT.embed` met.

    Attributes
    ----------
    n_cells
        Cells embedded.
    n_genes, n_known_genes
        Genes given, and how many of them are in the vocabulary.
    n_empty
        Cells with no count of a known gene; their rows are zero.
    n_sampled
        Cells with more genes than fit, of which a sample was taken.
    """

    n_cells: int
    n_genes: int
    n_known_genes: int
    n_empty: int
    n_sampled: int


# -- tokens ----------------------------------------------------------------------------------------------------------


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 numbers (the finaliser of SplitMix64), so that nearby inputs give unrelated outputs."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


class Tokens(NamedTuple):
    """The non-zero known genes of all cells, cell after cell: ``indptr`` as in a CSR matrix."""

    indptr: np.ndarray
    ids: np.ndarray
    values: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.indptr)

    @property
    def cells(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.indptr) - 1), self.lengths)


def _random_numbers(tokens: Tokens, counts: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """One uint64 per token that depends on the seed, the cell's content and the gene, and on nothing else.

    Neither the order of cells or genes, nor how cells are batched, nor the number of workers can change it. Cells of
    equal content get equal numbers.
    """
    bits = counts.astype(np.float64).view(np.uint64)
    token_key = _mix(_mix(tokens.ids.astype(np.uint64)) ^ bits)
    cell_key = np.zeros(len(tokens.indptr) - 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        np.add.at(cell_key, tokens.cells, token_key)
    # seeds and streams are few and small: one number holds both
    salt = _mix(np.array([np.uint64(seed) * np.uint64(8) + np.uint64(stream)], dtype=np.uint64))
    return _mix(token_key ^ _mix(cell_key ^ salt)[tokens.cells])


def _edges_below(values: np.ndarray, starts: np.ndarray, rank: np.ndarray, n: np.ndarray, n_edges: int) -> np.ndarray:
    """Say (0 or 1) for which groups of ties a quantile that should equal their value lies just below it.

    ``numpy.quantile`` works in floating point: a level that falls exactly on a sorted value may miss it by a rounding
    error, so that this edge, too, is smaller than the value. It is computed here as numpy does.

    Parameters
    ----------
    values, rank, n
        Sorted values of all cells, their ranks in their cells, and the cells' lengths.
    starts
        Where in ``values`` the groups begin.
    n_edges
        Number of edges less one.
    """
    first, n_minus_1 = rank[starts], n[starts] - 1
    edge, remainder = np.divmod(n_edges * first, np.maximum(n_minus_1, 1))
    meets = (remainder == 0) & (edge > 0) & (edge < n_edges)
    position = n_minus_1 * np.linspace(0, 1, n_edges + 1)[np.minimum(edge, n_edges)]
    share = position - np.floor(position)
    value, before = values[starts], values[np.maximum(starts - 1, 0)]
    quantile = value - (value - before) * (1 - share)
    return (meets & (position < first) & (quantile < value)).astype(np.int64)


def bin_values(
    tokens: Tokens, *, n_bins: int = N_BINS, binning: Binning = "upper", random: np.ndarray | None = None
) -> np.ndarray:
    """Bin the values of each cell by its own quantiles, to 1 … n_bins - 1.

    A value that occupies the sorted ranks j0 … j1 of n falls between the bins floor((b - 2) j1 / (n - 1)) + 1 and
    ceil((b - 2) j0 / (n - 1)) + 1: scGPT draws one of them at random, which makes its embeddings differ from run to
    run. ``"upper"`` (its ``numpy.digitize``), ``"middle"`` and ``"lower"`` are fixed conventions. The bins are those of
    ``numpy.quantile`` to the last one, see :func:`_edges_below`.

    Returns
    -------
    (n_tokens,) float32.
    """
    n_edges = n_bins - 2
    order = np.lexsort((tokens.values, tokens.cells))
    cells, values = tokens.cells[order], tokens.values[order]
    rank = np.arange(len(order)) - tokens.indptr[cells]
    n = tokens.lengths[cells]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (cells[1:] != cells[:-1]) | (values[1:] != values[:-1])
    group = np.cumsum(is_first) - 1
    starts = np.flatnonzero(is_first)
    first = rank[starts][group] if len(order) else rank
    last_of_group = np.append(starts[1:], len(order)) - 1
    last = rank[last_of_group][group] if len(order) else rank
    span = np.maximum(n - 1, 1)
    upper = n_edges * last // span + 1
    below = -(-n_edges * first // span) + _edges_below(values, starts, rank, n, n_edges)[group]
    lower = np.minimum(upper, below + 1)
    # A single value is the minimum and the maximum at once: every bin is possible.
    upper, lower = np.where(n == 1, n_bins - 1, upper), np.where(n == 1, 1, lower)
    if binning == "upper":
        digits = upper
    elif binning == "lower":
        digits = lower
    elif binning == "middle":
        digits = (lower + upper) // 2
    else:
        if random is None:
            raise ValueError("Random binning needs random numbers.")
        share = (random[order] >> np.uint64(11)).astype(np.float64) / 2.0**53
        digits = lower + np.floor(share * (upper - lower + 1)).astype(lower.dtype)
    result = np.empty(len(order), dtype=np.float32)
    result[order] = digits
    return result


def _sample(tokens: Tokens, random: np.ndarray, limit: int) -> np.ndarray:
    """Numbers of the tokens kept: all of a cell's, or the ``limit`` with the smallest random numbers, in order."""
    order = np.lexsort((random, tokens.cells))
    rank = np.arange(len(order)) - tokens.indptr[tokens.cells]  # lexsort keeps the cells' stretches
    return np.sort(order[rank < limit])


# -- network ---------------------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    """A post-norm transformer layer with ReLU."""

    def __init__(self, width: int, heads: int, feedforward: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, *, only_first: bool) -> torch.Tensor:
        """Map (n, T, width) to the same, or to (n, 1, width) when only the first token is wanted."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if only_first:
            q, x = q[:, :, :1], x[:, :1]
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.norm1(x + self.out_proj(attended.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.linear2(nn.functional.relu(self.linear1(x))))


class _Network(nn.Module):
    def __init__(self, n_tokens: int, width: int, heads: int, feedforward: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, width)
        self.embedding_norm = nn.LayerNorm(width)
        self.value1 = nn.Linear(1, width)
        self.value2 = nn.Linear(width, width)
        self.value_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(_Layer(width, heads, feedforward) for _ in range(layers))

    def forward(self, ids: torch.Tensor, values: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """Return the (n, width) state of the first token, which stands for the cell."""
        value = self.value2(nn.functional.relu(self.value1(values.clamp(max=_MAX_VALUE).unsqueeze(-1))))
        x = self.embedding_norm(self.embedding(ids)) + self.value_norm(value)
        mask = None if padding is None else ~padding[:, None, None, :]
        for number, layer in enumerate(self.layers):
            # Nothing but the first token is read after the last layer.
            x = layer(x, mask, only_first=number == len(self.layers) - 1)
        return x[:, 0]


def _official_names(layers: int) -> dict[str, str]:
    """Our names → those of the checkpoint, attention in PyTorch's naming."""
    names = {
        "embedding.weight": "encoder.embedding.weight",
        **{f"embedding_norm.{p}": f"encoder.enc_norm.{p}" for p in ("weight", "bias")},
        **{f"value{k}.{p}": f"value_encoder.linear{k}.{p}" for k in (1, 2) for p in ("weight", "bias")},
        **{f"value_norm.{p}": f"value_encoder.norm.{p}" for p in ("weight", "bias")},
    }
    for number in range(layers):
        prefix = f"transformer_encoder.layers.{number}"
        for p in ("weight", "bias"):
            names[f"layers.{number}.qkv.{p}"] = f"{prefix}.self_attn.in_proj_{p}"
            names[f"layers.{number}.out_proj.{p}"] = f"{prefix}.self_attn.out_proj.{p}"
            names |= {
                f"layers.{number}.{part}.{p}": f"{prefix}.{part}.{p}"
                for part in ("linear1", "linear2", "norm1", "norm2")
            }
    return names


def _rename(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Bring the three namings of the attention projection to one; the content is the same."""
    renamed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = key.replace("self_attn._impl.", "self_attn.").replace("self_attn.Wqkv.", "self_attn.in_proj_")
        if name in renamed:
            raise ValueError(f"The checkpoint holds {name!r} twice, in two namings ({key!r}). It is not a scGPT file.")
        renamed[name] = value
    return renamed


# -- files -----------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}. A scGPT checkpoint is a folder with args.json, vocab.json and "
            "best_model.pt."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). It is truncated or corrupt.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = _read_json(path)
    bad = [token for token, number in vocab.items() if isinstance(number, bool) or not isinstance(number, int)]
    if bad:
        raise ValueError(f"{path} must map tokens to whole numbers; these are not: {listing(bad, 5)}.")
    if not vocab:
        raise ValueError(f"{path} holds no tokens.")
    numbers = sorted(vocab.values())
    wrong = [place for place, number in enumerate(numbers) if number != place]
    if wrong:
        raise ValueError(
            f"The {len(vocab)} token ids of {path} must be 0 … {len(vocab) - 1}, each once; there is a gap or a repeat "
            f"at id {wrong[0]} (found {numbers[wrong[0]]}). The file is damaged or was edited."
        )
    for special in _SPECIALS:
        vocab.setdefault(special, len(vocab))
    return vocab


def _read_args(path: Path) -> dict[str, Any]:
    args = _read_json(path)
    needed = ("embsize", "nheads", "d_hid", "nlayers")
    absent = [key for key in needed if key not in args]
    if absent:
        raise ValueError(f"{path} lacks {listing(absent)}.{near(absent[0], args)} It must describe a scGPT model.")
    for key in needed:
        check_positive(f"{path}: {key}", args[key], integer=True)
    if args["embsize"] % args["nheads"]:
        raise ValueError(f"{path}: embsize {args['embsize']} is not a multiple of nheads {args['nheads']}.")
    return args


def _check_matrix(counts: Any, n_genes: int) -> sparse.csr_matrix:
    """Return counts as a CSR matrix without repeated entries, or say what is wrong with them."""
    if not sparse.issparse(counts):
        counts = np.asarray(counts)
        if counts.ndim != 2 or counts.dtype.kind not in "buif":
            raise ValueError(
                f"counts must be a (n_cells, n_genes) matrix of numbers, got shape {counts.shape} of {counts.dtype}."
            )
        if counts.dtype == np.float16:  # SciPy has no sparse matrices of it
            counts = counts.astype(np.float32)
    matrix = sparse.csr_matrix(counts)
    if not matrix.has_canonical_format:
        matrix = matrix.copy()  # the caller's matrix keeps its entries as they are
        matrix.sum_duplicates()
    if matrix.shape[1] != n_genes:
        raise ValueError(f"counts has {matrix.shape[1]} columns, but {n_genes} gene names were given.")
    if not np.isfinite(matrix.data).all():
        raise ValueError("counts holds NaN or infinite values.")
    negative = int((matrix.data < 0).sum())
    if negative:
        raise ValueError(
            f"counts holds {negative} negative values (smallest {matrix.data.min():g}). Pass raw or log-normalised "
            "counts, not scaled ones."
        )
    return matrix


class ScGPT(nn.Module):
    """scGPT as a frozen cell encoder: counts → (n, embsize) embeddings of unit norm.

    Made by :meth:`from_folder`. The cell's embedding is the final state of the ``<cls>`` token (Cui et al. 2024).

    Attributes
    ----------
    dim
        Width of the embedding (512 for the public models).
    vocab
        Token → id.
    report
        The :class:`ScGPTReport` of the last :meth:`embed`.
    provenance
        Folder and SHA-256 of ``best_model.pt``.

    Examples
    --------
    >>> from stalign.models.encoders import ScGPT
    >>> scgpt = ScGPT.from_folder("scGPT_human")  # doctest: +SKIP
    >>> X = scgpt.embed(adata.X, adata.var_names)  # doctest: +SKIP
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        *,
        dim: int,
        heads: int,
        feedforward: int,
        layers: int,
        pad_token: str = "<pad>",  # noqa: S107 - a token of the vocabulary
        pad_value: float = -2.0,
    ) -> None:
        super().__init__()
        self.vocab = dict(vocab)
        self.dim = dim
        self.pad_id = self.vocab[pad_token]
        self.cls_id = self.vocab["<cls>"]
        self.pad_value = float(pad_value)
        self.network = _Network(len(self.vocab), dim, heads, feedforward, layers)
        self.report: ScGPTReport | None = None
        self.provenance: Provenance | None = None

    @property
    def genes(self) -> tuple[str, ...]:
        """Gene names of the vocabulary in the order of their ids; special tokens, in angle brackets, are left out."""
        tokens = sorted(self.vocab, key=self.vocab.__getitem__)
        return tuple(t for t in tokens if t.strip() and not (t.startswith("<") and t.endswith(">")))

    @classmethod
    def from_folder(cls, path: str | Path) -> ScGPT:
        """Read ``args.json``, ``vocab.json`` and ``best_model.pt`` (no pickled code is executed).

        Raises
        ------
        FileNotFoundError
            If one of the files is not there.
        ValueError
            If one is damaged, the vocabulary has gaps, a needed weight is missing or has another shape than
            ``args.json`` says, or there are weights that would change the embedding and are not supported
            (``bn.*``, ``dsbn.*``).
        """
        from stalign.models._checkpoint import check_finite, check_state, sha256
        from stalign.models._torchfile import read_torch, unwrap

        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}. A scGPT checkpoint is a folder with best_model.pt.")
        args = _read_args(folder / "args.json")
        vocab = _read_vocab(folder / "vocab.json")
        pad_token = args.get("pad_token", "<pad>")
        if pad_token not in vocab:
            raise ValueError(f"{folder / 'vocab.json'} has no pad token {pad_token!r}.")
        file = folder / "best_model.pt"
        state = _rename(unwrap(read_torch(file), what=str(file)))
        refused = [key for key in state if key.startswith(_REFUSED)]
        if refused:
            raise ValueError(
                f"{file} holds {listing(refused, 4)}: a batch normalisation of the input, which changes the embedding "
                "and is not supported. Use a checkpoint without it, such as the whole-human one."
            )
        rows = state["encoder.embedding.weight"].shape[0] if "encoder.embedding.weight" in state else len(vocab)
        if rows != len(vocab):
            raise ValueError(f"{file} has embeddings of {rows} tokens, but {folder / 'vocab.json'} names {len(vocab)}.")
        with torch.random.fork_rng(devices=[]):
            model = cls(
                vocab,
                dim=args["embsize"],
                heads=args["nheads"],
                feedforward=args["d_hid"],
                layers=args["nlayers"],
                pad_token=pad_token,
                pad_value=args.get("pad_value", -2),
            )
        names = _official_names(args["nlayers"])
        own = model.network.state_dict()
        needed = {names[key]: value for key, value in own.items()}
        used = {key: value for key, value in state.items() if not key.startswith(_UNUSED)}
        check_state(used, needed, what=f"{file} with args.json (embsize {args['embsize']}, nlayers {args['nlayers']})")
        check_finite(used, file)
        model.network.load_state_dict({key: used[names[key]] for key in own}, strict=True)
        digest = sha256(file)
        model.provenance = Provenance("scgpt", digest[:12], digest, str(folder.resolve()))
        return model.eval().requires_grad_(False)

    def _gene_ids(self, gene_names: Sequence[str]) -> np.ndarray:
        """Token of each gene; -1 where the vocabulary has none. Special tokens are no genes."""
        names = [str(name) for name in gene_names]
        return np.array([-1 if name in _SPECIALS else self.vocab.get(name, -1) for name in names], dtype=np.int64)

    @staticmethod
    def _tokens(matrix: sparse.csr_matrix, ids: np.ndarray) -> Tokens:
        """Non-zero counts of known genes."""
        values = matrix.data.astype(np.float64)
        known = (ids[matrix.indices] >= 0) & (values != 0)
        cells = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))[known]
        indptr = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=matrix.shape[0]))])
        return Tokens(indptr, ids[matrix.indices[known]], values[known])

    def embed(
        self,
        counts: Any,
        gene_names: Sequence[str],
        *,
        batch_size: int = 64,
        binning: Binning = "upper",
        seed: int = 0,
        max_length: int = MAX_LENGTH,
        n_bins: int = N_BINS,
        normalise: bool = True,
        progress: bool | None = None,
    ) -> np.ndarray:
        """Embed cells or spots.

        Parameters
        ----------
        counts
            (n, n_genes) array or sparse matrix; raw or log-normalised gives the same, since values are binned by rank.
        gene_names
            (n_genes,) symbols; matched exactly. Names outside the vocabulary are left out.
        batch_size
            Cells in one forward pass. Cells are sorted by length, so that little is padded. Neither this nor the order
            of cells and genes changes the result beyond rounding.
        binning
            What a tied value becomes: ``"upper"`` (default), ``"middle"``, ``"lower"`` are deterministic; ``"random"``
            draws as the original does, with ``seed``.
        seed
            Of random binning, and of the sample taken from cells with more than ``max_length - 1`` genes. The random
            numbers come from the seed, the cell's content and the gene, hence cells of equal content are treated
            alike.
        max_length
            Longest sequence, ``<cls>`` included.
        n_bins
            Number of bins, the one of zero included.
        normalise
            Whether rows are divided by their norm.
        progress
            Show a progress bar; ``None`` is ``stalign.settings.progress``.

        Returns
        -------
        (n, dim) float32. Rows of cells with no count of a known gene are zero; ``report`` counts them.
        """
        check_choice("binning", binning, get_args(Binning))
        check_positive("batch_size", batch_size, integer=True)
        if check_positive("max_length", max_length, integer=True) < 2:
            raise ValueError(f"max_length must be at least 2 (<cls> and a gene), got {max_length}.")
        if check_positive("n_bins", n_bins, integer=True) < 3:
            raise ValueError(f"n_bins must be at least 3, got {n_bins}.")
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**60:
            raise ValueError(f"seed must be a whole number >= 0, got {seed!r}.")
        from tqdm.auto import tqdm

        hidden = not (settings.progress if progress is None else progress)
        matrix, ids = _check_matrix(counts, len(gene_names)), self._gene_ids(gene_names)
        n_known = int((ids >= 0).sum())
        if n_known == 0:
            raise ValueError(
                f"None of the {len(gene_names)} gene names is in scGPT's vocabulary, e.g. "
                f"{listing(list(gene_names), 3)}. It holds HGNC symbols, not Ensembl ids; matching is case sensitive."
            )
        result = np.zeros((matrix.shape[0], self.dim), dtype=np.float32)
        n_empty = n_sampled = 0
        with tqdm(total=matrix.shape[0], unit="cell", desc="scGPT", disable=hidden) as bar:
            # In blocks, so that the tokens of a million cells need not be held at once.
            for start in range(0, matrix.shape[0], _CELLS_PER_BLOCK):
                block = slice(start, start + _CELLS_PER_BLOCK)
                tokens = self._tokens(matrix[block], ids)
                random = _random_numbers(tokens, tokens.values, int(seed), 0) if binning == "random" else None
                values = bin_values(tokens, n_bins=n_bins, binning=binning, random=random)
                # Binned before sampling, as the original does.
                tokens, n_long = self._shorten(tokens._replace(values=values), tokens.values, int(seed), max_length)
                result[block] = self._run(tokens, batch_size, normalise=normalise, done=bar.update)
                n_empty, n_sampled = n_empty + int((tokens.lengths == 0).sum()), n_sampled + n_long
        self.report = ScGPTReport(len(result), len(gene_names), n_known, n_empty, n_sampled)
        if n_empty:
            logger.warning(
                "%d of %d cells have no count of a gene that scGPT knows; their rows are zero.", n_empty, len(result)
            )
        return result

    @staticmethod
    def _shorten(tokens: Tokens, counts: np.ndarray, seed: int, max_length: int) -> tuple[Tokens, int]:
        limit = max_length - 1
        n_long = int((tokens.lengths > limit).sum())
        if n_long == 0:
            return tokens, 0
        kept = _sample(tokens, _random_numbers(tokens, counts, seed, 1), limit)
        indptr = np.concatenate([[0], np.cumsum(np.minimum(tokens.lengths, limit))])
        return Tokens(indptr, tokens.ids[kept], tokens.values[kept]), n_long

    def _batch(self, tokens: Tokens, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pad some cells to (n, T): ids, values and what is padding."""
        lengths = tokens.lengths[cells]
        place = np.arange(1, lengths.max() + 1)
        padding = place[None] > lengths[:, None]
        source = np.where(padding, 0, tokens.indptr[cells][:, None] + place[None] - 1)
        ids = np.where(padding, self.pad_id, tokens.ids[source])
        values = np.where(padding, self.pad_value, tokens.values[source])
        first = np.ones((len(cells), 1))
        return (
            np.hstack([first.astype(np.int64) * self.cls_id, ids]),
            np.hstack([first * self.pad_value, values]).astype(np.float32),
            np.hstack([first < 0, padding]),
        )

    def _run(self, tokens: Tokens, batch_size: int, *, normalise: bool, done: Callable[[int], Any]) -> np.ndarray:
        result = np.zeros((len(tokens.indptr) - 1, self.dim), dtype=np.float32)
        order = np.argsort(-tokens.lengths, kind="stable")
        order = order[tokens.lengths[order] > 0]
        done(len(result) - len(order))
        device = self.network.embedding.weight.device
        was_training = self.training
        self.eval()
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                cells = order[start : start + batch_size]
                ids, values, padding = self._batch(tokens, cells)
                embedding = self.network(
                    torch.from_numpy(ids).to(device),
                    torch.from_numpy(values).to(device),
                    torch.from_numpy(padding).to(device) if padding.any() else None,
                )
                embedding = nn.functional.normalize(embedding.float(), dim=-1) if normalise else embedding.float()
                result[cells] = embedding.cpu().numpy()
                done(len(cells))
        self.train(was_training)
        return result


class ScGPTEmbedding(GeneEncoder):
    """The published spot gene branch: frozen scGPT embeddings, computed ahead of the network.

    The network's input is the embedding itself; :meth:`preprocess` makes it with the scGPT checkpoint that
    :meth:`attach` names. scGPT's own weights are no part of the ST-Align checkpoint, which records their SHA-256 and
    folder: a model that was saved with a checkpoint attached finds it again, in the subfolder ``scgpt`` of the model's
    folder or where it was.

    Parameters
    ----------
    dim
        Width of the embedding.
    """

    _place: torch.Tensor
    runs_network = True

    def __init__(self, *, vocabulary: Sequence[str] = (), dim: int = 512) -> None:
        super().__init__(vocabulary=vocabulary)
        self.dim = self.input_dim = check_positive("dim", dim, integer=True)
        self._scgpt: list[ScGPT] = []  # in a list, so that its weights stay out of the state dict
        # Follows the model from device to device.
        self.register_buffer("_place", torch.empty(0), persistent=False)

    def attach(self, scgpt: ScGPT | str | Path, *, other: bool = False) -> None:
        """Name the scGPT checkpoint (or its folder) that :meth:`preprocess` embeds with.

        Parameters
        ----------
        scgpt
            A loaded :class:`ScGPT` or its folder.
        other
            Allow a checkpoint other than the one the model was saved with.

        Raises
        ------
        ValueError
            If its width is not the model's, or its weights are not those the model was saved with.
        """
        scgpt = scgpt if isinstance(scgpt, ScGPT) else ScGPT.from_folder(scgpt)
        if scgpt.dim != self.dim:
            raise ValueError(f"The scGPT checkpoint embeds to {scgpt.dim} numbers, this model takes {self.dim}.")
        wanted = "" if self.provenance is None else self.provenance.sha256
        given = "" if scgpt.provenance is None else scgpt.provenance.sha256
        if wanted and given != wanted and not other:
            raise ValueError(
                f"This is not the scGPT checkpoint the model was saved with: best_model.pt has SHA-256 {given or '?'}, "
                f"recorded {wanted}. Its embeddings would mean something else to the model. Attach the recorded one, "
                "or pass `other=True` if you mean it."
            )
        self._scgpt, self.provenance = [scgpt], scgpt.provenance

    def _attached(self) -> ScGPT:
        """Return the attached checkpoint, or the recorded one where it is still there."""
        if not self._scgpt and self.provenance is not None and Path(self.provenance.folder).is_dir():
            self.attach(self.provenance.folder)
        if not self._scgpt:
            recorded = self.provenance
            lost = f" The one it was saved with is not in {recorded.folder} any more." if recorded is not None else ""
            raise ValueError(
                f"This model takes scGPT embeddings, and no scGPT checkpoint is attached.{lost} Call "
                "`model.encoder('spot_gene').attach('path/to/scGPT_human')`; the folder holds args.json, vocab.json "
                "and best_model.pt."
            )
        return self._scgpt[0]

    def preprocess(
        self,
        counts: sparse.csr_matrix,
        *,
        connectivities: sparse.csr_matrix | None = None,
        library: np.ndarray | None = None,
        statistics: Any = None,
    ) -> np.ndarray:
        """Embed counts over the vocabulary (their niche means with ``connectivities``) with the attached scGPT."""
        scgpt = self._attached()
        matrix = counts if connectivities is None else connectivities @ counts
        before, here = scgpt.network.embedding.weight.device, self._place.device
        # Moved outside any inference mode: its weights would come back as tensors that nothing else may use.
        with torch.inference_mode(False):
            try:
                return scgpt.to(here).embed(matrix, self.vocabulary)
            finally:
                scgpt.to(before)

    def prompt(self, gene_index: np.ndarray) -> np.ndarray:
        """Embed a cell in which only these genes are expressed."""
        cell = np.zeros((1, len(self.vocabulary)), dtype=np.float32)
        cell[0, np.asarray(gene_index)] = 1.0
        return self.preprocess(sparse.csr_matrix(cell))[0]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return the embeddings as they are."""
        return values
