"""`moc generate RUN`: text from a run, for a prompt, a file of prompts, or a conversation."""

from pathlib import Path
from typing import Annotated

import typer

from moc_cli.cli.options import JsonOption


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
    from moc_cli.serving.options import GenerateOptions, Sampling

    if raw and template not in ("auto", "raw"):
        raise MocError(f"--raw and --template {template} contradict each other", "give one")
    options = GenerateOptions(
        run=run,
        model=model,
        prompt=prompt,
        file=file,
        base=base,
        template="raw" if raw else template,
        system=system,
        sampling=Sampling(max_new_tokens, temperature, top_p, num_beams, seed),
        device=device,
        json=json,
    )
    options.check()
    recipe = options.read_recipe()
    prompts = None if options.conversation else options.read_prompts()

    from moc_cli.serving.session import run_generate

    run_generate(options, recipe, prompts)
