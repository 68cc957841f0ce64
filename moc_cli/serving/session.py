"""`moc generate`: load the model, then answer prompts or hold a conversation."""

import sys
from collections.abc import Sequence
from typing import Any

from moc_cli.errors import DataError
from moc_cli.load_run import LoadedModel, open_model, open_run
from moc_cli.models.compiled_generation import compiled_generation
from moc_cli.recipe.schema import Recipe
from moc_cli.report.output import print_json, say
from moc_cli.report.progress import WorkProgress
from moc_cli.serving.chat import Chat
from moc_cli.serving.options import GenerateOptions
from moc_cli.serving.prompts import Message, check_system, choose_frame
from moc_cli.serving.text import GeneratedText, Writer, write
from moc_cli.training.device_checks import check_compiler

LISTED = 5  # prompts that an error names; the others are counted


def run_generate(
    options: GenerateOptions, recipe: Recipe | None, prompts: list[str] | None
) -> None:
    """Answer the prompts; without any, hold a conversation on the terminal."""
    compiled = check_compiler(recipe, options.torch_compile, options.device)
    if options.run is not None and recipe is not None:
        loaded: LoadedModel = open_run(
            options.run, device=options.device, recipe=recipe, base=options.base_options
        )
        trained, template = recipe.data.frame, recipe.data.template
    else:
        trusted, trained, template = options.trust_remote_code, None, "alpaca"
        loaded = open_model(
            str(options.model),
            device=options.device or "auto",
            trust_remote_code=trusted,
            load_in_4bit=options.base_options.load_in_4bit,
        )
    frame, reason = choose_frame(options.template, trained, loaded.tokenizer)
    check_system(options.system, frame)
    say(f"template: {frame}, {reason}")
    writer = Writer(
        loaded.adapted, loaded.tokenizer, frame, template, options.system, options.sampling
    )
    with compiled_generation(loaded.adapted.model, compiled):
        if prompts is None:
            try:
                import readline  # noqa: F401  line editing and history for input()
            except ImportError:
                say("no line editing: this Python lacks readline")
            Chat(writer, read=lambda: input("> "), write=write, say=say, base=options.base).run()
            return
        answers = answer_prompts(writer, prompts, options)
    if options.json:
        facts: dict[str, Any] = {"model": loaded.name, "template": frame, "system": options.system}
        facts["sampling"] = vars(options.sampling)
        print_json(facts | (answers[0] if options.file is None else {"answers": answers}))


def answer_prompts(
    writer: Writer, prompts: list[str], options: GenerateOptions
) -> list[dict[str, Any]]:
    """Answer every prompt, and return what --json says of each.

    Without --json the answers are written to stdout as they come. Raises DataError naming the
    prompts that are too long, before any is answered.
    """
    conversations = [writer.messages(prompt) for prompt in prompts]
    _check_lengths(writer, conversations)
    numbered = options.file is not None
    # On a terminal the answers themselves show the progress.
    silent = not numbered or (sys.stdout.isatty() and not options.json)
    entries = []
    with WorkProgress("generate", len(prompts), silent=silent) as bar:
        for number, (prompt, messages) in enumerate(zip(prompts, conversations, strict=True), 1):
            if numbered and not options.json:
                write(f"{'' if number == 1 else chr(10)}[{number}] {prompt}\n")
            answer = _answer(writer, messages, "run: " if options.base else "", options.json)
            entry = {"prompt": prompt} | _facts(answer) | {"base": None}
            if options.base:
                base = _answer(writer, messages, "base: ", options.json, base=True)
                entry["base"] = _facts(base)
            entries.append(entry)
            bar.observe(number)
    return entries


def _check_lengths(writer: Writer, conversations: Sequence[Sequence[Message]]) -> None:
    errors = []
    for number, messages in enumerate(conversations, 1):
        try:
            writer.tokens(messages)
        except DataError as error:
            prefix = "" if len(conversations) == 1 else f"prompt {number}: "
            errors.append(prefix + error.message)
    if errors:
        and_more = f"\nand {len(errors) - LISTED} more" if len(errors) > LISTED else ""
        raise DataError("\n".join(errors[:LISTED]) + and_more)


def _answer(
    writer: Writer, messages: Sequence[Message], label: str, json: bool, *, base: bool = False
) -> GeneratedText:
    """Answer once; write the answer as it comes, unless it goes into JSON."""
    if json:
        answer = writer.answer(messages, base=base)
    else:
        write(label)
        answer = writer.answer(messages, write, base=base)
        write("\n")
    if not answer.ended and answer.tokens < writer.sampling.max_new_tokens:
        say("cut off: the model has no more positions")
    if not json and sys.stdout.isatty():
        say(f"{answer.tokens} tokens, {answer.tokens_per_second:.1f} tokens/s")
    return answer


def _facts(answer: GeneratedText) -> dict[str, Any]:
    return vars(answer) | {"tokens_per_second": answer.tokens_per_second}
