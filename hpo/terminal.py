"""The terminal: results on standard output, progress and log on standard error."""

import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_json", "print_parts", "start_logging"]

_WIDTH_WITHOUT_TERMINAL = 140
_PACKAGES = ("hpo", "objectives", "search_spaces", "storage")


def start_logging(verbose: bool) -> "Console":
    """Set up logging to standard error; the console that progress and log share."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False)
    handler = _ConsoleHandler(console)
    # torch's own trace logger passes everything on, whatever the root's level.
    handler.setLevel(logging.DEBUG if verbose else logging.INFO)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in _PACKAGES:
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if verbose else logging.ERROR)
    return console


class _ConsoleHandler(logging.Handler):
    """Log records above the progress display."""

    def __init__(self, console: "Console") -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.capitalize()}: " if record.levelno >= logging.WARNING else ""
        try:
            self._console.print(f"{prefix}{self.format(record)}", soft_wrap=True)
        except Exception:
            self.handleError(record)


def print_parts(*parts: Any) -> None:
    """Print texts and tables on standard output."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, markup=False, width=_WIDTH_WITHOUT_TERMINAL)
    for part in parts:
        if part != "":
            console.print(part, soft_wrap=isinstance(part, str))


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    click.echo(json.dumps(value, indent=2))
