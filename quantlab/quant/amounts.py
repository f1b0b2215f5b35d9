"""How many samples and tokens each part of a run sees: the one place for amounts that the work and its estimate share.

Plain arithmetic on a recipe. Knows nothing about tensors, text or models.
"""

from quantlab.recipe import Gptq, Recipe, Rounding

# Tokens in flight through a block at once; fewer on a CPU, where what they make should stay in the cache.
MICRO_TOKENS, CPU_MICRO_TOKENS = 4096, 2048
# Weights solved at a time, 16 MB in fp32: a solver keeps half a dozen arrays of their size.
CHUNK_ELEMENTS = 1 << 22
# Held-out tokens on which candidates are compared, evenly spaced; samples that they come from, at most.
HELD_OUT_TOKENS, HELD_OUT_SAMPLES = 1024, 16
# Samples, at least, on which the 16-bit model runs beside the quantized one.
COMPARED = 24


def held_out_samples(samples: int) -> int:
    """Calibration samples that no solver sees: one in sixteen, at least one and at most sixteen."""
    return min(HELD_OUT_SAMPLES, max(1, samples // 16))


def solver_samples(recipe: Recipe, samples: int, gpu: bool) -> int:
    """Samples that run through the blocks, the held-out ones among them: all, or fewer on a CPU by the recipe."""
    limit = next((step.cpu_samples for step in recipe.passes if isinstance(step, Gptq)), None)
    if gpu or limit is None or limit >= samples:
        return samples
    return max(1, limit - held_out_samples(samples)) + held_out_samples(samples)


def compared_samples(recipe: Recipe, samples: int, held_out: int) -> int:
    """How many of `samples` run through the 16-bit blocks too, the `held_out` ones among them."""
    if any(isinstance(step, Rounding) for step in recipe.passes):
        return samples
    solver = next((step for step in recipe.passes if isinstance(step, Gptq)), None)
    if solver is None or solver.target_correction == 0:
        return 0
    return min(samples, held_out + max(COMPARED, round(samples * solver.correction_share)))
