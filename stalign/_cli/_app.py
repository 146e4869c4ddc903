"""The application: options that every command has, and errors as one line instead of a traceback."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from stalign._logging import one_line

# What the package raises on bad input. Anything else is a fault of the package and keeps its traceback.
USER_ERRORS = (ValueError, KeyError, TypeError, ImportError, OSError)
USER_ERROR_CODE = 2

# Headings of the list of commands.
SLIDES = "Slides"
MODELS = "Models"
INSTALLATION = "Installation"


def one_line_a_paragraph(doc: str | None) -> str | None:
    """Let the terminal break the lines of a docstring, which typer would keep as they are."""
    if doc is None:
        return None
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(doc).split("\n\n"))


def examples(*commands: str) -> str:
    """Return the end of a command's help."""
    return "\n\n".join(["Examples:" if len(commands) > 1 else "Example:", *commands])


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
    epilog="\n\n".join(
        [
            "Start with: stalign doctor, then stalign demo.",
            "Exit codes: 0 done; 1 a check of `doctor` failed, or a fault of the package, with its traceback; "
            "2 the input or the call was wrong, one line says how; 130 stopped with Ctrl-C.",
        ]
    ),
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
