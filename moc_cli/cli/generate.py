"""`moc generate RUN`: text from a run, for a prompt, a file of prompts, or a conversation."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moc_cli.cli.options import JsonOption

if TYPE_CHECKING:
    from moc_cli.load_run import LoadedModel
    from moc_cli.recipe.schema import Recipe
    from moc_cli.serving.text import Answer, Writer


def generate(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="The run folder of `moc train`.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="ID", help="Ask this bare model instead.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The prompt; - reads it from stdin.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help='A prompt a line; of a .jsonl file its "prompt"; - is stdin.'
        ),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Let the base model answer below, without controls.")
    ] = False,
    template: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="commonsense, instruction, chat or raw; auto: what the run was trained on.",
        ),
    ] = "auto",
    raw: Annotated[bool, typer.Option("--raw", help="The same as --template raw.")] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system message, with --template chat.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, metavar="P")] = 1.0,
    num_beams: Annotated[
        int, typer.Option(min=1, metavar="N", help="Search with N beams; the text comes at once.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, metavar="N")] = 0,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    json: JsonOption = False,
) -> None:
    """Generate text with a run's controls; without a prompt on a terminal, hold a conversation."""
    from moc_cli.errors import MocError
    from moc_cli.report.output import say

    if (run is None) == (model is None):
        raise MocError("give a run folder or --model ID, one of them", "moc generate --help")
    if model is not None and base:
        raise MocError("--base asks a run's base model; --model is one already", "leave it out")
    if raw and template not in ("auto", "raw"):
        raise MocError(f"--raw and --template {template} contradict each other", "give one")
    from moc_cli.serving.prompts import check_frame, check_system, choose_frame

    check_frame(template)
    recipe = _read_recipe(run)
    prompts = _prompts(prompt, file)
    if prompts is None and json:
        raise MocError("a conversation has no --json", 'give --prompt "..." or --file FILE')

    from moc_cli.serving.text import Sampling, Writer

    sampling = Sampling(max_new_tokens, temperature, top_p, num_beams, seed)
    sampling.check()
    opened, trained = _open(run, recipe, model, device)
    frame, why = choose_frame("raw" if raw else template, trained, opened.tokenizer)
    check_system(system, frame)
    say(f"template: {frame}, {why}")
    writer = Writer(opened.adapted, opened.tokenizer, frame, system, sampling)
    if prompts is None:
        _chat(writer, base)
    else:
        _answer_all(writer, prompts, base=base, many=file is not None, json=json, name=opened.name)


def _read_recipe(run: Path | None) -> "Recipe | None":
    """The run's recipe; refuses a classifier before torch is imported."""
    if run is None:
        return None
    from moc_cli.errors import MocError
    from moc_cli.recipe.load import load_recipe
    from moc_cli.runs import RunFolder

    recipe = load_recipe(RunFolder.open(run).recipe_file)
    if recipe.data.suite == "glue" or recipe.data.format in ("classification", "regression"):
        raise MocError(
            f"{run} is a classifier ({', '.join(recipe.data.tasks)}): it has no text to give",
            f"score it: moc eval {run}",
        )
    return recipe


def _prompts(prompt: str | None, file: str | None) -> list[str] | None:
    """The prompts asked for; None for a conversation. Nothing on a terminal means one."""
    from moc_cli.errors import DataError, MocError

    if prompt is not None and file is not None:
        raise MocError("--prompt and --file are both given", "give one of them")
    if prompt is None and file is None:
        if sys.stdin.isatty():
            return None
        prompt = "-"
    if file is not None:
        from moc_cli.serving.prompts import read_prompts, split_prompts

        return split_prompts(_stdin(), "stdin") if file == "-" else read_prompts(Path(file))
    assert prompt is not None
    text = _stdin().removesuffix("\n") if prompt == "-" else prompt
    if not text.strip():
        raise DataError("the prompt is empty", 'give a text: --prompt "..."')
    return [text]


def _stdin() -> str:
    from moc_cli.errors import DataError

    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError("stdin is not UTF-8", "give the prompt as UTF-8 text") from error


def _open(
    run: Path | None, recipe: "Recipe | None", model: str | None, device: str | None
) -> tuple["LoadedModel", str | None]:
    """The run or the bare model, and the frame that it was trained in, if that is known."""
    from moc_cli.load_run import open_model, open_run
    from moc_cli.serving.prompts import trained_frame

    if run is not None:
        opened = open_run(run, device=device, recipe=recipe)
        return opened, trained_frame(opened.recipe.data.suite, opened.recipe.data.format)
    assert model is not None
    return open_model(model, device=device or "auto"), None


def _chat(writer: "Writer", base: bool) -> None:
    from moc_cli.report.output import say
    from moc_cli.serving.chat import Chat

    try:
        import readline  # noqa: F401  line editing and history for input()
    except ImportError:
        say("no line editing: this Python lacks readline")
    Chat(writer, read=lambda: input("> "), write=_write, say=say, base=base).run()


def _write(text: str) -> None:
    """Write a piece of an answer to stdout at once."""
    from moc_cli.serving.text import harmless

    sys.stdout.write(harmless(text))
    sys.stdout.flush()


def _answer_all(
    writer: "Writer", prompts: list[str], *, base: bool, many: bool, json: bool, name: str
) -> None:
    """Answer every prompt: as text while it comes, or all of it as JSON at the end."""
    from moc_cli.report.output import print_json
    from moc_cli.report.progress import WorkProgress

    conversations = [writer.turns(prompt) for prompt in prompts]
    _check_all(writer, conversations)
    silent = not many or (sys.stdout.isatty() and not json)  # there the answers are the progress
    found = []
    with WorkProgress("generate", len(prompts), silent=silent) as bar:
        for number, (prompt, turns) in enumerate(zip(prompts, conversations, strict=True), 1):
            if many and not json:
                _write(f"{'' if number == 1 else chr(10)}[{number}] {prompt}\n")
            answer = _show(writer, turns, "run: " if base else "", base=False, json=json)
            entry = {"prompt": prompt} | _facts(answer) | {"base": None}
            if base:
                entry["base"] = _facts(_show(writer, turns, "base: ", base=True, json=json))
            found.append(entry)
            bar.observe(number)
    if json:
        facts = {"model": name, "template": writer.frame, "system": writer.system}
        facts["sampling"] = vars(writer.sampling)
        print_json(facts | ({"answers": found} if many else found[0]))


def _check_all(writer: "Writer", conversations: list) -> None:
    """Name every prompt that is too long before any is answered."""
    from moc_cli.errors import DataError

    wrong = []
    for number, turns in enumerate(conversations, 1):
        try:
            writer.tokens(turns)
        except DataError as error:
            one = len(conversations) == 1
            wrong.append(error.message if one else f"prompt {number}: {error.message}")
    if wrong:
        more = f"\nand {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError("\n".join(wrong[:5]) + more)


def _show(writer: "Writer", turns: list, label: str, *, base: bool, json: bool) -> "Answer":
    """Answer once, and write it as it comes unless it goes into JSON."""
    from moc_cli.report.output import say

    if json:
        answer = writer.answer(turns, base=base)
    else:
        _write(label)
        answer = writer.answer(turns, _write, base=base)
        _write("\n")
    if not answer.ended and answer.tokens < writer.sampling.max_new_tokens:
        say("cut off: the model has no more positions")
    if not json and sys.stdout.isatty():
        say(f"{answer.tokens} tokens, {answer.tokens_per_second:.1f} tokens/s")
    return answer


def _facts(answer: "Answer") -> dict[str, Any]:
    return vars(answer) | {"tokens_per_second": answer.tokens_per_second}
