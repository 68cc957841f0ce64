"""A batch that mixes control sets against the same batch with one set, pair by pair.

    python tests/benchmarks/tenants.py

Both are timed in one process and take turns: prompt and greedy tokens of the whole batch.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from spread import ratio_interval
from transformers import AutoModelForCausalLM

from moc_cli.api import attach
from moc_cli.serving.tenants import Tenants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".weights/smollm2-135m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sets", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    model.to(given.device)
    with tempfile.TemporaryDirectory() as place:
        folders = []
        for seed in range(given.sets):
            controls = attach(model, "moc", rank=given.rank, seed=seed)
            for name, parameter in controls.named_parameters().items():
                if name.endswith(".B"):
                    torch.nn.init.normal_(parameter, std=1e-3)
            folders.append(Path(place) / str(seed))
            controls.save(folders[-1])
            controls.detach()
        tenants = Tenants(model)
        for folder in folders:
            tenants.add(folder.name, folder)
    ids = torch.randint(5, 1000, (given.rows, given.prompt), device=given.device)
    choices: list[str | None] = [*tenants.names, None]
    mixed = [choices[row % len(choices)] for row in range(given.rows)]

    def seconds(names: list[str | None]) -> float:
        begin = time.perf_counter()
        with tenants.rows(names):
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=given.tokens,
                min_new_tokens=given.tokens,
                do_sample=False,
                pad_token_id=0,
            )
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    one = [tenants.names[0]] * given.rows
    seconds(one), seconds(mixed)
    pairs = [(seconds(one), seconds(mixed)) for _ in range(given.pairs)]
    ratios = np.array([single / several for single, several in pairs])
    found = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "bytes_per_set": tenants.memory()[tenants.names[0]],
        "ratio": ratio_interval(ratios),
    }
    print(json.dumps(vars(given) | found, indent=1))


if __name__ == "__main__":
    main()
