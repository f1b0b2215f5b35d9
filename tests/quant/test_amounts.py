"""How many samples each part sees, and that the work and its estimate read the same figures."""

import pytest

from quantlab.quant.amounts import COMPARED, compared_samples, held_out_samples, solver_samples
from quantlab.recipe_file import builtin


@pytest.mark.parametrize(("samples", "held_out"), [(1, 1), (15, 1), (64, 4), (256, 16), (4096, 16)])
def test_one_sample_in_sixteen_is_held_out_within_bounds(samples: int, held_out: int) -> None:
    assert held_out_samples(samples) == held_out


def test_a_cpu_solves_on_fewer_samples_where_the_recipe_says_so() -> None:
    best = builtin("w4a16-best")
    assert solver_samples(best, 512, gpu=True) == 512
    assert solver_samples(best, 512, gpu=False) == 128
    assert solver_samples(best, 100, gpu=False) == 100


def test_comparison_takes_its_share_of_the_samples_and_never_more_than_there_are() -> None:
    balanced, rtn = builtin("w4a16-balanced"), builtin("w4a16-rtn")
    assert compared_samples(balanced, 64, held_out=4) == 4 + COMPARED
    assert compared_samples(balanced, 8, held_out=1) == 8
    assert compared_samples(rtn, 64, held_out=4) == 0
