"""Peak memory of sampling and of learning, by part, from the config alone."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from trl_apa.algorithms.learned_normalizers import moments_bytes
from trl_apa.memory.networks import build_networks, classifier_bytes, weight_bytes
from trl_apa.memory.optimizers import state_bytes, step_bytes
from trl_apa.memory.pretending import ACTIVATIONS, LiveBytes, pretending, scales_of
from trl_apa.memory.setup import Setup
from trl_apa.memory.sharding import count_elements, per_process
from trl_apa.models import PolicyAndValue
from trl_apa.models.autocasting import frozen_weights_cast_once
from trl_apa.models.caches import CACHE_ARGUMENT
from trl_apa.models.layouts import Layouts, ShardedLayouts
from trl_apa.models.logprobs import forward_replaced
from trl_apa.rollout.batch import Layout, lay_out


LOGITS, GRADIENTS, CACHE, OVERHEAD = "logits", "gradients", "KV cache", "overhead"
NORMALIZER = "learned log Z"
# Matrices as large as its moments that are there beside them while it is fitted.
FITTING = 6
PASSING = (GRADIENTS, ACTIVATIONS, LOGITS, CACHE)
ADAPTERS = "adapters and heads"
# Tokens that are proposed are a multiple of it.
ROUND = 64
# Rows of a pass from which on memory grows along a line. Each takes time to pretend.
ROWS_OF_LINE = 4
# The parts in the order in which they are shown.
PARTS = (
    "weights: policy",
    "weights: value",
    "weights: reference",
    "weights: reward",
    ADAPTERS,
    "float32 weights",
    "optimizer",
    NORMALIZER,
    *PASSING,
    "engine's buffers",
    OVERHEAD,
)


@dataclass(frozen=True)
class Prediction:
    """Peak bytes of one GPU by part, in each phase.

    Args:
        generation: while responses are sampled.
        update: while the policy and the value model, if there is one, learn from them.
    """

    generation: dict[str, int]
    update: dict[str, int]

    @property
    def peak(self) -> int:
        """The larger phase's sum, bytes."""
        return max(sum(self.generation.values()), sum(self.update.values()))


def predict(setup: Setup) -> Prediction:
    """Build the networks without contents, pretend a pass of each phase, and add up what was alive at the peaks.

    Nothing is allocated: neither memory nor time depend on the batch, and a 7B model takes seconds.

    Raises:
        ValueError: if the networks cannot be built.
    """
    return Planner(setup).prediction


class Planner:
    """A setup's prediction, and what else its networks, which are built once, say of it.

    Raises:
        ValueError: if the networks cannot be built.
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        # Engines that divide the weights cast them before use. Autocast does it otherwise, and keeps the copies.
        self._cast = replace(setup, dtype=setup.autocast or setup.dtype) if setup.is_sharded else setup
        stored = self._cast if setup.sharding.startswith("zero") else setup
        module, reference = build_networks(stored)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._lasting = _lasting(module, reference, stored)
        self._counts = count_elements(module)
        self._module = module if stored == self._cast else build_networks(self._cast)[0]
        with pretending(self._module), _autocast(self._cast):
            generation = self._parts(_pretend_generation(self._module, self._cast))
        self._pass = self._parts(self._update(self._cast))
        step = {GRADIENTS: self._counts.gradients, ACTIVATIONS: step_bytes(setup.optimizer, trained)}
        step = self._parts(step)
        fit = self._parts({ACTIVATIONS: FITTING * self._lasting.get(NORMALIZER, 0)})
        self._beside_passes = max(map(_total, (generation, step, fit)))
        self.prediction = Prediction(generation, max(self._pass, step, fit, key=_total))

    def _update(self, setup: Setup) -> dict[str, int]:
        with pretending(self._module), _autocast(setup):
            update = _pretend_update(self._module, setup)
        if setup.is_sharded:
            update[GRADIENTS] = self._counts.gradients
        return update

    def _parts(self, passing: dict[str, int]) -> dict[str, int]:
        parts = per_process({**self._lasting, **passing}, self._counts, self.setup)
        parts[OVERHEAD] = self.setup.overhead
        return {name: parts[name] for name in PARTS if parts.get(name)}

    def tokens_that_fit(self, sizes: Sequence[int]) -> list[int | None]:
        """The largest `tokens_per_micro_batch` with which the run fits, None where it does not fit at all.

        What a pass of some rows needs grows with its tokens along a line, which is found from two passes.

        Args:
            sizes: bytes that there are.
        """
        length = self.setup.max_length
        tokens = max(ROWS_OF_LINE, self.setup.micro_batch_size) * length
        peak, larger = (self._peak_with(tokens * factor) for factor in (1, 2))
        slope = (larger - peak) / tokens
        found: list[int | None] = []
        for size in sizes:
            fitting = int(tokens + (size - peak) / slope) // ROUND * ROUND
            found.append(fitting if self._beside_passes <= size and fitting >= length else None)
        return found

    def _peak_with(self, tokens: int) -> int:
        """Bytes at the peak of passes of so many tokens."""
        return _total(self._parts(self._update(replace(self._cast, tokens_per_micro_batch=tokens))))


def _total(parts: dict[str, int]) -> int:
    return sum(parts.values())


def _lasting(module: PolicyAndValue, reference: nn.Module | None, setup: Setup) -> dict[str, int]:
    """What is there in every phase."""
    parts = _weights(module)
    if reference is not None:
        parts["weights: reference"] = weight_bytes(reference, beside=module.policy)
    trained = module.trainable_parameters()
    adapter = sum(p.numel() * p.element_size() for p in trained["policy"])
    if setup.reference_kind == "adapter":
        parts[ADAPTERS] += adapter
    if setup.reward == "adapter":
        parts[ADAPTERS] += adapter + 4 * module.policy.get_output_embeddings().weight.shape[1]
    elif setup.reward is not None:
        parts["weights: reward"] = classifier_bytes(
            setup.config if setup.reward == "separate" else setup.reward, setup
        )
    if setup.learned_normalizer:
        parts[NORMALIZER] = moments_bytes(module.policy.get_output_embeddings().weight.shape[1])
    parts["optimizer"] = state_bytes(setup.optimizer, (p for network in trained.values() for p in network))
    return parts


def _weights(module: PolicyAndValue) -> dict[str, int]:
    policy = weight_bytes(module.policy)
    value = 0 if module.value_model is None else weight_bytes(module.value_model, beside=module.policy)
    small = {"policy": 0, "value_model": 0}
    for name, parameter in module.named_parameters():
        owner, _, inside = name.partition(".")
        if "lora_" in name or (owner == "value_model" and not inside.startswith("network.")):
            small[owner] += parameter.numel() * parameter.element_size()
    return {
        "weights: policy": policy - small["policy"],
        "weights: value": value - small["value_model"],
        ADAPTERS: sum(small.values()),
    }


@contextmanager
def _autocast(setup: Setup) -> Iterator[None]:
    with torch.autocast("cpu", dtype=setup.autocast, enabled=setup.autocast is not None):
        yield


def _counted(module: PolicyAndValue) -> LiveBytes:
    """A counter that starts after the weights exist; it does not count them."""
    vocabulary = module.config.get_text_config().vocab_size
    live = LiveBytes(lambda tensor: LOGITS if tensor.dim() > 1 and tensor.shape[-1] == vocabulary else None)
    live.count("weights", (*module.parameters(), *module.buffers(), *scales_of(module)))
    return live


def _peak(live: LiveBytes) -> dict[str, int]:
    return {name: live.peak.get(name, 0) for name in PASSING}


def _pretend_update(module: PolicyAndValue, setup: Setup) -> dict[str, int]:
    """Forward and backward pass of a micro-batch, twice if gradients of one are there while the next is computed."""
    tokens = _longest_rows(setup, _layout(module, setup))
    if setup.gradient_checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    live = _counted(module)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: live.count(GRADIENTS, [p.grad]))
    # Weights that are divided are read through the model's own forward, which makes all logits of a pass at once.
    own_forward = setup.sharding in ("fsdp2", "zero3") and setup.is_sharded
    with live, forward_replaced(module.policy) if own_forward else nullcontext():
        for _ in range(min(setup.gradient_accumulation_steps, 2) if setup.tokens_per_micro_batch is None else 2):
            for networks in module.passes:
                with module.adapter_for(**networks):
                    forward_and_backward(module, tokens, setup.max_new_tokens, networks)
    if setup.gradient_checkpointing:
        module.gradient_checkpointing_disable()
    return _peak(live)


def _layout(module: PolicyAndValue, setup: Setup) -> Layout:
    """In which rows as long as a row can be are read."""
    with warnings.catch_warnings(action="ignore"):  # of a slower layout: the run itself says so
        if not setup.is_sharded:
            return Layouts(module.networks())(setup.max_length)
        layouts = ShardedLayouts(module.networks())
        layouts.try_out(module.networks())
        return layouts(setup.max_length)


def _longest_rows(setup: Setup, layout: Layout) -> dict[str, Any]:
    """A micro-batch of rows of which each is as long as a row can be, but for one that fills it up."""
    rows, rest = setup.micro_batch_size, 0
    if setup.tokens_per_micro_batch is not None:
        rows, rest = divmod(max(setup.tokens_per_micro_batch, setup.max_length), setup.max_length)
    lengths = [(setup.max_length - setup.max_new_tokens, setup.max_new_tokens)] * rows
    if layout is not Layout.PADDED and rest > 1:  # a shorter row fills the pass
        response = min(setup.max_new_tokens, rest - 1)
        lengths.append((rest - response, response))
    queries, responses = ([torch.ones(row[side], dtype=torch.long) for row in lengths] for side in (0, 1))
    return lay_out(layout, queries, responses, pad_token_id=0)


def forward_and_backward(
    module: PolicyAndValue, tokens: dict[str, Any], width: int, networks: dict[str, bool]
) -> None:
    """One pass of a micro-batch, as an update makes it, with a loss of no meaning.

    Args:
        module: policy and value model.
        tokens: what `batch.lay_out` gives.
        width: tokens of the longest response.
        networks: one of `module.passes`.
    """
    with_entropy = networks.get("with_policy", True)
    outputs = module(**tokens, response_width=width, **networks, with_entropy=with_entropy)
    terms = [outputs[name].mean() for name in ("logprobs", "values") if name in outputs]
    del outputs
    torch.stack(terms).sum().backward()


@torch.no_grad()
def _pretend_generation(module: PolicyAndValue, setup: Setup) -> dict[str, int]:
    """The pass over the prompts and that for the last token, whichever needs more."""
    policy, rows = module.eval().policy, setup.generation_batch_size
    live, prompt = _counted(module), setup.max_length - setup.max_new_tokens
    cache = DynamicCache(config=policy.config)
    with live, frozen_weights_cast_once(policy):
        tokens = torch.ones(rows, prompt, dtype=torch.long)
        _sample_next(policy, tokens, tokens, cache)
        first = _peak(live)
        first[CACHE] = sum(_bytes(states) for layer in cache.layers for states in _states(layer))
        first[ACTIVATIONS] = max(first[ACTIVATIONS] - first[CACHE], 0)
        for layer in cache.layers:
            _lengthen(layer, setup.max_length - 1)
            live.count(CACHE, _states(layer))
        live.restart()
        _sample_next(policy, tokens[:, :1], torch.ones(rows, setup.max_length, dtype=torch.long), cache)
        last = _peak(live)
    module.train()
    return max(first, last, key=lambda parts: sum(parts.values()))


def _sample_next(policy: nn.Module, tokens: Tensor, attention_mask: Tensor, cache: DynamicCache) -> None:
    output = policy(
        input_ids=tokens, attention_mask=attention_mask, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1
    )
    output.logits[:, -1].float().softmax(-1)


def _states(layer: Any) -> list[Tensor]:
    """What a layer of the cache holds: keys and values, or the states of a recurrence."""
    return [leaf for leaf in tree_leaves(vars(layer)) if isinstance(leaf, Tensor) and leaf.dim() > 1]


def _lengthen(layer: Any, length: int) -> None:
    """As if the layer had seen `length` tokens: a sliding window keeps the last, a recurrence stays as it is."""
    if not isinstance(getattr(layer, "keys", None), Tensor):
        return
    window = getattr(layer, "sliding_window", None)
    kept = length if window is None else min(length, window - 1)
    layer.keys, layer.values = (
        states.new_empty(*states.shape[:2], kept, states.shape[3]) for states in (layer.keys, layer.values)
    )
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
