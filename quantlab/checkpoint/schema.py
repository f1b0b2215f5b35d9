"""`quantization_config` in config.json: which module is stored how, written minimally and read strictly.

The keys are those of compressed-tensors that every reader of it knows (transformers with compressed-tensors 0.15 and
newer, vLLM); docs/format.md tells why each is there. Knows nothing about tensors.
"""

from collections.abc import Iterable, Mapping
from typing import Final

from quantlab.errors import CheckpointError, UnsupportedModel, UsageError
from quantlab.schemes import GROUP_SIZES, Scheme, SchemeName

METHOD: Final = "compressed-tensors"
MIXED: Final = "mixed-precision"
_TOKEN_INT8: dict[str, object] = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "group_size": None,
    "dynamic": True,
}
# Keys that other writers of the same layouts add; only these values mean "nothing".
_EMPTY: tuple[object, ...] = (None, {}, [], "", False)
_INERT_TOP = {"global_compression_ratio", "kv_cache_scheme", "moe_sparsity_config", "sparsity_config"}
_INERT_TOP |= {"transform_config"}
_KNOWN_TOP = {"quant_method", "format", "quantization_status", "ignore", "config_groups", "dequantize", "quantlab"}
_KNOWN_TOP |= {"version"}
_KNOWN_GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}
# An observer says how a scale was found, and a static order in which order codes were: neither changes the layout.
_KNOWN_WEIGHTS = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "observer", "observer_kwargs"}
_INERT_WEIGHTS = {"actorder", "block_structure", "scale_dtype", "zp_dtype"}
_STATIC_ORDERS = ("weight", "static")


def quantization_config(schemes: Mapping[str, Scheme | None], provenance: Mapping[str, object]) -> dict[str, object]:
    """The `quantization_config` for `schemes`: every linear module's scheme, None where it stays as it was.

    `provenance` goes under the key "quantlab", which other readers ignore. Raises UsageError for asymmetric weights
    beside another scheme: transformers reads asymmetric files by a road that applies the first group to every module.
    """
    groups: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        if scheme is not None:
            groups.setdefault(scheme, []).append(module)
    assert groups, "nothing is quantized"
    if len(groups) > 1 and not all(scheme.symmetric for scheme in groups):
        message = "asymmetric weights cannot be mixed with a second scheme: transformers would misread the file"
        raise UsageError(message, fix="make all schemes symmetric, or give every module the same one")
    formats = {_format(scheme) for scheme in groups}
    config: dict[str, object] = {
        "quant_method": METHOD,
        "format": formats.pop() if len(groups) == 1 else MIXED,
        # Without it transformers loads random weights and only logs a report.
        "quantization_status": "compressed",
    }
    if not all(scheme.symmetric for scheme in groups):
        # compressed-tensors 0.18 to 0.20 cannot load packed zero points any other way; vLLM ignores the key.
        config["dequantize"] = True
    config["ignore"] = _ignored(schemes)
    config["config_groups"] = {
        f"group_{i}": _group(scheme, _targets(modules, alone=len(groups) == 1))
        for i, (scheme, modules) in enumerate(groups.items())
    }
    config["quantlab"] = dict(provenance)
    return config


def parse_quantization_config(
    raw: Mapping[str, object], modules: Iterable[str], where: str = "config.json"
) -> dict[str, Scheme | None]:
    """The scheme of each of `modules` (all linear modules of the model) according to `raw`.

    Raises CheckpointError for a malformed section, UnsupportedModel for a sound one that quantlab does not write.
    """
    modules = list(modules)
    where = f"{where}: quantization_config"
    _check_top(raw, where)
    ignore = _names(raw.get("ignore") or [], f"{where}.ignore")
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError("config_groups is missing or empty", where=where)
    by_target: dict[str, Scheme] = {}
    for key, group in groups.items():
        scheme, targets = _parse_group(group, f"{where}.config_groups.{key}")
        for target in targets:
            if target in by_target:
                raise CheckpointError(f"target {target!r} is in two groups", where=where)
            by_target[target] = scheme
    known = set(modules) | {"Linear", "lm_head"}
    for name in [*by_target, *ignore]:
        if name not in known:
            raise CheckpointError(f"names {name!r}, which is no linear module of this model", where=where)
    # A name wins over the class, as in compressed-tensors.
    default = by_target.get("Linear")
    return {name: None if name in ignore else by_target.get(name, default) for name in modules}


def _format(scheme: Scheme) -> str:
    """W8A16 is packed too: it is the only form of INT8 weights with 16-bit activations that vLLM loads."""
    return "int-quantized" if scheme.quantizes_activations else "pack-quantized"


def _ignored(schemes: Mapping[str, Scheme | None]) -> list[str]:
    """Modules left alone; always lm_head unless it is quantized, for with tied embeddings it is no module of ours."""
    ignored = [module for module, scheme in schemes.items() if scheme is None]
    return ignored if "lm_head" in schemes else [*ignored, "lm_head"]


def _targets(modules: list[str], alone: bool) -> list[str]:
    """The class when one scheme covers all, else names.

    Names for every group of a mixed model: vLLM asks for the class "Linear" before it looks at the parts of a fused
    layer, so a class target would win over the names of q_proj, k_proj and v_proj. It calls lm_head no Linear.
    """
    if not alone:
        return modules
    return ["Linear", "lm_head"] if "lm_head" in modules else ["Linear"]


def _group(scheme: Scheme, targets: list[str]) -> dict[str, object]:
    return {
        "format": _format(scheme),
        "targets": targets,
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if scheme.group_size is None else "group",
            "group_size": scheme.group_size,
            "dynamic": False,
        },
        "input_activations": dict(_TOKEN_INT8) if scheme.quantizes_activations else None,
        "output_activations": None,
    }


def _check_top(raw: Mapping[str, object], where: str) -> None:
    """The keys that hold for all groups."""
    if raw.get("quant_method") != METHOD:
        raise UnsupportedModel(f"quant_method {str(raw.get('quant_method'))[:40]!r} is not {METHOD}", where=where)
    if raw.get("quantization_status") != "compressed":
        raise CheckpointError('quantization_status is not "compressed": other tools would load noise', where=where)
    _check_keys(raw, _KNOWN_TOP, _INERT_TOP, where)


def _check_keys(table: Mapping[str, object], known: set[str], inert: set[str], where: str) -> None:
    """Refuses keys outside `known`, save `inert` ones that say nothing."""
    for key, value in table.items():
        if key not in known and not (key in inert and value in _EMPTY):
            raise UnsupportedModel(f"{key[:60]!r} = {str(value)[:60]} is not supported", where=where)


def _parse_group(group: object, where: str) -> tuple[Scheme, list[str]]:
    """One config group: its scheme and its targets."""
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise CheckpointError("is not a group with weights", where=where)
    _check_keys(group, _KNOWN_GROUP, set(), where)
    if group.get("output_activations") is not None:
        raise UnsupportedModel("output_activations are not supported", where=where)
    scheme = _parse_weights(group["weights"], group.get("input_activations"), where)
    if group.get("format", _format(scheme)) != _format(scheme):
        raise UnsupportedModel(f"format {str(group['format'])[:40]!r} does not fit {scheme.name}", where=where)
    return scheme, _names(group.get("targets"), f"{where}.targets")


def _parse_weights(weights: Mapping[str, object], activations: object, where: str) -> Scheme:
    """The scheme that a group's weights and input activations make."""
    symmetric, strategy, group_size = weights.get("symmetric"), weights.get("strategy"), weights.get("group_size")
    grouped = strategy == "group" and type(group_size) is int and group_size in GROUP_SIZES
    whole_row = strategy == "channel" and group_size in (None, -1)
    sound = isinstance(symmetric, bool) and weights.get("type", "int") == "int" and not weights.get("dynamic")
    if not sound or not (grouped or whole_row):
        raise UnsupportedModel(f"weights {str(dict(weights))[:120]} are not supported", where=where)
    stated = {key: value for key, value in weights.items() if key != "actorder" or value not in _STATIC_ORDERS}
    _check_keys(stated, _KNOWN_WEIGHTS, _INERT_WEIGHTS, where)
    name = _scheme_name(weights.get("num_bits"), activations, where)
    scheme = Scheme(name, group_size if grouped else None, symmetric)  # type: ignore[arg-type]
    if scheme.quantizes_activations and (grouped or not symmetric):
        raise UnsupportedModel("w8a8 weights must be symmetric with one scale a row", where=where)
    return scheme


def _scheme_name(bits: object, activations: object, where: str) -> SchemeName:
    """The scheme's name from weight bits and input activations."""
    if activations is None and type(bits) is int and bits in (4, 8):
        return "w4a16" if bits == 4 else "w8a16"
    if isinstance(activations, dict) and bits == 8:
        stated = {key: activations.get(key) for key in _TOKEN_INT8}
        if stated == _TOKEN_INT8:
            return "w8a8"
    raise UnsupportedModel(f"{str(bits)[:20]}-bit weights with activations {str(activations)[:80]}", where=where)


def _names(value: object, where: str) -> list[str]:
    """A list of module names or class names; regular expressions from a file are not run."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise CheckpointError("is not a list of names", where=where)
    for name in value:
        if name.startswith("re:"):
            raise UnsupportedModel(f"regular expression {name[:60]!r}; quantlab reads exact names only", where=where)
    return value
