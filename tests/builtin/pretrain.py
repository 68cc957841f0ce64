"""Make the built-in model and task: `PYTHONPATH=tests python -m builtin.pretrain`.

Writes `world-llama/`, a plain Hugging Face folder with a Llama of about half a million weights that
has read the text of `world.documents`, and `world/{train,validation,test}.jsonl.gz`, the task. The
run is a pure function of the seed, the thread count and the versions noted in `pretraining.json`.
"""

import argparse
import gzip
import hashlib
import math
import platform
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import moc_cli.builtin
from moc_cli.files import (
    write_bytes_atomic,
    write_folder_atomic,
    write_json_atomic,
    write_text_atomic,
)

from . import world

HERE = Path(moc_cli.builtin.__file__).parent
CARD = Path(__file__).parent / "card.md"
VOCABULARY = 1536
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# A word takes the one space before it along. Line ends take the indentation after them along, and
# longer runs of spaces stand alone, so that text cut after an indentation splits as the whole does.
PIECES = r"\n *| {2,}| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"

LENGTH, BATCH, STEPS, WARMUP = 128, 32, 1200, 100
PEAK_RATE, WEIGHT_DECAY = 3e-3, 0.05


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the pre-training text and on the frame and rows of the task."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = list(islice(world.documents(seed), 4000))
    text += [f"{row['instruction']}\n{row['output']}" for row in world.make_rows("train", seed)]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Build the Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Yield (BATCH, LENGTH) token ids of documents laid end to end, each ending in EOS."""
    stream: list[int] = []
    text = world.documents(seed)
    need = BATCH * LENGTH
    while True:
        while len(stream) < need:
            for ids in tokenizer(list(islice(text, 256)))["input_ids"]:
                stream += [*ids, tokenizer.eos_token_id]
        yield torch.tensor(stream[:need]).view(BATCH, LENGTH)
        stream = stream[need:]


def rate(step: int) -> float:
    """Learning rate of a step: linear warm-up, then a half cosine to a hundredth of the peak."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, STEPS - WARMUP)
    return PEAK_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int
) -> list[dict[str, float]]:
    """Train every weight in float32 on next-token prediction; return the loss every 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    model.train()
    log: list[dict[str, float]] = []
    recent: list[float] = []
    for step, ids in enumerate(islice(batches(tokenizer, seed), STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if len(recent) == 50:
            log.append({"step": step + 1, "loss": round(sum(recent) / len(recent), 4)})
            print(log[-1], flush=True)
            recent.clear()
    return log


def save_model(
    folder: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    record: dict[str, object],
) -> None:
    """Write the Hugging Face folder, with a model card and a record of the run that made it."""
    with write_folder_atomic(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        weights = new / "model.safetensors"
        weights.chmod(0o644)
        record = {
            "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "parameters": model.num_parameters(),
            **record,
        }
        write_json_atomic(new / "pretraining.json", record)
        card = CARD.read_text(encoding="utf-8").replace(
            "{weights_sha256}", str(record["weights_sha256"])
        )
        write_text_atomic(new / "README.md", card)


def save_task(folder: Path, seed: int) -> None:
    """Write the rows of every split, gzipped without a time stamp."""
    for split in world.SPLITS:
        text = world.rows_text(world.make_rows(split, seed))
        write_bytes_atomic(
            folder / f"{split}.jsonl.gz", gzip.compress(text.encode(), compresslevel=9, mtime=0)
        )


def main() -> None:
    """Parse the command line, then make the task and the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write into")
    parser.add_argument("--seed", type=int, default=world.SEED)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    save_task(options.output / "world", options.seed)
    tokenizer = train_tokenizer(options.seed)
    model = build_model(tokenizer, options.seed)
    start, cpu_start = time.perf_counter(), time.process_time()
    log = pretrain(model, tokenizer, options.seed)
    record: dict[str, object] = {
        "seed": options.seed,
        "threads": options.threads,
        "steps": STEPS,
        "tokens": STEPS * BATCH * LENGTH,
        "peak_learning_rate": PEAK_RATE,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "loss": log,
    }
    save_model(options.output / "world-llama", model, tokenizer, record)


if __name__ == "__main__":
    main()
