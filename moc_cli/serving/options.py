"""The options of `moc generate`, checked before torch is imported."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moc_cli.errors import DataError, MocError
from moc_cli.runs import BaseOptions, RunFolder
from moc_cli.serving.prompts import check_frame, read_prompts, split_prompts

if TYPE_CHECKING:
    from moc_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: at temperature 0 the likeliest one, without a draw."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 0

    def check(self) -> None:
        """Raise MocError for settings that contradict each other."""
        if self.num_beams > 1 and self.temperature > 0:
            raise MocError(
                f"--num-beams {self.num_beams} and --temperature {self.temperature:g} "
                "cannot be combined",
                "leave out --temperature for a beam search",
            )
        if self.top_p < 1 and self.temperature == 0:
            raise MocError(
                f"--top-p {self.top_p:g} has no effect at temperature 0", "add --temperature 0.7"
            )


@dataclass(frozen=True)
class GenerateOptions:
    """The options of `moc generate`: a run or a bare model, where the prompts come from, and how
    they are answered. Without a prompt on a terminal it holds a conversation.
    """

    run: Path | None = None
    model: str | None = None
    prompt: str | None = None
    file: str | None = None
    base: bool = False
    template: str = "auto"
    system: str | None = None
    sampling: Sampling = Sampling()
    device: str | None = None
    trust_remote_code: bool = False
    base_options: BaseOptions = BaseOptions()
    torch_compile: bool | None = None
    json: bool = False

    def check(self) -> None:
        """Raise MocError for options that contradict each other."""
        if (self.run is None) == (self.model is None):
            raise MocError("give either a run folder or --model ID", "moc generate --help")
        if self.model is not None and self.base:
            raise MocError("--base asks a run's base model; --model is one already", "leave it out")
        moved = self.base_options.path is not None or self.base_options.allow_changes
        if self.model is not None and moved:
            raise MocError("--base-path and --allow-changed-base go with a run", "leave them out")
        if self.prompt is not None and self.file is not None:
            raise MocError("--prompt and --file are both given", "give one of them")
        check_frame(self.template)
        self.sampling.check()
        if self.conversation and self.json:
            raise MocError("a conversation has no --json", 'give --prompt "..." or --file FILE')

    @property
    def conversation(self) -> bool:
        """Whether to hold a conversation: no prompt is given, and stdin is a terminal."""
        return self.prompt is None and self.file is None and sys.stdin.isatty()

    def read_recipe(self) -> "Recipe | None":
        """Return the run's recipe, or None for a bare model; raises MocError for a classifier."""
        if self.run is None:
            return None
        folder = RunFolder.open(self.run)
        recipe = folder.read_recipe(trust_remote_code=self.trust_remote_code)
        data = recipe.data
        if data.kind.classifier:
            raise MocError(
                f"{self.run} is a classifier ({', '.join(data.tasks)}): it has no text to give",
                f"classify new rows: moc predict {shlex.quote(str(self.run))} --file FILE",
            )
        from moc_cli.recipe.rules import generation_rules

        rules = [*generation_rules(recipe)] if self.torch_compile else []
        if rules:
            raise MocError("\n".join(f"--torch-compile: {rule.message}" for rule in rules))
        return recipe

    def read_prompts(self) -> list[str]:
        """Return the prompts of --prompt, --file or stdin; raises DataError where there is none."""
        if self.file is not None:
            if self.file == "-":
                return split_prompts(_read_stdin(), "stdin")
            return read_prompts(Path(self.file))
        text = self.prompt
        if text is None or text == "-":
            text = _read_stdin().removesuffix("\n")
        if not text.strip():
            raise DataError("the prompt is empty", 'give a text: --prompt "..."')
        return [text]


def _read_stdin() -> str:
    try:
        return sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError("stdin is not UTF-8", "give the prompt as UTF-8 text") from error
