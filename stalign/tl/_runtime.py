"""Where and how a model runs: the model itself, its device, its precision."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stalign._settings import settings
from stalign._validate import check_choice, listing

if TYPE_CHECKING:
    import torch

    from stalign.models import STAlign

_AMP = ("bf16", "fp16", "off")


class ModelIdentity(NamedTuple):
    """What a model is called in ``uns``; two models are the same if ``sha256`` is.

    ``source`` is what :func:`stalign.models.load` takes to load it again, empty for a model that was never saved.
    """

    name: str
    revision: str
    sha256: str
    source: str


def resolve_model(model: Any) -> STAlign:
    """Return a model given by name, folder or Hub id, or as it is."""
    from stalign import models

    if isinstance(model, models.STAlign):
        model.warn_untrained()
        return model
    if isinstance(model, (str, Path)):
        return models.load(model)
    raise TypeError(
        f"model must be a name, a folder, a Hub id or a loaded STAlign, got {type(model).__name__}: {model!r}. "
        f"Models with weights: {listing(models.available().models)}."
    )


def identify(model: STAlign) -> ModelIdentity:
    """Say which model this is; the SHA-256 of a model that was never saved is that of its tensors."""
    from stalign.models._folder import bundled_folder

    origin = model.provenance
    name = origin.name or model.config.name
    if not origin.sha256:
        return ModelIdentity(name, "", _tensor_digest(model), "")
    on_hub = "/" in name  # folders go by the name in their config, which has no slash
    is_bundled = Path(origin.folder) == bundled_folder() / name
    source = name if on_hub or is_bundled else origin.folder
    return ModelIdentity(name, origin.revision, origin.sha256, source)


def _tensor_digest(model: STAlign) -> str:
    import torch

    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def available_devices() -> list[str]:
    """Return the names of the devices that are there, the fastest first."""
    import torch

    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device of an argument: ``None`` is the setting, ``"auto"`` the fastest that is there.

    Raises
    ------
    ValueError
        If a device is asked for that is not there.
    """
    import torch

    wanted = str(settings.device if device is None else device)
    present = available_devices()
    if wanted == "auto":
        return torch.device(present[0])
    if wanted in present or (wanted == "cuda" and present[0].startswith("cuda")):
        return torch.device(wanted)
    raise ValueError(
        f"Device {wanted!r} is not available. Available: {listing(present)}. Pass `device='auto'` for the first of "
        "them."
    )


def resolve_amp(amp: str | None) -> str:
    """Return ``"bf16"``, ``"fp16"`` or ``"off"``; ``None`` is the setting."""
    if amp is None:
        return settings.amp or "off"
    return check_choice("amp", amp, _AMP)


@contextmanager
def inference(model: STAlign, device: torch.device, amp: str = "off") -> Iterator[STAlign]:
    """Lend a model to a device, in evaluation mode and without gradients; afterwards it is as it was."""
    import torch

    before, was_training = model.device, model.training
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    try:
        model.to(device).eval()
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=amp != "off"):
            yield model
    finally:
        model.to(before).train(was_training)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device ran out of memory."""
    import torch

    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower()
