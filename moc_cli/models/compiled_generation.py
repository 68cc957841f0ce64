"""torch.compile for generation: each new token is one run of one graph, with a static cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel, StaticCache

from moc_cli.models.compiler import compile_error

PLACES = 128  # a cache has a multiple of so many places, so that few graphs serve all lengths
GRAPHS = 64  # at most: for sizes of a batch and lengths of the cache


@contextmanager
def compiled_generation(model: PreTrainedModel, enabled: bool) -> Iterator[None]:
    """Within it the forwards of `model.generate` for one new token are compiled, where `enabled`.

    Prompts are read without compiling. A graph is for a number of rows and of the cache's places.
    `generate` takes `input_ids` by name, and makes the cache itself. Raises MocError where the
    model cannot be compiled as one graph.
    """
    if not enabled:
        yield
        return
    decoder, own_generate = _Decoder(model), vars(model).get("generate")
    vars(model)["generate"] = decoder.run
    try:
        with torch._dynamo.config.patch(recompile_limit=GRAPHS):
            yield
    except TorchDynamoException as error:
        raise compile_error("eval.torch_compile", "the model", error) from error
    finally:
        del vars(model)["generate"]
        if own_generate is not None:
            vars(model)["generate"] = own_generate


class _Decoder:
    """Runs a model's generations: the first forward of each as it is, the others compiled.

    transformers compiles by itself, but on GPUs alone and not for a beam search.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        generate: Any = model.generate
        self.generate: Callable[..., Any] = generate
        self._model = model
        self._compiled: dict[str, Callable[..., Any]] = {}
        self._forwards = 0
        self._mode = "default"

    def run(self, *, input_ids: Tensor, **kwargs: Any) -> Any:
        """Generate, with a static cache that is long enough."""
        model = self._model
        settings = vars(model.generation_config) | kwargs
        places = -(-(input_ids.shape[1] + settings["max_new_tokens"]) // PLACES) * PLACES
        cache = StaticCache(model.config.get_text_config(decoder=True), max_cache_len=places)
        # A CUDA graph starts all kernels together, and wants its cache where it was; beams move it.
        steady = input_ids.is_cuda and (settings["num_beams"] or 1) == 1
        self._forwards, self._mode = 0, "reduce-overhead" if steady else "default"
        model._compiled_call_impl = self._call
        try:
            return self.generate(input_ids=input_ids, past_key_values=cache, **kwargs)
        finally:
            model._compiled_call_impl = None

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """A forward of the model."""
        self._forwards += 1
        if self._forwards == 1:
            return self._model._call_impl(*args, **kwargs)
        if self._mode not in self._compiled:
            self._compiled[self._mode] = torch.compile(
                self._model._call_impl, fullgraph=True, mode=self._mode
            )
        return self._compiled[self._mode](*args, **kwargs)
