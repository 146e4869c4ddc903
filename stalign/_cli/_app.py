"""The application: options that every command has, and errors as one line instead of a traceback."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from stalign._logging import one_line

# What the package raises on bad input. Anything else is a fault of the package and keeps its traceback.
USER_ERRORS = (ValueError, KeyError, TypeError, ImportError, OSError)
USER_ERROR_CODE = 2


class _Group(TyperGroup):
    """Commands whose errors about input become one readable line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except USER_ERRORS as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(USER_ERROR_CODE) from error


app = typer.Typer(
    cls=_Group,
    name="stalign",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Align H&E images with spatial gene expression: embeddings, domains, names and predicted genes.",
    epilog="Exit codes: 0 done, 1 a check of `doctor` failed, 2 the input or the call was wrong.",
)


def _version(value: bool) -> None:
    if value:
        from stalign import __version__

        typer.echo(f"stalign {__version__}")
        raise typer.Exit


@app.callback()
def common(
    ctx: typer.Context,
    verbosity: Annotated[
        str | None, typer.Option(help="What is logged on stderr: DEBUG, INFO, WARNING or ERROR.", show_default="INFO")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Set what all commands share."""
    del debug, version  # read from the context, and handled before this runs
    ctx.obj = {"verbosity": verbosity}
    if verbosity is not None:
        from stalign import settings

        settings.verbosity = verbosity
