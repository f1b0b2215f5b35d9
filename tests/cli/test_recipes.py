"""`quantlab recipes`: what is listed is what can be shown, and what is shown is valid."""

import json
from pathlib import Path
from typing import Any

from quantlab.recipe import Recipe
from quantlab.recipe_file import builtin_names


def test_list_names_every_recipe_with_its_passes(cli: Any) -> None:
    ran = cli("recipes", "list")
    assert ran.code == 0
    for name in builtin_names():
        assert f"{name} " in ran.out
    assert "smoothquant + gptq" in ran.out


def test_list_as_json(cli: Any) -> None:
    rows = json.loads(cli("recipes", "list", "--json").out)
    assert [row["name"] for row in rows] == list(builtin_names())
    assert all(row["passes"] for row in rows)


def test_what_is_shown_validates(cli: Any, here: Path) -> None:
    for name in builtin_names():
        (here / "mine.yaml").write_text(cli("recipes", "show", name).out)
        ran = cli("recipes", "validate", "mine.yaml")
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith(f"mine.yaml: valid; {name}, ")


def test_validate_as_json(cli: Any, here: Path) -> None:
    (here / "mine.yaml").write_text("name: mine\ngroup_size: 32\nsymmetric: false\npasses: [{pass: rtn}]\n")
    told = json.loads(cli("recipes", "validate", "mine.yaml", "--json").out)
    assert told == {"file": "mine.yaml", "name": "mine", "scheme": "w4a16 g32 asym", "passes": ["rtn"]}


def test_schema_describes_every_key_and_pass(cli: Any) -> None:
    schema = json.loads(cli("recipes", "schema").out)
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    assert {"Rtn", "Gptq", "Awq", "SmoothQuant", "Rounding", "Distill"} <= set(schema["$defs"])
    assert "pass" in schema["$defs"]["Gptq"]["properties"]
