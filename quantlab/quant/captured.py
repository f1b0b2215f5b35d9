"""A computation on a GPU recorded once as a CUDA graph and replayed: Python starts one graph, not thousands of kernels.

Knows nothing about what is computed; only that its shapes and addresses stay as they are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Runs before the recording: libraries set themselves up in the first, tensors such as gradients come to be.
WARM_UP = 2


class Captured:
    """`run` on inputs of one shape; whatever it writes to is written again by every call.

    run: from an input on a GPU to an output there; it may not wait for the GPU, copy from the host, or let a value
    decide what it does. It runs `WARM_UP` times before the recording, which itself changes nothing.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], example: Tensor):
        self._input = example.clone()
        with torch.cuda.device(example.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # a library that was set up on the recording's own stream would be recorded
                for _ in range(WARM_UP):
                    run(self._input)
            torch.cuda.current_stream().wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = run(self._input)

    def __call__(self, x: Tensor) -> Tensor:
        """x, of the example's shape and dtype, through `run`; the output is overwritten by the next call."""
        self._input.copy_(x)
        self._graph.replay()
        return self._output
