"""The prompts of LLM-Adapters, byte for byte.

Training and evaluation differ in two places, as they do there: two blanks or one after the header,
and a line of sixteen blanks or an empty line before the response. Published numbers were
made this way, so the difference is kept.
"""

import hashlib

INDENT = " " * 16
HEADER = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


def train_prompt(instruction: str) -> str:
    """The text before the answer in training."""
    return _prompt(instruction, "  ", INDENT)


def eval_prompt(instruction: str) -> str:
    """The text before the answer in evaluation."""
    return _prompt(instruction, " ", "")


def _prompt(instruction: str, after_header: str, before_response: str) -> str:
    return (
        f"{HEADER}{after_header}\n\n"
        f"{INDENT}### Instruction:\n"
        f"{INDENT}{instruction}\n"
        f"{before_response}\n"
        f"{INDENT}### Response:\n"
        f"{INDENT}"
    )


def template_hash() -> str:
    """Sha256 of both templates, which results state."""
    templates = train_prompt("{instruction}") + "\0" + eval_prompt("{instruction}")
    return hashlib.sha256(templates.encode()).hexdigest()
