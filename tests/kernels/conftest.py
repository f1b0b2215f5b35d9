"""Without a GPU, kernels run in Triton's interpreter; what compiles them for a GPU starts a process of its own."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
