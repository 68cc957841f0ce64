"""`moc generate RUN`: text for a prompt, a file of prompts, or a conversation."""

from typing import Annotated

import typer

from moc_cli.cli.options import (
    AllowChangedBaseOption,
    BasePathOption,
    DeviceOption,
    JsonOption,
    LoadIn4bitOption,
    OptionalRunArgument,
    TorchCompileOption,
    TrustOption,
)


def generate(
    run: OptionalRunArgument = None,
    model: Annotated[
        str | None, typer.Option(metavar="ID", help="Use this base model instead, for reference.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The prompt; - is stdin.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help='One prompt a line; in a .jsonl file its "prompt"; - is stdin.',
        ),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Show the base model's answer too, for reference.")
    ] = False,
    template: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Prompt template: commonsense, instruction, chat or raw; auto: the training's.",
        ),
    ] = "auto",
    raw: Annotated[bool, typer.Option("--raw", help="The same as --template raw.")] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system message, with --template chat.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to generate at most.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0: always the most likely token.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, metavar="P", help="Sample from this share of probability."),
    ] = 1.0,
    num_beams: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Beam search with N beams; the text is shown at the end."
        ),
    ] = 1,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Seed of the sampling.")
    ] = 0,
    base_path: BasePathOption = None,
    allow_changed_base: AllowChangedBaseOption = False,
    load_in_4bit: LoadIn4bitOption = None,
    torch_compile: TorchCompileOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Generate text with a run, or a base model; without a prompt, start a conversation."""
    from moc_cli.errors import MocError
    from moc_cli.runs import BaseOptions
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
        trust_remote_code=trust_remote_code,
        base_options=BaseOptions(base_path, allow_changed_base, load_in_4bit),
        torch_compile=torch_compile,
        json=json,
    )
    options.check()
    recipe = options.read_recipe()
    prompts = None if options.conversation else options.read_prompts()

    from moc_cli.serving.session import run_generate

    run_generate(options, recipe, prompts)
