"""What a run says about each module it quantized, and the report file made of it.

Holds no times: the same input gives the same report, byte for byte; times go beside the output.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from quantlab.schemes import Scheme


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One linear: how its codes were found and what they cost.

    error, rtn_error: squared output error over squared wanted output, on held-out tokens (on the weights themselves
    for a recipe without calibration), of what was kept and of plain rounding. `tokens` is what the solver saw.
    """

    name: str
    scheme: Scheme
    method: str
    damping: float
    retries: int
    tokens: int
    error: float
    rtn_error: float

    def as_json(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "ModuleRow":
        """The inverse of `as_json`."""
        return cls(**{**raw, "scheme": Scheme(**raw["scheme"])})


def report_json(
    rows: Iterable[ModuleRow], recipe: dict[str, Any], facts: dict[str, Any], stages: dict[str, Any]
) -> dict[str, Any]:
    """The content of quantlab_report.json: `facts` are versions and fingerprints, `stages` what later passes did."""
    modules = [row.as_json() for row in rows]
    worse = [row["name"] for row in modules if row["error"] > row["rtn_error"]]
    return {**facts, "recipe": recipe, "stages": stages, "worse_than_rtn": worse, "modules": modules}
