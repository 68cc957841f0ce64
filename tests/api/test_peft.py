"""The peft surface: the same numbers as our own, switched, saved, refused and trained by peft."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.machine import ROOT
from support.messages import refused, warned
from support.models import (
    KINDS_OF_DECODERS,
    make_batch,
    make_tiny,
    tiny_config,
    train_controls,
)
from support.processes import run_program
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import moc_cli.peft
from moc_cli.api import attach, load_controls
from moc_cli.errors import MocError, RecipeError, RunError
from moc_cli.models.fingerprint import fingerprint
from moc_cli.peft import MocConfig

METHODS = {
    "moc": {"name": "moc", "rank": 4, "top_k": 2, "alpha": 0.6, "gate": {"projection_dim": 8}},
    "control": {"name": "control", "rank": 3},
}
ROWS, NEW = 6, 5
BEAMS = {"max_new_tokens": NEW, "num_beams": 4, "do_sample": False, "pad_token_id": 0}


def make(family: str = "llama") -> PreTrainedModel:
    model = make_tiny(family).eval()
    model.generation_config.eos_token_id = None
    return model


def wrapped(family: str = "llama", method: str = "moc", seed: int = 5) -> PeftModel:
    """A model with controls by peft, with numbers as if trained."""
    config = MocConfig(method=METHODS[method], task_type="CAUSAL_LM", seed=seed)
    model = get_peft_model(make(family), config)
    named = dict(model.base_model.model.moc.moc_mixtures["default"].named_parameters())
    train_controls(named, seed)
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    return make_batch(ROWS, "left")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", KINDS_OF_DECODERS)
def test_peft_gives_what_our_own_surface_gives(family: str, method: str, tmp_path: Path) -> None:
    peft_model = wrapped(family, method)
    options = dict(METHODS[method])
    controls = attach(make(family), options.pop("name"), seed=5, **options)
    train_controls(controls.named_parameters())
    assert torch.equal(logits(peft_model), logits(controls.model))
    ours = controls.model.generate(**inputs(), **BEAMS)
    assert torch.equal(peft_model.generate(**inputs(), **BEAMS), ours)
    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(make(family), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(peft_model))
    assert torch.equal(again.generate(**inputs(), **BEAMS), ours)


def test_fresh_controls_and_disabled_ones_are_the_bare_base() -> None:
    bare = logits(make())
    fresh = get_peft_model(make(), MocConfig(method=METHODS["moc"], task_type="CAUSAL_LM"))
    assert torch.equal(logits(fresh.eval()), bare)
    model = wrapped()
    adapted = logits(model)
    assert not torch.equal(adapted, bare)
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), adapted)
    assert torch.equal(logits(model.unload()), bare)


def test_sets_are_added_switched_and_deleted(tmp_path: Path) -> None:
    first, second = wrapped(seed=5), wrapped(method="control", seed=6)
    expected = {"default": logits(first), "other": logits(second)}
    second.save_pretrained(tmp_path / "second")
    first.load_adapter(tmp_path / "second", "other")
    assert torch.equal(logits(first), expected["default"])
    for name in ("other", "default", "other"):
        first.set_adapter(name)
        assert torch.equal(logits(first), expected[name])
        trained = [n for n, p in first.named_parameters() if p.requires_grad]
        assert trained
        assert all(f".{name}." in n for n in trained)
    first.delete_adapter("other")
    assert first.active_adapters == ["default"]
    assert torch.equal(logits(first), expected["default"])
    assert not [name for name, _ in first.named_parameters() if ".other." in name]
    with refused(MocError):
        first.base_model.set_adapter(["default", "other"])


def test_disabled_adapters_stay_off_when_sets_change() -> None:
    bare, model = logits(make()), wrapped()
    model.add_adapter("other", MocConfig(method=METHODS["control"], task_type="CAUSAL_LM"))
    train_controls(dict(model.base_model.model.moc.moc_mixtures["other"].named_parameters()))
    with model.disable_adapter():
        model.set_adapter("other")
        assert torch.equal(logits(model), bare)
        model.delete_adapter("other")
        assert model.active_adapters == ["default"]
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), logits(wrapped()))


def test_a_set_of_the_same_name_takes_the_place_of_the_first() -> None:
    """As where a notebook calls get_peft_model twice on one base."""
    first = wrapped()
    config = MocConfig(method=METHODS["control"], task_type="CAUSAL_LM")
    second = get_peft_model(first.base_model.model, config).eval()
    assert torch.equal(logits(second), logits(make()))
    ids = inputs()["input_ids"]
    second.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p.grad for name, p in second.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in trained.values())
    assert any(grad.abs().sum() > 0 for grad in trained.values())


def test_a_model_with_controls_of_the_surface_is_refused() -> None:
    attach(model := make(), "control", rank=2)
    with refused(MocError):
        get_peft_model(model, MocConfig(method=METHODS["moc"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_every_set_has_a_head_of_its_own(task: str | None, tmp_path: Path) -> None:
    def classifier() -> PreTrainedModel:
        torch.manual_seed(0)
        made: PreTrainedModel = AutoModelForSequenceClassification.from_config(
            tiny_config("llama", num_labels=3)
        )
        return made.eval()

    def config() -> MocConfig:
        return MocConfig(method=METHODS["moc"], task_type=task, modules_to_save=["score"])

    def trained(model: PeftModel) -> list[str]:
        return [n for n, p in model.named_parameters() if p.requires_grad and "score" in n]

    model = get_peft_model(classifier(), config())
    model.add_adapter("other", config())
    model.eval()
    assert [".default." in name for name in trained(model)] == [True]
    expected = {}
    for number, name in enumerate(("default", "other")):
        model.set_adapter(name)
        assert [f".{name}." in found for found in trained(model)] == [True]
        with torch.no_grad():
            model.base_model.model.score.modules_to_save[name].weight.mul_(2 + number)
        expected[name] = logits(model)
    assert not torch.equal(expected["default"], expected["other"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(), tmp_path).eval()
    again.load_adapter(tmp_path / "other", "other")
    for name in ("other", "default"):
        again.set_adapter(name)
        assert torch.equal(logits(again.eval()), expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unloaded_base_has_its_modules_back(dtype: torch.dtype) -> None:
    """As with peft's own methods: the active set's, where it has one, and nothing of peft."""

    def classifier() -> PreTrainedModel:
        return make_tiny("bert").eval().to(dtype)

    def unloaded(active: str) -> tuple[PreTrainedModel, torch.Tensor]:
        model = get_peft_model(classifier(), MocConfig(rank=2, modules_to_save=["classifier"]))
        model.add_adapter("other", MocConfig(rank=2))
        model.set_adapter(active)
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].weight.mul_(2)
        trained = logits(model.eval())
        return model.unload(), trained

    bare = logits(classifier())
    names = classifier().state_dict().keys()
    base, trained = unloaded("default")
    assert base.state_dict().keys() == names
    assert torch.equal(logits(base), trained)  # the controls are fresh
    assert not torch.equal(logits(base), bare)
    base, _ = unloaded("other")
    assert base.state_dict().keys() == names
    assert torch.equal(logits(base), bare)
    assert base.classifier.weight.dtype == dtype


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "payload", "base"])
def test_loading_is_strict(change: str, tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path)
    file, described = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    state, config = load_file(file), json.loads(described.read_text())
    assert config["state_sha256"] is None
    config["state_sha256"] = moc_cli.peft.state_hash(state)
    name = sorted(state)[0]
    base = make()
    if change == "payload":
        state[name].view(-1)[3] += 1e-6
    elif change == "base":
        config["base_fingerprint"] = fingerprint(base)
        base.model.layers[0].mlp.up_proj.weight.data.mul_(1.01)
    else:
        config["state_sha256"] = None
        value = state.pop(name)
        if change == "unexpected":
            state |= {name: value, f"{name}.more": value.clone()}
        elif change == "shape":
            state[name] = value[:, :-1].contiguous()
    save_file(state, file)
    described.write_text(json.dumps(config))
    with refused(RunError):
        PeftModel.from_pretrained(base, tmp_path)


def test_sizes_and_numbers_of_the_payload_are_checked(tmp_path: Path) -> None:
    """A config that declares more than its payload holds, and a payload with a NaN in it."""
    wrapped().save_pretrained(tmp_path)
    file, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, state = json.loads(file.read_text()), load_file(weights)
    large = config | {"method": config["method"] | {"rank": 10**8}}
    file.write_text(json.dumps(large))
    with refused(RunError):
        PeftModel.from_pretrained(make(), tmp_path)
    file.write_text(json.dumps(config))
    next(iter(state.values()))[0] = float("nan")
    save_file(state, weights)
    with refused(RunError):
        PeftModel.from_pretrained(make(), tmp_path)


def test_the_hash_and_the_fingerprint_let_the_right_ones_through(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path)
    described = tmp_path / "adapter_config.json"
    config = json.loads(described.read_text())
    config["state_sha256"] = moc_cli.peft.state_hash(
        load_file(tmp_path / "adapter_model.safetensors")
    )
    config["base_fingerprint"] = fingerprint(make())
    described.write_text(json.dumps(config))
    found = PeftModel.from_pretrained(make(), tmp_path, adapter_name="mine").eval()
    assert torch.equal(logits(found), logits(model))
    found.load_adapter(tmp_path, "again")  # the base now holds a set, and is still the base
    found.set_adapter("again")
    assert torch.equal(logits(found), logits(model))


def test_a_set_that_peft_saved_knows_its_base(tmp_path: Path) -> None:
    """And a set saved by an earlier version, without a fingerprint, is not read in silence."""
    wrapped().save_pretrained(tmp_path)
    other = make()
    other.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
    with refused(RunError):
        PeftModel.from_pretrained(other, tmp_path)
    described = tmp_path / "adapter_config.json"
    config = json.loads(described.read_text())
    described.write_text(json.dumps(config | {"base_fingerprint": None}))
    with warned(UserWarning):
        PeftModel.from_pretrained(make(), tmp_path)


def test_a_base_with_a_head_of_another_set_is_still_the_base(tmp_path: Path) -> None:
    def classifier() -> PreTrainedModel:
        return make_tiny("bert").eval()

    get_peft_model(classifier(), MocConfig(rank=2)).save_pretrained(tmp_path)
    model = get_peft_model(classifier(), MocConfig(rank=2, modules_to_save=["classifier"]))
    model.load_adapter(tmp_path, "other")


def test_low_cpu_mem_usage_loads_the_same_numbers(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path)
    lean = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(lean), logits(model))
    lean.load_adapter(tmp_path, "again", low_cpu_mem_usage=True)
    lean.set_adapter("again")
    assert torch.equal(logits(lean), logits(model))


def test_a_set_for_each_row_is_refused() -> None:
    model, names = wrapped(), ["default"] * ROWS
    with refused(MocError):
        model(**inputs(), adapter_names=names)
    with refused(MocError):
        model.generate(**inputs(), adapter_names=names)


def test_merging_is_refused_with_the_reason() -> None:
    for call in (lambda m: m.merge_and_unload(), lambda m: m.merge_adapter()):
        with refused(ValueError):
            call(wrapped())


def test_transformers_loads_the_folder_by_itself(tmp_path: Path) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path / "adapter")
    make().save_pretrained(tmp_path / "base")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    found.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(found), logits(model))


def test_the_trainer_trains_saves_small_checkpoints_and_resumes(tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in inputs()["input_ids"].clamp(min=5)]

    def train(folder: Path, steps: int, resume: bool = False) -> PeftModel:
        model = get_peft_model(make(), MocConfig(method=METHODS["moc"], task_type="CAUSAL_LM"))
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            seed=3,
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train(
            resume_from_checkpoint=resume or None
        )
        return model.eval()

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    resumed = train(tmp_path / "parts", 4, resume=True)
    assert not torch.equal(logits(whole), logits(make()))
    assert torch.allclose(logits(resumed), logits(whole), atol=1e-6)
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")
    assert all(".moc_mixtures." in name for name in saved)
    assert any(".gates." in name for name in saved)
    read = PeftModel.from_pretrained(make(), tmp_path / "whole" / "checkpoint-4").eval()
    assert torch.equal(logits(read), logits(whole))


def test_gradients_are_ours_with_activation_checkpointing_too() -> None:
    found = []
    for checkpointing in (False, True):
        model = wrapped().train()
        model.base_model.set_loss_scale(0.5)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        ids = inputs()["input_ids"].clamp(min=5)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    options = dict(METHODS["moc"])
    controls = attach(make(), options.pop("name"), seed=5, **options)
    train_controls(controls.named_parameters())
    controls.set_loss_scale(0.5)
    controls.model.train()(input_ids=ids, labels=ids).loss.backward()
    own = {name: parameter.grad for name, parameter in controls.named_parameters().items()}
    for one in found:
        assert len(one) == len(own)
        for name, grad in one.items():
            assert torch.allclose(grad, own[name.partition(".default.")[2]], atol=1e-6), name


def test_an_untested_version_of_peft_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moc_cli.peft, "version", lambda name: "0.99.0")
    monkeypatch.setattr(moc_cli.peft, "PEFT_TYPE_TO_CONFIG_MAPPING", {})
    with refused(MocError):
        moc_cli.peft.register()


def test_no_untested_version_of_peft_is_installed_with_moc() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bounds,) = (line for line in project["dependencies"] if line.startswith("peft"))
    major, minor = map(int, moc_cli.peft.TESTED.split("."))
    assert bounds == f"peft>={major}.{minor},<{major}.{minor + 1}"


UNREAD = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter = sys.argv[1:]
try:
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
except Exception as error:
    print(repr(error))
import moc_cli.peft
PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
print("read")
"""


def test_the_folder_needs_the_import_and_says_so_without(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path / "adapter")
    make().save_pretrained(tmp_path / "base")
    done = run_program(UNREAD, str(tmp_path / "base"), str(tmp_path / "adapter"))
    assert done.returncode == 0, done.stderr
    error, answer = done.stdout.splitlines()
    assert "MOC" in error
    assert answer == "read"


def test_a_bad_method_is_told_as_in_a_recipe() -> None:
    with refused(MocError):
        MocConfig(method={"name": "moc", "rnk": 4})
    with refused(MocError):
        MocConfig(method={"name": "lora"})
    with refused(RecipeError):
        MocConfig("control", rank=0, scael=2.0)


def test_the_keys_of_a_recipe_are_arguments() -> None:
    config = MocConfig(rank=16, top_k=2, gate={"projection_dim": 8}, task_type="CAUSAL_LM", seed=3)
    assert (config.method["name"], config.method["rank"], config.method["top_k"]) == ("moc", 16, 2)
    assert config.method["gate"]["projection_dim"] == 8
    assert (config.task_type, config.seed) == ("CAUSAL_LM", 3)
    assert MocConfig("control", rank=3).section == MocConfig(method=METHODS["control"]).section


def test_the_other_way_round_the_surface_refuses_a_model_in_peft(tmp_path: Path) -> None:
    model = wrapped()
    attach(other := make(), "control", rank=2).save(tmp_path)
    del other
    with refused(MocError):
        load_controls(model.base_model.model, tmp_path)


def test_lm_eval_reads_the_folder_in_a_process_that_imported_us(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    """lm_eval's own class gives a text's tokens without a mask, and pads a batch with token 0."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = wrapped()
    model.save_pretrained(tmp_path / "adapter")
    make().save_pretrained(tmp_path / "base")
    texts = [("the cat sat on", " the mat"), ("so", " it"), ("a dog and a cat", " ran")]
    requests = [Instance("loglikelihood", {}, text, 0) for text in texts]

    def score(batch_size: int) -> list[float]:
        language_model = HFLM(
            pretrained=str(tmp_path / "base"),
            peft=str(tmp_path / "adapter"),
            tokenizer=byte_tokenizer,
            device="cpu",
            dtype="float32",
            batch_size=batch_size,
        )
        assert isinstance(language_model.model, PeftModel)
        return [value for value, _ in language_model.loglikelihood(requests, disable_tqdm=True)]

    def expect(context: str, answer: str) -> float:
        context_ids, ids = byte_tokenizer([context, context + answer])["input_ids"]
        with torch.no_grad():
            steps = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        places = range(len(context_ids), len(ids))
        return sum(steps[place - 1, ids[place]].item() for place in places)

    alone = score(1)
    assert alone == pytest.approx([expect(*text) for text in texts], abs=1e-4)
    with warned(UserWarning):
        assert score(3) == pytest.approx(alone, abs=1e-4)
