"""What a pretraining run is made of, read from TOML and checked before anything starts."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stalign._validate import check_choice, check_positive, listing, near
from stalign.models._config import build_config, plain_config
from stalign.train.losses import NEGATIVES

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
STRATEGIES = ("auto", "ddp")
WEIGHTS = ("spot_image", "niche_image", "scgpt")
# What a validation measures, and whether more is better.
METRICS = {
    "recall_at_1_percent": True,
    "recall_at_5_percent": True,
    "recall_at_10_percent": True,
    "alignment": False,
    "uniformity": False,
    "domain_ari": True,
}
# The paper's learning rate is stated for a batch of this size, and grows in proportion.
_REFERENCE_BATCH = 256
# Keys that say where and on what a run happens, not what comes out of it.
_PLACES = ("out", "data.root", "data.shards", "card")
_PLACES_OF_RUN = ("accumulate", "clip", "precision", "final", "best")


def _check_weight(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number >= 0, got {value!r}.")


def _check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}.")


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}.")


def _check_whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}.")


@dataclass(frozen=True)
class DataConfig:
    """Which sections.

    ``train`` and ``validation`` are glob patterns relative to ``root``; ``mpp`` gives µm per full-resolution pixel of
    sections (by file stem) whose scale nothing else states. ``shards`` is the folder of prepared sections, by default
    ``<out>.shards``; with an empty ``train``, all of its sections are trained on but those of ``validation`` and of
    ``validation_patients``. ``skip_damaged`` leaves damaged shards out in place of stopping.
    """

    root: str = "."
    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    validation_patients: list[str] = field(default_factory=list)
    mpp: dict[str, float] = field(default_factory=dict)
    shards: str = ""
    skip_damaged: bool = False

    def __post_init__(self) -> None:
        for name, what in (
            ("train", "glob patterns"),
            ("validation", "glob patterns"),
            ("validation_patients", "names"),
        ):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):
                raise TypeError(f"{name} must be a list of {what}, got {patterns!r}.")
        _check_text("shards", self.shards)
        _check_switch("skip_damaged", self.skip_damaged)
        if not self.train and not self.shards:
            raise ValueError("train is empty: name at least one section, or the folder of `shards` to train on.")
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
    """Which network: a config by name with changes on top, the vocabulary, and how the result is named and stored.

    ``weights`` names the pretrained weights of frozen encoders: ``scgpt`` a folder, ``spot_image`` and ``niche_image``
    a file or folder, or ``""`` for the Hub. ``gene_sets`` is the GMT file of a pathway encoder, by default the sets of
    :func:`stalign.models.assemble`.
    """

    name: str = "stalign-mini"
    config: str = "mini"
    changes: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    gene_sets: str = ""
    vocabulary: str = "protein-coding"
    dtype: str = "float16"

    def __post_init__(self) -> None:
        for branch, path in self.weights.items():
            if branch not in WEIGHTS:
                raise ValueError(
                    f"weights has an unknown key {branch!r}. Known: {listing(WEIGHTS)}.{near(branch, WEIGHTS)}"
                )
            _check_text(f"weights.{branch}", path)
        _check_text("gene_sets", self.gene_sets)
        check_choice("vocabulary", self.vocabulary, ("protein-coding",))
        check_choice("dtype", self.dtype, ("float16", "float32"))


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss: α and β of the paper, temperature, negatives, and what is added to the three alignments.

    ``spot``, ``niche`` and ``cross`` switch the three alignments; the weights α, β and 1 - α - β of those that stay do
    not change. ``symmetric`` averages both directions of a contrast. ``stratified`` lets every batch hold spots of all
    clusters of its slide, the source of its negatives. ``structure`` weighs
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
    spot: bool = True
    niche: bool = True
    cross: bool = True
    stratified: bool = True
    structure: float = 0.0
    rotated: float = 0.0

    def __post_init__(self) -> None:
        for name in ("symmetric", "spot", "niche", "cross", "stratified"):
            _check_switch(name, getattr(self, name))
        if not (self.spot or self.niche or self.cross or self.structure):
            raise ValueError("spot, niche and cross are all false and structure is 0: nothing is left to train.")
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
    that gene-only and image-only slides are nothing new. ``views`` is the number of augmented views of each patch that
    are cached of a frozen image encoder, which runs once and cannot see a new one in every step.
    """

    gain: float = 0.15
    shift: float = 0.25
    flips: bool = True
    gene_noise: float = 0.3
    drop_modality: float = 0.1
    views: int = 1

    def __post_init__(self) -> None:
        check_positive("views", self.views, integer=True)
        _check_switch("flips", self.flips)
        for name in ("gain", "shift", "gene_noise", "drop_modality"):
            _check_weight(name, getattr(self, name))
        if self.drop_modality > 0.5:
            raise ValueError(f"drop_modality must be at most 0.5, got {self.drop_modality}.")


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with linear warm-up and cosine decay; weight decay on a cosine of its own, none on biases and norms.

    ``batch_size`` is that of all processes together, and holds spots of ``slides_per_batch`` slides. ``epochs`` and
    ``warmup_epochs`` state ``steps`` and ``warmup`` in passes over the training spots where they are not 0.
    ``lr_scaling="linear"`` takes ``lr`` for a batch of 256 spots and multiplies it by batch size / 256, as the paper
    does. Slides with an image are drawn ``image_sections`` times as often as those without. ``fused`` takes a step of
    the optimiser in one pass over the weights, which is several times as fast and differs in the last bits.
    """

    steps: int = 1000
    epochs: float = 0.0
    batch_size: int = 192
    slides_per_batch: int = 1
    lr: float = 1e-3
    lr_scaling: str = "none"
    lr_min: float = 1e-6
    warmup: int = 50
    warmup_epochs: float = 0.0
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    validate_every: int = 100
    image_sections: float = 4.0
    fused: bool = True

    def __post_init__(self) -> None:
        _check_switch("fused", self.fused)
        for name in ("steps", "batch_size", "slides_per_batch", "validate_every"):
            check_positive(name, getattr(self, name), integer=True)
        check_positive("lr", self.lr)
        check_choice("lr_scaling", self.lr_scaling, ("none", "linear"))
        _check_whole("warmup", self.warmup)
        for name in ("lr_min", "epochs", "warmup_epochs", "weight_decay", "weight_decay_end"):
            _check_weight(name, getattr(self, name))
        check_positive("image_sections", self.image_sections)
        if self.slides_per_batch > self.batch_size // 2:
            raise ValueError(
                f"slides_per_batch ({self.slides_per_batch}) leaves a slide less than two of {self.batch_size} spots."
            )

    def resolved(self, n_spots: int, *, accumulate: int = 1) -> OptimiserConfig:
        """Return the same with epochs turned into steps, and the learning rate that is used.

        Parameters
        ----------
        n_spots
            Training spots, that is the length of an epoch.
        accumulate
            Batches that make one step.
        """
        whole = self.batch_size * accumulate

        def steps(epochs: float, otherwise: int) -> int:
            return max(1, round(epochs * n_spots / whole)) if epochs else otherwise

        return replace(
            self,
            steps=steps(self.epochs, self.steps),
            warmup=steps(self.warmup_epochs, self.warmup),
            lr=self.lr * whole / _REFERENCE_BATCH if self.lr_scaling == "linear" else self.lr,
            epochs=0.0,
            warmup_epochs=0.0,
            lr_scaling="none",
        )


def _check_penalties(penalties: Sequence[float]) -> None:
    if not penalties:
        raise ValueError("penalties is empty.")
    for value in penalties:
        check_positive("penalties", value)


@dataclass(frozen=True)
class PredictionFitConfig:
    """The prediction head: how many genes, and what is tried with each patient left out in turn.

    A penalty of the ridge regression is in units of the features' mean variance. A number of programmes confines the
    predictions to as many patterns of genes that vary together; 0 predicts each gene for itself. ``n_genes = 0`` leaves
    the head out. Of a large cohort, ``max_sections`` sections with an image, as many for the programmes, and
    ``max_spots`` spots of each are drawn.
    """

    n_genes: int = 3000
    penalties: list[float] = field(default_factory=lambda: [0.3, 1.0, 3.0, 10.0, 30.0, 100.0])
    programmes: list[int] = field(default_factory=lambda: [0, 2, 3, 5, 8, 12, 20])
    max_sections: int = 24
    max_spots: int = 4000

    def __post_init__(self) -> None:
        _check_whole("n_genes", self.n_genes)
        check_positive("max_sections", self.max_sections, integer=True)
        check_positive("max_spots", self.max_spots, integer=True)
        _check_penalties(self.penalties)
        if not self.programmes:
            raise ValueError("programmes is empty. Give the numbers that are tried; [0] predicts each gene for itself.")
        for number in self.programmes:
            _check_whole("programmes", number)


@dataclass(frozen=True)
class AlignmentFitConfig:
    """The image sides, fitted to the gene sides in closed form after training; needs image heads of one linear layer.

    The ridge penalty, in units of the features' mean variance, is chosen by leaving out one patient at a time. Of a
    large cohort, ``max_sections`` sections and ``max_spots`` spots of each are drawn. Off by default: what the
    contrastive training has learned is kept.
    """

    enabled: bool = False
    penalties: list[float] = field(default_factory=lambda: [0.1, 0.3, 1.0, 3.0, 10.0])
    max_sections: int = 24
    max_spots: int = 4000

    def __post_init__(self) -> None:
        _check_switch("enabled", self.enabled)
        _check_penalties(self.penalties)
        check_positive("max_sections", self.max_sections, integer=True)
        check_positive("max_spots", self.max_spots, integer=True)


@dataclass(frozen=True)
class FamiliarityFitConfig:
    """Statistics of the training spots, by which :func:`stalign.tl.quality` tells what is foreign to the model.

    ``n_genes`` genes with the most counts, and ``n_components`` leading components of their niche expression. Of a
    large cohort, ``max_sections`` sections and ``max_spots`` spots of each are drawn. ``enabled = false`` leaves them
    out.
    """

    enabled: bool = True
    n_genes: int = 4000
    n_components: int = 16
    max_sections: int = 64
    max_spots: int = 500

    def __post_init__(self) -> None:
        _check_switch("enabled", self.enabled)
        for name in ("n_genes", "n_components", "max_sections", "max_spots"):
            check_positive(name, getattr(self, name), integer=True)


@dataclass(frozen=True)
class CardConfig:
    """What the model card says beside the numbers."""

    description: str = ""
    licence_weights: str = ""
    licence_data: str = ""


@dataclass(frozen=True)
class RunConfig:
    """How a run is carried out.

    ``devices`` are the processes of one machine, one for each GPU: a number, ``"all"``, or ``"auto"``, which is what
    ``torchrun`` started, else one. ``accumulate`` batches make one step. ``clip`` is the largest norm of the gradient,
    0 for any. ``checkpoint_every`` is in steps. ``resume`` goes on from ``<out>.run``. ``best`` names the validation
    metric by which the best checkpoint is kept, ``final`` (``"last"`` or ``"best"``) the weights that become the
    result. ``timeout`` is how many minutes a process waits for the others.
    """

    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    accumulate: int = 1
    clip: float = 1.0
    checkpoint_every: int = 100
    resume: bool = True
    best: str = "recall_at_5_percent"
    final: str = "last"
    num_workers: int = 0
    log_every: int = 10
    tensorboard: bool = False
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if isinstance(self.devices, str):
            check_choice("devices", self.devices, ("auto", "all"))
        else:
            check_positive("devices", self.devices, integer=True)
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("best", self.best, tuple(METRICS))
        check_choice("final", self.final, ("last", "best"))
        for name in ("num_nodes", "accumulate", "checkpoint_every", "log_every"):
            check_positive(name, getattr(self, name), integer=True)
        _check_whole("num_workers", self.num_workers)
        _check_weight("clip", self.clip)
        check_positive("timeout", self.timeout)
        for name in ("resume", "tensorboard"):
            _check_switch(name, getattr(self, name))


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
    alignment: AlignmentFitConfig = AlignmentFitConfig()
    prediction: PredictionFitConfig = PredictionFitConfig()
    familiarity: FamiliarityFitConfig = FamiliarityFitConfig()
    run: RunConfig = RunConfig()
    card: CardConfig = CardConfig()

    def __post_init__(self) -> None:
        _check_text("out", self.out)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer >= 0, got {self.seed!r}.")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "config") -> PretrainConfig:
        """Build from nested dicts; unknown keys are refused with the nearest known one."""
        return build_config(cls, data, where)

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts and lists."""
        return plain_config(self)

    def recipe(self) -> dict[str, Any]:
        """Return what decides the weights, as ``{dotted key: value}``: no places, devices, or text of the card."""
        flat = _flatten(self.to_dict())
        return {
            key: value
            for key, value in flat.items()
            if not key.startswith(_PLACES)
            and (not key.startswith("run.") or key.removeprefix("run.") in _PLACES_OF_RUN)
            and not key.startswith("network.weights.")
        }


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item})
    return flat


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

    Returns
    -------
    :class:`PretrainConfig`.

    Raises
    ------
    FileNotFoundError, ValueError
        For a missing file, TOML that cannot be read, a change without ``=``, or an unknown key.

    Examples
    --------
    >>> from stalign import train
    >>> train.read_config("my-model.toml", ["optimiser.steps=20"])  # doctest: +SKIP
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no config {str(path)!r}.")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no valid TOML: {error}") from error
    return PretrainConfig.from_dict(apply_changes(data, changes), where=str(path))


def apply_changes(data: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Set ``"key=value"`` with dotted keys in nested dicts, in place; values are read as TOML reads them.

    Raises
    ------
    ValueError
        For a change without ``=``, or one inside of what is no table.
    """
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
    return data
