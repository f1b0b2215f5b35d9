"""Which rotary embedding a checkpoint asks for, read from either spelling of its config.json.

Knows nothing about tensors: `rope` turns a RopeConfig into frequencies.
"""

from dataclasses import dataclass
from typing import Any

from quantlab.errors import UnsupportedModel
from quantlab.models.fields import Fields, shorten

ROPE_TYPES: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
MAX_CONTEXT = 1 << 31


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One rotary embedding; fields that its `type` does not use keep their defaults.

    `max_position` is the context in tokens that the type scales from: the trained one for llama3 and yarn,
    `max_position_embeddings` for dynamic.
    """

    type: str
    theta: float
    max_position: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


def read_rope(raw: dict[str, Any], where: str, max_position: int, default_theta: float) -> RopeConfig:
    """The rotary embedding of a config.json; raises UnsupportedModel for a type not in ROPE_TYPES.

    As in transformers: `rope_scaling` wins over `rope_parameters`, either wins over a `rope_theta` beside it, and
    only for `original_max_position_embeddings` the top level wins.
    """
    top = Fields(raw, where)
    scaling = top.child("rope_scaling") or top.child("rope_parameters") or Fields({}, where)
    kind = _rope_type(scaling)
    _refuse_partial(top, scaling)
    theta = scaling.number("rope_theta", 1.0 + 1e-6, 1e15, top.number("rope_theta", 1.0 + 1e-6, 1e15, default_theta))
    if kind == "default":
        return RopeConfig(kind, theta, max_position)
    if kind in ("linear", "dynamic"):
        return RopeConfig(kind, theta, max_position, factor=_factor(scaling))
    return _read_long(top, scaling, kind, theta, max_position)


def _rope_type(scaling: Fields) -> str:
    if any(isinstance(value, dict) for value in scaling.raw.values()):
        raise UnsupportedModel("rope parameters that differ by layer type are not supported", where=scaling.where)
    kind = scaling.text("rope_type", scaling.raw.get("type") or "default")
    if kind not in ROPE_TYPES:
        names = ", ".join(ROPE_TYPES)
        raise UnsupportedModel(f"rope type {shorten(kind)} is not supported; supported: {names}", where=scaling.where)
    return kind


def _refuse_partial(top: Fields, scaling: Fields) -> None:
    share = scaling.number("partial_rotary_factor", 0.0, 1.0, top.number("partial_rotary_factor", 0.0, 1.0, 1.0))
    if share != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor {share:g} is not supported; supported: 1", where=top.where)


def _factor(scaling: Fields) -> float:
    return scaling.number("factor", 1.0, 1e6)


def _read_long(top: Fields, scaling: Fields, kind: str, theta: float, max_position: int) -> RopeConfig:
    key = "original_max_position_embeddings"
    trained = top.integer(key, 1, MAX_CONTEXT, scaling.integer(key, 1, MAX_CONTEXT, max_position))
    if kind == "llama3":
        low = scaling.number("low_freq_factor", 1e-6, 1e6)
        high = scaling.number("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            raise scaling.error(f"high_freq_factor {high:g} must be above low_freq_factor {low:g}")
        return RopeConfig(kind, theta, trained, _factor(scaling), low_freq_factor=low, high_freq_factor=high)
    ratio = max_position / trained
    return RopeConfig(
        kind,
        theta,
        trained,
        scaling.number("factor", 1.0, 1e6, ratio),
        attention_factor=scaling.optional_number("attention_factor", 0.0, 1e3),
        beta_fast=scaling.number("beta_fast", 0.0, 1e6, 32.0) or 32.0,
        beta_slow=scaling.number("beta_slow", 0.0, 1e6, 1.0) or 1.0,
        mscale=scaling.optional_number("mscale", 0.0, 1e3),
        mscale_all_dim=scaling.optional_number("mscale_all_dim", 0.0, 1e3),
        truncate=scaling.flag("truncate", True),
    )
