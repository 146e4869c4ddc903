"""Several processes that share each batch: rows and gradients that cross ranks, and waiting without a hang."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

# Preparing and encoding a cohort may take long before the first step.
_PATIENCE = timedelta(days=7)
_MEETINGS = itertools.count()


class World(NamedTuple):
    """Which of how many processes this is."""

    rank: int
    size: int


def world() -> World:
    """Return rank and number of processes that share the batches; (0, 1) outside a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World(0, 1)


def launched_world() -> World:
    """Return what ``torchrun`` started, before any process group exists; (0, 1) without it."""
    if dist.is_available() and dist.is_torchelastic_launched():
        return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return World(0, 1)


def started_rank() -> int:
    """Return the rank of a process that ``torchrun``, or Lightning itself, has started; 0 for any other."""
    return launched_world().rank or int(os.environ.get("LOCAL_RANK", "0"))


# -- rows of all processes --------------------------------------------------------------------------------------------


class _GatherRows(torch.autograd.Function):
    """All processes' rows; the gradient of a row is the sum of what all processes' losses say of it."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return _interleave(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[own_rows()]


def _interleave(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(parts, dim=1).flatten(0, 1)


def own_rows() -> slice:
    """Return which rows of a whole batch are this process's: every ``world_size``-th."""
    rank, size = world()
    return slice(rank, None, size)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows of all processes in the order of the whole batch, with gradients; alone, the rows as they are.

    Parameters
    ----------
    rows
        (n, …) the rows :func:`own_rows` of a batch; n is the same in every process.

    Returns
    -------
    (n · world_size, …). The mean over processes of losses that use them has, averaged over processes, the gradient of
    one process with the whole batch.
    """
    if world().size == 1:
        return rows
    rows = rows.contiguous()
    if rows.requires_grad:
        return _GatherRows.apply(rows)
    parts = [torch.empty_like(rows) for _ in range(world().size)]
    dist.all_gather(parts, rows)
    return _interleave(parts)


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the mean over processes, without a gradient."""
    values = values.detach().clone()
    if world().size > 1:
        dist.all_reduce(values)
        values /= world().size
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set in any process."""
    if world().size == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value > 0)


def gather_objects(value: Any) -> list[Any]:
    """Return the plain values of all processes, by rank."""
    if world().size == 1:
        return [value]
    values: list[Any] = [None] * world().size
    dist.all_gather_object(values, value)
    return values


# -- batch normalisation ----------------------------------------------------------------------------------------------


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class _BatchNormOverRanks(nn.Module):
    """Batch normalisation over the batches of all processes, for devices that ``SyncBatchNorm`` does not know."""

    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        # The same parameters and buffers under the same names.
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.eps, self.momentum = norm.eps, norm.momentum
        self.training = norm.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (n, channels, …)."""
        if not self.training or world().size == 1:
            return nn.functional.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                0.0 if self.momentum is None else self.momentum,
                self.eps,
            )
        axes = [axis for axis in range(x.ndim) if axis != 1]
        values = x.float()
        n = values.numel() // values.shape[1] * world().size
        mean = _SumOverRanks.apply(values.sum(dim=axes)) / n
        shape = [1, -1, *[1] * (x.ndim - 2)]
        centred = values - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(dim=axes)) / n
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, weight)
            self.running_var.lerp_(variance * (n / max(n - 1, 1)), weight)
        scaled = centred * torch.rsqrt(variance + self.eps).view(shape)
        return (scaled * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


def share_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Let the batch normalisations of ``module`` take their statistics from all processes.

    Frozen ones are left alone: they take none. Names and shapes in the state dict stay the same.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        trains = any(parameter.requires_grad for parameter in module.parameters())
        if not trains or not module.track_running_stats:
            return module
        if device.type == "cuda":
            from timm.layers import convert_sync_batchnorm

            return convert_sync_batchnorm(module)
        return _BatchNormOverRanks(module) if type(module).__module__.startswith("torch.") else module
    for name, child in list(module.named_children()):
        shared = share_batch_norm(child, device)
        if shared is not child:
            setattr(module, name, shared)
    return module


# -- waiting ----------------------------------------------------------------------------------------------------------


@functools.cache
def _store() -> Any:
    """Connect to the key-value store of ``torchrun``, which is there before any process group."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and launched_world().rank == 0
    store = dist.TCPStore(host, port, None, hosts, timeout=_PATIENCE, wait_for_workers=False, multi_tenant=True)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"stalign/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}", store)


def wait_for_all() -> None:
    """Return when every process that ``torchrun`` started has come here; if one fails, ``torchrun`` ends the others."""
    size = launched_world().size
    if size == 1:
        return
    name = str(next(_MEETINGS))
    if _store().add(f"{name}/count", 1) == size:
        _store().set(f"{name}/done", "1")
    _store().wait([f"{name}/done"], _PATIENCE)


@contextmanager
def first_rank_first() -> Iterator[None]:
    """Let the first process run the block before the others, which then find its work done."""
    rank = launched_world().rank
    if rank:
        wait_for_all()
    yield
    if not rank:
        wait_for_all()


@contextmanager
def lost_contact(where: Callable[[], str]) -> Iterator[None]:
    """Turn the failure of a collective call, when another process has ended, into a clear message.

    Parameters
    ----------
    where
        Says at which step this happened.

    Raises
    ------
    ConnectionError
        In place of what the backend raises.
    """
    with _sigterm_waits() as ignore_sigterm:
        try:
            yield
        except RuntimeError as error:
            if world().size == 1 or not _is_lost_contact(error):
                raise
            ignore_sigterm()
            raise _lost_contact_error(where(), error) from error


def _lost_contact_error(where: str, error: RuntimeError) -> ConnectionError:
    rank, size = world()
    return ConnectionError(
        f"Process {rank} of {size} lost contact with another process {where}: that one has ended, and this one "
        "stops, too. Its own message says why; the same command goes on from the last checkpoint. "
        f"({_first_line(error)})"
    )


@contextmanager
def _sigterm_waits() -> Iterator[Callable[[], None]]:
    """Hold back the SIGTERM of ``torchrun``, which follows the end of another process, until the block is done.

    Gives a function after whose call this process heeds no SIGTERM any more: an error that ends it anyway is then told.
    Lightning calls this handler beside its own while it trains, and leaves it in place.
    """
    if launched_world().size == 1 or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came: list[int] = []
    handler = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number)) or signal.SIG_DFL

    def ignore() -> None:
        nonlocal handler
        handler = signal.SIG_IGN

    try:
        yield ignore
    finally:
        signal.signal(signal.SIGTERM, handler)
        if came:
            signal.raise_signal(signal.SIGTERM)


_SIGNS = ("gloo", "nccl", "connection closed", "connection reset", "connection refused", "broken pipe", "socket")


def _is_lost_contact(error: RuntimeError) -> bool:
    kind = getattr(dist, "DistError", None)
    if kind is not None and isinstance(error, kind):
        return True
    text = str(error).lower()
    return any(sign in text for sign in _SIGNS)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
