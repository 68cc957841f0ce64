"""The program `moc` and its commands. Nothing here imports torch before a command needs it."""

import gc
import io
import os
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

# Looking for pydantic's plugins reads the metadata of every installed package at each start.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
# Even for a local file `datasets` would count a download at a server, and the hub's clients send
# facts about their environment. Both are switched off.
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from moc_cli import __version__
from moc_cli.errors import MocError, explain_system
from moc_cli.processes import PARENT, check_one_process, launched, leave

if TYPE_CHECKING:
    from moc_cli.launching.place import ProcessRank

# Each command's module in this folder, and the function or the group in it. `moc --help` lists them
# in this order, that of the README; typer puts a group of commands last.
COMMANDS = {
    "train": ("train", "train"),
    "eval": ("eval", "evaluate"),
    "inspect-routing": ("inspect_routing", "inspect_routing"),
    "generate": ("generate", "generate"),
    "export": ("export", "export"),
    "predict": ("predict", "predict"),
    "compare": ("compare", "compare"),
    "sweep": ("sweep", "sweep"),
    "plan": ("plan", "plan"),
    "bench": ("bench", "bench"),
    "import": ("import_controls", "import_controls"),
    "recipes": ("recipes", "app"),
}

# The commands that several processes run together.
TOGETHER = ("train", "eval", "inspect-routing")


def _full_name(name: str) -> str:
    """Return an option's name of today: `--output` is still read as `--output-dir`."""
    return "output-dir" if name == "output" else name


def make_app(names: Iterable[str]) -> typer.Typer:
    """Return the program with these commands; only their modules are imported."""
    app = typer.Typer(
        name="moc",
        help="Fine-tune transformers with Mixture-of-Control: moc train RECIPE.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": _full_name,
        },
    )
    app.callback()(_moc)
    for name in names:
        module, attribute = COMMANDS[name]
        command = getattr(import_module(f"moc_cli.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command)
        else:
            app.command(name)(command)
    return app


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"moc {__version__}")
        raise typer.Exit()


def _moc(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code: 2 for a user's mistake, 130 after Ctrl-C, 143 and
    129 after SIGTERM and SIGHUP.

    A user's mistake is reported in a sentence and a hint on stderr, or as JSON on stdout under
    --json; so is what the system refuses. Any other exception than MocError is a bug and passes
    through with its traceback.
    """
    from moc_cli.report.output import say
    from moc_cli.report.streams import lasting_streams
    from moc_cli.signals import stopped_by_signals

    place = _place()
    follows = place is not None and place.rank > 0
    with stopped_by_signals() as stop, lasting_streams(silent=follows) as results:
        code = _run(arguments, place)
        if stop.number is not None:
            say(f"stopped by signal {stop.number}")
            code = 128 + stop.number
        results.flush()
        if results.refusal is not None:
            say(f"Error: cannot write to standard output: {results.refusal}")
            code = code or 2
    return code


def _place() -> "ProcessRank | None":
    """Return this process's place among those that a launcher has started, if there are others."""
    if launched() == 1:
        return None
    from moc_cli.launching.place import known_place

    return known_place(os.environ)


def _run(arguments: list[str], place: "ProcessRank | None") -> int:
    """Run one command, and tell what goes wrong."""
    try:
        if place is None:
            if PARENT in os.environ:  # a sweep has started it
                from moc_cli.launching.child import stop_with_parent

                stop_with_parent()
            return _call(arguments)
        from moc_cli.launching.child import run_as_one

        return run_as_one(place, lambda: _call(arguments), _explain)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        explained = _explain(error)
        if explained is None:
            raise
        code = int(getattr(error, "exit_code", 2))
        if not explained.message:  # `moc` alone: the help is the answer, and typer has printed it
            return code
        _refuse(explained, as_json="--json" in arguments)
        return code


def _call(arguments: list[str]) -> int:
    """Run one command and return its exit code; what goes wrong is raised."""
    called = arguments[:1]
    is_command = bool(called) and called[0] in COMMANDS
    app = make_app(called if is_command else COMMANDS)
    if is_command and launched() > 1:
        from moc_cli.launching.place import take_place

        take_place(os.environ)
        if called[0] not in TOGETHER:
            check_one_process(called[0])
    code = app(args=arguments, obj=arguments, prog_name="moc", standalone_mode=False)
    leave()
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> MocError | None:
    """Return a user's mistake, or what the system refused, as an error of ours; None for a bug."""
    if isinstance(error, MocError):
        return error
    if isinstance(error, OSError):
        return None if error.errno is None else explain_system(error)  # without: a library's own
    # Typer's usage errors: their class is not public under one name in all its versions.
    if not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "moc"
    return MocError(error.format_message(), hint=f"{command} --help")


def main() -> NoReturn:
    """Entry point of the `moc` program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a bar or a name that the terminal cannot show
    _delay_collection()
    code = run(sys.argv[1:])
    gc.freeze()  # saves Python's last collection, of objects that are freed anyway
    sys.exit(code)


def _delay_collection() -> None:
    """Delay the first garbage collection: the start makes many objects and no garbage.

    With `gc.freeze` at the end it saves a quarter of a short command's time. The first collection
    restores the usual threshold.
    """
    usual = gc.get_threshold()

    def restore(phase: str, info: dict[str, int]) -> None:
        gc.set_threshold(*usual)
        gc.callbacks.remove(restore)

    gc.callbacks.append(restore)
    gc.set_threshold(200_000, *usual[1:])


def _refuse(error: MocError, as_json: bool) -> None:
    from moc_cli.report.output import print_json, say

    problems = getattr(error, "problems", ())
    if as_json:
        answer = {"error": error.message, "hint": error.hint}
        print_json(answer | ({"problems": problems} if problems else {}))
        return
    if len(problems) > 1:
        say(f"{error.message}\nError: {len(problems)} mistakes in the recipe")
    else:
        say(f"Error: {error.message}")
    if error.hint:
        say(f"Hint: {error.hint}")
