"""What the sampling kernels mean, in plain torch, with a sort: the text that `sampling` is compared with."""

import torch
from torch import Tensor


def greatest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest of each row of `scores: [S, V]`, fp32 [S], and its first column, int64 [S]; NaN if a row has one."""
    value = scores.float().amax(-1)
    return value, (scores.float() == value[:, None]).int().argmax(-1)


def nucleus_floor(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """The least probability in each row's nucleus (arXiv 1904.09751): a token is in it when those likelier than it have
    less than top_p together. probabilities: [S, P] fp32; top_p: [S] fp32, above 0. Returns [S] fp32."""
    falling = probabilities.sort(-1, descending=True).values
    likelier = falling.double().cumsum(-1) - falling.double()
    # Of equals the first has the least in front of it, so that all of them are in or out together.
    count = (likelier < top_p[:, None].double()).sum(-1, keepdim=True)
    return falling.gather(1, count - 1)[:, 0]


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first token of each row whose cumulated probability exceeds that part of the row's sum, int64 [S].

    probabilities: [S, P] fp32; uniforms: [S] fp64 in [0, 1 - 2^-52].
    """
    ends = probabilities.double().cumsum(-1)
    target = uniforms[:, None] * ends[:, -1:]
    return torch.minimum((ends <= target).sum(-1), (ends < ends[:, -1:]).sum(-1))
