"""What a pretraining run is made of, read from TOML and checked before anything starts."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stalign._validate import check_choice, check_positive
from stalign.models._config import build_config, plain_config
from stalign.train.losses import NEGATIVES


def _check_weight(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number >= 0, got {value!r}.")


@dataclass(frozen=True)
class DataConfig:
    """Which sections.

    ``train`` and ``validation`` are glob patterns relative to ``root``; ``mpp`` gives µm per full-resolution pixel of
    sections (by file stem) whose scale nothing else states.
    """

    root: str
    train: list[str]
    validation: list[str] = field(default_factory=list)
    mpp: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("train", "validation"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
                raise TypeError(f"{name} must be a list of glob patterns, got {patterns!r}.")
        if not self.train:
            raise ValueError("train is empty: name at least one section.")
        for section, value in self.mpp.items():
            check_positive(f"mpp.{section}", value)

    def files(self, role: str) -> list[Path]:
        """Return the files of a role (``"train"`` or ``"validation"``), sorted, each once.

        Raises
        ------
        FileNotFoundError
            If a pattern matches no file.
        """
        found: dict[Path, None] = {}
        for pattern in getattr(self, check_choice("role", role, ("train", "validation"))):
            matches = sorted(Path(self.root).expanduser().glob(pattern))
            if not matches:
                raise FileNotFoundError(
                    f"data.{role}: no file matches {pattern!r} under {self.root!r}. Set `data.root` to the folder "
                    "with the sections, e.g. `--set data.root=PATH`."
                )
            found.update(dict.fromkeys(matches))
        return list(found)


@dataclass(frozen=True)
class NetworkConfig:
    """Which network: a config by name with changes on top, the vocabulary, and how the result is named and stored."""

    name: str = "stalign-mini"
    config: str = "mini"
    changes: dict[str, Any] = field(default_factory=dict)
    vocabulary: str = "protein-coding"
    dtype: str = "float16"

    def __post_init__(self) -> None:
        check_choice("vocabulary", self.vocabulary, ("protein-coding",))
        check_choice("dtype", self.dtype, ("float16", "float32"))


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss: α and β of the paper, temperature, negatives, and what is added to the three alignments.

    ``symmetric`` averages both directions of a contrast. ``structure`` weighs
    :func:`~stalign.train.losses.structure_loss` on the fused embeddings; ``rotated`` adds, with that share of its
    weight, the same loss on profiles turned by a random rotation with no image, so that geometry is kept for genes that
    no training tissue expresses, too.
    """

    alpha: float = 0.3
    beta: float = 0.3
    temperature: float = 0.1
    negatives: str = "masked"
    n_clusters: int = 6
    symmetric: bool = True
    structure: float = 0.0
    rotated: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "structure", "rotated"):
            _check_weight(name, getattr(self, name))
        if self.alpha + self.beta > 1:
            raise ValueError(f"alpha + beta must be at most 1, got {self.alpha} + {self.beta}.")
        check_positive("temperature", self.temperature)
        check_choice("negatives", self.negatives, NEGATIVES)
        if check_positive("n_clusters", self.n_clusters, integer=True) < 2:
            raise ValueError(f"n_clusters must be at least 2, got {self.n_clusters}.")


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation: colour gain and shift in standard deviations of the slide, flips, noise on the gene profiles.

    ``drop_modality`` is the share of batches that go in without their image, and the same share without their genes, so
    that gene-only and image-only slides are nothing new.
    """

    gain: float = 0.15
    shift: float = 0.25
    flips: bool = True
    gene_noise: float = 0.3
    drop_modality: float = 0.1

    def __post_init__(self) -> None:
        for name in ("gain", "shift", "gene_noise", "drop_modality"):
            _check_weight(name, getattr(self, name))
        if self.drop_modality > 0.5:
            raise ValueError(f"drop_modality must be at most 0.5, got {self.drop_modality}.")


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with linear warm-up and cosine decay; weight decay on a cosine of its own, none on biases and norms."""

    steps: int = 1000
    batch_size: int = 192
    lr: float = 1e-3
    lr_min: float = 1e-6
    warmup: int = 50
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    validate_every: int = 100
    image_sections: float = 4.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every"):
            check_positive(name, getattr(self, name), integer=True)
        check_positive("lr", self.lr)
        for name in ("lr_min", "warmup", "weight_decay", "weight_decay_end"):
            _check_weight(name, getattr(self, name))
        check_positive("image_sections", self.image_sections)


@dataclass(frozen=True)
class PredictionFitConfig:
    """The prediction head: how many genes, and the ridge penalties tried by leave-one-section-out.

    A penalty is in units of the features' mean variance.
    """

    n_genes: int = 3000
    penalties: list[float] = field(default_factory=lambda: [0.1, 0.3, 1.0, 3.0, 10.0, 30.0])

    def __post_init__(self) -> None:
        check_positive("n_genes", self.n_genes, integer=True)
        if not self.penalties:
            raise ValueError("penalties is empty.")
        for value in self.penalties:
            check_positive("penalties", value)


@dataclass(frozen=True)
class CardConfig:
    """What the model card says beside the numbers."""

    description: str = ""
    licence_weights: str = ""
    licence_data: str = ""


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run.

    Examples
    --------
    >>> from stalign.train import PretrainConfig
    >>> config = PretrainConfig.from_dict({"out": "run", "data": {"root": ".", "train": ["*.h5ad"]}})
    >>> config.objective.alpha
    0.3
    """

    data: DataConfig
    out: str = "stalign-run"
    seed: int = 0
    network: NetworkConfig = NetworkConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    augment: AugmentConfig = AugmentConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    prediction: PredictionFitConfig = PredictionFitConfig()
    card: CardConfig = CardConfig()

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer >= 0, got {self.seed!r}.")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "config") -> PretrainConfig:
        """Build from nested dicts; unknown keys are refused with the nearest known one."""
        return build_config(cls, data, where)

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts and lists."""
        return plain_config(self)


def _parse_value(text: str) -> Any:
    """Read a value as TOML would; what is no TOML value is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def read_config(path: str | Path, changes: Sequence[str] = ()) -> PretrainConfig:
    """Read a pretraining config.

    Parameters
    ----------
    path
        A TOML file.
    changes
        ``"key=value"`` with dotted keys, applied on top, e.g. ``"optimiser.steps=10"``.

    Raises
    ------
    FileNotFoundError, ValueError
        For a missing file, TOML that cannot be read, a change without ``=``, or an unknown key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no config {str(path)!r}.")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no valid TOML: {error}") from error
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"A change must read key=value, got {change!r}.")
        *parents, last = key.strip().split(".")
        target = data
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"{key!r}: {parent!r} is a value, not a table.")
        target[last] = _parse_value(value.strip())
    return PretrainConfig.from_dict(data, where=str(path))
