"""Generation with controls against the bare base, pair by pair.

    python tests/benchmarks/generation.py

Both models are in one process and take turns, so that a busy machine slows both. The ceiling is
what the controls' extra bytes allow where a token costs the reading of all weights:
bytes of the base / (bytes of the base + bytes of the controls that the rows use).
"""

import argparse
import json
import time

import numpy as np
import torch
from spread import ratio_interval
from transformers import AutoModelForCausalLM, PreTrainedModel

from moc_cli.methods import attach
from moc_cli.recipe.methods import ControlMethod, MocMethod


def seconds(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> float:
    """Time of `tokens` greedy tokens, less that of the first one and its prefill."""
    parts = []
    for new in (1, tokens + 1):
        begin = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        if ids.is_cuda:
            torch.cuda.synchronize()
        parts.append(time.perf_counter() - begin)
    return parts[1] - parts[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=".weights/smollm2-135m")
    parser.add_argument("--method", choices=("moc", "control"), default="moc")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    torch.manual_seed(0)
    load = {"dtype": getattr(torch, given.dtype)}
    bare, host = (
        AutoModelForCausalLM.from_pretrained(given.model, **load).to(given.device).eval()
        for _ in range(2)
    )
    kind = MocMethod if given.method == "moc" else ControlMethod
    adapted = attach(host, kind(rank=given.rank))
    for name, parameter in adapted.named_trainables().items():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=1e-3)
    ids = torch.randint(5, 1000, (given.rows, 32), device=given.device)
    with torch.no_grad():
        seconds(bare, ids, 2), seconds(host, ids, 2)
        pairs = [
            (seconds(bare, ids, given.tokens), seconds(host, ids, given.tokens))
            for _ in range(given.pairs)
        ]
    ratios = np.array([base / ours for base, ours in pairs])
    weights = sum(p.numel() * p.element_size() for p in bare.parameters())
    host.generate(input_ids=ids, max_new_tokens=3, pad_token_id=0)
    stacks = host.moc.current.store.stacks.values()
    extra = sum(t.numel() * t.element_size() for stack in stacks for t in (stack.A, stack.B))
    ceiling = weights / (weights + extra)
    print(
        json.dumps(
            vars(given)
            | {
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "base_tokens_per_second": given.rows
                * given.tokens
                / float(np.median([p[0] for p in pairs])),
                "tokens_per_second": given.rows
                * given.tokens
                / float(np.median([p[1] for p in pairs])),
                "ratio": ratio_interval(ratios),
                "ceiling": ceiling,
                "share_of_ceiling": float(np.median(ratios)) / ceiling,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
