"""`quantlab quantize`: options in, one call to `quant.run`, a result out.

Knows nothing about tensors; torch is imported only when everything that can be checked without it has been.
"""

import sys
from pathlib import Path

import typer

from quantlab.cli import arguments as arg
from quantlab.cli.examples import SETTINGS, epilog
from quantlab.cli.failures import Interrupted
from quantlab.cli.plan_view import show_plan, show_result
from quantlab.cli.preflight import calibration_spec, check_device, check_out, check_space, choose_recipe, open_source
from quantlab.cli.progress import make_view
from quantlab.errors import RecipeError, UsageError
from quantlab.quant.options import QuantizeOptions, Result
from quantlab.quant.plan import Plan, make_plan

EXAMPLES = (
    ("quantlab quantize ./Llama-3.2-1B --out ./Llama-3.2-1B-w4a16", "INT4 weights, balanced quality"),
    ("quantlab quantize ./Llama-3.2-1B --out ./Llama-3.2-1B-w8a8 --scheme w8a8", "INT8 weights and activations"),
    ("quantlab quantize ./Llama-3.2-1B --out ./small --quality best --device cuda", "as good as it gets, on a GPU"),
    ("quantlab quantize ./Llama-3.2-1B -o ./mine --calibration notes.txt", "your own text"),
    ("quantlab quantize ./Llama-3.2-1B --out ./g32 --group-size 32 --asymmetric", "finer groups, zero points"),
    ("quantlab quantize ./Llama-3.2-1B --dry-run --json", "the plan, for a script"),
)
app = typer.Typer()


@app.command("quantize", context_settings=SETTINGS, epilog=epilog(EXAMPLES))
def command(
    model: arg.Model,
    out: arg.Out = None,
    scheme: arg.SchemeOption = None,
    quality: arg.QualityOption = None,
    recipe: arg.RecipeOption = None,
    group_size: arg.GroupSizeOption = None,
    symmetric: arg.Symmetric = None,
    calibration: arg.Calibration = None,
    split: arg.Split = None,
    field: arg.Field = None,
    samples: arg.Samples = None,
    seq_len: arg.SeqLen = None,
    seed: arg.Seed = 0,
    device: arg.Device = "auto",
    max_shard_size: arg.MaxShardSize = "5GB",  # type: ignore[assignment]
    force: arg.Force = False,
    restart: arg.Restart = False,
    dry_run: arg.DryRun = False,
    json: arg.Json = False,
) -> None:
    """Quantize a checkpoint to packed INT4 or INT8 safetensors (compressed-tensors layout).

    Works block by block, so a model larger than memory is fine. Interrupted at any point, the same command resumes.
    """
    if out is None and not dry_run:
        raise UsageError("say where to write: --out DIR", where="--out", fix="--dry-run needs no --out")
    chosen = choose_recipe(recipe, scheme, quality, group_size, symmetric)
    checkpoint, config = open_source(model)
    spec = calibration_spec(chosen, config, (calibration, split, field), samples, seq_len, seed)
    target = out or Path(f"{model.resolve().name}-{chosen.scheme}")
    options = QuantizeOptions(model, target, chosen, spec, device, max_shard_size, force, restart)
    if out is not None:
        check_out(model, out, force, restart)
    plan = make_plan(checkpoint, config, chosen, options)
    if dry_run:
        show_plan(plan, options, json)
    refuse_problems(plan)
    if not dry_run:
        check_device(device)
        check_space(target, plan.output_bytes)
        show_result(run(options), plan, json)


def refuse_problems(plan: Plan) -> None:
    """Raises RecipeError when the plan cannot be carried out."""
    if plan.problems:
        more = f" (and {len(plan.problems) - 1} more: see --dry-run)" if len(plan.problems) > 1 else ""
        raise RecipeError(plan.problems[0] + more, where=f"recipe {plan.recipe}")


def run(options: QuantizeOptions) -> Result:
    """Carry the plan out, with progress on stderr; raises Interrupted on Ctrl-C."""
    from quantlab.quant.run import quantize_checkpoint

    try:
        with make_view(sys.stderr) as view:
            return quantize_checkpoint(options, view)
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped; finished blocks are kept, and nothing was put in place",
            where=str(options.out),
            fix="the same command again, which resumes (--restart begins anew)",
        ) from None
