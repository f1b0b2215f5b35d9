"""What every command's help shares: -h, and examples at its end, kept as data so that the tests can run them.

Knows nothing about the commands.
"""

from collections.abc import Sequence

Example = tuple[str, str]
SETTINGS = {"help_option_names": ["-h", "--help"]}


def epilog(examples: Sequence[Example]) -> str:
    """The examples as help text, in one paragraph so that typer keeps them together."""
    lines = ["[bold]Examples[/bold]"]
    for command, meaning in examples:
        shown = command.replace("[", "\\[")
        lines += [f"  [dim]# {meaning}[/dim]", f"  [green]$[/green] {shown}"]
    return "\n".join(lines)
