"""Which tensors a packed checkpoint holds and how many bytes its files take, to the byte and without torch.

The layouts are those of compressed-tensors (docs/format.md). Knows nothing about tensor data or about models.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quantlab.checkpoint.header import DTYPE_BYTES, TensorInfo
from quantlab.schemes import Scheme

Entry = tuple[str, str, tuple[int, ...]]  # tensor name, safetensors dtype, shape


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write: `header` is its first bytes (length included), `entries` its tensors in file order."""

    name: str
    entries: tuple[Entry, ...]
    header: bytes

    @property
    def data_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(entry_bytes(entry) for entry in self.entries)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.data_bytes


def entry_bytes(entry: Entry) -> int:
    """Bytes of one tensor's data."""
    return math.prod(entry[2]) * DTYPE_BYTES[entry[1]]


def disk_entries(module: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str) -> list[Entry]:
    """The tensors that replace `module`'s weight of `shape` (N, K) under `scheme`.

    scale_dtype: safetensors name, that of the source weight. K must be a multiple of the group size.
    """
    rows, columns = shape
    assert scheme.group_size is None or columns % scheme.group_size == 0
    scale: Entry = (f"{module}.weight_scale", scale_dtype, (rows, scheme.groups(columns)))
    if scheme.quantizes_activations:
        return [(f"{module}.weight", "I8", (rows, columns)), scale]
    per_word = 32 // scheme.bits
    entries: list[Entry] = [
        (f"{module}.weight_packed", "I32", (rows, -(-columns // per_word))),
        scale,
        (f"{module}.weight_shape", "I64", (2,)),
    ]
    if not scheme.symmetric:
        entries.append((f"{module}.weight_zero_point", "I32", (-(-rows // per_word), scheme.groups(columns))))
    return entries


def output_entries(tensors: Iterable[TensorInfo], schemes: Mapping[str, Scheme | None]) -> list[Entry]:
    """Every tensor of the packed checkpoint made from `tensors` (the source's, in model order), in that order."""
    entries: list[Entry] = []
    for info in tensors:
        module = info.name.removesuffix(".weight")
        scheme = schemes.get(module) if module != info.name else None
        if scheme is None:
            entries.append((info.name, info.dtype, info.shape))
        else:
            rows, columns = info.shape
            entries += disk_entries(module, (rows, columns), scheme, info.dtype)
    return entries


def plan_shards(entries: Iterable[Entry], max_shard_size: int) -> list[Shard]:
    """`entries` cut, in order, into files of at most `max_shard_size` bytes (a tensor larger than that goes alone).

    Inside a file wider dtypes come first, so that every tensor is aligned to its element.
    """
    parts: list[list[Entry]] = [[]]
    used = _HEADER_SLACK
    for entry in entries:
        cost = entry_bytes(entry) + _header_cost(entry)
        if parts[-1] and used + cost > max_shard_size:
            parts.append([])
            used = _HEADER_SLACK
        parts[-1].append(entry)
        used += cost
    names = shard_names(len(parts))
    return [_shard(name, part) for name, part in zip(names, parts, strict=True)]


def shard_names(count: int) -> list[str]:
    """File names of `count` shards, as Hugging Face tools expect them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def index_json(shards: Iterable[Shard]) -> dict[str, object]:
    """The content of model.safetensors.index.json; `total_size` counts tensor data only, as others do."""
    shards = list(shards)
    weight_map = {entry[0]: shard.name for shard in shards for entry in shard.entries}
    total = sum(shard.data_bytes for shard in shards)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def json_bytes(value: object) -> bytes:
    """`value` as the bytes that `writer.write_json` writes: the one JSON form of every output file."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


# Length word, braces, metadata and padding of a header, rounded up.
_HEADER_SLACK = 64


def _header_cost(entry: Entry) -> int:
    """An upper bound of the header bytes of one entry: offsets are given 15 digits each."""
    return len(_entry_json(entry, 10**14, 10**14)) + 1


def _entry_json(entry: Entry, start: int, end: int) -> str:
    name, dtype, shape = entry
    return _compact(name) + ":" + _compact({"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]})


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _shard(name: str, part: list[Entry]) -> Shard:
    """The file `name` holding `part`, its header padded with spaces to a multiple of 8 bytes."""
    ordered = sorted(part, key=lambda entry: -DTYPE_BYTES[entry[1]])  # stable: model order within a width
    items = ['"__metadata__":{"format":"pt"}']
    position = 0
    for entry in ordered:
        end = position + entry_bytes(entry)
        items.append(_entry_json(entry, position, end))
        position = end
    text = ("{" + ",".join(items) + "}").encode()
    text += b" " * (-len(text) % 8)
    return Shard(name, tuple(ordered), len(text).to_bytes(8, "little") + text)
