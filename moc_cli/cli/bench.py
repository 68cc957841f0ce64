"""`moc bench RECIPE`: time and memory of methods side by side, on random weights."""

from pathlib import Path
from typing import Annotated

import typer

from moc_cli.cli.options import (
    JsonOption,
    RecipeArgument,
    SetOption,
    TrustOption,
    split_names,
    write_record,
)

RECORD = "bench.json"


def bench(
    recipe: RecipeArgument,
    methods: Annotated[
        str, typer.Option(metavar="A,B", help="Methods to measure, in turns.")
    ] = "moc,control,lora",
    set_: SetOption = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2",
            help="Measure each of these values of a recipe key too, as in method.top_k=1,3,7 or "
            "train.per_device_train_batch_size=1,4; may be repeated for all combinations.",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Use only N layers of the model's shape."),
    ] = None,
    rows: Annotated[
        str,
        typer.Option(
            metavar="full|data",
            help="full: random rows of data.max_length tokens; data: lengths and learned tokens of "
            "the recipe's own rows.",
        ),
    ] = "full",
    repeats: Annotated[
        int, typer.Option(min=1, metavar="N", help="Turns that count; each measures every method.")
    ] = 10,
    warmup: Annotated[int, typer.Option(min=0, metavar="N", help="Turns before them.")] = 2,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate",
            help="Measure generation instead, beside the bare base; lora and dora are merged. "
            "Batch sizes: --vary eval.per_device_eval_batch_size=1,16.",
        ),
    ] = False,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --generate: tokens of each prompt.")
    ] = 128,
    new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --generate: tokens written after each.")
    ] = 32,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for bench.json, bench.png and bench.svg; default: runs/bench/<recipe>.",
        ),
    ] = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Measure what methods cost: time, memory and tokens/s of training steps, or of generation.

    The model has the recipe's shape and random weights: no weights are read, and the shapes of the
    paper's models come with the program. Variants take turns on the same batches.
    """
    from moc_cli.benchmark.variants import make_variants
    from moc_cli.errors import MocError
    from moc_cli.recipe.load import check_trust

    if rows not in ("full", "data"):
        raise MocError(f"--rows: found '{rows}', allowed: full, data")
    variants = make_variants(recipe, set_ or [], split_names(methods), vary or [])
    check_trust(variants[0].recipe, recipe, granted=trust_remote_code)
    from moc_cli.files import check_folder
    from moc_cli.run_files import Benched, check_own

    place = Path(recipe).stem if Path(recipe).suffix else recipe.replace("/", "-")
    folder = output_dir or Path("runs") / "bench" / place
    check_folder(folder)
    from moc_cli.benchmark.figure import PICTURES, draw_benchmark
    from moc_cli.benchmark.session import run_benchmark
    from moc_cli.benchmark.turns import BenchmarkOptions, Lengths
    from moc_cli.report.benchmark_table import benchmark_table
    from moc_cli.report.output import print_json, print_table, say

    check_own(folder, RECORD, Benched, PICTURES, command="moc bench")
    options = BenchmarkOptions(
        repeats=repeats,
        warmup=warmup,
        layers=layers,
        own_rows=rows == "data",
        lengths=Lengths(prompt_tokens, new_tokens) if generate else None,
    )
    results = run_benchmark(recipe, variants, options, say)
    pictures = draw_benchmark(results)
    results["pictures"] = [folder / name for name in pictures]
    written = write_record(folder / RECORD, results, pictures)
    if json:
        print_json(results)
        return
    print_table(benchmark_table(results))
    say(f"Written: {', '.join(map(str, written))}")
