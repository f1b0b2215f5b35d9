"""What every command's help shares: -h, and examples at its end, kept as data so that the tests can run them.

Knows nothing about the commands.
"""

from collections.abc import Sequence

Example = tuple[str, str]
SETTINGS = {"help_option_names": ["-h", "--help"]}


def epilog(examples: Sequence[Example]) -> str:
    """The examples as help text: typer starts a new line at each empty one."""
    lines = ["[bold]Examples[/bold]"]
    for command, meaning in examples:
        shown = command.replace("[", "\\[")
        lines.append(f"[dim]# {meaning}[/dim]")
        lines.append(f"[green]$[/green] {shown}")
    return "\n\n".join(lines)
