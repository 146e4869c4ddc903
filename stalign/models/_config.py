"""What a model is made of: nested frozen dataclasses, checked when they are made, JSON on disk.

Nothing here imports torch, so that the geometry of a model can be read in milliseconds.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from stalign._validate import check_choice, check_choices, check_positive, listing, near

T = TypeVar("T")

BRANCHES = ("spot_image", "spot_gene", "niche_image", "niche_gene")
TokenKind = Literal["conv", "linear", "none"]
Missing = Literal["single", "tokens"]
Pool = Literal["flatten", "mean"]
Colour = Literal["fixed", "library"]


class Geometry(NamedTuple):
    """What a model sees of a slide.

    Attributes
    ----------
    n_neighbors
        Neighbours of a spot in its niche.
    spot_um, niche_um
        Side of the spot's and the niche's square patch in µm.
    spot_pixels, niche_pixels
        Side of the same patches in the pixels the encoders get.
    """

    n_neighbors: int
    spot_um: float
    niche_um: float
    spot_pixels: int
    niche_pixels: int


class Provenance(NamedTuple):
    """Where a model's weights come from: name, revision, SHA-256 of the weights' file, folder (all may be empty)."""

    name: str = ""
    revision: str = ""
    sha256: str = ""
    folder: str = ""


def _dataclass_in(hint: Any) -> type | None:
    """Return the dataclass a type hint stands for (``X`` or ``X | None``), if any."""
    if get_origin(hint) in (Union, types.UnionType):
        hints = [h for h in get_args(hint) if h is not type(None)]
        return _dataclass_in(hints[0]) if len(hints) == 1 else None
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def build_config(cls: type[T], data: Any, where: str) -> T:
    """Make a config from nested dicts, refusing keys it does not know."""
    if isinstance(data, cls):
        return data
    if not isinstance(data, Mapping):
        raise TypeError(f"{where} must be a dict with the keys of {cls.__name__}, got {type(data).__name__}: {data!r}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise ValueError(
                f"{where} has an unknown key {key!r}. Known: {listing(fields, 20)}.{near(str(key), fields)}"
            )
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    absent = [name for name in required if name not in data]
    if absent:
        raise ValueError(f"{where} lacks {listing(absent)}. Required: {listing(required, 20)}.")
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        nested = _dataclass_in(hints[key])
        is_left_out = value is None and type(None) in get_args(hints[key])
        values[key] = value if nested is None or is_left_out else build_config(nested, value, f"{where}.{key}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error


def plain_config(value: Any) -> Any:
    """Turn configs and tuples into the dicts and lists that JSON holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_config(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_config(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_config(item) for item in value]
    return value


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    if "encoder" in changes and changes["encoder"] != base.get("encoder"):
        merged["args"] = {}  # arguments of another encoder mean nothing to this one
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _check_share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}.")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


@dataclasses.dataclass(frozen=True)
class PatchConfig:
    """A square patch: ``um`` on the slide, resampled to ``pixels``."""

    um: float
    pixels: int

    def __post_init__(self) -> None:
        check_positive("um", self.um)
        check_positive("pixels", self.pixels, integer=True)


@dataclasses.dataclass(frozen=True)
class TokenConfig:
    """How a feature vector becomes tokens.

    ``"conv"`` is the published convolution with one input channel, ``"linear"`` one linear map per token,
    ``"none"`` takes the tokens of an encoder that yields tokens itself.
    """

    kind: TokenKind = "linear"
    kernel: int = 1
    stride: int = 1

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(TokenKind))
        check_positive("kernel", self.kernel, integer=True)
        check_positive("stride", self.stride, integer=True)


@dataclasses.dataclass(frozen=True)
class BranchConfig:
    """One of the four branches: an encoder by its registry name, its arguments, and its tokens."""

    encoder: str
    args: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    tokens: TokenConfig = TokenConfig()
    frozen: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.encoder, str) or not self.encoder:
            raise TypeError(f"encoder must be the name of an encoder, got {self.encoder!r}.")
        if not isinstance(self.args, Mapping):
            raise TypeError(f"args must be a dict of arguments of encoder {self.encoder!r}, got {self.args!r}.")
        _check_bool("frozen", self.frozen)
        # A private copy: the caller's dict may change later, a config may not.
        object.__setattr__(self, "args", copy.deepcopy(dict(self.args)))


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """The fusion network (ABFN): attention heads, hidden width of its feed-forward, dropout, residual, final norm."""

    heads: int = 8
    head_dim: int = 64
    hidden: int = 64
    dropout: float = 0.1
    residual: bool = False
    norm: bool = True

    def __post_init__(self) -> None:
        check_positive("heads", self.heads, integer=True)
        check_positive("head_dim", self.head_dim, integer=True)
        check_positive("hidden", self.hidden, integer=True)
        _check_share("dropout", self.dropout)
        _check_bool("residual", self.residual)
        _check_bool("norm", self.norm)


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """The projection heads: tokens → ``hidden`` → ``out``.

    ``hidden=None`` is one linear layer; ``skip`` adds a linear layer beside the two, so that what the tokens hold
    passes unbent. ``niche`` says whether the niche's image and gene side have heads too (the
    published model leaves them as tokens), ``pool`` how tokens become one vector, ``normalise`` whether the
    projections leave with unit norm.
    """

    hidden: int | None = 2048
    out: int = 1024
    niche: bool = True
    normalise: bool = False
    pool: Pool = "flatten"
    skip: bool = False

    def __post_init__(self) -> None:
        if self.hidden is not None:
            check_positive("hidden", self.hidden, integer=True)
        check_positive("out", self.out, integer=True)
        _check_bool("niche", self.niche)
        _check_bool("normalise", self.normalise)
        _check_bool("skip", self.skip)
        check_choice("pool", self.pool, get_args(Pool))


@dataclasses.dataclass(frozen=True)
class PredictionConfig:
    """The head that maps the aligned embeddings in ``inputs`` to the expression of ``n_genes`` vocabulary genes.

    ``levels`` are the coverages, ascending, whose intervals' half-widths are stored with it. ``niche_share`` is the
    share of the niche's mean in what is predicted for a spot.
    """

    n_genes: int
    inputs: tuple[str, ...] = ("spot_image", "niche_image")
    hidden: int | None = None
    levels: tuple[float, ...] = ()
    niche_share: float = 0.0

    def __post_init__(self) -> None:
        check_positive("n_genes", self.n_genes, integer=True)
        share = self.niche_share
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"niche_share must be a number in [0, 1], got {share!r}.")
        object.__setattr__(self, "inputs", check_choices("inputs", self.inputs, (*BRANCHES, "spot", "niche")))
        if self.hidden is not None:
            check_positive("hidden", self.hidden, integer=True)
        for level in self.levels:
            _check_share("levels", level)
        object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))
        if list(self.levels) != sorted(set(self.levels)) or len(self.levels) == 1:
            raise ValueError(f"levels must be two or more ascending coverages, or none; got {list(self.levels)}.")


@dataclasses.dataclass(frozen=True)
class FamiliarityConfig:
    """Statistics of the training spots: ``n_genes`` genes (0 for none), their components, and whether of pixels too."""

    n_genes: int
    n_components: int = 16
    image: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.n_genes, bool) or not isinstance(self.n_genes, int) or self.n_genes < 0:
            raise ValueError(f"n_genes must be an integer >= 0, got {self.n_genes!r}.")
        check_positive("n_components", self.n_components, integer=True)
        _check_bool("image", self.image)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build a :class:`~stalign.models.STAlign` and to cut the patches it expects.

    ``missing`` says how a spot or a niche is fused when one modality is absent: ``"single"``, the side that is
    there takes both places of the fusion network (it attends to itself); ``"tokens"``, learned tokens stand in.

    ``colour`` says what pixels are normalised with: ``"fixed"``, the encoders' own mean and standard deviation;
    ``"library"``, those of the slide's spot patches, which takes most of the difference between stainings away.

    ``unit_fused`` says whether the fused embeddings are scaled to unit norm, as those of a purely contrastive model
    should be; a model that was trained to keep distances leaves their length as it is. ``bypass`` adds the gene
    encoders' inputs to the gene sides and to the fused embeddings of spot and niche, so that the network learns what to
    add to them.

    Examples
    --------
    >>> from stalign import models
    >>> models.config("paper").fusion.heads
    8
    """

    name: str
    n_neighbors: int
    spot_patch: PatchConfig
    niche_patch: PatchConfig
    spot_image: BranchConfig
    spot_gene: BranchConfig
    niche_image: BranchConfig
    niche_gene: BranchConfig
    n_tokens: int = 8
    width: int = 512
    fusion: FusionConfig = FusionConfig()
    heads: HeadsConfig = HeadsConfig()
    missing: Missing = "single"
    colour: Colour = "fixed"
    unit_fused: bool = True
    bypass: bool = False
    prediction: PredictionConfig | None = None
    familiarity: FamiliarityConfig | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name must be a non-empty string, got {self.name!r}.")
        check_positive("n_neighbors", self.n_neighbors, integer=True)
        check_positive("n_tokens", self.n_tokens, integer=True)
        check_positive("width", self.width, integer=True)
        check_choice("missing", self.missing, get_args(Missing))
        check_choice("colour", self.colour, get_args(Colour))
        _check_bool("unit_fused", self.unit_fused)
        _check_bool("bypass", self.bypass)
        if self.width % 2:
            raise ValueError(f"width must be even, since the fusion network joins two halves; got {self.width}.")
        tokens = set(self.prediction.inputs if self.prediction is not None else ()) & {"niche_image", "niche_gene"}
        if tokens and not self.heads.niche:
            raise ValueError(
                f"prediction.inputs names {sorted(tokens)}, which are tokens, not embeddings, while "
                "heads.niche is False."
            )

    @property
    def geometry(self) -> Geometry:
        """What the model sees of a slide."""
        return Geometry(
            n_neighbors=self.n_neighbors,
            spot_um=float(self.spot_patch.um),
            niche_um=float(self.niche_patch.um),
            spot_pixels=self.spot_patch.pixels,
            niche_pixels=self.niche_patch.pixels,
        )

    def branch(self, name: str) -> BranchConfig:
        """Return the config of one of the four branches."""
        return getattr(self, check_choice("branch", name, BRANCHES))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "config") -> ModelConfig:
        """Build a config from nested dicts.

        Raises
        ------
        ValueError
            For a key that does not exist (with the nearest that does), one that is absent, or a value out of range.
        TypeError
            For a value of another type.
        """
        return build_config(cls, data, where)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as nested dicts and lists, as they are written to JSON."""
        return plain_config(self)

    def updated(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> ModelConfig:
        """Return a copy with the nested ``changes`` merged in.

        Examples
        --------
        >>> from stalign import models
        >>> models.config("paper").updated({"fusion": {"residual": True}}).fusion.residual
        True
        """
        return type(self).from_dict(_merge(self.to_dict(), {**plain_config(changes or {}), **plain_config(more)}))
