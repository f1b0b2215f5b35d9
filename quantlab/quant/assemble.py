"""The finished folder from the journal's parts: written aside, read back, checked against the solver, then renamed.

Knows nothing about how codes were found.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab.checkpoint.hf import INDEX_FILE
from quantlab.checkpoint.packed import disk_tensors
from quantlab.checkpoint.reader import TensorReader
from quantlab.checkpoint.sizes import index_json, plan_shards
from quantlab.checkpoint.verify import run_prompts, verify_codes, verify_folder, verify_tensors
from quantlab.checkpoint.writer import copy_file, disk_errors, publish, remove_tree, write_json, write_shard
from quantlab.events import StepDone
from quantlab.models.naming import tensor_shapes
from quantlab.quant.journal import Journal
from quantlab.quant.parts import Parts
from quantlab.quant.plan import output_config, output_entries
from quantlab.quant.setup import Setup
from quantlab.quant.work import PUBLISHED, REPORT_FILE, contents

CHECKED_PROMPTS = 2
CHECKED_TOKENS = 64


def assemble(setup: Setup, journal: Journal, parts: Parts, report: dict[str, Any]) -> None:
    """Write, verify and publish `setup.options.out`; raises VerificationError or OutputError, leaving no output."""
    folder = journal.folder / "output"
    with disk_errors(folder):
        if folder.exists():
            remove_tree(folder)
        folder.mkdir()
    _write(setup, folder, parts)
    write_json(folder / REPORT_FILE, report)
    setup.listener(StepDone("verify", 0, 3))
    _verify(setup, folder, parts)
    journal.note(PUBLISHED, contents(folder))
    publish(folder, setup.options.out, setup.options.force)


def _write(setup: Setup, folder: Path, parts: Parts) -> None:
    shards = plan_shards(output_entries(setup.checkpoint, setup.config, setup.schemes), setup.options.max_shard_size)
    tensor = output_tensor(setup, parts)
    for number, shard in enumerate(shards, start=1):
        write_shard(folder / shard.name, shard, tensor)
        setup.listener(StepDone("write", number, len(shards)))
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, index_json(shards))
    recipe = setup.options.recipe
    write_json(folder / "config.json", output_config(setup.checkpoint.config, setup.schemes, recipe))
    for path in setup.checkpoint.extra_files:
        copy_file(path, folder / path.relative_to(setup.checkpoint.folder))


def output_tensor(setup: Setup, parts: Parts) -> Callable[[str], Tensor]:
    """A reader of output tensors by name: packed from the solver's codes, changed by a fold, or the source's own."""
    reader = TensorReader(setup.checkpoint)
    packed: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        module = name.rpartition(".")[0]
        scheme = setup.schemes.get(module)
        if scheme is None or name.endswith(".bias"):
            changed = parts.changed(name)
            return reader.tensor(name) if changed is None else changed
        if name not in packed:  # the tensors of one module are asked for close together: keep only its own
            packed.clear()
            packed.update(disk_tensors(module, parts.quantized(module), scheme))
        return packed[name]

    return tensor


def _verify(setup: Setup, folder: Path, parts: Parts) -> None:
    """Every name, dtype and shape; every code against the solver's; every float against its origin; then prompts."""
    model = verify_folder(folder, setup.schemes)
    verify_codes(model, parts.quantized)
    setup.listener(StepDone("verify", 1, 3))
    reader = TensorReader(setup.checkpoint)
    wanted = {}
    for name in tensor_shapes(setup.config):
        if name.endswith(".weight") and setup.schemes.get(name.removesuffix(".weight")) is not None:
            continue
        changed = parts.changed(name)
        wanted[name] = (lambda n=name: reader.tensor(n)) if changed is None else (lambda c=changed: c)
    verify_tensors(model, wanted)
    setup.listener(StepDone("verify", 2, 3))
    if setup.blocks is not None:
        ids = setup.blocks.ids[:CHECKED_PROMPTS, :CHECKED_TOKENS]
    else:
        ids = torch.arange(CHECKED_PROMPTS * 8).view(CHECKED_PROMPTS, -1) % setup.config.vocab_size
    run_prompts(model, ids.to(setup.place.device), torch.float32, setup.place.device)
    setup.listener(StepDone("verify", 3, 3))
