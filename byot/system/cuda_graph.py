"""Records a function as a CUDA graph: replayed, it needs no Python and launches no kernel by itself."""

from collections.abc import Callable
from typing import Any

import torch

from byot.system.stopping import TrainingError

WARMUP_CALLS = 5  # before a function is recorded: libraries choose their algorithms in them


class RecordingError(TrainingError):
    """A function could not be recorded; nothing of that call was done."""


class RecordedFunction:
    """A function of a NamedTuple of tensors, some possibly None, whose later calls replay a graph of it.

    The first calls run it as it is, on a stream of its own, to warm up. It must read nothing on the host, and every
    call must have the shapes of `example`.
    """

    def __init__(self, function: Callable[[Any], None], example: Any) -> None:
        self._function, self._calls = function, 0
        self._inputs = type(example)(*(None if tensor is None else tensor.clone() for tensor in example))
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Any) -> None:
        """Raises RecordingError where the function cannot be recorded."""
        for static, tensor in zip(self._inputs, inputs, strict=True):
            if static is not None:
                static.copy_(tensor)
        self._calls += 1
        if self._calls <= WARMUP_CALLS:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._function(self._inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may pin memory meanwhile, as those do that stream images
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._function(self._inputs)  # recorded, not done
        except Exception as error:
            raise RecordingError(f"the step cannot be recorded as a CUDA graph here ({error})") from error
        return graph
