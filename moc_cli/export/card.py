"""The model card: what the folder is, what it was made from, what it scored and how to load it."""

import json
from pathlib import Path
from typing import Any

from moc_cli import __version__
from moc_cli.data.custom.frame import frame_text
from moc_cli.data.prompts import eval_prompt
from moc_cli.export.parity import Written
from moc_cli.load_run import LoadedRun
from moc_cli.models.load import class_names
from moc_cli.models.tokens import pooling_token
from moc_cli.models.weight_files import BUILTIN
from moc_cli.recipe.quantization import asked_for, of_arguments
from moc_cli.report.numbers import score_text

PAPER = "https://arxiv.org/abs/2606.31397"


def base_code(trained: LoadedRun) -> str:
    """Python that loads the bare base of a run into `model`, in its type and with its head.

    Its name stands in `base`, as a local path is nobody else's business. A classifier that is a
    decoder gets the run's pad token.
    """
    model, base, auto = trained.recipe.model, trained.base, trained.kind.head.auto_class
    lines = [f"from transformers import {auto}"]
    name = "base"
    if model.model_name_or_path.startswith(BUILTIN):
        lines.append("from moc_cli.models.load import resolve")
        name = "resolve(base)"
    options: dict[str, Any] = {"dtype": "bfloat16" if trained.recipe.train.bf16 else "float32"}
    options |= {key: base[key] for key in ("num_labels", "problem_type") if key in base}
    if "id2label" in base:
        del options["num_labels"]
        options |= class_names(base["id2label"])
    options |= {"revision": model.revision} if model.revision else {}
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    if model.trust_remote_code:
        options["trust_remote_code"] = True
    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    if asked_for(model) is not None:
        lines[0] += ", BitsAndBytesConfig"
        arguments += f", quantization_config=BitsAndBytesConfig({_quantization(trained)})"
    lines += ["", f"model = {auto}.from_pretrained({name}{arguments})"]
    config, pad = trained.adapted.model.config, pooling_token(trained.adapted.model)
    if pad is not None:
        nested = config.get_text_config() is not config
        targets = ["model.config", *(["model.config.get_text_config()"] if nested else [])]
        lines += [f"{target}.pad_token_id = {pad}  # of the training" for target in targets]
    return "\n".join(lines)


def whole_code(trained: LoadedRun, arguments: str) -> str:
    """Python that loads a complete model from `folder` into `model`."""
    auto, attention = trained.kind.head.auto_class, trained.recipe.model.attn_implementation
    chosen = f", attn_implementation={attention!r}" if attention else ""
    return (
        f"from transformers import {auto}\n\n"
        f"model = {auto}.from_pretrained(folder, {arguments}{chosen})"
    )


def _quantization(trained: LoadedRun) -> str:
    """The arguments with which the base was quantised when it was loaded."""
    config = trained.adapted.model.config.quantization_config
    values: dict[str, Any] = {**trained.base["base_quantization"]}
    values["llm_int8_skip_modules"] = config.llm_int8_skip_modules
    if "load_in_4bit" in values:
        values["bnb_4bit_compute_dtype"] = trained.dtype
    return ", ".join(f"{key}={value!r}" for key, value in values.items())


def make_card(
    trained: LoadedRun, written: Written, proof: dict[str, Any], to: str, sizes: dict[str, int]
) -> str:
    """Return README.md with the YAML front matter of the hub."""
    recipe, folder = trained.recipe, trained.folder
    finished = folder.checkpoint is None and (folder.path / "results.json").is_file()
    results = folder.read_results() if finished else {}
    parts = [
        _front(trained, written),
        f"# {recipe.method.name} on {_shown(recipe.model.model_name_or_path)}",
        _introduction(trained, to),
        _section("How to load", _loading(trained, written)),
        _section("Base model", base_lines(trained)),
        _section("Inputs", _inputs(trained)),
        _section("Classes", _classes(trained)),
        _section("Method", _method(trained, results)),
        _section("Data", _data(trained)),
        _section("Scores", _scores(trained, results) + evaluation_lines(trained)),
        _section("Routing", _routing(results.get("routing", {}))),
        _section("Proof and sizes", _proof(written, proof, sizes)),
        f"Written by moc {__version__}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(trained: LoadedRun, written: Written) -> str:
    """The hub's metadata; a local folder is no base model that the hub knows."""
    name = trained.recipe.model.model_name_or_path
    method = trained.recipe.method.name
    tags = ["moc", *(["mixture-of-control"] if method == "moc" else []), method]
    lines = [f"library_name: {written.library}"]
    if not name.startswith(BUILTIN) and not _is_local(name):
        lines.append(f"base_model: {json.dumps(name)}")
    lines.append(f"pipeline_tag: {trained.kind.head.pipeline_tag}")
    lines.append("tags:")
    lines += [f"- {tag}" for tag in dict.fromkeys(tags)]
    return "\n".join(["---", *lines, "---"])


def _introduction(trained: LoadedRun, to: str) -> str:
    name = trained.recipe.method.name
    method_name = "Mixture-of-Control" if name == "moc" else name
    tasks = ", ".join(trained.recipe.data.tasks)
    return f"{method_name} ([arXiv 2606.31397]({PAPER})), trained on {tasks}; format `{to}`."


def _loading(trained: LoadedRun, written: Written) -> list[str]:
    if not written.loading:
        return []
    start = ['folder = "."  # where these files are']
    if "base" in written.loading:
        name = trained.recipe.model.model_name_or_path
        comment = "the folder of the base model" if _is_local(name) else "the base model"
        start.append(f"base = {json.dumps(_shown(name))}  # {comment}")
    return ["```python", *start, *written.loading.splitlines(), "```"]


def base_lines(trained: LoadedRun) -> list[str]:
    """Return what the card says of the base model."""
    model = trained.recipe.model
    lines = [f"- name: `{_shown(model.model_name_or_path)}`"]
    lines += [f"- revision: `{model.revision}`"] if model.revision else []
    quantization = of_arguments(trained.adapter_config.get("base_quantization"))
    lines += [f"- trained on: its weights in {quantization}"] if quantization else []
    return [*lines, f"- sha256 over its tensors: `{trained.weights_hash}`"]


def _inputs(trained: LoadedRun) -> list[str]:
    """What the model was trained to read: prompt frame, tokenizer and attention mask."""
    data, tokenizer = trained.recipe.data, trained.tokenizer
    frame = data.frame
    template = {
        "commonsense": eval_prompt("{instruction}"),
        "instruction": frame_text(data.template),
    }.get(frame or "")
    if template is not None:
        lines = [f"Prompt (frame `{frame}`):", "", "```text", template, "```", ""]
    elif frame == "chat":
        lines = ["Prompt: the chat template of the tokenizer.", ""]
    else:
        lines = ["Prompt: the text itself, without a frame.", ""]
    tokens = {"begin": tokenizer.bos_token, "end": tokenizer.eos_token, "pad": tokenizer.pad_token}
    listed = ", ".join(f"{name} `{token}`" for name, token in tokens.items() if token is not None)
    tokenizer_name = trained.recipe.model.tokenizer_name
    whose = f"`{_shown(tokenizer_name)}`" if tokenizer_name else "that of the base model"
    lines.append(
        f"Tokenizer: {whose}; `{type(tokenizer).__name__}`, {len(tokenizer):,} tokens"
        + (f"; {listed}" if listed else "")
    )
    mask = "Give the `attention_mask` with padded rows"
    if getattr(trained.recipe.method, "top_k", 0):
        return [
            *lines,
            "",
            f"{mask}: a token that it does not leave out votes on the routes. Without one, pad "
            "tokens at the ends of rows do not vote, but other padding and the answer that is "
            "scored do. The plain `hf` model of lm_eval gives none and pads with token 0: its "
            "scores may depend on the batch size. Take batch size 1, or `moc eval --harness`.",
        ]
    return [*lines, "", f"{mask}."]


def _classes(trained: LoadedRun) -> list[str]:
    names = trained.base.get("id2label", {})
    rows = [f"| {number} | {name} |" for number, name in names.items()]
    return ["| output | class |", "|---|---|", *rows] if rows else []


def _method(trained: LoadedRun, results: dict[str, Any]) -> list[str]:
    method = trained.recipe.method.model_dump(mode="json", exclude_none=True)
    lines = ["```json", *json.dumps(method, indent=2).splitlines(), "```"]
    counts = results.get("parameters")
    if counts:
        share, modules = 100 * counts["share"], counts["modules"]
        lines += ["", f"{counts['adapter']:,} trained parameters, {share:.3f} % of the base's"]
        lines[-1] += f"; {modules:,} more in whole modules (a head)." if modules else "."
    return lines


def _data(trained: LoadedRun) -> list[str]:
    data, train = trained.recipe.data, trained.recipe.train
    learned = "; loss on " + ("prompt and answer" if data.train_on_inputs else "the answer alone")
    learned += f" (`train_on_inputs: {str(data.train_on_inputs).lower()}`)"
    lines = [
        f"- suite `{data.suite}`, tasks {', '.join(f'`{task}`' for task in data.tasks)}",
        f"- rows cut at {data.max_length} tokens" + (learned if data.kind.prompted else ""),
        f"- learning rate {train.learning_rate:g} ({train.lr_scheduler_type}), "
        f"{train.per_device_train_batch_size} rows a micro-batch, "
        f"{train.gradient_accumulation_steps} a step, seed {trained.recipe.seed}",
    ]
    if not (trained.folder.path / "environment.json").is_file():
        return lines
    sources = trained.folder.read_environment().get("data", {})
    rows = [
        f"| {name} | {entry.get('rows', '–')} | `{entry['sha256']}` |"
        for name, entry in sources.items()
    ]
    return [*lines, "", "| rows | number | sha256 |", "|---|---|---|", *rows] if rows else lines


def _scores(trained: LoadedRun, results: dict[str, Any]) -> list[str]:
    """The run's own scores; what they depend on stands above them."""
    if trained.folder.checkpoint is not None:
        step = trained.adapter_config["step"]
        return [f"These are the controls of a checkpoint, step {step}: it was not scored alone."]
    if results.get("status") != "finished":
        return ["The run was not finished when this was written."]
    chosen = results.get("controls", {})
    prompted = trained.recipe.data.kind.prompted
    head = (
        f"At the end of training: protocol `{results['protocol']}`, "
        + _limit(trained.recipe.eval.max_samples)
        + f", controls of step {chosen.get('step')} ({chosen.get('chosen')}) of "
        f"{results['steps']}"
        + (f", `train_on_inputs: {str(results['train_on_inputs']).lower()}`." if prompted else ".")
    )
    return [head, "", *_table(results["tasks"], "before", "untrained")]


def evaluation_lines(trained: LoadedRun) -> list[str]:
    """Scores of `moc eval` on these very controls, each under its own conditions."""
    lines: list[str] = []
    for results in trained.folder.read_evaluations().values():
        if results.get("controls_sha256") != trained.adapter_config["payload_sha256"]:
            continue
        protocol, path = results["protocol"], results.get("path")
        rows = _limit(results.get("limit"), first=protocol == "harness")
        rows += f" of `{_shown(path)}`" if path else ""
        lines += ["", f"`moc eval`: protocol `{protocol}`, {rows}.", ""]
        lines += _table(results["tasks"], "base", "base")
    return lines


def _limit(limit: int | None, *, first: bool = False) -> str:
    """How many rows of each task were scored; lm_eval takes the first ones."""
    if limit is None:
        return "all rows"
    return f"the first {limit} rows a task" if first else f"{limit} drawn rows a task"


def _table(tasks: dict[str, Any], reference: str, title: str) -> list[str]:
    """A row for each metric of each task, beside the model without the method."""
    rows = [f"| task | metric | {title} | trained | majority | n |", "|---|---|---|---|---|---|"]
    for task, entry in tasks.items():
        for metric, score in entry["metrics"].items():
            shown = {
                key: score_text(metric, score.get(key)) for key in (reference, "value", "majority")
            }
            if score["stderr"] is not None:
                shown["value"] += f" ± {score_text(metric, score['stderr'])}"
            cells = [task, metric, *shown.values(), str(score["n"])]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def _routing(routing: dict[str, Any]) -> list[str]:
    lines = []
    for name, pool in routing.get("pools", {}).items():
        ranked = sorted(zip(pool["use"], pool["controls"], strict=True), reverse=True)[:5]
        top = ", ".join(f"{control} {100 * use:.1f} %" for use, control in ranked)
        dead = ", ".join(pool["dead"]) or "none"
        lines.append(
            f"- pool `{name}`: {len(pool['controls'])} controls, {pool['decisions']:,} decisions "
            f"in the final scoring; most used: {top}; never used: {dead}; a site chose its own "
            f"control in {100 * pool['local_share']:.1f} %"
        )
    return lines


def _proof(written: Written, proof: dict[str, Any], sizes: dict[str, int]) -> list[str]:
    equal = "equal to the bit" if proof["bit_equal"] else f"|Δ| ≤ {proof['max_difference']:.3g}"
    rounding = proof.get("rounding")
    rounded = " with its controls rounded alike" if rounding else ""
    lines = [
        f"A fresh process loaded this folder: the logits of {proof['positions']} positions in "
        f"{proof['rows']} padded rows are {equal} to those of the run{rounded}."
    ]
    if rounding:
        lines.append(
            f"Rounding itself moved a logit by up to {rounding['max_difference']:.3g} "
            f"({100 * rounding['relative_difference']:.2g} % of the largest); "
            f"{100 * rounding['same_best']:.1f} % of the positions have the same most likely token."
        )
    lines += [*written.notes, "", "| file | bytes |", "|---|---|"]
    return lines + [f"| {name} | {size:,} |" for name, size in sizes.items()]


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([f"## {title}", "", *lines]) if lines else ""


def _shown(name: str) -> str:
    """A hub id as it is, of a folder only its name."""
    return Path(name).name if _is_local(name) else name


def _is_local(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or Path(name).exists()
