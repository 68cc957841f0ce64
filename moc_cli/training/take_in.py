"""`moc import`: a run folder around controls that were trained elsewhere, for all commands."""

from pathlib import Path

from safetensors.torch import save

from moc_cli.adapter.check import check_base
from moc_cli.adapter.from_peft import read_any
from moc_cli.errors import MocError, RecipeError, RunError
from moc_cli.models.fingerprint import hash_vocabulary
from moc_cli.recipe.load import dump
from moc_cli.recipe.paths import absolute_paths
from moc_cli.recipe.rules import broken_rules
from moc_cli.recipe.schema import Recipe
from moc_cli.runs import Call, RunFolder
from moc_cli.training import build
from moc_cli.training.accelerator import make_accelerator
from moc_cli.training.environment import describe_environment


def take_in(recipe: Recipe, controls: Path, *, call: Call, overwrite: bool) -> RunFolder:
    """Write a run folder with these controls; its recipe says which base and which rows.

    `controls` was written by `save` or the Trainer after `attach`, by `moc export --to controls`,
    or by peft. Method and seed of the recipe become those of the controls. Raises MocError, with
    nothing written, for damaged controls, for another base than the one that they were trained on,
    and for rows that cannot be read.
    """
    config, state = read_any(controls)
    recipe = absolute_paths(recipe).changed(train={"modules": config.modules or None})
    seed = recipe.seed if config.seed is None else config.seed
    recipe = recipe.model_copy(update={"method": config.method, "seed": seed})
    broken = list(map(str, broken_rules(recipe)))
    if broken:
        raise RecipeError("\n".join(broken))
    output_dir = recipe.output.output_dir
    folder = RunFolder.claim(output_dir, call=call, resume=False, overwrite=overwrite)
    with folder:
        recipe, splits = build.read_rows(recipe)
        accelerator = make_accelerator(recipe.launch, (), folder.path)
        tokenizer = build.make_tokenizer(recipe.model, recipe.data.chat_template)
        built = build.build(recipe, accelerator.device, tokenizer)
        check_base(built.name, config.model_dump(), fingerprint=built.fingerprint)
        try:
            built.adapted.load_state(state)
        except MocError as error:
            raise RunError(f"{controls}: {error.message}") from error
        folder.begin(dump(recipe), fresh=True)
        environment = describe_environment(
            accelerator.device,
            recipe,
            built,
            vocabulary=hash_vocabulary(tokenizer),
            data=splits.fingerprints(),
        )
        folder.write_environment(environment)
        facts = built.adapted.adapter_config() | build.base_facts(recipe, built)
        payload = save(built.adapted.state(), {"format": "pt"})
        folder.save_controls(facts | {"step": config.step}, payload)
    return folder
