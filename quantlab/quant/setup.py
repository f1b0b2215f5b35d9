"""Everything a run needs before its first block, gathered and checked: model, schemes, text, place, fingerprint.

Reads the source once to fingerprint it; knows nothing about solving or writing.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantlab import __version__
from quantlab.checkpoint.hf import HFCheckpoint, open_checkpoint
from quantlab.checkpoint.reader import TORCH_DTYPES
from quantlab.errors import CalibrationError, OutputError
from quantlab.events import Listener
from quantlab.models.config import ModelConfig
from quantlab.models.device import use_fast_products
from quantlab.models.naming import EMBEDDING, tensor_shapes
from quantlab.quant.amounts import held_out_samples, solver_samples
from quantlab.quant.data import Blocks, load_blocks
from quantlab.quant.device import Place, choose_place
from quantlab.quant.options import QuantizeOptions
from quantlab.quant.plan import assign_schemes
from quantlab.quant.work import published_by
from quantlab.recipe import Recipe, Rtn
from quantlab.schemes import Scheme
from quantlab.text import load_tokenizer


@dataclass(frozen=True, slots=True)
class Setup:
    """A checked run; `blocks` is None for a recipe that needs no text.

    `published` means that `out` is this very run's, which was cut off before it could tidy up.
    """

    options: QuantizeOptions
    checkpoint: HFCheckpoint
    config: ModelConfig
    schemes: dict[str, Scheme | None]
    blocks: Blocks | None
    place: Place
    fingerprint: dict[str, str]
    listener: Listener
    published: bool = False

    @property
    def held_out(self) -> int:
        """Calibration samples that no solver sees, the last ones."""
        assert self.blocks is not None
        return held_out_samples(len(self.blocks.ids))

    @property
    def solver_ids(self) -> Tensor:
        """The samples `[S, T]` that run through the blocks, the held-out ones last: all, or fewer on a CPU."""
        assert self.blocks is not None
        ids = self.blocks.ids
        seen = solver_samples(self.options.recipe, len(ids), self.place.device.type != "cpu")
        return ids if seen == len(ids) else torch.cat([ids[: seen - self.held_out], ids[-self.held_out :]])


def prepare(options: QuantizeOptions, listener: Listener) -> Setup:
    """Checks all that can be checked before work; raises a QuantlabError and writes nothing."""
    use_fast_products()
    check_output(options)
    checkpoint = open_checkpoint(options.source)
    config = ModelConfig.from_json(checkpoint.config, str(options.source / "config.json"))
    checkpoint.check_tensors(tensor_shapes(config))
    schemes = assign_schemes(options.recipe, config)
    place = choose_place(options.device, TORCH_DTYPES[checkpoint.tensors[EMBEDDING].dtype])
    blocks = None
    if needs_text(options.recipe):
        blocks = load_blocks(options.calibration, load_tokenizer(options.source))
        if len(blocks.ids) < 2:
            message = "one block cannot be solved on and held out at once"
            raise CalibrationError(message, where=blocks.source, fix="--samples 2, or a smaller --seq-len")
    identity = fingerprint(options.recipe, checkpoint, blocks, place)
    published = is_published(options, identity)
    if options.out.exists() and not (options.force or published):
        raise _exists(options.out)
    return Setup(options, checkpoint, config, schemes, blocks, place, identity, listener, published)


def needs_text(recipe: Recipe) -> bool:
    """Whether any pass looks at calibration text."""
    return not all(isinstance(p, Rtn) and p.grid != "hessian" for p in recipe.passes)


def fingerprint(recipe: Recipe, checkpoint: HFCheckpoint, blocks: Blocks | None, place: Place) -> dict[str, str]:
    """What the output depends on, by name; a run may be continued only if all of it is unchanged."""
    name = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "cpu"
    return {
        "quantlab": __version__,
        "torch": str(torch.__version__),
        "device": f"{name} {str(place.compute).removeprefix('torch.')}",
        "source": checkpoint.fingerprint(),
        "recipe": digest(recipe.model_dump(mode="json", by_alias=True)),
        "calibration": "none" if blocks is None else blocks.digest,
    }


def digest(value: object) -> str:
    """sha256 of `value` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_output(options: QuantizeOptions) -> None:
    """Raises OutputError for an `out` that exists, unless it may be replaced, or a run of it may have to tidy up."""
    out = options.out
    if (out.exists() or out.is_symlink()) and not options.force and (options.restart or published_by(out) is None):
        raise _exists(out)


def is_published(options: QuantizeOptions, identity: dict[str, str]) -> bool:
    """Whether `out` is what `options` with the fingerprint `identity` make, put in place by a run that was cut off."""
    report = None if options.restart else published_by(options.out)
    asked = (identity, options.max_shard_size)
    return report is not None and (report.get("fingerprint"), report.get("max_shard_size")) == asked


def _exists(out: Path) -> OutputError:
    return OutputError("exists already", where=str(out), fix="--force to replace it, or another --out")
