"""The paper's model from the pretrained encoders a user has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stalign._logging import logger
from stalign._settings import settings
from stalign.models._checkpoint import ModelCard
from stalign.models._config import ModelConfig, PatchConfig, TokenConfig
from stalign.models._network import STAlign
from stalign.models._registry import config as named_config
from stalign.models.encoders._registry import build_image_encoder
from stalign.models.encoders._scgpt import ScGPT
from stalign.models.encoders._weights import fill_image_encoder, find_weights, stated_args

# Which eight sets the paper used is not published. These are signalling pathways, and their union has the 548 genes
# of the published network; 87 of the 1,081,575 choices of eight among the 25 sets shipped have that.
GENE_SETS = (
    "HALLMARK_APOPTOSIS",
    "HALLMARK_HEDGEHOG_SIGNALING",
    "HALLMARK_IL6_JAK_STAT3_SIGNALING",
    "HALLMARK_INTERFERON_ALPHA_RESPONSE",
    "HALLMARK_NOTCH_SIGNALING",
    "HALLMARK_PI3K_AKT_MTOR_SIGNALING",
    "HALLMARK_TGF_BETA_SIGNALING",
    "HALLMARK_WNT_BETA_CATENIN_SIGNALING",
)


def assemble(
    config: str | Path | ModelConfig = "paper",
    *,
    scgpt: str | Path | ScGPT,
    image_weights: str | Path | None = None,
    gene_sets: str | Path | Mapping[str, Sequence[str]] | Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
    min_coverage: float = 0.5,
    seed: int | None = None,
    revision: str | None = None,
    local_files_only: bool | None = None,
) -> STAlign:
    """Build the paper's model with its frozen encoders filled, ready to embed or to train.

    No weights of the paper's trained parts were ever published: ResNet-50, pathway transformer, tokens, fusion and
    heads start from random numbers drawn with ``seed``.

    Parameters
    ----------
    config
        A config whose spot gene encoder is ``"scgpt"`` and whose niche gene encoder is ``"pathway-transformer"``.
    scgpt
        Folder of a scGPT checkpoint (``args.json``, ``vocab.json``, ``best_model.pt``), or a loaded
        :class:`~stalign.models.encoders.ScGPT`.
    image_weights
        File or folder with the weights of the niche image encoder (UNI in the paper); ``None`` for the Hub. A
        ``config.json`` beside them may state another size of the same architecture.
    gene_sets
        A GMT file, ``{name: genes}``, or names among the hallmark sets shipped. ``None``: eight signalling pathways
        with 548 genes in their union, as many as the published network has. Every set is a token of the model.
    genes
        Vocabulary. ``None``: the genes of scGPT's vocabulary, and those of the sets that are not in it.
    min_coverage
        Least share of a gene set's genes that must be in the vocabulary.
    seed
        Of the parts that are not pretrained; ``None`` is ``stalign.settings.seed``.
    revision, local_files_only
        As in :func:`stalign.models.load`, for weights from the Hub.

    Returns
    -------
    The model in evaluation mode, on the CPU. :meth:`STAlign.save` writes the image encoder's weights, and of scGPT
    where it was and the SHA-256 of its file. A loaded model looks for it in the subfolder ``scgpt`` of its own folder,
    then where it was; anything but the same file is refused.

    Raises
    ------
    ValueError
        If the config has other encoders, files are damaged or do not fit, or a gene set is not covered.
    FileNotFoundError, PermissionError
        If weights are not there, or are gated and this machine has no access.

    Examples
    --------
    >>> import stalign as sta
    >>> model = sta.models.assemble("paper", image_weights="UNI", scgpt="scGPT_human")  # doctest: +SKIP
    >>> sta.tl.embed(adata, model=model)  # doctest: +SKIP
    """
    base = config if isinstance(config, ModelConfig) else named_config(config)
    _check_encoders(base)
    name = base.niche_image.encoder
    # What costs little is checked first: files are found before gigabytes are read.
    sets, stored = _resolve_sets(gene_sets)
    model_name = base.niche_image.args.get("model")
    weights, commit = find_weights(
        name, model_name, image_weights, revision=revision, local_files_only=local_files_only
    )
    image_args = {**stated_args(name, weights), **base.niche_image.args}
    scgpt = scgpt if isinstance(scgpt, ScGPT) else ScGPT.from_folder(scgpt)
    vocabulary = _vocabulary(scgpt, sets) if genes is None else tuple(genes)
    _check_coverage(scgpt, sets, vocabulary, min_coverage)
    full = _fit_config(base, image_args=image_args, scgpt=scgpt, sets=sets, stored=stored)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed if seed is None else seed)
        model = STAlign(full, vocabulary)
    fill_image_encoder(model.encoder("niche_image"), name, weights, commit=commit)
    model.encoder("spot_gene").attach(scgpt)
    model.card = _card(model)
    untrained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        "Assembled %r: %s and scGPT are pretrained, the other %s parameters are random until trained.",
        full.name,
        name,
        f"{untrained:,}",
    )
    return model.eval()


def _check_encoders(config: ModelConfig) -> None:
    for branch, encoder in (("spot_gene", "scgpt"), ("niche_gene", "pathway-transformer")):
        if config.branch(branch).encoder != encoder:
            raise ValueError(
                f"Config {config.name!r} has the encoder {config.branch(branch).encoder!r} in branch {branch}; "
                f"`assemble` is for configs with {encoder!r} there, such as 'paper'. Build others with "
                "`models.STAlign(config, genes)` and `load_encoder`."
            )


def _resolve_sets(
    gene_sets: str | Path | Mapping[str, Sequence[str]] | Sequence[str] | None,
) -> tuple[dict[str, tuple[str, ...]], Any]:
    """Return the sets, and what stands for them in the config: names of sets that are shipped, or the sets."""
    from stalign.genes import hallmark, read_gmt, select_sets

    if gene_sets is None or (not isinstance(gene_sets, (str, Path)) and not isinstance(gene_sets, Mapping)):
        names = list(GENE_SETS if gene_sets is None else gene_sets)
        return select_sets(hallmark(), names), names
    sets: Mapping[str, Sequence[str]] = gene_sets if isinstance(gene_sets, Mapping) else read_gmt(gene_sets)
    resolved = {str(name): tuple(dict.fromkeys(members)) for name, members in sets.items()}
    empty = [name for name, members in resolved.items() if not members]
    if empty or not resolved:
        raise ValueError(f"gene_sets must hold at least one gene each; empty: {empty or 'there are no sets at all'}.")
    return resolved, {name: list(members) for name, members in resolved.items()}


def _vocabulary(scgpt: ScGPT, sets: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Genes of scGPT, and those of the sets that it does not have."""
    return tuple(dict.fromkeys([*scgpt.genes, *(gene for members in sets.values() for gene in members)]))


def _check_coverage(scgpt: ScGPT, sets: Mapping[str, Sequence[str]], vocabulary: Sequence[str], minimum: float) -> None:
    from stalign.genes import gene_set_coverage

    coverage = gene_set_coverage(sets, vocabulary, minimum=minimum)
    known = set(scgpt.genes)
    n_known = sum(gene in known for gene in vocabulary)
    if not n_known:
        raise ValueError(
            f"None of the {len(vocabulary)} genes is in scGPT's vocabulary, e.g. {list(vocabulary[:3])}. It holds HGNC "
            "symbols; leave `genes` out to take them."
        )
    logger.info(
        "Vocabulary: %d genes, %d of them known to scGPT; %d of the %d genes of %d gene sets.",
        len(vocabulary),
        n_known,
        coverage.n_found,
        coverage.n_genes,
        len(sets),
    )


def _fit_tokens(tokens: TokenConfig, dim: int, width: int) -> TokenConfig:
    """Keep the published convolution, with the kernel that turns ``dim`` into ``width``; linear tokens if none does."""
    if tokens.kind != "conv" or (dim - tokens.kernel) // tokens.stride + 1 == width:
        return tokens
    if dim % width == 0:
        return TokenConfig("conv", kernel=dim // width, stride=dim // width)
    logger.info("%d features cannot become tokens of width %d by a convolution: the tokens are linear.", dim, width)
    return TokenConfig("linear")


def _fit_config(
    base: ModelConfig,
    *,
    image_args: Mapping[str, Any],
    scgpt: ScGPT,
    sets: Mapping[str, Sequence[str]],
    stored: Any,
) -> ModelConfig:
    """Fit the sizes of the config to the encoders and gene sets."""
    with torch.device("meta"):
        image = build_image_encoder(base.niche_image.encoder, **image_args)
    pixels = base.niche_patch.pixels if image.size is None else image.size
    n_genes = len({gene for members in sets.values() for gene in members})
    gene_args = {"n_pathways": len(sets), "n_genes": n_genes, "gene_sets": stored, "dim": base.width}
    return dataclasses.replace(
        base,
        niche_patch=PatchConfig(um=base.niche_patch.um, pixels=pixels),
        niche_image=dataclasses.replace(
            base.niche_image,
            args=dict(image_args),
            tokens=_fit_tokens(base.niche_image.tokens, image.dim, base.width),
        ),
        spot_gene=dataclasses.replace(
            base.spot_gene,
            args={**base.spot_gene.args, "dim": scgpt.dim},
            tokens=_fit_tokens(base.spot_gene.tokens, scgpt.dim, base.width),
        ),
        niche_gene=dataclasses.replace(base.niche_gene, args={**base.niche_gene.args, **gene_args}),
        n_tokens=len(sets),
    )


def _card(model: STAlign) -> ModelCard:
    name = model.config.niche_image.encoder
    licence = model.encoder("niche_image").licence or "not stated"
    return ModelCard(
        description=(
            f"The network of arXiv 2411.16793 with pretrained {name} and scGPT; its other parts are random until "
            "they are trained. scGPT's weights are not in this folder."
        ),
        licence_weights=f"those of {name} in this file: {licence}; mind its terms before you pass the folder on",
    )
