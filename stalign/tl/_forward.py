"""Forward passes of a model over a slide, with what they need read ahead of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stalign._logging import logger
from stalign.tl._runtime import is_out_of_memory

if TYPE_CHECKING:
    import torch

    from stalign.models import STAlign
    from stalign.slide._library import PatchReader
    from stalign.tl._expression import Expression
    from stalign.tl._sinks import Sink

Colours = Mapping[str, tuple[np.ndarray, np.ndarray]]

# Spots whose gene inputs are made at once, at most: their niches share most of their spots.
_GENE_SPOTS = 4096
_GENE_BYTES = 32 * 2**20
# Image features that may wait for the gene inputs.
_WAITING_BYTES = 64 * 2**20


class Batch(NamedTuple):
    """Positions of spots of one library that go through the model together."""

    spots: np.ndarray
    library: str
    with_image: bool


class Images(NamedTuple):
    """Pixels or the encoders' input of spots and niches; or what the image encoders made of them."""

    spot: torch.Tensor
    niche: torch.Tensor


class _Embedded(NamedTuple):
    """Embeddings on their way from the device: (n, d) float32 by name of the output."""

    spots: np.ndarray
    values: dict[str, torch.Tensor]
    arrived: torch.cuda.Event | None

    def fetch(self) -> dict[str, np.ndarray]:
        """Wait until they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return {name: values.numpy() for name, values in self.values.items()}


def run_passes(
    model: STAlign,
    network: Callable[..., Any],
    reader: PatchReader,
    batches: Sequence[Batch],
    expression: Expression | None,
    colours: Colours,
    *,
    outputs: Sequence[str],
    device: torch.device,
    num_workers: int,
    sink: Sink,
    advance: Callable[[int], Any],
) -> None:
    """Send all batches through the model, in order, and their embeddings to the sink.

    Threads read and resample the pixels of the next batches meanwhile. Where there are such threads, another one makes
    the gene inputs; until the first are there, which takes a look at the whole slide, the image encoders run ahead.

    Parameters
    ----------
    model
        In evaluation mode, on the device.
    network
        What is called: the model, or a compiled form of it.
    reader, batches, expression, colours
        The slide. Without ``expression`` there are no genes.
    outputs
        Names of the matrices to keep.
    device
        Where the model is.
    num_workers
        Threads that read pixels; 0 does everything in this one.
    sink
        Takes the embeddings.
    advance
        Called with the number of spots that are through.
    """
    passes = _Passes(model, network, colours, outputs, device)
    with ExitStack() as stack:
        genes = None if expression is None else _GenesAhead(expression, batches, threaded=num_workers > 0)
        if genes is not None:
            stack.callback(genes.close)
        waiting: deque[tuple[Batch, Images]] = deque()
        limit = passes.can_wait(_WAITING_BYTES)
        n_waiting = 0
        held: deque[_Embedded] = deque()

        def keep(embedded: _Embedded) -> None:
            sink.write(embedded.spots, embedded.fetch())
            advance(len(embedded.spots))

        def finish(batch: Batch, images: Images | None) -> None:
            for embedded in passes(batch, images, None if genes is None else genes(batch)):
                held.append(embedded)
                # A GPU has its next pass before the last one's results are waited for.
                while len(held) > (1 if device.type == "cuda" else 0):
                    keep(held.popleft())

        images: Images | None
        for batch, images in _read_ahead(lambda b: passes.read(reader, b), batches, num_workers):
            if images is not None and genes is not None and n_waiting < limit and not genes.ready(batch):
                waiting.append((batch, passes.encode(batch, images)))
                n_waiting += len(batch.spots)
                continue
            while waiting:
                finish(*waiting.popleft())
            n_waiting = 0
            finish(batch, images)
        while waiting:
            finish(*waiting.popleft())
        while held:
            keep(held.popleft())


def _read_ahead(
    read: Callable[[Batch], Images | None], batches: Sequence[Batch], num_workers: int
) -> Iterator[tuple[Batch, Images | None]]:
    """Yield batches with their pixels, in order; threads read the next ones meanwhile."""
    if num_workers == 0:
        for batch in batches:
            yield batch, read(batch)
        return
    with ThreadPoolExecutor(num_workers, thread_name_prefix="stalign-pixels") as pool:
        waiting: deque[tuple[Batch, Future[Images | None]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(read, batch)))
                if len(waiting) > num_workers + 1:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


class _GenesAhead:
    """Gene inputs of the batches, made for several at once, and in a thread of their own if wanted."""

    def __init__(self, expression: Expression, batches: Sequence[Batch], *, threaded: bool) -> None:
        self._expression = expression
        limit = min(_GENE_SPOTS, _GENE_BYTES // max(1, expression.bytes_per_spot))
        self._blocks: list[list[np.ndarray]] = []
        self._place: dict[int, tuple[int, int]] = {}  # first spot of a batch → its block and its place in it
        library, size = "", 0
        for batch in batches:
            if not self._blocks or batch.library != library or size + len(batch.spots) > limit:
                self._blocks.append([])
                size = 0
            self._place[int(batch.spots[0])] = (len(self._blocks) - 1, size)
            self._blocks[-1].append(batch.spots)
            library, size = batch.library, size + len(batch.spots)
        # A network runs where the forward passes do, on the same device and in the same precision.
        self._pool = ThreadPoolExecutor(1, "stalign-genes") if threaded and not expression.runs_network else None
        self._futures: dict[int, Future[tuple[np.ndarray, np.ndarray]]] = {}
        self._made: tuple[int, tuple[np.ndarray, np.ndarray]] | None = None
        self._submit(0)

    def _submit(self, number: int) -> None:
        if self._pool is not None and number < len(self._blocks) and number not in self._futures:
            self._futures[number] = self._pool.submit(self._make, number)

    def _make(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return self._expression(np.concatenate(self._blocks[number]))

    def ready(self, batch: Batch) -> bool:
        """Whether the inputs are there, or have to be made by whoever asks for them."""
        number, _ = self._place[int(batch.spots[0])]
        if self._pool is None or (self._made is not None and self._made[0] == number):
            return True
        self._submit(number)
        return self._futures[number].done()

    def __call__(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs of spots and niches, (n, input_dim) float32 each."""
        number, start = self._place[int(batch.spots[0])]
        if self._made is None or self._made[0] != number:
            self._submit(number)
            self._submit(number + 1)
            self._made = None  # let go of the last block first
            values = self._make(number) if self._pool is None else self._futures.pop(number).result()
            self._made = number, values
        part = slice(start, start + len(batch.spots))
        spot, niche = self._made[1]
        return spot[part], niche[part]

    def close(self) -> None:
        """Let go of the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class _Passes:
    """Forward passes over batches, in parts that fit the device's memory."""

    def __init__(
        self,
        model: STAlign,
        network: Callable[..., Any],
        colours: Colours,
        outputs: Sequence[str],
        device: torch.device,
    ) -> None:
        self.model = model
        self.network = network
        self.colours = colours
        self.outputs = outputs
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.limit: int | None = None

    # -- images ------------------------------------------------------------------------------------------------------

    def read(self, reader: PatchReader, batch: Batch) -> Images | None:
        """Read a batch's patches; runs in any thread."""
        import torch

        if not batch.with_image:
            return None
        geometry = self.model.geometry
        patches = [
            torch.from_numpy(np.ascontiguousarray(reader.read(batch.spots, um, pixels)))
            for um, pixels in (
                (geometry.spot_um, geometry.spot_pixels),
                (geometry.niche_um, geometry.niche_pixels),
            )
        ]
        if self.on_gpu:  # bytes travel, numbers are made there
            return Images(*(values.pin_memory() for values in patches))
        if self.device.type == "cpu":
            return self._preprocess(Images(*patches), batch.library)
        return Images(*patches)

    def _preprocess(self, patches: Images, library: str) -> Images:
        import torch

        if patches.spot.dtype != torch.uint8:  # in the reading thread already, or features
            return patches
        colour = self.colours.get(library)
        return Images(
            self.model.preprocess_spot_image(patches.spot, colour=colour),
            self.model.preprocess_niche_image(patches.niche, colour=colour),
        )

    def _images(self, batch: Batch, images: Images, part: slice) -> Images:
        moved = Images(*(values[part].to(self.device, non_blocking=self.on_gpu) for values in images))
        return self._preprocess(moved, batch.library)

    def can_wait(self, limit: int) -> int:
        """Return how many spots' image features may wait for their genes; 0 if they cannot be handed over."""
        encoders = [self.model.encoder(name) for name in ("spot_image", "niche_image")]
        if any(encoder.n_tokens is not None for encoder in encoders):
            return 0
        return limit // (4 * sum(encoder.dim for encoder in encoders))

    def encode(self, batch: Batch, images: Images) -> Images:
        """Run the image encoders alone; the result goes on as the images do."""
        import torch

        def run(part: slice) -> Images:
            spot, niche = self._images(batch, images, part)
            return Images(self.model.encoder("spot_image")(spot), self.model.encoder("niche_image")(niche))

        parts = [features for _, features in self._in_parts(len(batch.spots), run)]
        return Images(*(torch.cat(values) for values in zip(*parts, strict=True)))

    # -- the whole network -------------------------------------------------------------------------------------------

    def __call__(
        self, batch: Batch, images: Images | None, genes: tuple[np.ndarray, np.ndarray] | None
    ) -> Iterator[_Embedded]:
        """Yield the embeddings of parts of the batch until it is through."""
        for _, embedded in self._in_parts(len(batch.spots), lambda part: self._run(batch, images, genes, part)):
            yield embedded

    def _in_parts(self, n: int, run: Callable[[slice], Any]) -> Iterator[tuple[slice, Any]]:
        start = 0
        while start < n:
            size = min(self.limit or n, n - start)
            part = slice(start, start + size)
            result = None
            try:
                result = run(part)
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            if result is None:  # out of memory; outside the handler, so that the failed pass is freed first
                self._shrink(size)
                continue
            yield part, result
            start += size

    def _shrink(self, size: int) -> None:
        import torch

        self.limit = max(1, size // 2)
        logger.warning("%s is out of memory with %d spots at once: going on with %d.", self.device, size, self.limit)
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _run(
        self, batch: Batch, images: Images | None, genes: tuple[np.ndarray, np.ndarray] | None, part: slice
    ) -> _Embedded:
        import torch

        inputs: dict[str, torch.Tensor] = {}
        if images is not None:
            inputs["spot_image"], inputs["niche_image"] = self._images(batch, images, part)
        if genes is not None:
            for name, values in zip(("spot_gene", "niche_gene"), genes, strict=True):
                tensor = torch.from_numpy(values[part])
                inputs[name] = (tensor.pin_memory() if self.on_gpu else tensor).to(self.device, non_blocking=True)
        output = self.network(**inputs)
        embedded: dict[str, torch.Tensor] = {}
        for name in self.outputs:
            matrix = self.model.embedding(output, name)
            if matrix is not None:
                embedded[name] = matrix.float().flatten(1).to("cpu", non_blocking=self.on_gpu)
        arrived = None
        if self.on_gpu:
            arrived = torch.cuda.Event()
            arrived.record()
        return _Embedded(batch.spots[part], embedded, arrived)
