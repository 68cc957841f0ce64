"""The frozen outputs: what each command prints with --json, and the files it writes, on small runs.

`python tests/support/freeze.py` compares with tests/frozen, exactly. `--write REASON` replaces the
frozen files that differ; the reason is kept at their head, and belongs into the CHANGELOG too.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.models import make_byte_tokenizer, make_pair_tokenizer, make_tiny_model
from support.processes import in_this_process

from moc_cli.cli import run

FROZEN = Path(__file__).resolve().parent.parent / "frozen"

# Relative: what is nearer than this is equal. Other processors round differently, and a run that
# was trained there took some other routes on the way.
EXACT, NEAR = 1e-6, 0.25

# Another value in each run, or with another version of a package: only its type is compared.
VOLATILE = re.compile(
    r"seconds|_per_second|peak|measured\.memory|controls_sha256|payload_sha256|config_sha256"
    r"|samples_sha256|custom.*base_weights_sha256|sizes\..*\.(md|json|py)$|parity\.(max|relative)_difference|(static|standalone).*bit_equal"
    r"|bench\..*(ratio_to|_bytes|interval|clock)"
)
# The result of comparing nearly equal numbers: routes, predictions and what is counted of them. Its
# type and shape are compared, and the sums of rows of choices; everything only with `exact`.
NEAR_TIES = re.compile(
    r"routing\.|\buse\b|local_share|counts|\bshare\b|\bweight\b|per_site|per_control|summary"
    r"|\bdead\b|warnings|prediction|correct|margin|votes|choice|facts|notes|text$|output$|answer$"
    r"|ended|tokens$|unparsed|average|stderr"
    r"|metrics\.\w+\.(value|before|base)|interval|differ|scores|ablation|matrix|better|worse|gained|lost"
)
# Of those, what other routes move a little only: within WIDE, relative or absolute.
SCORES = re.compile(r"metrics\.\w+\.(value|before|base|stderr)$")
WIDE = 0.35
SUMS = re.compile(r"\b(counts|share|weight|per_site)\b")


def moc(*arguments: str) -> dict[str, Any]:
    """Run a command and return what it prints with --json."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()) as said:
        code = run([*arguments, "--json"])
    assert code == 0, f"moc {' '.join(arguments)}: {code}\n{printed.getvalue()}{said.getvalue()}"
    return json.loads(printed.getvalue())


def outputs() -> Iterator[tuple[str, Any]]:
    """Run every command in the working folder; yield names and what is frozen."""
    yield from _quickstart()
    yield from _exports()
    yield from _custom()


def _quickstart() -> Iterator[tuple[str, Any]]:
    short = ["--set", "train.max_steps=20", "--set", "output.logging_steps=10"]
    short += ["--set", "eval.max_samples=60"]
    yield "train", _with_files(moc("train", "quickstart", *short, "--output-dir", "run"), "run")
    config = json.loads(Path("run/controls/adapter_config.json").read_text())
    yield "adapter_config", config
    fewer = [*short, "--set", "train.max_steps=10", "--set", "eval.before=false"]
    lora = ["--set", "method={name: lora}", "--output-dir", "lora"]
    printed = moc("train", "quickstart", *fewer, *lora)
    yield "train-lora", _with_files(printed, "lora")

    limit = ["--limit", "24"]
    yield "eval-rank", _with_files(moc("eval", "run", "--base", *limit), "run/eval/rank-limit-24")
    moc("eval", "lora", *limit)
    generated = moc("eval", "run", "--protocol", "generate", "--limit", "4")
    yield "eval-generate", _with_files(generated, "run/eval/generate-limit-4")
    model = moc("eval", "--model", "builtin:world-llama", "--suite", "builtin", *limit)
    yield "eval-model", model
    yield "compare", moc("compare", "run", "lora")
    yield "bench", _bench()

    moc("train", "quickstart", *fewer, "--set", "seed=2", "--output-dir", "other")
    rows = moc("inspect-routing", "run", "--limit", "8")
    yield "inspect-rows", _with_files(rows, "run/routing")
    text = moc("inspect-routing", "run", "--text", "Where is the cup?")
    yield "inspect-text", text
    compare = ["--compare", "other", "--ablate", "--limit", "4", "--output-dir", "compared"]
    yield "inspect-compare", moc("inspect-routing", "run", *compare)

    asked = ["--max-new-tokens", "6"]
    yield "generate-prompt", moc("generate", "run", "--prompt", "Where is Ann?", "--base", *asked)
    Path("prompts.txt").write_text("Where is the cup?\nWho has the red hat?\n")
    yield "generate-file", moc("generate", "run", "--file", "prompts.txt", *asked)


def _bench() -> dict[str, Any]:
    """A benchmark without its machine."""
    few = ["--layers", "1", "--repeats", "1", "--warmup", "0", "--set", "data.max_length=16"]
    results = moc("bench", "quickstart", "--methods", "moc,control", *few, "--output-dir", "bench")
    del results["environment"]
    return results


def _exports() -> Iterator[tuple[str, Any]]:
    for form in ("controls", "peft", "static", "standalone"):
        rows = ["--calibration", "16"] if form == "static" else []
        yield (
            f"export-{form}",
            moc("export", "run", "--to", form, "--output-dir", f"as-{form}", *rows),
        )
    yield "export-merged", moc("export", "lora", "--to", "merged", "--output-dir", "as-merged")


def _custom() -> Iterator[tuple[str, Any]]:
    """A classifier and a writer on files, two steps each."""
    make_tiny_model("bert", num_labels=2).base_model.save_pretrained("encoder")
    make_pair_tokenizer().save_pretrained("encoder")
    make_tiny_model("llama").save_pretrained("decoder")
    make_byte_tokenizer().save_pretrained("decoder")
    colours = ("blue", "red")
    with open("pairs.csv", "w", newline="") as stream:
        rows = [(f"{colours[n % 2]} {n}", n % 4 + 0.5, colours[n % 2]) for n in range(24)]
        csv.writer(stream).writerows([("sentence", "score", "colour"), *rows])
    with open("writing.jsonl", "w") as stream:
        for n in range(24):
            stream.write(json.dumps({"instruction": f"Say {n}", "output": colours[n % 2]}) + "\n")
    kinds = {
        "classification": ("encoder", "pairs.csv", "{text: sentence, label: colour}"),
        "regression": ("encoder", "pairs.csv", "{text: sentence, label: score}"),
        "instruction": ("decoder", "writing.jsonl", "{}"),
    }
    for kind, (model, path, columns) in kinds.items():
        Path("recipe.yaml").write_text(
            f"""
model: {{model_name_or_path: {model}}}
method: {{name: moc, rank: 4, gate: {{projection_dim: 8}}}}
data: {{suite: custom, path: {path}, format: {kind}, columns: {columns}, held_out: 6}}
train: {{max_steps: 2, per_device_train_batch_size: 6, learning_rate: 2.0e-2}}
eval: {{eval_strategy: steps, eval_steps: 1}}
output: {{output_dir: {kind}, logging_steps: 1}}
launch: {{device: cpu}}
"""
        )
        yield f"train-custom-{kind}", _with_files(moc("train", "recipe.yaml"), kind)
        base = ["--base"] if kind == "instruction" else []
        scored = moc("eval", kind, *base, "--output-dir", f"{kind}-scores")
        yield f"eval-custom-{kind}", _with_files(scored, f"{kind}-scores")


def _with_files(printed: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return what is printed, and the JSON files below `folder`; of long ones the first lines."""
    found: dict[str, Any] = {"printed": printed}
    without = {key: value for key, value in printed.items() if key != "folder"}
    for name in ("results.json", "routing.json"):
        if (file := Path(folder, name)).exists():
            content = json.loads(file.read_text())
            found[name] = "as printed" if content in (printed, without) else content
    for name in ("samples.jsonl", "metrics.jsonl"):
        if (file := Path(folder, name)).exists():
            lines = file.read_text().splitlines()
            found[name] = {"lines": len(lines), "first": [json.loads(line) for line in lines[:3]]}
    return found


def differences(frozen: Any, now: Any, path: str, *, exact: bool) -> Iterator[str]:
    """Yield a line for each place where `now` is not what is frozen."""
    if isinstance(frozen, bool) or not isinstance(frozen, int | float):
        same_type = type(frozen) is type(now)
    else:
        same_type = isinstance(now, int | float) and not isinstance(now, bool)
    ties = not exact and bool(NEAR_TIES.search(path))
    if not same_type:
        if not (ties and (frozen is None or now is None)):
            yield f"{path}: {_short(frozen)} is frozen, now {_short(now)}"
    elif isinstance(frozen, dict):
        for key in [*frozen, *(now.keys() - frozen.keys())]:
            if key not in now or key not in frozen:
                yield f"{path}.{key}: {'missing' if key not in now else 'new'}"
            else:
                yield from differences(frozen[key], now[key], f"{path}.{key}", exact=exact)
    elif isinstance(frozen, list):
        yield from _list_differences(frozen, now, path, ties, exact)
    elif not VOLATILE.search(path) and not _equal(frozen, now, _tolerance(path, exact)):
        yield f"{path}: {_short(frozen)} is frozen, now {_short(now)}"


def _tolerance(path: str, exact: bool) -> float:
    if exact:
        return EXACT
    if SCORES.search(path):
        return WIDE
    return math.inf if NEAR_TIES.search(path) else NEAR


def _list_differences(
    frozen: list[Any], now: list[Any], path: str, ties: bool, exact: bool
) -> Iterator[str]:
    named = any(isinstance(value, str) for value in [*frozen, *now])
    if len(frozen) != len(now):
        if not (ties and (named or re.search(r"dead|warnings|tokens", path))):
            yield f"{path}: {len(frozen)} entries are frozen, now {len(now)}"
        return
    numbers = all(isinstance(value, int | float) for value in [*frozen, *now])
    if ties and numbers and SUMS.search(path):
        if not math.isclose(sum(frozen), sum(now), rel_tol=1e-3, abs_tol=1e-3):
            yield f"{path}: the sum {sum(frozen)} is frozen, now {sum(now)}"
        return
    for index, (one, other) in enumerate(zip(frozen, now, strict=True)):
        yield from differences(one, other, f"{path}[{index}]", exact=exact)


def _equal(frozen: Any, now: Any, tolerance: float) -> bool:
    if isinstance(frozen, float) or isinstance(now, float):
        return math.isclose(frozen, now, rel_tol=tolerance, abs_tol=tolerance)
    return math.isinf(tolerance) or bool(frozen == now)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read(name: str) -> Any:
    """Return a frozen output."""
    return json.loads((FROZEN / f"{name}.json").read_text())["output"]


def write(name: str, output: Any, reason: str) -> None:
    """Freeze an output; `reason` joins those that stand at the head of the file."""
    file = FROZEN / f"{name}.json"
    before = json.loads(file.read_text())["changed"] if file.exists() else []
    text = json.dumps({"changed": [*before, reason], "output": output}, indent=1)
    # Lists of plain values on one line each.
    text = re.sub(r"\[\n[^][{}]*\]", lambda hit: re.sub(r"\n\s*", " ", hit[0]), text)
    file.write_text(text + "\n")


def collect() -> dict[str, Any]:
    """Run every command in a new folder and return what is to be frozen, by name.

    Pictures take seconds each and nothing of them is frozen: none is drawn.
    """
    torch.set_num_threads(1)
    undrawn = mock.patch("moc_cli.inspection.results.write_figures", return_value=[])
    plain = mock.patch("moc_cli.benchmark.figure.draw_benchmark", return_value={})
    with (
        TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        in_this_process(),
        undrawn,
        plain,
    ):
        text = json.dumps(dict(outputs()))
        return dict(json.loads(text.replace(f"{os.getcwd()}/", "")))


def main() -> int:
    """Compare exactly and tell every difference, or write what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", metavar="REASON", help="freeze what differs; why it does")
    reason = parser.parse_args().write
    now = collect()
    count = 0
    for name, output in now.items():
        known = (FROZEN / f"{name}.json").exists()
        new = [f"{name}: new"]
        lines = list(differences(read(name), output, name, exact=True)) if known else new
        for line in lines:
            print(line)
        count += len(lines)
        if lines and reason:
            write(name, output, reason)
    print(f"{len(now)} outputs, {count} differences" + (", written" if reason and count else ""))
    return int(bool(count and not reason))


if __name__ == "__main__":
    sys.exit(main())
