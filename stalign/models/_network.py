"""The ST-Align network: four branches, a fusion network per scale, heads. Written once for every config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from stalign._logging import logger
from stalign._validate import check_choice, listing
from stalign.models._config import BRANCHES, BranchConfig, Geometry, ModelConfig, Provenance
from stalign.models._familiarity import Familiarity
from stalign.models._fusion import ABFN
from stalign.models._gene_inputs import GeneInputs
from stalign.models._heads import GenePrediction, ProjectionHead
from stalign.models._tokens import build_tokens
from stalign.models.encoders._base import GeneEncoder, ImageEncoder
from stalign.models.encoders._registry import build_gene_encoder, build_image_encoder, find_image_encoder

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from stalign.models._checkpoint import ModelCard
    from stalign.models._summary import Summary


class STAlignOutput(NamedTuple):
    """What the network returns; a field is ``None`` where its input was absent.

    Attributes
    ----------
    spot_image, spot_gene
        (n, out) the aligned pair of the spots.
    niche_image, niche_gene
        (n, out) the aligned pair of the niches, or (n, n_tokens, width) tokens where ``heads.niche`` is False.
    spot, niche
        (n, out) fused embeddings. With one modality absent they are made as ``config.missing`` says.
    """

    spot_image: torch.Tensor | None
    spot_gene: torch.Tensor | None
    niche_image: torch.Tensor | None
    niche_gene: torch.Tensor | None
    spot: torch.Tensor | None
    niche: torch.Tensor | None

    @property
    def image(self) -> torch.Tensor | None:
        """The image side of spot and niche, joined by ``join_scales``; (n, d), unit norm."""
        return join_scales(self.spot_image, self.niche_image)

    @property
    def gene(self) -> torch.Tensor | None:
        """The gene side of spot and niche, joined by ``join_scales``; (n, d), unit norm."""
        return join_scales(self.spot_gene, self.niche_gene)


def join_scales(spot: torch.Tensor | None, niche: torch.Tensor | None) -> torch.Tensor | None:
    """Join the embeddings of spot and niche to one unit vector; ``None`` where either is absent.

    Both are scaled to unit norm first, so that the cosine of two joined vectors is the mean of the cosines of the two
    scales.
    """
    if spot is None or niche is None:
        return None
    halves = [nn.functional.normalize(embedding.flatten(1).float(), dim=-1) for embedding in (spot, niche)]
    return nn.functional.normalize(torch.cat(halves, dim=-1), dim=-1)


class Branch(nn.Module):
    """An encoder and its tokeniser: data of one kind → (n, n_tokens, width)."""

    def __init__(self, name: str, config: BranchConfig, *, genes: Sequence[str], n_tokens: int, width: int) -> None:
        super().__init__()
        self.name = name
        self.is_image = name.endswith("image")
        self.frozen = config.frozen
        self.encoder: ImageEncoder | GeneEncoder = (
            build_image_encoder(config.encoder, **config.args)
            if self.is_image
            else build_gene_encoder(config.encoder, vocabulary=genes, **config.args)
        )
        self.tokens = build_tokens(
            config.tokens,
            dim=self.encoder.dim,
            encoder_tokens=self.encoder.n_tokens,
            n_tokens=n_tokens,
            width=width,
        )
        if self.frozen:
            for module in self.encoder.frozen_modules():
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> Branch:
        """Set the mode; frozen parts stay in evaluation mode, so that their statistics and dropout do not move."""
        super().train(mode)
        if self.frozen:
            for module in self.encoder.frozen_modules():
                module.eval()
        return self

    def _check(self, x: torch.Tensor) -> bool:
        """Check the input; True if it holds the encoder's features already."""
        if not x.is_floating_point():
            raise ValueError(f"{self.name} must be a floating-point tensor, as `preprocess` makes it; got {x.dtype}.")
        encoder = self.encoder
        if self.is_image:
            is_features = x.ndim == 2 and encoder.n_tokens is None and x.shape[1] == encoder.dim
            if is_features or (x.ndim == 4 and x.shape[1] == 3):
                return is_features
            expected = f"(n, 3, height, width), or features (n, {encoder.dim})"
        else:
            input_dim = encoder.input_dim  # type: ignore[union-attr]
            if x.ndim == 2 and x.shape[1] == input_dim:
                return False
            expected = f"(n, {input_dim})"
        raise ValueError(f"{self.name} must have shape {expected}, got {tuple(x.shape)}.")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the encoder's input to (n, n_tokens, width).

        An image branch also takes (n, dim) features that its encoder made earlier, so that a frozen encoder runs once.
        """
        return self.tokens(self.encode(x))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Map the encoder's input to its features, or pass on an image's features that were made earlier."""
        return x if self._check(x) else self.encoder(x)


class STAlign(nn.Module):
    """Histology and gene expression of spots and niches in one space.

    The weights are *untrained* until a checkpoint is loaded (:func:`stalign.models.load`) or the model is trained.

    Parameters
    ----------
    config
        What the model is made of, a :class:`~stalign.models.ModelConfig`.
    genes
        Vocabulary: the gene symbols whose counts the gene encoders take, in order.

    Attributes
    ----------
    config
        The config, with the colour normalisation of the image encoders filled in.
    genes
        The vocabulary, a tuple of symbols.
    provenance
        Name, revision and SHA-256 of the loaded weights.
    card
        What the model card says (description and licences), or ``None``.

    Examples
    --------
    >>> from stalign import models
    >>> model = models.load("stalign-mini")  # doctest: +SKIP
    """

    def __init__(self, config: ModelConfig, genes: Sequence[str] = ()) -> None:
        super().__init__()
        self.genes = _check_genes(genes)
        self.branches = nn.ModuleDict()
        for name in BRANCHES:
            try:
                self.branches[name] = Branch(
                    name, config.branch(name), genes=self.genes, n_tokens=config.n_tokens, width=config.width
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"config.{name}: {error}") from error
        filled = {name: {"args": self.encoder(name).resolved_args()} for name in BRANCHES}
        self.config = config.updated(filled)
        self.spot_fusion = ABFN(config.width, config.fusion)
        self.niche_fusion = ABFN(config.width, config.fusion)
        with_head = ["spot_image", "spot_gene", "spot", "niche"]
        if config.heads.niche:
            with_head += ["niche_image", "niche_gene"]
        self.heads = nn.ModuleDict(
            {name: ProjectionHead(config.n_tokens, config.width, config.heads) for name in with_head}
        )
        if config.bypass:
            self._start_at_bypass()
        self.missing_tokens = nn.ParameterDict()
        if config.missing == "tokens":
            for name in BRANCHES:
                self.missing_tokens[name] = nn.Parameter(torch.randn(config.n_tokens, config.width) * 0.02)
        self.prediction = None if config.prediction is None else GenePrediction(config.heads.out, config.prediction)
        if self.prediction is not None and self.genes and len(self.genes) < config.prediction.n_genes:  # type: ignore[union-attr]
            raise ValueError(
                f"config.prediction.n_genes is {config.prediction.n_genes}, "  # type: ignore[union-attr]
                f"but the vocabulary has {len(self.genes)} genes."
            )
        self.familiarity = None if config.familiarity is None else Familiarity(config.familiarity)
        self.provenance = Provenance(name=config.name)
        self.card: ModelCard | None = None

    # -- what the model is -------------------------------------------------------------------------------------------

    @property
    def geometry(self) -> Geometry:
        """Niche size and patch sizes the model expects."""
        return self.config.geometry

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def branch(self, name: str) -> Branch:
        """Return one of the four branches, by name."""
        return cast("Branch", self.branches[check_choice("branch", name, BRANCHES)])

    def encoder(self, name: str) -> Any:
        """Return the encoder of one of the four branches, by name."""
        return self.branch(name).encoder

    # -- from data to input ------------------------------------------------------------------------------------------

    def preprocess_spot_image(
        self, pixels: np.ndarray | torch.Tensor, *, colour: tuple[np.ndarray, np.ndarray] | None = None
    ) -> torch.Tensor:
        """(n, height, width, 3) uint8 spot patches → the spot image encoder's (n, 3, height, width) float32."""
        return self.encoder("spot_image").preprocess(pixels, colour=colour)

    def preprocess_niche_image(
        self, pixels: np.ndarray | torch.Tensor, *, colour: tuple[np.ndarray, np.ndarray] | None = None
    ) -> torch.Tensor:
        """(n, height, width, 3) uint8 niche patches → the niche image encoder's (n, 3, height, width) float32."""
        return self.encoder("niche_image").preprocess(pixels, colour=colour)

    def preprocess_genes(
        self, counts: csr_matrix, *, connectivities: csr_matrix, library: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raw counts → the inputs of the two gene encoders.

        Parameters
        ----------
        counts
            (n, n_vocabulary) raw counts of all spots of the slides.
        connectivities
            (n, n) row-stochastic niche graph.
        library
            (n,) number of each spot's slide.

        Returns
        -------
        (n, input_dim) float32 of the spots, and of the niches.
        """
        library = np.zeros(counts.shape[0], dtype=np.intp) if library is None else library
        spot, niche = (
            np.empty((counts.shape[0], self.encoder(name).input_dim), dtype=np.float32)
            for name in ("spot_gene", "niche_gene")
        )
        for code in np.unique(library):
            rows = np.flatnonzero(library == code)
            slide, graph = counts[rows], connectivities[rows][:, rows]
            statistics = self.fit_genes(slide, connectivities=graph)
            inputs = GeneInputs(self, slide.__getitem__, graph, statistics)
            spot[rows], niche[rows] = inputs(np.arange(len(rows)))
        return spot, niche

    def fit_genes(
        self, counts: csr_matrix, *, connectivities: csr_matrix, library: np.ndarray | None = None
    ) -> tuple[Any, Any]:
        """Take from the slides what the two gene encoders' ``preprocess`` needs of all their spots.

        Parameters are those of :meth:`preprocess_genes`.

        Returns
        -------
        ``statistics`` of the spots' encoder, and of the niches'.
        """
        niche_statistics = self.encoder("niche_gene").fit(counts, connectivities=connectivities, library=library)
        if _without_tokens(self.config.spot_gene) == _without_tokens(self.config.niche_gene):
            return niche_statistics, niche_statistics
        spot = self.encoder("spot_gene")
        return spot.fit(counts, connectivities=connectivities, library=library), niche_statistics

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        *,
        spot_image: torch.Tensor | None = None,
        spot_gene: torch.Tensor | None = None,
        niche_image: torch.Tensor | None = None,
        niche_gene: torch.Tensor | None = None,
    ) -> STAlignOutput:
        """Encode, fuse and project.

        Parameters
        ----------
        spot_image, niche_image
            (n, 3, height, width) as the encoders' ``preprocess`` makes them, or their (n, dim) features.
        spot_gene, niche_gene
            (n, input_dim) as the encoders' ``preprocess`` makes them.

        Returns
        -------
        :class:`~stalign.models.STAlignOutput`. Any input may be ``None``. A scale of which one modality is there is
        fused as ``config.missing`` says: ``"single"``, that side's tokens take both places of the fusion network;
        ``"tokens"``, learned tokens take the place of the absent side. A scale with neither is ``None``.

        Raises
        ------
        ValueError
            If every input is ``None``, a shape is wrong, or the inputs differ in their number of spots.
        """
        inputs = {
            "spot_image": spot_image,
            "spot_gene": spot_gene,
            "niche_image": niche_image,
            "niche_gene": niche_gene,
        }
        sizes = {name: len(x) for name, x in inputs.items() if x is not None}
        if not sizes:
            raise ValueError(f"Nothing to embed: pass at least one of {listing(BRANCHES)}.")
        if len(set(sizes.values())) > 1:
            raise ValueError(f"The inputs differ in their number of spots: {sizes}.")
        tokens = {name: None if x is None else self.branches[name](x) for name, x in inputs.items()}
        bypass = {"spot_gene": self._bypass(spot_gene), "niche_gene": self._bypass(niche_gene)}
        return STAlignOutput(
            **{
                name: None if t is None else self.heads[name](t, bypass.get(name)) if name in self.heads else t
                for name, t in tokens.items()
            },
            spot=self._fuse("spot", tokens, bypass["spot_gene"]),
            niche=self._fuse("niche", tokens, bypass["niche_gene"]),
        )

    def _bypass(self, profile: torch.Tensor | None) -> torch.Tensor | None:
        """Return a gene encoder's input, whose mean norm is the square root of its width, at a mean norm of one."""
        return None if profile is None or not self.config.bypass else profile / profile.shape[1] ** 0.5

    def _fuse(
        self, scale: str, tokens: Mapping[str, torch.Tensor | None], bypass: torch.Tensor | None
    ) -> torch.Tensor | None:
        image, gene = tokens[f"{scale}_image"], tokens[f"{scale}_gene"]
        if image is None and gene is None:
            return None
        image = self._stand_in(f"{scale}_image", gene) if image is None else image
        gene = self._stand_in(f"{scale}_gene", image) if gene is None else gene
        fusion = self.spot_fusion if scale == "spot" else self.niche_fusion
        return self.heads[scale](fusion(image, gene), bypass)

    def _start_at_bypass(self) -> None:
        """Let the fused embeddings and the gene sides start as the gene encoders' inputs.

        The last layers of their heads are zero.
        """
        for scale in ("spot", "niche"):
            dim = self.encoder(f"{scale}_gene").input_dim
            if self.config.heads.out != dim:
                raise ValueError(
                    f"config.bypass needs heads.out ({self.config.heads.out}) to equal the width of the {scale} gene "
                    f"encoder's input ({dim})."
                )
            for name in (scale, f"{scale}_gene"):
                if name in self.heads:
                    cast("ProjectionHead", self.heads[name]).start_at_zero()

    def _stand_in(self, name: str, other: torch.Tensor | None) -> torch.Tensor:
        """Tokens in place of the absent side ``name``, given those of the other side."""
        if other is None:  # cannot happen through forward
            raise ValueError(f"{name} and its counterpart are both absent.")
        if name in self.missing_tokens:
            return self.missing_tokens[name].to(other.dtype).expand(len(other), -1, -1)
        return other

    def embedding(self, output: STAlignOutput, part: str) -> torch.Tensor | None:
        """Return one of the matrices that :func:`stalign.tl.embed` keeps; ``None`` where its input was absent.

        Parameters
        ----------
        output
            What :meth:`forward` returned.
        part
            ``"image"`` or ``"gene"``: the aligned pair, spot and niche joined by ``join_scales``, unit norm.
            ``"spot"`` or ``"niche"``: the fused embedding of a scale, and ``"fused"``: both side by side; unit norm if
            ``config.unit_fused``.
        """
        if part in ("image", "gene"):
            return output.image if part == "image" else output.gene
        check_choice("part", part, ("fused", "spot", "niche", "image", "gene"))
        if part == "fused":
            if self.config.unit_fused:
                return join_scales(output.spot, output.niche)
            if output.spot is None or output.niche is None:
                return None
            return torch.cat([output.spot.float(), output.niche.float()], dim=-1) / 2**0.5
        single = output.spot if part == "spot" else output.niche
        if single is None or not self.config.unit_fused:
            return single
        return nn.functional.normalize(single.float(), dim=-1)

    def predict(self, output: STAlignOutput) -> torch.Tensor:
        """Return (n, n_genes) log-normalised expression predicted from ``output``; genes: :attr:`predicted_genes`.

        Raises
        ------
        ValueError
            If the model has no prediction head, or an embedding the head needs is absent.
        """
        if self.prediction is None:
            raise ValueError(f"Model {self.config.name!r} has no prediction head (`config.prediction`).")
        embeddings = []
        for name in self.prediction.inputs:
            embedding = getattr(output, name)
            if embedding is None:
                raise ValueError(f"The prediction head needs {name!r}, which is absent from the output.")
            embeddings.append(embedding)
        return self.prediction(embeddings)

    @property
    def predicted_genes(self) -> tuple[str, ...]:
        """Symbols of the genes the prediction head predicts; empty without one."""
        if self.prediction is None:
            return ()
        return tuple(self.genes[int(number)] for number in self.prediction.gene_index)

    # -- weights -----------------------------------------------------------------------------------------------------

    def load_encoder(
        self,
        branch: str,
        weights: str | Path | None = None,
        *,
        revision: str | None = None,
        local_files_only: bool | None = None,
    ) -> None:
        """Fill the image encoder of ``branch`` with pretrained weights.

        Parameters
        ----------
        branch
            ``"spot_image"`` or ``"niche_image"``.
        weights
            A local file or folder; ``None`` for the Hub.
        revision, local_files_only
            As in :func:`stalign.models.load`.
        """
        from stalign.models.encoders._weights import fill_image_encoder

        check_choice("branch", branch, [name for name in BRANCHES if name.endswith("image")])
        fill_image_encoder(
            self.encoder(branch),
            self.config.branch(branch).encoder,
            weights,
            revision=revision,
            local_files_only=local_files_only,
        )

    def warn_untrained(self) -> None:
        """Log the frozen branches whose pretrained weights were never loaded: they would stay random."""
        for name in BRANCHES:
            branch = self.branch(name)
            if not (branch.frozen and branch.is_image) or getattr(branch.encoder, "provenance", None):
                continue
            entry = find_image_encoder(self.config.branch(name).encoder)
            if entry.hub:
                logger.warning(
                    "The frozen encoder %r of branch %s has random weights. Call `load_encoder(%r, weights=...)`.",
                    self.config.branch(name).encoder,
                    name,
                    name,
                )

    def save(
        self,
        folder: str | Path,
        *,
        dtype: str = "float32",
        card: ModelCard | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the model to a folder that :func:`stalign.models.load` reads.

        Parameters
        ----------
        folder
            Written under a temporary name beside it and renamed at the end.
        dtype
            ``"float16"`` halves the file; numbers that half precision cannot hold stay float32. Loaded as float32.
        card
            Description and licences for the model card; by default those the model was loaded with.
        overwrite
            Whether an existing model may be replaced.

        Returns
        -------
        The folder, with ``model.safetensors``, ``config.json`` (with SHA-256 of the other files), ``genes.txt`` and
        ``README.md``.
        """
        from stalign.models._checkpoint import save

        self.warn_untrained()
        return save(self, folder, dtype=dtype, card=card, overwrite=overwrite)

    def summary(self) -> Summary:
        """Return parts, parameters, what is frozen, FLOPs per spot and memory; ``print`` shows a table."""
        from stalign.models._summary import summarise

        return summarise(self)


def _without_tokens(branch: BranchConfig) -> tuple[str, dict[str, Any]]:
    return branch.encoder, branch.args


def _check_genes(genes: Sequence[str]) -> tuple[str, ...]:
    if isinstance(genes, str):
        raise TypeError(f"genes must be a sequence of gene symbols, got the string {genes!r}.")
    genes = tuple(str(gene) for gene in genes)
    if len(set(genes)) < len(genes):
        seen: set[str] = set()
        twice = dict.fromkeys(gene for gene in genes if gene in seen or seen.add(gene))  # type: ignore[func-returns-value]
        raise ValueError(f"The vocabulary names {len(twice)} genes more than once: {listing(twice, 5)}.")
    if any(not gene.strip() or "\n" in gene for gene in genes):
        raise ValueError("The vocabulary holds an empty gene symbol or one with a line break.")
    return genes
