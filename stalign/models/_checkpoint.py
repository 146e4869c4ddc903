"""Checkpoints: a folder with weights (safetensors), config, vocabulary and model card. No pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stalign._logging import logger
from stalign._validate import check_choice, listing
from stalign.models._config import BRANCHES, ModelConfig, Provenance
from stalign.models._folder import CONFIG, GENES, WEIGHTS, read_config_file, read_genes_file, require_file

if TYPE_CHECKING:
    from stalign.models._network import STAlign
    from stalign.models.encoders._base import Encoder

FORMAT = 1
CARD = "README.md"
_NOT_STATED = "not stated"


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What a model card says beside the numbers, which are filled in from the model."""

    description: str = ""
    licence_code: str = "BSD-3-Clause"
    licence_weights: str = _NOT_STATED
    licence_data: str = _NOT_STATED

    def render(self, model: STAlign) -> str:
        """Write the card as Markdown."""
        config = model.config
        branches = "\n".join(
            f"| {name.replace('_', ' ')} | {branch.encoder} | {'frozen' if branch.frozen else 'trained'} "
            f"| {model.encoder(name).licence or '-'} |"
            for name, branch in ((name, config.branch(name)) for name in BRANCHES)
        )
        return (
            f"---\nlibrary_name: stalign\ntags: [spatial-transcriptomics, histology]\n---\n\n# {config.name}\n\n"
            f"{self.description.strip() or 'An ST-Align model.'}\n\n"
            f"## What it sees\n\n"
            f"Spot patch {config.spot_patch.um:g} µm at {config.spot_patch.pixels} px, niche patch "
            f"{config.niche_patch.um:g} µm at {config.niche_patch.pixels} px, {config.n_neighbors} neighbours per "
            f"niche, {len(model.genes)} genes.\n\n"
            "## What it is made of\n\n| branch | encoder | weights | licence of pretrained weights |\n"
            f"|---|---|---|---|\n{branches}\n\n{sum(p.numel() for p in model.parameters()):,} parameters.\n\n"
            f"## Licences\n\n- Code: {self.licence_code}\n- Weights: {self.licence_weights}\n"
            f"- Data: {self.licence_data}\n\n"
            f'## Use\n\n```python\nimport stalign as sta\n\nmodel = sta.models.load("path/to/this/folder")\n```\n'
        )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(module: torch.nn.Module) -> str:
    """Return the SHA-256 of a module's parameters and buffers, their names and types included."""
    digest = hashlib.sha256()
    for key, tensor in module.state_dict().items():
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _to_half(tensor: torch.Tensor) -> torch.Tensor:
    """Cast to float16 unless a number would overflow."""
    half = tensor.half()
    return half if bool((torch.isfinite(half) == torch.isfinite(tensor)).all()) else tensor


def _tensors(model: STAlign, dtype: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for key, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        tensors[key] = _to_half(value) if dtype == "float16" and value.dtype == torch.float32 else value.clone()
    return tensors


def save(
    model: STAlign,
    folder: str | Path,
    *,
    dtype: str = "float32",
    card: ModelCard | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``model`` to ``folder``; see :meth:`STAlign.save`."""
    from safetensors.torch import save_file

    import stalign

    check_choice("dtype", dtype, ("float32", "float16"))
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a model is saved to a folder.")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{folder} exists and is not empty. Pass `overwrite=True` to replace the model in it."
            )
        if not (folder / CONFIG).is_file():
            raise FileExistsError(f"{folder} does not hold a model ({CONFIG} is not there); it is not overwritten.")
    card = card or model.card or ModelCard()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(_tensors(model, dtype), temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / WEIGHTS).chmod(0o644)  # safetensors makes it readable for the owner alone
        (temporary / GENES).write_text("".join(f"{gene}\n" for gene in model.genes), encoding="utf-8", newline="\n")
        (temporary / CARD).write_text(card.render(model), encoding="utf-8", newline="\n")
        content = {
            "format": FORMAT,
            "stalign_version": stalign.__version__,
            "dtype": dtype,
            "sha256": {name: sha256(temporary / name) for name in (WEIGHTS, GENES)},
            "card": dataclasses.asdict(card),
            "encoders": _encoder_records(model),
            "model": model.config.to_dict(),
        }
        (temporary / CONFIG).write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
        )
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            _flush(file)
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("Saved model %r to %s", model.config.name, folder)
    return folder


def _flush(file: Path) -> None:
    """Bring a file to the disk, so that no power cut leaves its name without its content."""
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


def _replace(temporary: Path, folder: Path) -> None:
    """Put ``temporary`` in the place of ``folder``; an old folder is back in place if that fails."""
    if not folder.exists():
        temporary.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    folder.rename(old / folder.name)
    try:
        temporary.rename(folder)
    except OSError:
        (old / folder.name).rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def check_state(state: dict[str, Any], expected: dict[str, Any], *, what: str) -> None:
    """Refuse a state dict whose keys or shapes are not exactly those expected; values need a ``shape``."""
    missing = [key for key in expected if key not in state]
    foreign = [key for key in state if key not in expected]
    if missing or foreign:
        parts = [f"{len(missing)} keys are missing: {listing(missing, 4)}"] if missing else []
        parts += [f"{len(foreign)} keys do not belong to it: {listing(foreign, 4)}"] if foreign else []
        raise ValueError(f"{what} does not fit the model: {'; '.join(parts)}.")
    wrong = [key for key in expected if tuple(state[key].shape) != tuple(expected[key].shape)]
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{what} does not fit the model: {len(wrong)} tensors have another shape, e.g. {first!r} is "
            f"{tuple(state[first].shape)} instead of {tuple(expected[first].shape)}."
        )


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file, with a clear error for one that is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}). It is truncated or corrupt "
            f"({path.stat().st_size} bytes); fetch or copy it again."
        ) from error


def load_folder(folder: Path, *, name: str = "", revision: str = "") -> STAlign:
    """Read a model from a folder written by :func:`save`."""
    from stalign.models._network import STAlign

    content = read_config_file(folder)
    config = ModelConfig.from_dict(content["model"], where=f"{folder / CONFIG}: model")
    genes = read_genes_file(folder)
    digests = {file: sha256(require_file(folder / file)) for file in (WEIGHTS, GENES)}
    # Read first: "truncated" is a better message than "another checksum".
    state = read_safetensors(folder / WEIGHTS)
    for file, digest in digests.items():
        recorded = content.get("sha256", {}).get(file)
        if recorded is not None and recorded != digest:
            raise ValueError(
                f"{folder / file} is not the file that was saved: SHA-256 {digest}, recorded {recorded}. "
                "It is corrupt or was edited; fetch or copy the model again."
            )
    # Building draws random weights that the checkpoint replaces: the caller's random state is none of its business.
    with torch.random.fork_rng(devices=[]):
        model = STAlign(config, genes)
    check_state(state, model.state_dict(), what=str(folder / WEIGHTS))
    check_finite(state, folder / WEIGHTS)
    model.load_state_dict(state, strict=True)
    model.card = ModelCard(**content["card"]) if "card" in content else None
    model.provenance = Provenance(
        name=name or config.name,
        revision=revision or digests[WEIGHTS][:12],
        sha256=digests[WEIGHTS],
        folder=str(folder),
    )
    _restore_encoder_records(model, content, folder)
    return model.eval()


def _has_weights(encoder: Encoder) -> bool:
    """Whether the encoder's weights are in the checkpoint; scGPT stands outside it."""
    return next(encoder.parameters(), None) is not None


def _encoder_records(model: STAlign) -> dict[str, dict[str, str]]:
    """Where the weights of frozen encoders, and of those outside the checkpoint, come from.

    A branch is absent while its encoder's weights are random.
    """
    records = {}
    for name in BRANCHES:
        encoder = model.encoder(name)
        if encoder.provenance is not None and (model.branch(name).frozen or not _has_weights(encoder)):
            records[name] = encoder.provenance._asdict()
    return records


def _restore_encoder_records(model: STAlign, content: Mapping[str, Any], folder: Path) -> None:
    records = content.get("encoders")
    for name in BRANCHES:
        branch = model.branch(name)
        inside = _has_weights(branch.encoder)
        if records is not None and name in records:
            record = build_record(records[name], where=f"{folder / CONFIG}: encoders.{name}")
            beside = folder / record.name
            branch.encoder.provenance = (
                record._replace(folder=str(beside)) if not inside and beside.is_dir() else record
            )
        elif inside and (records is None or not branch.frozen):
            branch.encoder.provenance = model.provenance
    model.warn_untrained()


def build_record(data: Any, *, where: str) -> Provenance:
    """Make a provenance from what a config file holds."""
    if not isinstance(data, Mapping) or set(data) - set(Provenance._fields):
        raise ValueError(f"{where} must be a dict with the keys {list(Provenance._fields)}, got {data!r}.")
    return Provenance(**{key: str(value) for key, value in data.items()})


def check_finite(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse weights of ``path`` that hold NaN or infinite numbers."""
    bad = [key for key, value in state.items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]
    if bad:
        raise ValueError(f"{path} holds NaN or infinite weights in {len(bad)} tensors: {listing(bad, 4)}.")
