"""Gates on disk: what a candidate must prove, as YAML, every complaint at its line and column.

Knows nothing about measurements; `gate` judges them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quantlab import yaml_tree
from quantlab.errors import GateError
from quantlab.eval import metrics
from quantlab.yaml_tree import Kind, Route

DEFAULT = "default"
Number = Annotated[float, Field(strict=True, ge=-1e100, le=1e100, allow_inf_nan=False)]
LEAST_MARGIN = 1e-4  # points; a task has at most a million items, and one of them is this much
Test = Literal["noninferiority", "mcnemar"]


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(Strict):
    """One requirement: a metric and either a limit or a paired test.

    `margin_points` is in hundredths of accuracy. An `optional` rule is left out where its metric is not measured.
    """

    metric: Annotated[str, Field(min_length=1, max_length=200)]
    max: Number | None = None
    min: Number | None = None
    test: Test | None = None
    margin_points: Annotated[Number, Field(ge=0.0, lt=100.0)] | None = None
    optional: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _says_one_thing(self) -> "Rule":
        stated = [key for key in ("max", "min", "test") if getattr(self, key) is not None]
        if len(stated) != 1:
            found = " and ".join(stated) or "none"
            raise ValueError(f"a requirement needs exactly one of max, min and test, not {found}")
        if self.margin_points is not None and self.test is None:
            raise ValueError("margin_points belongs to a test: noninferiority or mcnemar")
        if self.test == "noninferiority" and not self.margin_points:
            raise ValueError("noninferiority needs a margin_points above 0: the loss that you accept")
        if self.margin_points and self.margin_points < LEAST_MARGIN:
            raise ValueError(f"margin_points below {LEAST_MARGIN:g} are less than one item in a million")
        if self.test is not None and not metrics.is_accuracy(self.metric):
            raise ValueError(f"{self.test} compares accuracies; {self.metric} takes max or min")
        return self

    @model_validator(mode="after")
    def _limit_can_be_meant(self) -> "Rule":
        limit = self.min if self.max is None else self.max
        if limit is None:
            return self
        if metrics.is_share(self.metric) and not 0.0 <= limit <= 1.0:
            raise ValueError(f"{self.metric} is a share between 0 and 1: {limit:g} % is {limit / 100.0:g}")
        if metrics.is_ratio(self.metric) and limit <= 0.0:
            raise ValueError(f"{self.metric} is a ratio, its limit must be above 0")
        return self

    @property
    def margin(self) -> float:
        """The accepted loss of accuracy, a share."""
        return (self.margin_points or 0.0) / 100.0


class GateSettings(Strict):
    """A gate file."""

    version: Literal[1] = 1
    description: Annotated[str, Field(max_length=1000)] = ""
    alpha: Annotated[Number, Field(ge=0.001, le=0.25)] = 0.05
    require: Annotated[tuple[Rule, ...], Field(min_length=1, max_length=500)]


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate ready to judge: `source` is a built-in name or a file, `places` where in it each rule stands."""

    source: str
    description: str
    alpha: float
    rules: tuple[Rule, ...]
    places: tuple[str, ...]


def load_gate(path: Path) -> Gate:
    """Read one gate file; raises GateError at file:line:column for anything that is not a valid gate."""
    return parse_gate(yaml_tree.read_text(path, GATE), str(path), str(path))


def find_gate(name: str) -> Gate:
    """The gate behind `--gate`: a built-in name, else a file."""
    return builtin_gate(name) if name in builtin_names() else load_gate(Path(name))


def default_gate() -> Gate:
    """The gate that judges when none is named."""
    return builtin_gate(DEFAULT)


def builtin_gate(name: str) -> Gate:
    """One of the gates shipped with the package, by a name among `builtin_names`."""
    path = builtin_folder() / f"{name}.yaml"
    return parse_gate(path.read_text(encoding="utf-8"), f"gates/{name}.yaml", name)


def builtin_folder() -> Path:
    """The folder of built-in gates: inside an installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    shipped = package / "_gates"
    return shipped if shipped.is_dir() else package.parent / "gates"


@cache
def builtin_names() -> tuple[str, ...]:
    """Names of the built-in gates, sorted."""
    return tuple(sorted(path.stem for path in builtin_folder().glob("*.yaml")))


def parse_gate(text: str, where: str, source: str) -> Gate:
    """Parse the text of a gate; `where` names it in errors, `source` in results."""
    tree = yaml_tree.parse(text, where, GATE)
    try:
        settings = GateSettings.model_validate(tree.data)
    except ValidationError as err:
        raise yaml_tree.explain(err, tree, _valid_keys) from None
    places = []
    for index, rule in enumerate(settings.require):
        if problem := metrics.problem_with(rule.metric):
            raise tree.error(tree.at(("require", index, "metric")), problem)
        line, column = tree.at(("require", index))
        places.append(f"{where}:{line}:{column}")
    return Gate(source, settings.description, settings.alpha, settings.require, tuple(places))


def _valid_keys(route: Route) -> Sequence[str]:
    """The keys allowed in the mapping at `route`."""
    return list((Rule if route else GateSettings).model_fields)


GATE = Kind("gate", "alpha and require", GateError, builtin_names, "--gate default, or --gate strict", None)
