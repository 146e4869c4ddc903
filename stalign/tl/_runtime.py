"""Where and how a model runs: the model itself, its device, its precision."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stalign._settings import settings
from stalign._validate import check_choice, listing

if TYPE_CHECKING:
    import torch

    from stalign.models import STAlign

_AMP = ("bf16", "fp16", "off")
# Pixels of one forward pass on a CPU: 256 spots of the bundled model.
_CPU_PIXELS = 256 * (32**2 + 64**2)
# Parameters of a model beside which reading pixels takes no time worth a thread.
_LARGE = 20_000_000
# Spots of the pass that tells how much memory one takes.
_PROBE = 8


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
    from stalign.models._checkpoint import tensor_digest
    from stalign.models._folder import bundled_folder

    origin = model.provenance
    name = origin.name or model.config.name
    if not origin.sha256:
        return ModelIdentity(name, "", tensor_digest(model), "")
    on_hub = "/" in name  # folders go by the name in their config, which has no slash
    is_bundled = Path(origin.folder) == bundled_folder() / name
    source = name if on_hub or is_bundled else origin.folder
    return ModelIdentity(name, origin.revision, origin.sha256, source)


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
def inference(model: STAlign, device: torch.device, amp: str = "off", *, workers: int = 0) -> Iterator[Any]:
    """Lend a model to a device, in evaluation mode and without gradients; afterwards it is as it was.

    Parameters
    ----------
    model
        The model.
    device
        Where it runs.
    amp
        ``"bf16"``, ``"fp16"`` or ``"off"``.
    workers
        Threads that work beside it: on a CPU the passes leave them room.

    Yields
    ------
    What to call: the model, or with ``settings.compile`` its compiled form.
    """
    import torch
    from threadpoolctl import threadpool_limits

    before, was_training = model.device, model.training
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    threads = torch.get_num_threads()
    tf32 = torch.backends.cudnn.allow_tf32
    try:
        model.to(device).eval()
        if device.type == "cpu":
            torch.set_num_threads(max(1, min(threads, (os.cpu_count() or 1) - workers)))
        if device.type == "cuda":
            _lay_out(model, torch.channels_last)
            # Convolutions would drop to ten bits unasked, and differ from a CPU's.
            torch.backends.cudnn.allow_tf32 = amp != "off" and tf32
        # Readers that each ask for all cores for their matrix products wait for each other and for the passes.
        alone = threadpool_limits(1, user_api="blas") if device.type == "cpu" and workers else nullcontext()
        with alone, torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=amp != "off"):
            yield _compiled(model) if settings.compile else model
    finally:
        if device.type == "cuda":
            _lay_out(model, torch.contiguous_format)
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_num_threads(threads)
        model.to(before).train(was_training)


def _lay_out(model: STAlign, memory_format: Any) -> None:
    """Order the weights of convolutions as the pixels are."""
    for name in ("spot_image", "niche_image"):
        model.encoder(name).to(memory_format=memory_format)


_COMPILED: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _compiled(model: STAlign) -> Any:
    """Return the compiled form of a model, which is made once."""
    import torch

    if model not in _COMPILED:
        # The wrapper must not hold the model, or neither would ever be let go.
        reference = weakref.ref(model)
        _COMPILED[model] = torch.compile(lambda **inputs: reference()(**inputs))  # type: ignore[misc]
    return _COMPILED[model]


def auto_workers(model: STAlign, device: torch.device) -> int:
    """Return the number of threads that read pixels: more beside a GPU than beside a CPU that computes.

    On a CPU one works beside a small model. Beside a large one, which takes nearly all the time, it would only hold one
    core back from it.
    """
    cores = os.cpu_count() or 1
    if device.type != "cpu":
        return max(1, min(8, cores - 1))
    is_large = sum(parameter.numel() for parameter in model.parameters()) > _LARGE
    return 0 if is_large else min(1, cores - 1)


def auto_batch_size(model: STAlign, device: torch.device, *, image: bool, genes: bool) -> int:
    """Return how many spots go through the model at once.

    On a CPU as many as keep their pixels to a few megabytes. On a GPU as many as fit into half of the free memory, by
    what a small batch takes; more is halved anyway.
    """
    geometry = model.geometry
    values = (geometry.spot_pixels**2 + geometry.niche_pixels**2) if image else 0
    if device.type != "cuda":
        return _power_of_two(_CPU_PIXELS / max(values, 1), 16, 256)
    import torch

    inputs: dict[str, torch.Tensor] = {}
    for name in ("spot", "niche"):
        if image:
            side = model.encoder(f"{name}_image").size or getattr(geometry, f"{name}_pixels")
            inputs[f"{name}_image"] = torch.zeros(_PROBE, 3, side, side, device=device)
        if genes:
            inputs[f"{name}_gene"] = torch.zeros(_PROBE, model.encoder(f"{name}_gene").input_dim, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(**inputs)
    per_spot = (torch.cuda.max_memory_allocated(device) - before) / _PROBE + 6 * values
    return _power_of_two(0.5 * torch.cuda.mem_get_info(device)[0] / max(per_spot, 1), 16, 1024)


def _power_of_two(value: float, low: int, high: int) -> int:
    return int(min(high, max(low, 2 ** int(math.log2(max(value, 1))))))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device ran out of memory."""
    import torch

    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower()
