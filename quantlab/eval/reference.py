"""The baseline's side of a text, kept on disk, so that a second candidate needs no second run of the baseline.

Kept are the final hidden states in the runtime's own dtype, from which the output layer gives the very same logits:
hidden_size * 2 bytes a token where log-probabilities over a vocabulary would take a hundred times as much. An entry
is a folder named after the digest of everything that it depends on; whatever is not whole and not exactly that is
made again. Knows nothing about candidates.
"""

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from quantlab.checkpoint.folder import read_json_object
from quantlab.checkpoint.header import TensorInfo, read_header
from quantlab.checkpoint.hf import file_digest
from quantlab.checkpoint.reader import read_tensor
from quantlab.checkpoint.sizes import plan_shards
from quantlab.checkpoint.writer import disk_errors, remove_tree, write_json, write_shard
from quantlab.errors import CheckpointError, OutputError
from quantlab.eval.distribution import text_noise
from quantlab.eval.measure import Side, States, Tick, model_side, score_noise
from quantlab.eval.protocol import Windows, digest
from quantlab.eval.result import Digest, Strict, TextNoise
from quantlab.models.decoder import CausalLM

MAX_BYTES_A_TOKEN = 10_000
STATES, FACTS = "states.safetensors", "reference.json"
DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class Key(Strict):
    """What an entry depends on; `machine` because other kernels round otherwise."""

    weights: Digest
    tokenizer: Digest
    protocol: Digest  # the text's digest, the window, the dtype and the rest
    machine: str  # device, torch, rows in a batch

    def folder(self, cache: Path) -> Path:
        """Where its entry is."""
        return cache / "text" / digest(self.model_dump())[:40]


class Facts(Strict):
    """What lies beside the states: the key again, digests of states and output layer, and the noise."""

    key: Key
    states: Digest
    head: Digest
    noise: TextNoise


@dataclass(frozen=True, slots=True)
class Reference:
    """A whole and checked entry."""

    facts: Facts
    states: States


def bytes_a_token(head: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that an entry takes for each scored token: the width of what the output layer reads."""
    width = next(tensor for tensor in head.state_dict().values() if tensor.dim() == 2).shape[1]
    return int(width) * dtype.itemsize


def open_reference(cache: Path, key: Key, windows: Windows, head: nn.Module) -> Reference | None:
    """The entry for `key` and the baseline's output layer, or None if there is none or it is not whole."""
    folder = key.folder(cache)
    try:
        facts = Facts.model_validate(read_json_object(folder / FACTS, folder))
        infos = read_header(folder / STATES)
        rows = [infos[_row_name(index)] for index in range(len(windows.rows))]
        fits = all(info.shape[0] == length for info, length in zip(rows, windows.lengths, strict=True))
        whole = facts.key == key and fits and file_digest(folder / STATES)[0] == facts.states
    except (CheckpointError, ValidationError, OSError, KeyError):
        return None
    if not whole or head_digest(head) != facts.head:
        return None
    return Reference(facts, _reader(rows, next(iter(head.state_dict().values())).device))


def build_reference(cache: Path, key: Key, windows: Windows, model: CausalLM, batch: int, tick: Tick) -> None:
    """Make the entry for `key`, whole or not at all; raises OutputError if the disk refuses.

    A whole entry that another run has put there meanwhile is kept, since that run may be reading it.
    """
    with _staged(key.folder(cache), lambda: open_reference(cache, key, windows, model.lm_head) is not None) as staging:
        states = _write_states(staging / STATES, windows, model, batch, tick)
        side = Side(states, model.lm_head)
        facts = Facts(
            key=key,
            states=file_digest(staging / STATES)[0],
            head=head_digest(model.lm_head),
            noise=text_noise("", score_noise(model, windows, side, batch)),
        )
        write_json(staging / FACTS, facts.model_dump())


def head_digest(head: nn.Module) -> str:
    """sha256 (hex) of the tensors of an output layer."""
    found = hashlib.sha256()
    for name, tensor in sorted(head.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


@contextmanager
def _staged(folder: Path, whole: Callable[[], bool]) -> Iterator[Path]:
    """An empty folder of this run's own that becomes `folder` when the block ends well, and else goes away."""
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with disk_errors(folder):
            staging.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
            yield staging
            _put_in_place(staging, folder, whole)
    except OutputError as error:
        fix = "--cache DIR on another disk, or --no-cache"
        raise OutputError(error.message, where=str(folder), fix=fix) from error
    finally:
        if staging.exists():
            remove_tree(staging)


def _put_in_place(staging: Path, folder: Path, whole: Callable[[], bool]) -> None:
    """Rename `staging` to `folder`, unless what stands there is `whole`; a damaged entry makes way."""
    if folder.exists() and not whole():
        damaged = staging.with_name(f"{staging.name}.damaged")
        with suppress(FileNotFoundError):  # another run has just done the same
            os.rename(folder, damaged)
            remove_tree(damaged)
    try:
        os.rename(staging, folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _write_states(path: Path, windows: Windows, model: CausalLM, batch: int, tick: Tick) -> States:
    """Write every row's states and return how to read them."""
    dtype, width = model.embed_tokens.weight.dtype, model.config.hidden_size
    names = [_row_name(index) for index in range(len(windows.rows))]
    entries = [(name, DTYPE_NAMES[dtype], (length, width)) for name, length in zip(names, windows.lengths, strict=True)]
    (shard,) = plan_shards(entries, 1 << 62)
    produced = _produce(windows, model, batch, tick)
    assert [entry[0] for entry in shard.entries] == names, "a file of one dtype keeps the order of its tensors"
    write_shard(path, shard, lambda name: next(produced))
    infos = read_header(path)
    return _reader([infos[name] for name in names], model.embed_tokens.weight.device)


def _produce(windows: Windows, model: CausalLM, batch: int, tick: Tick) -> Iterator[Tensor]:
    """The states of every row, [L, hidden] each, in order."""
    side = model_side(model, windows)
    for rows in windows.batches(batch):
        states = side.states(rows).cpu()
        tick(rows.stop, len(windows.rows))
        yield from states.chunk(len(rows))


def _reader(infos: list[TensorInfo], device: torch.device) -> States:
    return lambda rows: torch.cat([read_tensor(infos[index]) for index in rows]).to(device)


def _row_name(index: int) -> str:
    return f"row.{index:06d}"
