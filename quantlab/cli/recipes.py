"""`quantlab recipes`: list, show, validate, schema.

Knows nothing about checkpoints: a recipe is checked for itself, not against a model (that is --dry-run's work).
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli.console import data_console, plain_table, print_json
from quantlab.cli.examples import SETTINGS, epilog
from quantlab.quant.plan import scheme_of
from quantlab.recipe import Recipe
from quantlab.recipe_file import builtin, builtin_names, builtin_text, load_recipe
from quantlab.schemes import describe

LIST_EXAMPLES = (("quantlab recipes list", "every built-in recipe"),)
SHOW_EXAMPLES = (
    ("quantlab recipes show w4a16-balanced", "the YAML behind --quality balanced"),
    ("quantlab recipes show w4a16-balanced > my.yaml", "a start for your own"),
)
VALIDATE_EXAMPLES = (("quantlab recipes validate my.yaml", "line and column of the first mistake"),)
SCHEMA_EXAMPLES = (("quantlab recipes schema > recipe.schema.json", "for completion in your editor"),)
EXAMPLES = LIST_EXAMPLES + SHOW_EXAMPLES + VALIDATE_EXAMPLES + SCHEMA_EXAMPLES

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


app = typer.Typer(context_settings=SETTINGS, epilog=epilog(EXAMPLES))


@app.callback(invoke_without_command=True)
def root(context: typer.Context) -> None:
    """Built-in recipes, and checks of your own."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def complete_name(incomplete: str) -> list[str]:
    """Built-in names for the shell's completion."""
    return [name for name in builtin_names() if name.startswith(incomplete)]


@app.command("list", context_settings=SETTINGS, epilog=epilog(LIST_EXAMPLES))
def list_recipes(as_json: Json = False) -> None:
    """List the built-in recipes."""
    recipes = [builtin(name) for name in builtin_names()]
    if as_json:
        print_json([{"name": r.name, "description": r.description, "passes": passes(r)} for r in recipes])
        return
    table = plain_table("recipe", "passes", "what it gives")
    for recipe in recipes:
        table.add_row(recipe.name, " + ".join(passes(recipe)), recipe.description)
    data_console().print(table)


def passes(recipe: Recipe) -> list[str]:
    """The names of a recipe's passes, in order."""
    return [step.kind for step in recipe.passes]


@app.command("show", context_settings=SETTINGS, epilog=epilog(SHOW_EXAMPLES))
def show(
    name: Annotated[str, typer.Argument(help="A built-in recipe.", autocompletion=complete_name, show_default=False)],
) -> None:
    """Print the YAML of a built-in recipe."""
    sys.stdout.write(builtin_text(name))


@app.command("validate", context_settings=SETTINGS, epilog=epilog(VALIDATE_EXAMPLES))
def validate(
    file: Annotated[Path, typer.Argument(help="A recipe file.", show_default=False)], as_json: Json = False
) -> None:
    """Check a recipe file; the first mistake is told with line and column."""
    recipe = load_recipe(file)
    scheme = describe(scheme_of(recipe))
    if as_json:
        print_json({"file": str(file), "name": recipe.name, "scheme": scheme, "passes": passes(recipe)})
        return
    print(f"{file}: valid; {recipe.name}, {scheme}, {' + '.join(passes(recipe))}")


@app.command("schema", context_settings=SETTINGS, epilog=epilog(SCHEMA_EXAMPLES))
def schema() -> None:
    """Print the JSON Schema of a recipe."""
    print(json.dumps(Recipe.model_json_schema(by_alias=True), indent=2))
