"""What to do to a checkpoint: the strict schema of a recipe.

Knows nothing about YAML, files or tensors: `recipe_file` reads these from disk, `quant` carries them out.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quantlab.schemes import SchemeName

GroupSize = Literal[32, 64, 128, "channel"]
Quality = Literal["fast", "balanced", "best"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0, le=1.0)]


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Rtn(Strict):
    """Round to nearest; `grid` says how each group's scale is found."""

    kind: Literal["rtn"] = Field("rtn", alias="pass")
    grid: Literal["absmax", "mse", "hessian"] = "absmax"


class Gptq(Strict):
    """Column-by-column rounding that feeds each column's error to the next, on the inputs' Hessian.

    Always true sequential: each group of linears is solved on the inputs that those solved before it give. The way to
    the 16-bit outputs (`target_correction`) is measured on `correction_share` of the samples. A CPU shows the solver at
    most `cpu_samples` samples, the rest serve later passes.
    """

    kind: Literal["gptq"] = Field("gptq", alias="pass")
    grid: Literal["absmax", "mse", "hessian"] = "hessian"
    damping: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    block_size: Annotated[int, Field(ge=8, le=1024)] = 32
    activation_order: bool = True
    descent_rounds: Annotated[int, Field(ge=0, le=64)] = 0
    target_correction: Fraction = 0.0
    correction_share: Fraction = 0.375
    cpu_samples: Annotated[int, Field(ge=2, le=1_000_000)] | None = None


class Awq(Strict):
    """Scale input channels before rounding so that salient weights lose less; folded into the layer before."""

    kind: Literal["awq"] = Field("awq", alias="pass")
    grid_points: Annotated[int, Field(ge=2, le=100)] = 20
    pairs: tuple[Literal["norm", "v_o", "up_down"], ...] = ("norm", "v_o", "up_down")


class SmoothQuant(Strict):
    """Move activation outliers into the weights; the strength of each pair is searched unless given."""

    kind: Literal["smoothquant"] = Field("smoothquant", alias="pass")
    strength: Fraction | None = None
    grid_points: Annotated[int, Field(ge=2, le=100)] = 20
    pairs: tuple[Literal["norm", "v_o", "up_down"], ...] = ("norm", "v_o", "up_down")


class Rounding(Strict):
    """Learn each block's rounding by gradient descent on its output error."""

    kind: Literal["rounding"] = Field("rounding", alias="pass")
    steps: Annotated[int, Field(ge=1, le=100_000)] = 200
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 4
    code_rate: Rate = 0.01
    scale_rate: Rate = 0.003


class Distill(Strict):
    """Train codes, scales and norms end to end towards the 16-bit model's next-token distribution.

    A CPU takes `cpu_steps` of `cpu_batch_size` samples instead, what it can do in minutes; for codes to move at all in
    so few, the rates of codes and scales are multiplied by `cpu_rate_factor` there.
    """

    kind: Literal["distill"] = Field("distill", alias="pass")
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 3000
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    cpu_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    cpu_batch_size: Annotated[int, Field(ge=1, le=1024)] = 4
    cpu_rate_factor: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    code_rate: Rate = 0.006
    scale_rate: Rate = 0.001
    norm_rate: Rate = 0.0005
    checkpoint_seconds: Annotated[float, Field(gt=0.0, le=60.0)] = 30.0


Pass = Annotated[Rtn | Gptq | Awq | SmoothQuant | Rounding | Distill, Field(discriminator="kind")]
ORDER: dict[str, int] = {"awq": 0, "smoothquant": 0, "rtn": 1, "gptq": 1, "rounding": 2, "distill": 3}


class Override(Strict):
    """Another scheme for the modules whose whole name equals `match`, or matches it after `re:`."""

    match: Annotated[str, Field(min_length=1, max_length=512)]
    scheme: SchemeName | Literal["skip"]
    group_size: GroupSize = 128
    symmetric: bool = True


class Recipe(Strict):
    """A scheme, its exceptions and the passes that carry it out, in order."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._+-]+$")] = "custom"
    description: Annotated[str, Field(max_length=1000)] = ""
    scheme: SchemeName = "w4a16"
    group_size: GroupSize = 128
    symmetric: bool = True
    ignore: tuple[Annotated[str, Field(min_length=1, max_length=512)], ...] = ("lm_head",)
    overrides: tuple[Override, ...] = ()
    passes: Annotated[tuple[Pass, ...], Field(min_length=1, max_length=8)]

    @model_validator(mode="after")
    def _ordered(self) -> "Recipe":
        ranks = [ORDER[p.kind] for p in self.passes]
        if ranks != sorted(ranks):
            raise ValueError("passes must come in the order awq/smoothquant, rtn/gptq, rounding, distill")
        if ranks.count(1) != 1:
            raise ValueError("passes must hold exactly one of rtn and gptq")
        kinds = [p.kind for p in self.passes]
        if len(set(kinds)) != len(kinds):
            raise ValueError("a pass may appear once")
        return self
