"""What is to be seen on a GPU, in ten minutes: `python tests/gpu.py --output gpu.json`.

Every command on the built-in model, the laws of the methods in float32 and bfloat16, plan against
measured, the benchmark and the generation of LLaMA2-7B's shape with random weights. The commands
run side by side. Without a GPU all of it runs on the CPU with small shapes. A part that fails is
reported; the others still run.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from support.device_laws import check_laws
from support.models import make_pair_tokenizer, make_tiny_model

from moc_cli.benchmark.machine import describe_machine
from moc_cli.benchmark.models import Bases
from moc_cli.benchmark.rows import make_rows
from moc_cli.benchmark.steps import make_loop
from moc_cli.benchmark.variants import make_variants
from moc_cli.cli import COMMANDS
from moc_cli.training.accelerator import make_accelerator

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
ON_DEVICE = ["--set", f"launch.device={DEVICE.type}"]
SHAPE = ["commonsense/llama2-7b/moc"]
if not GPU:
    SHAPE = ["commonsense/smollm2-135m/moc", "--layers", "2", *ON_DEVICE]
    for change in ("data.max_length=64", "train.per_device_train_batch_size=4"):
        SHAPE += ["--set", change]
# The plan reads rows: these are cut to 32 tokens, as long as the random ones of the benchmark.
SMALL = ["custom/world-llama/moc", *ON_DEVICE]
for change in ("path=texts.jsonl", "format=text", "held_out=2", "max_length=32"):
    SMALL += ["--set", f"data.{change}"]
PLANNED = SHAPE if GPU else SMALL
TURNS = ["--repeats", "8", "--warmup", "2"] if GPU else ["--repeats", "3", "--warmup", "1"]
GRID = """recipe: quickstart
set: {train.max_steps: 10, eval.max_samples: 40}
vary: {method: {moc: {}, control: {method: control}}}
seeds: [0]
output_dir: grid
"""
LABELLED = "text,label\n" + "".join(f"row {n},{'ab'[n % 2]}\n" for n in range(16))


def moc(*arguments: str) -> dict[str, Any]:
    """Run a command in a new process; return its JSON, its code and its seconds."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "moc_cli", *arguments, "--json"], capture_output=True, text=True
    )
    result: dict[str, Any] = {
        "command": f"moc {' '.join(arguments)}",
        "code": done.returncode,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    try:
        return result | {"json": json.loads(done.stdout)}
    except ValueError:
        return result | {"json": None, "said": (done.stdout + done.stderr)[-1500:]}


def commands() -> dict[str, Any]:
    """Every command of the program; the classifier is a tiny BERT."""
    make_tiny_model("bert", num_labels=2).base_model.save_pretrained("encoder")
    make_pair_tokenizer().save_pretrained("encoder")
    Path("labelled.csv").write_text(LABELLED)
    Path("grid.yaml").write_text(GRID)
    short = [*ON_DEVICE, "--set", "train.max_steps=20", "--set", "eval.max_samples=40"]
    classes = ["custom/minilm/moc", "--set", "data.path=labelled.csv", "--set", "data.held_out=4"]
    classes += ["--set", "model.model_name_or_path=encoder", "--output-dir", "classes"]
    few = ["--repeats", "2", "--warmup", "1", *ON_DEVICE]
    compiled = ["--torch-compile"] if GPU else []  # on a CPU it takes longer than all the rest
    training = [
        ["train", "quickstart", *short, "--output-dir", "run"],
        ["train", "quickstart", *short, "--set", "method=lora", "--output-dir", "lora"],
        ["train", "quickstart", *short, "--set", "train.bf16=true", "--output-dir", "bf16"],
        ["train", "quickstart", *short, "--set", "model.load_in_4bit=true", "--output-dir", "four"],
        ["train", *classes, *short],
        ["plan", "quickstart"],
        ["sweep", "grid.yaml", "--jobs", "2", *ON_DEVICE],
        ["recipes", "list"],
    ]
    using = [
        ["eval", "run", "--limit", "24"],
        ["eval", "run", "--limit", "8", "--protocol", "generate", *compiled],
        ["eval", "four", "--limit", "24"],
        ["compare", "run", "lora"],
        ["inspect-routing", "run", "--limit", "8"],
        ["generate", "run", "--prompt", "Where is the cup kept?", "--max-new-tokens", "8"],
        ["generate", "run", "--prompt", "Where is the cup kept?", "--num-beams", "2", *compiled],
        ["predict", "classes", "--file", "labelled.csv"],
        ["export", "run", "--to", "controls", "--output-dir", "as-controls"],
        ["export", "run", "--to", "standalone", "--output-dir", "as-standalone"],
        ["export", "lora", "--to", "merged", "--output-dir", "as-merged"],
        ["train", "quickstart", *short, "--resume", "auto", "--output-dir", "run"],
    ]
    last = [["import", "as-controls", "quickstart", *ON_DEVICE, "--output-dir", "imported"]]
    alone = [["bench", "quickstart", *few, "--output-dir", "bench"]]  # it refuses a GPU in use
    stages = (training, using, last, alone)
    results = []
    for stage in stages:
        with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
            results += pool.map(lambda call: moc(*call), stage)
    tried = {call[0] for stage in stages for call in stage}
    for result in results:
        if not result["code"]:
            del result["json"]
    return {
        "commands": results,
        "failed": [result["command"] for result in results if result["code"]],
        "not tried": sorted(COMMANDS.keys() - tried),
    }


def laws() -> dict[str, Any]:
    """The laws of the methods, in both types of numbers."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        checked = list(check_laws(DEVICE, dtype))
        broken = [law for law in checked if not law["holds"]]
        found[str(dtype)] = {"laws": len(checked), "broken": broken}
    return found


def plans() -> dict[str, Any]:
    """Planned against measured peaks of a training step: each way of recomputing, and 4 bits."""
    found: dict[str, Any] = {}
    texts = (f'{{"text": "{"Where is the cup? " * 20}{n}"}}\n' for n in range(40))
    Path("texts.jsonl").write_text("".join(texts))
    for bits, four in (("16-bit", "false"), ("4-bit", "true")):
        modes = "none,selective,full" if bits == "16-bit" else "none,full"
        vary = ["--vary", f"train.activation_checkpointing={modes}"]
        change = ["--set", f"model.load_in_4bit={four}"]
        few = ["--methods", "moc", "--repeats", "1", "--warmup", "1", "--output-dir", bits]
        measured = moc("bench", *PLANNED, *few, *vary, *change)
        planned = moc("plan", *PLANNED, *change)
        if measured["code"] or planned["code"]:
            found[bits] = {"error": [measured, planned]}
            continue
        steps = planned["json"]["plans"]
        for name, entry in measured["json"]["methods"].items():
            mode, peak = name.rpartition("=")[2], entry["peak_bytes"]
            found[f"{bits} {mode}"] = compared(steps, mode, four == "true", peak)
    return found


def compared(plans: list[dict[str, Any]], mode: str, four: bool, measured: int) -> dict[str, Any]:
    """Return a measured peak beside the planned one of the recipe's batch size."""
    rows = plans[0]["per_device_train_batch_size"]
    for plan in plans:
        kind = plan["activation_checkpointing"], plan["load_in_4bit"]
        if kind == (mode, four) and plan["per_device_train_batch_size"] == rows:
            ratio = plan["step_bytes"] / measured
            return {"planned": plan["step_bytes"], "measured": measured, "ratio": ratio}
    return {"planned": None, "measured": measured}


def benchmark() -> dict[str, Any]:
    """Time and memory of the methods side by side."""
    return moc("bench", *SHAPE, *TURNS, "--methods", "moc,control,lora", "--output-dir", "steps")


def generation() -> dict[str, Any]:
    """Tokens per second with controls, with merged LoRA, and of the bare base."""
    sizes = ["--vary", "eval.per_device_eval_batch_size=1,16"]
    few = ["--repeats", "3", "--warmup", "1"] if GPU else ["--repeats", "2", "--new-tokens", "4"]
    methods = ["--methods", "moc,lora", "--output-dir", "generation"]
    return moc("bench", *SHAPE, "--generate", *methods, *sizes, *few)


def compiled_generation() -> dict[str, Any]:
    """The same of eight layers, with and without compiling."""
    if not GPU:
        return {"skipped": "compiling takes minutes on a CPU"}
    both = ["--vary", "eval.torch_compile=false,true", "--layers", "8"]
    both += ["--set", "eval.per_device_eval_batch_size=1"]
    few = ["--methods", "moc", "--repeats", "3", "--warmup", "2", "--output-dir", "compiled"]
    return moc("bench", *SHAPE, "--generate", *both, *few)


def utilization() -> dict[str, Any]:
    """What share of the card's own rate of products a step reaches: frozen weights take 4 FLOPs a
    token and number (one product forward, one backward), attention not counted.
    """
    changes = [["--set", "train.gradient_accumulation_steps=1"]]
    changes.append([*changes[0], "--set", "train.torch_compile=true"])
    rate = alone("rate")["flops"]
    found: dict[str, Any] = {"matmul_flops": rate}
    for change in changes:
        few = ["--methods", "moc", *TURNS, "--output-dir", "rate"]
        result = moc("bench", *SHAPE, *few, *change)
        name = " ".join(text for text in change if "=" in text)
        if result["code"]:
            found[name] = result
            continue
        entry = result["json"]["methods"]["moc"]
        size = 2 if GPU else 4  # bytes of a number
        flops = 4 * entry["kept_bytes"] / size * entry["tokens_per_second"]
        found[name] = entry | {"share_of_matmul_rate": flops / rate}
    return found


def matmul_rate() -> dict[str, Any]:
    """FLOPs per second of large products in the type of the training."""
    size, dtype = (8192, torch.bfloat16) if GPU else (512, torch.float32)
    left, right = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        left @ right
        if GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return {"flops": 2 * size**3 / min(times)}


def profile() -> dict[str, Any]:
    """For which share of five steps the GPU works; on a CPU, which share of a step collating takes,
    which a GPU would do beside.
    """
    changes = [text for text in SHAPE if "=" in text]
    (variant,) = make_variants(SHAPE[0], changes, ["moc"], [])
    accelerator = make_accelerator(variant.recipe.launch, (), Path())
    bases = Bases(accelerator.device, None if GPU else 2)
    size = variant.recipe.train.per_device_train_batch_size
    rows = make_rows(variant.recipe, bases.of(variant.recipe).model, 20 * size, own_rows=False)
    folder = Path("profile")
    folder.mkdir()
    loop = make_loop(variant, rows, bases, accelerator, folder)
    for _ in range(3):
        loop.train_step()
    with torch.profiler.profile() as recorded:
        begin = time.perf_counter()
        for _ in range(5):
            loop.train_step()
        if GPU:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    if not GPU:
        begin = time.perf_counter()
        loop.data.collate(loop.plan[0])
        return {"collate_share": (time.perf_counter() - begin) * 5 / seconds}
    return {"busy_share": busy_seconds(recorded.events()) / seconds, "step_seconds": seconds / 5}


def busy_seconds(events: Any) -> float:
    """The time in which at least one kernel ran."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6


Part = Callable[[], dict[str, Any]]
PARTS: dict[str, Part] = {
    "environment": lambda: describe_machine(DEVICE, {}),
    "laws": laws,
    "commands": commands,
    "benchmark": benchmark,
    "utilization": utilization,
    "generation": generation,
    "profile": profile,
    "compiled_generation": compiled_generation,
    "plans": plans,
    "rate": matmul_rate,
}


def alone(part: str) -> dict[str, Any]:
    """Run a part in a process of its own: nothing stays on the GPU that the next would meet."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr[-3000:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--only", help="parts, with commas", default=",".join([*PARTS][:-1]))
    parser.add_argument("--seconds", type=float, default=570, help="no part begins after these")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print("\n" + json.dumps(PARTS[given.part]()))
        return 0
    output = given.output.resolve()
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{Path(__file__).resolve().parents[1]}{os.pathsep}{before}"
    results: dict[str, Any] = {}
    begin = time.perf_counter()

    def run(name: str) -> None:
        started = time.perf_counter() - begin
        late = started > given.seconds
        results[name] = {"skipped": f"{started:.0f} s have passed"} if late else alone(name)
        results[name]["part_seconds"] = round(time.perf_counter() - begin - started, 1)
        output.write_text(json.dumps(results, indent=1))  # what there is, if time runs out
        print(f"{name}: {results[name]['part_seconds']} s", file=sys.stderr, flush=True)

    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name in given.only.split(","):
            run(name)
    return int(any("error" in part or part.get("failed") for part in results.values()))


if __name__ == "__main__":
    sys.exit(main())
