"""The frame of the command line: help under headings, options from the configuration, errors in a line."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from hpo.config import OPTIONS, Section
from search_spaces.errors import PruningHPOError
from search_spaces.suggestions import did_you_mean

__all__ = ["ARGUMENTS", "Command", "EXIT_INTERRUPTED", "Group", "Option", "configuration_options", "file_option"]

ARGUMENTS = "arguments"
"""Key of a context's `meta` that holds the command's arguments as they were typed."""

EXIT_INTERRUPTED = 130

_log = logging.getLogger(__name__)
_F = TypeVar("_F", bound=Callable[..., Any])


class Option(click.Option):
    """An option that stands under a heading in `--help`."""

    def __init__(self, *arguments: Any, heading: str = "Options", **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.heading = heading


class _WithExamples(click.Command):
    """A command whose help ends with examples."""

    def __init__(self, *arguments: Any, examples: str = "", **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples.strip().splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line.strip()}\n")


class Command(_WithExamples):
    """A command with examples, whose options stand under headings."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments as they were typed."""
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(parameter, "heading", "Options"), []).append(record)
        # What is common to all commands comes last.
        for heading in sorted(sections, key=lambda heading: heading == "Options"):
            with formatter.section(heading):
                formatter.write_dl(sections[heading])


class Group(_WithExamples, click.Group):
    """The command group; turns what a user can cause into one line and an exit status."""

    command_class = Command
    group_class = type  # a group in a group is of the same kind

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Commands in the order of a user's day, not of the alphabet."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of this name; for an unknown one, which there are."""
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            raise click.UsageError(f"No such command {name!r}.{did_you_mean(name, self.commands)}", ctx)
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Tell in one line what is misused."""
        with _misuse_in_one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit 1 with one line for an error of the user's, 2 for misuse, 130 for Ctrl-C."""
        try:
            with _misuse_in_one_line():
                return super().invoke(ctx)
        except PruningHPOError as error:
            _log.debug("The error's origin:", exc_info=True)
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(EXIT_INTERRUPTED)


class _MisuseError(click.ClickException):
    """Options or arguments that a command doesn't take."""

    exit_code = click.UsageError.exit_code


@contextmanager
def _misuse_in_one_line() -> Iterator[None]:
    """Turn click's three lines about misuse into one; a group without a command shows its help."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        command = "hpo" if error.ctx is None else error.ctx.command_path
        raise _MisuseError(f"{error.format_message()} See `{command} --help`.") from error


_HEADINGS: dict[Section, str] = {
    "study": "Study",
    "search": "Search",
    "execution": "Execution",
    "model": "Network",
    "data": "Images",
    "objective": "Pruning and evaluation",
}


def configuration_options(*sections: Section, only: Sequence[str] = ()) -> Callable[[_F], _F]:
    """Decorator: the options of a configuration's sections, or only some of them."""
    chosen = [option for option in OPTIONS.values() if option.section in sections and (not only or option.name in only)]

    def decorate(command: _F) -> _F:
        for option in reversed(chosen):
            default = f"  [default: {option.default}]" if option.default.strip() else ""
            value: dict[str, Any] = {"metavar": option.metavar, "multiple": option.multiple}
            if option.is_flag:
                value = {"is_flag": True, "default": None}  # None: not given, so that a file holds
            command = click.option(
                f"--{option.name}",
                option.field,
                cls=Option,
                heading=_HEADINGS[option.section],
                **value,
                help=f"{option.help}{default}",
            )(command)
        return command

    return decorate


def file_option(name: str, help: str, **keywords: Any) -> Callable[[_F], _F]:
    """Decorator: an option that takes the path of a file."""
    return click.option(name, type=click.Path(path_type=Path, dir_okay=False), help=help, **keywords)
