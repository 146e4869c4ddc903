"""Pretrained weights of image encoders: from a local file, a local folder, or the Hub. Never random in their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stalign._logging import logger
from stalign.models._config import Provenance
from stalign.models.encoders._base import ImageEncoder
from stalign.models.encoders._registry import EncoderEntry, build_image_encoder, find_image_encoder
from stalign.models.encoders._timm import TimmEncoder

_FILES = ("model.safetensors", "pytorch_model.bin")
# What timm's config.json says of a vision transformer and our class takes; the rest of it is not ours.
_VIT_ARGS = (
    "img_size",
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "norm_eps",
    "reg_tokens",
    "no_embed_class",
)


def load_image_encoder(
    name: str,
    *,
    weights: str | Path | None = None,
    revision: str | None = None,
    local_files_only: bool | None = None,
    **args: Any,
) -> ImageEncoder:
    """Make an image encoder with its pretrained weights.

    Parameters
    ----------
    name
        ``"uni"``, ``"uni2-h"``, ``"virchow2"``, ``"h-optimus-0"``, ``"phikon-v2"``, or any name that timm knows.
    weights
        A local file (``.safetensors``, or what ``torch.save`` writes, read without executing it) or the folder that
        holds it. ``None``: the encoder's repository on the Hub, kept in ``settings.cache_dir``. A ``config.json``
        beside the file may state other sizes of a vision transformer: ``img_size``, ``patch_size``, ``embed_dim``,
        ``depth``, ``num_heads``, ``mlp_ratio``, ``norm_eps``, ``reg_tokens``, ``no_embed_class``, bare or under
        ``model_args``.
    revision
        Branch, tag or commit on the Hub.
    local_files_only
        Never touch the network.
    **args
        Arguments of the encoder; they go before those of a ``config.json``.

    Returns
    -------
    The encoder in evaluation mode; its ``provenance`` names revision and SHA-256.

    Raises
    ------
    PermissionError
        For gated weights without access, with the steps that solve it.
    FileNotFoundError
        If the weights are not there.
    ValueError
        If they are damaged or belong to another architecture.

    Examples
    --------
    >>> from stalign.models.encoders import load_image_encoder
    >>> uni = load_image_encoder("uni", weights="UNI/")  # doctest: +SKIP
    >>> features = uni(uni.preprocess(patches))  # doctest: +SKIP
    """
    # Found before a network of gigabytes is built.
    found = find_weights(name, args.get("model"), weights, revision=revision, local_files_only=local_files_only)
    encoder = build_image_encoder(name, **{**stated_args(name, found[0]), **args})
    _fill(encoder, name, *found)
    return encoder.eval()


def fill_image_encoder(
    encoder: ImageEncoder,
    name: str,
    weights: str | Path | None,
    *,
    revision: str | None = None,
    local_files_only: bool | None = None,
    commit: str | None = None,
) -> None:
    """Fill an encoder in place; it is left as it was if anything is wrong.

    ``commit`` is given for ``weights`` that :func:`find_weights` has found.
    """
    if weights is not None and commit is not None:
        _fill(encoder, name, Path(weights), commit)
        return
    model = encoder.model_name if isinstance(encoder, TimmEncoder) else None
    _fill(encoder, name, *find_weights(name, model, weights, revision=revision, local_files_only=local_files_only))


def _fill(encoder: ImageEncoder, name: str, path: Path, commit: str) -> None:
    from stalign.models._checkpoint import check_finite, check_state, sha256

    state = encoder.convert(read_weights(path))
    check_state(state, encoder.backbone.state_dict(), what=f"{path} for encoder {name!r}")
    check_finite(state, path)
    encoder.backbone.load_state_dict(state, strict=True)
    digest = sha256(path)
    encoder.provenance = Provenance(name=name, revision=commit or digest[:12], sha256=digest, folder=str(path.parent))
    logger.info("Loaded weights of encoder %r from %s", name, path)


def stated_args(name: str, path: Path) -> dict[str, Any]:
    """Return the sizes that a ``config.json`` beside a vision transformer's weights states.

    Raises
    ------
    ValueError
        If the file is no JSON object, or states something that is no number.
    """
    file = path.parent / "config.json"
    if not find_image_encoder(name).factory.endswith(":ViT") or not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}). It is truncated or corrupt.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    nested = content.get("model_args")
    stated = {**content, **(nested if isinstance(nested, dict) else {})}
    args = {key: stated[key] for key in _VIT_ARGS if key in stated}
    for key, value in args.items():
        if not isinstance(value, (int, float)):
            raise ValueError(f"{file}: {key} must be a number, got {value!r}.")
    return args


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a flat state dict from a safetensors file or one of ``torch.save``."""
    from stalign.models._checkpoint import read_safetensors
    from stalign.models._torchfile import read_torch, unwrap

    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return unwrap(read_torch(path), what=str(path))


def find_weights(
    name: str,
    model: str | None,
    weights: str | Path | None,
    *,
    revision: str | None,
    local_files_only: bool | None,
) -> tuple[Path, str]:
    """Path and commit of an encoder's weights; ``model`` is the name in timm of an encoder of timm."""
    from stalign.models._hub import commit_of, download, gated_steps

    entry = find_image_encoder(name)
    if weights is not None:
        return _local(Path(weights).expanduser(), entry), ""
    repo, file = entry.hub, entry.file or _FILES[0]
    model = model or entry.args.get("model")
    if model is not None:  # timm knows where its own weights are
        from timm.models import get_pretrained_cfg

        known = get_pretrained_cfg(model)
        repo = (known.hf_hub_id or "") if known is not None else ""
    if not repo:
        raise ValueError(f"There are no public weights of encoder {name!r}. Pass a local path: weights='path/to/file'.")
    hint = f" {gated_steps(repo, file)}" if entry.gated else ""
    path = download(repo, file, revision=revision, local_files_only=local_files_only, hint=hint)
    return path, commit_of(path)


def _local(path: Path, entry: EncoderEntry) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder {path} with weights.")
    files = [file for file in (entry.file, *_FILES) if file and (path / file).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{path} holds none of {sorted({*_FILES, entry.file} - {''})}. Pass the path of the file."
        )
    return path / files[0]
