"""README, REFERENCE and CONTRIBUTING say what is true: commands run, keys and files exist."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from support import recipe_table
from support.machine import ROOT, absent

from moc_cli import __version__
from moc_cli.cli import COMMANDS, run
from moc_cli.models.families import FAMILIES
from moc_cli.planning import plans

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh ?(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
# So that the commands take seconds; nothing else is changed.
SHORT = " --set train.max_steps=2 --set eval.max_samples=16 --set data.max_train_samples=64"
FEW = " --limit 16"
NARROW = " --set data.max_length=16"


def arguments(kind: str, line: str) -> list[str]:
    """Return the arguments of `moc`; what needs the hub is only checked, which needs no network."""
    if line.startswith("moc train") and "--dry-run" not in line:
        line += " --dry-run" if kind == "hub" else SHORT
    elif line.startswith(("moc eval", "moc inspect-routing")) and "--text" not in line:
        line = re.sub(r" --limit \d+|$", FEW, line, count=1)
    elif line.startswith("moc bench"):
        line += NARROW
    return shlex.split(line)[1:]


@pytest.mark.usefixtures("same_process", "no_pictures")
def test_every_command_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of the README in their order, in one new folder, as a user types them."""
    weights = Path(os.environ.get("MOC_WEIGHTS") or ROOT / ".weights").resolve()
    if not (weights / "minilm").is_dir():
        absent("no weights: make weights")
    (tmp_path / ".weights").symlink_to(weights)
    monkeypatch.chdir(tmp_path)
    few = plans.alternatives_to  # each is replayed; tests/planning knows that all can be planned
    monkeypatch.setattr("moc_cli.planning.session.alternatives_to", lambda own: few(own)[:1])
    assert {kind for kind, _ in BLOCKS} == {"", "hub", "weights"}
    for kind, text in BLOCKS:
        files = "".join(re.findall(r"^cat > .*?^END$\n", text, flags=re.M | re.S))
        subprocess.run(["bash", "-c", files], check=True)
        for line in filter(lambda line: line.startswith("moc "), text.splitlines()):
            assert run(arguments(kind, line)) == 0, f"{line}\n{capsys.readouterr().err[-2000:]}"
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= {"quickstart", "reviews"}


def test_the_readme_shows_every_command_in_the_order_of_the_help() -> None:
    lines = [line for _, text in BLOCKS for line in text.splitlines()]
    typed = [shlex.split(line)[1] for line in lines if line.startswith("moc ")]
    order = [*dict.fromkeys(typed)]
    order.append(order.pop(order.index("recipes")))  # a group, which typer lists last
    assert order == list(COMMANDS)


def test_the_reference_has_every_key_of_a_recipe() -> None:
    """Write it again: PYTHONPATH=tests python -m support.recipe_table."""
    assert recipe_table.written() == recipe_table.table()


def test_the_documents_name_every_family() -> None:
    reference = (ROOT / "REFERENCE.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^Built in: (.*?)\.$", reference, flags=re.M | re.S)
    assert re.split(r"[,;]\s+", listed) == list(FAMILIES)
    assert f"the [{len(FAMILIES)} built-in ones]" in README


@pytest.mark.parametrize("name", ["README.md", "REFERENCE.md", "CONTRIBUTING.md"])
def test_links_and_files_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:moc_cli|tests|recipes)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
    anchors = re.findall(r"REFERENCE\.md#([\w-]+)", text) + (
        re.findall(r"\]\(#([\w-]+)\)", text) if name == "REFERENCE.md" else []
    )
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-")
        for line in (ROOT / "REFERENCE.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("#")
    }
    assert set(anchors) <= headings


def test_the_changelog_names_this_version() -> None:
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
