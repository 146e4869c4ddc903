"""Decoded tiles that are kept for a while: bounded in bytes, shared by threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future

import numpy as np

from stalign._settings import settings

_ENTRY_BYTES = 512
"""What an entry costs beside its pixels, so that very many small tiles are bounded too."""


class TileCache:
    """The most recently used arrays, up to a number of bytes.

    Two threads that want the same missing array make it once: the second waits for the first. An array larger than
    the limit is handed out and not kept.

    Parameters
    ----------
    limit
        Bytes; ``None`` follows ``settings.tile_cache_bytes``.

    Examples
    --------
    >>> cache = TileCache(limit=2000)
    >>> cache.get(("a", 0), lambda: np.zeros(1000, dtype=np.uint8)).nbytes
    1000
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._entries: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._pending: dict[Hashable, Future[np.ndarray]] = {}
        self._lock = threading.Lock()
        self._bytes = 0

    @property
    def limit(self) -> int:
        """Most bytes that are kept."""
        return settings.tile_cache_bytes if self._limit is None else self._limit

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        return self._bytes

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the array kept under a key; where there is none, make it and keep it.

        Parameters
        ----------
        key
            A tuple that begins with its owner.
        make
            Gives the array; what it raises reaches every thread that waits for it.
        """
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
            future = self._pending.get(key)
            if future is None:
                mine: Future[np.ndarray] = Future()
                self._pending[key] = mine
        if future is not None:
            return future.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._pending[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._pending[key]
            self._keep(key, value)
        mine.set_result(value)
        return value

    def _keep(self, key: Hashable, value: np.ndarray) -> None:
        size = value.nbytes + _ENTRY_BYTES
        if size > self.limit:
            return
        self._entries[key] = value
        self._bytes += size
        while self._bytes > self.limit:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.nbytes + _ENTRY_BYTES

    def drop(self, owner: Hashable) -> None:
        """Forget all arrays of an owner."""
        with self._lock:
            for key in [key for key in self._entries if key[0] == owner]:  # type: ignore[index]
                self._bytes -= self._entries.pop(key).nbytes + _ENTRY_BYTES


shared_cache = TileCache()
"""The one cache of all images that are read tile by tile."""
