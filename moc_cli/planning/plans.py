"""Plans: memory by part and time for settings of a recipe, and the cheapest that fits a card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from moc_cli.models.quantization import of_model
from moc_cli.planning.batches import Rows
from moc_cli.planning.cards import Card
from moc_cli.planning.footprint import Footprint, footprint, quantized
from moc_cli.planning.links import LINKS
from moc_cli.planning.shared import in_one_of, launch_of, traffic_of, votes_of
from moc_cli.recipe.quantization import Quantization, asked_for, unquantized
from moc_cli.recipe.rules import broken_rules
from moc_cli.recipe.schema import Recipe
from moc_cli.training import build
from moc_cli.training.recompute import recompute_mode

MODES = ("none", "selective", "full", "offload")  # from the fastest on
# Assumed, where nothing has been measured: the bytes of a CUDA context with the libraries' own,
# and the share of the rest that the allocator holds beyond what tensors take.
CONTEXT = 600_000_000
FRAGMENTS = 0.02
KEPT = ("weights", "controls", "optimizer", "buffer")  # parts that are there between steps too
OTHER_PHASES = ("evaluation", "checkpoint_saving", "resume")  # what comes instead of a step


@dataclass(frozen=True)
class Plan:
    """What one setting of a recipe takes.

    `peak_bytes` are those that a card must have: weights, controls and the optimizer's state, which
    stay; beside them what a step takes (gradients, activations, loss), or evaluation, saving a
    checkpoint or resuming, if one of these takes more; and what is assumed for context and
    allocator. `step_bytes` are the highest that torch allocates in a step. `step_seconds` are of a
    step of largest micro-batches, `seconds` of all steps. None: not known.

    Of `processes` that train together all this is what each takes. In a step each sends
    `wire_bytes`; `wire_seconds` are how long that takes on each of LINKS, beside `step_seconds`.
    """

    method: str
    changes: Sequence[str]
    activation_checkpointing: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    load_in_4bit: bool
    load_in_8bit: bool
    optim: str
    peak_bytes: int
    step_bytes: int
    parts: Mapping[str, int]
    step_seconds: float | None
    seconds: float | None
    fits: bool | None
    processes: int = 1
    strategy: str | None = None
    wire_bytes: int = 0
    wire_seconds: Mapping[str, float] = field(default_factory=dict)


class Planner:
    """Plans settings of recipes for a card, which may be unknown; each replay is made once.

    Where several processes train together, each has such a card.
    """

    def __init__(self, card: Card | None, rows: Rows) -> None:
        self.card, self.rows = card, rows
        self._footprints: dict[tuple[str, bool], Footprint] = {}

    def plan(
        self, recipe: Recipe, changes: Sequence[str] = (), *, all_layers: bool = False
    ) -> Plan:
        """Plan a recipe as it is; not `all_layers`: from replays with few layers."""
        shape = build.base_shape(unquantized(recipe))
        few_bits = of_model(shape) or asked_for(recipe.model)
        launch = launch_of(recipe)
        work = self.rows.work(recipe, launch.processes)
        alone = self._footprint(unquantized(recipe), all_layers)
        if few_bits is not None:
            recomputed = recompute_mode(recipe) in ("full", "offload")
            alone = quantized(alone, shape, few_bits, self.card, recomputed=recomputed)
        of_process = in_one_of(alone, shape, launch)
        plan = _plan(recipe, changes, few_bits, of_process, work.times, self.card)
        if launch.processes == 1:
            return plan
        micro_batches = recipe.train.gradient_accumulation_steps
        traffic = traffic_of(alone, shape, micro_batches, launch)
        traffic += votes_of(recipe, shape, launch)
        return replace(
            plan,
            processes=launch.processes,
            strategy=launch.strategy,
            wire_bytes=traffic.sent,
            wire_seconds={link.name: traffic.seconds(link) for link in LINKS},
        )

    def _footprint(self, recipe: Recipe, all_layers: bool) -> Footprint:
        key = recipe.model_dump_json(), all_layers
        if key not in self._footprints:
            self._footprints[key] = footprint(
                recipe, self.rows.work(recipe), self.card, all_layers=all_layers
            )
        return self._footprints[key]


def _plan(
    recipe: Recipe,
    changes: Sequence[str],
    few_bits: Quantization | None,
    of_process: Footprint,
    times: float | None,
    card: Card | None,
) -> Plan:
    """Return the plan of a training with so many micro-batches; its parts are those of a step at
    its peak, and evaluation, saving and resuming, each beside what is kept.
    """
    step, seconds = sum(of_process.parts.values()), of_process.seconds
    parts = dict.fromkeys((*KEPT, "gradients", "activations", "loss"), 0) | of_process.parts
    kept_bytes = sum(parts[name] for name in KEPT)
    parts |= {
        name: max(0, sum(of_process.phases[name].values()) - kept_bytes) for name in OTHER_PHASES
    }
    needed_bytes = max(step, kept_bytes + max(parts[name] for name in OTHER_PHASES))
    parts["overhead"] = CONTEXT + round(FRAGMENTS * needed_bytes)
    peak = needed_bytes + parts["overhead"]
    train = recipe.train
    return Plan(
        method=recipe.method.name,
        changes=list(changes),
        activation_checkpointing=recompute_mode(recipe),
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        load_in_4bit=few_bits is not None and few_bits.load_in_4bit,
        load_in_8bit=few_bits is not None and few_bits.load_in_8bit,
        optim=train.optim,
        peak_bytes=peak,
        step_bytes=step,
        parts=parts,
        step_seconds=None if seconds is None else seconds * train.gradient_accumulation_steps,
        seconds=None if seconds is None or times is None else seconds * times,
        fits=None if card is None else peak <= card.memory,
    )


def alternatives_to(recipe: Recipe) -> list[Recipe]:
    """Return settings to choose from instead of a recipe's own, of those that recipes allow: each
    way to recompute layers, micro-batches of the recipe's size and of a quarter of it (else of 1
    row), and the base in 4 bits too.

    The rows a step stay as many.
    """
    train, four_bits = recipe.train, recipe.model.load_in_4bit
    unchanged = _changed(
        recipe, recompute_mode(recipe), train.per_device_train_batch_size, four_bits
    )
    settings = [
        _changed(recipe, mode, rows, bits)
        for bits in dict.fromkeys((four_bits, True))
        for rows in _sizes(train.per_device_train_batch_size)
        for mode in MODES
    ]
    return [s for s in settings if s != unchanged and not any(broken_rules(s))]


def _sizes(rows: int) -> list[int]:
    return list(dict.fromkeys((rows, rows // 4 if rows % 4 == 0 else 1)))


def _changed(recipe: Recipe, mode: str, rows: int, four_bits: bool) -> Recipe:
    current = recipe.train
    accumulated = current.gradient_accumulation_steps * current.per_device_train_batch_size // rows
    train = {
        "activation_checkpointing": mode,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulated,
    }
    return recipe.changed(train=train, model={"load_in_4bit": four_bits})


def changes_to(plan: Plan, recipe: Recipe) -> list[str]:
    """Return the changes with which a recipe becomes what is planned, as `--set` takes them."""
    train, mode = recipe.train, plan.activation_checkpointing
    planned = {
        ("train", "activation_checkpointing"): mode,
        ("train", "gradient_checkpointing"): train.gradient_checkpointing and mode == "full",
        ("train", "per_device_train_batch_size"): plan.per_device_train_batch_size,
        ("train", "gradient_accumulation_steps"): plan.gradient_accumulation_steps,
        ("model", "load_in_4bit"): plan.load_in_4bit,
    }
    return [
        f"{section}.{key}={str(new).lower() if isinstance(new, bool) else new}"
        for (section, key), new in planned.items()
        if new != getattr(getattr(recipe, section), key)
    ]


def cheapest(plans: Sequence[Plan]) -> Plan | None:
    """Return the fastest plan that fits; without times the first of them."""
    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=lambda plan: plan.step_seconds or 0.0, default=None)
