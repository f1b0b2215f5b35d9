"""Where models run, as the cache's keys know it."""

import pytest
import torch

import quantlab
from quantlab.eval import setup
from quantlab.eval.setup import Place


def test_another_version_or_another_number_of_threads_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(torch.device("cpu"), torch.float32, 1)
    found = [place.machine]
    assert place.machine == found[0] and quantlab.__version__ in found[0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    found.append(place.machine)
    monkeypatch.setattr(setup, "runtime_version", lambda: "0.0.1")
    found.append(place.machine)
    assert len(set(found)) == 3
