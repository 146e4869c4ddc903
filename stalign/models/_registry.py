"""Models by name. Reading a model's geometry or vocabulary imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stalign._validate import listing, near
from stalign.models._config import (
    BranchConfig,
    FusionConfig,
    Geometry,
    HeadsConfig,
    ModelConfig,
    PatchConfig,
    TokenConfig,
)
from stalign.models._folder import CONFIG, bundled, bundled_folder, read_config_file, read_genes_file

if TYPE_CHECKING:
    from stalign.models._network import STAlign


def _paper() -> ModelConfig:
    """The reference configuration of arXiv 2411.16793; it leaves the sizes of the patches open, these are ours."""
    return ModelConfig(
        name="paper",
        n_neighbors=6,
        spot_patch=PatchConfig(um=100.0, pixels=32),
        niche_patch=PatchConfig(um=200.0, pixels=224),
        spot_image=BranchConfig("resnet50-small", {"dim": 512}, TokenConfig("conv", kernel=1)),
        spot_gene=BranchConfig("scgpt", {"dim": 512}, TokenConfig("conv", kernel=1), frozen=True),
        niche_image=BranchConfig("uni", {"front": "imagenet"}, TokenConfig("conv", kernel=2, stride=2), frozen=True),
        niche_gene=BranchConfig(
            "pathway-transformer", {"n_pathways": 8, "n_genes": 548, "dim": 512}, TokenConfig("none")
        ),
        n_tokens=8,
        width=512,
        fusion=FusionConfig(heads=8, head_dim=64, hidden=64, dropout=0.1, residual=False),
        heads=HeadsConfig(hidden=2048, out=1024, niche=False),
        missing="single",
    )


def _published() -> ModelConfig:
    """The released code: as the paper, but UNI trains, behind a trainable front end."""
    return _paper().updated(name="published", niche_image={"args": {"front": "published"}, "frozen": False})


def _mini() -> ModelConfig:
    """The same four branches for slides read on a laptop; the bundled ``stalign-mini`` is trained from it."""
    image = BranchConfig("filter-bank", {}, TokenConfig("linear"))
    gene = BranchConfig("slide-profile", {"dim": 256}, TokenConfig("linear"))
    return ModelConfig(
        name="mini",
        n_neighbors=18,
        spot_patch=PatchConfig(um=112.0, pixels=32),
        niche_patch=PatchConfig(um=448.0, pixels=64),
        spot_image=image,
        spot_gene=gene,
        niche_image=image,
        niche_gene=gene,
        n_tokens=4,
        width=128,
        fusion=FusionConfig(heads=4, head_dim=32, hidden=64, dropout=0.1, residual=True, norm=False),
        heads=HeadsConfig(hidden=None, out=256, niche=True),
        missing="tokens",
        colour="library",
        unit_fused=False,
        bypass=True,
    )


# Architectures without weights; a bundled model's config comes from its folder.
_CONFIGS = {"paper": _paper, "published": _published, "mini": _mini}


class Available(NamedTuple):
    """What :func:`load` and :func:`config` know by name."""

    models: tuple[str, ...]
    configs: tuple[str, ...]


def available() -> Available:
    """Return the names of the models that come with weights, and of the configs without.

    Returns
    -------
    :class:`Available`: ``models`` and ``configs``, tuples of names.

    Examples
    --------
    >>> from stalign import models
    >>> "paper" in models.available().configs
    True
    """
    return Available(models=tuple(bundled()), configs=tuple(_CONFIGS))


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or "\\" in name or Path(name).is_absolute()


def _local_folder(name: str | Path) -> Path | None:
    """Folder of a bundled name or of a local path; ``None`` if it is neither."""
    if isinstance(name, str) and name in bundled():
        return bundled_folder() / name
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(
            f"{path} is a file; a model is a folder with {CONFIG}. For a checkpoint of the authors' code use "
            "`models.from_official(path).save(folder)`, or `stalign convert` on the command line."
        )
    if isinstance(name, Path) or _looks_like_path(name):
        raise FileNotFoundError(f"There is no model folder {path}.")
    return None


def _unknown(name: str) -> ValueError:
    known = [*bundled(), *_CONFIGS]
    extra = ""
    if name in _CONFIGS:
        extra = (
            f" {name!r} is a config without weights (none were published): "
            f"`models.STAlign(models.config({name!r}))` builds it untrained."
        )
    return ValueError(
        f"Unknown model {name!r}.{near(name, known) if not extra else ''} Models with weights: {listing(bundled())}; "
        f"a local folder or a Hub id 'owner/name' work, too.{extra}"
    )


def _folder(name: str | Path, *, revision: str | None = None, local_files_only: bool | None = None) -> tuple[Path, str]:
    """Folder and revision of a model, fetched from the Hub where needed."""
    local = _local_folder(name)
    if local is not None:
        return local, ""
    if str(name).count("/") == 1:
        from stalign.models._hub import fetch_model

        return fetch_model(str(name), revision=revision, local_files_only=local_files_only)
    raise _unknown(str(name))


def config(name: str | Path) -> ModelConfig:
    """Return a config by name (``"paper"``, ``"published"``, a bundled model) or from a model folder.

    Parameters
    ----------
    name
        As in :func:`load`, or the name of a config.

    Returns
    -------
    :class:`ModelConfig`.

    Raises
    ------
    ValueError
        For an unknown name, with the near ones.

    Examples
    --------
    >>> from stalign import models
    >>> models.config("paper").width
    512
    """
    if isinstance(name, str) and name in _CONFIGS:
        return _CONFIGS[name]()
    folder, _ = _folder(name)
    return ModelConfig.from_dict(read_config_file(folder)["model"], where=f"{folder / CONFIG}: model")


def geometry(name: str | Path) -> Geometry:
    """Return what a model sees of a slide, without loading it.

    Parameters
    ----------
    name
        As in :func:`load`, or the name of a config.

    Returns
    -------
    :class:`Geometry`: neighbours of a niche, µm and pixels of the patches.

    Examples
    --------
    >>> from stalign import models
    >>> models.geometry("paper").niche_um
    200.0
    """
    return config(name).geometry


def vocabulary(name: str | Path) -> tuple[str, ...]:
    """Return the gene symbols of a model, without loading it.

    Parameters
    ----------
    name
        As in :func:`load`.

    Returns
    -------
    Symbols, in the order of the model's inputs.

    Examples
    --------
    >>> from stalign import models
    >>> "ERBB2" in models.vocabulary("stalign-mini")
    True
    """
    return read_genes_file(_folder(name)[0])


def load(name: str | Path, *, revision: str | None = None, local_files_only: bool | None = None) -> STAlign:
    """Load a model with its weights, ready for inference, on the CPU.

    Parameters
    ----------
    name
        A bundled model (:func:`available`), a local folder, or a Hub id ``"owner/name"``.
    revision
        Branch, tag or commit on the Hub. For a bundled model or a folder: the first digits of the SHA-256 of its
        weights, checked.
    local_files_only
        Never touch the network. ``None``: as the environment says (``HF_HUB_OFFLINE``).

    Returns
    -------
    The model in evaluation mode.

    Raises
    ------
    ValueError
        For an unknown name (with the near ones) and for files that are damaged or do not fit each other.
    FileNotFoundError
        For a folder that does not exist or lacks a file.

    Examples
    --------
    >>> from stalign import models
    >>> models.load("stalign-mini").config.name
    'stalign-mini'
    """
    from stalign.models._checkpoint import load_folder

    folder, commit = _folder(name, revision=revision, local_files_only=local_files_only)
    is_local = not commit
    model = load_folder(folder, name=str(name) if not is_local or str(name) in bundled() else "", revision=commit)
    if is_local and revision is not None and not model.provenance.sha256.startswith(revision):
        raise ValueError(
            f"Model {str(name)!r} has revision {model.provenance.revision!r} (the first digits of the SHA-256 of its "
            f"weights), not {revision!r}. Leave `revision` out, or use the version of the package that bundles it."
        )
    return model
