"""A missing optional dependency is one line with the command that installs it."""

import pytest

from quantlab.errors import MissingExtra
from quantlab.eval import extra


def test_the_harness_is_there_for_these_tests():
    assert extra.require_harness() is None


def test_a_missing_harness_names_the_extra(monkeypatch):
    monkeypatch.setattr(extra, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as error:
        extra.require_harness()
    assert error.value.exit_code == 3
    assert error.value.one_line().endswith("which is not installed; try: pip install 'quantlab[eval]'")
