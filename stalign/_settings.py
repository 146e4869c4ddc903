"""Package-wide settings, checked when they are set."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

_AMP_CHOICES = (None, "bf16", "fp16")


def _positive_int(name: str, value: Any, *, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"settings.{name} must be an integer >= {minimum}, got {value!r}.")
    return value


class Settings:
    """Defaults of every argument that is left at ``None``.

    Attributes
    ----------
    device
        ``"auto"`` (cuda, then mps, then cpu) or a name that torch knows.
    amp
        Mixed precision of the encoders: ``None`` (float32), ``"bf16"`` or ``"fp16"``.
    batch_size
        Spots in one forward pass; ``None`` finds out what suits the model and the device.
    num_workers
        Threads that read pixels ahead of the encoder; 0 reads in the calling thread, ``None`` takes as many as suit
        the device.
    compile
        Whether models are compiled by :func:`torch.compile` before they run: slow at first, then faster on a GPU.
    progress
        Whether progress bars are shown.
    cache_dir
        The one folder where downloaded checkpoints are kept.
    tile_cache_bytes
        Most bytes of decoded tiles that are kept while slides are read, over all open images together.
    max_image_pixels
        Largest picture, or single piece of one (strip, tile, chunk), that is decoded at once; more is refused.
    seed
        Seed of everything that is random and was not given its own.
    verbosity
        Level of the ``stalign`` logger, as a name or number of :mod:`logging`.

    Examples
    --------
    >>> import stalign as sta
    >>> sta.settings.batch_size = 256
    """

    def __init__(self) -> None:
        self._device = "auto"
        self._amp: str | None = None
        self._batch_size: int | None = None
        self._num_workers: int | None = None
        self._compile = False
        self._progress = True
        self._cache_dir = Path(os.environ.get("STALIGN_CACHE_DIR", Path.home() / ".cache" / "stalign"))
        self._tile_cache_bytes = 256 * 2**20
        self._max_image_pixels = 10**9
        self._seed = 0
        self.verbosity = "INFO"

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not isinstance(getattr(type(self), name, None), property):
            names = sorted(n for n, v in vars(type(self)).items() if isinstance(v, property))
            raise AttributeError(f"settings has no {name!r}. Available: {names}.")
        super().__setattr__(name, value)

    @property
    def device(self) -> str:
        """Name of the torch device, or ``"auto"``."""
        return self._device

    @device.setter
    def device(self, value: str) -> None:
        if not isinstance(value, str):
            raise TypeError(f"settings.device must be a string such as 'auto', 'cpu' or 'cuda:0', got {value!r}.")
        self._device = value

    @property
    def amp(self) -> str | None:
        """Mixed precision of the encoders."""
        return self._amp

    @amp.setter
    def amp(self, value: str | None) -> None:
        if value not in _AMP_CHOICES:
            raise ValueError(f"settings.amp must be one of {list(_AMP_CHOICES)}, got {value!r}.")
        self._amp = value

    @property
    def batch_size(self) -> int | None:
        """Spots in one forward pass, or ``None``."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int | None) -> None:
        self._batch_size = None if value is None else _positive_int("batch_size", value)

    @property
    def num_workers(self) -> int | None:
        """Threads that read pixels ahead of the encoder, or ``None``."""
        return self._num_workers

    @num_workers.setter
    def num_workers(self, value: int | None) -> None:
        self._num_workers = None if value is None else _positive_int("num_workers", value, minimum=0)

    @property
    def compile(self) -> bool:
        """Whether models are compiled before they run."""
        return self._compile

    @compile.setter  # noqa: A003
    def compile(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"settings.compile must be True or False, got {value!r}.")
        self._compile = value

    @property
    def progress(self) -> bool:
        """Whether progress bars are shown."""
        return self._progress

    @progress.setter
    def progress(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"settings.progress must be True or False, got {value!r}.")
        self._progress = value

    @property
    def cache_dir(self) -> Path:
        """Folder where downloaded checkpoints are kept."""
        return self._cache_dir

    @cache_dir.setter
    def cache_dir(self, value: str | Path) -> None:
        self._cache_dir = Path(value).expanduser()

    @property
    def tile_cache_bytes(self) -> int:
        """Most bytes of decoded tiles that are kept."""
        return self._tile_cache_bytes

    @tile_cache_bytes.setter
    def tile_cache_bytes(self, value: int) -> None:
        self._tile_cache_bytes = _positive_int("tile_cache_bytes", value)

    @property
    def max_image_pixels(self) -> int:
        """Largest picture, or piece of one, that is decoded at once."""
        return self._max_image_pixels

    @max_image_pixels.setter
    def max_image_pixels(self, value: int) -> None:
        self._max_image_pixels = _positive_int("max_image_pixels", value)

    @property
    def seed(self) -> int:
        """Seed of everything that is random and was not given its own."""
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._seed = _positive_int("seed", value, minimum=0)

    @property
    def verbosity(self) -> int:
        """Level of the ``stalign`` logger."""
        return logging.getLogger("stalign").level

    @verbosity.setter
    def verbosity(self, value: int | str) -> None:
        level = logging.getLevelNamesMapping().get(value.upper()) if isinstance(value, str) else value
        if level is None or isinstance(level, bool) or not isinstance(level, int):
            names = [n for n in logging.getLevelNamesMapping() if n != "NOTSET"]
            raise ValueError(f"settings.verbosity must be a level of logging ({names}), got {value!r}.")
        logging.getLogger("stalign").setLevel(level)


settings = Settings()
