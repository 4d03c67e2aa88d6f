"""Compares a network's results in each layout with its own plain forward pass of each row alone.

"Alone" is the right value: one row a call, its tokens and nothing else. Networks are left as they were.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_apa.models.logprobs import (
    forward_parameters,
    last_hidden_states,
    policy_outputs,
    response_rows,
    response_states,
    trunk_and_head,
)
from trl_apa.models.network_parts import Network, inner_model, num_token_ids, rope_options, trunk_of
from trl_apa.models.packing import attending_with, for_packed_rows, let_share, noting_launches, why_unsuitable
from trl_apa.rollout.batch import Layout, lay_out


# Options of a config after whose number of tokens a network may do otherwise: windows, chunks; and of those numbers of
# layers (Qwen's max_window_layers, Gemma's _sliding_window_pattern).
BOUNDARIES = re.compile(r"window|chunk|block_size|capacity|compress|index_topk|local_attention")
OF_LAYERS = re.compile(r"layers|pattern")
# Relative differences that rounding usually makes and at most: in float32, with TensorFloat-32, and below, where
# another kernel for masked attention alone makes 0.04 in 64 layers; faults are 0.25 to 1.
FLOAT32, TF32, HALF = (1e-4, 1e-3), (3e-3, 1e-2), (6e-2, 3e-1)
# Logits beyond it are not computed: they stand for tokens that a model never chooses.
ENORMOUS = 1e30
START_TOKENS = ("decoder_start_token_id", "bos_token_id")
# Tokens of the two rows of a trial, where no boundary asks for more, and tokens at their ends that are compared.
SHORT, LONG, COMPARED = 6, 13, 5


@dataclass(frozen=True)
class Difference:
    """How far outputs are from those of each row alone.

    Args:
        relative: the largest difference of a logit (of a network without a vocabulary, of a hidden state), over the
            largest of them. In low precision the median over the compared tokens of a row counts: experts that two
            passes choose differently change single tokens.
        max_nats, mean_nats: of the log-probs of the compared tokens; None without a vocabulary.
    """

    relative: float
    max_nats: float | None = None
    mean_nats: float | None = None


@dataclass(frozen=True)
class LayoutTrial:
    """How far a network is from its own plain forward of each row alone, in each way of reading two rows or three.

    Args:
        lengths: tokens of each row.
        repeated: one row alone, a second time; shows randomness.
        together: rows of equal length in one batch, without padding: what rounding makes of another size of batch.
        padded: all rows in one padded batch.
        has_padded_gradient: whether the gradient of that batch is a number, or nothing is to be learned.
        packed: all in one row; None if that was not tried, or did not work.
        leak: the largest change of the other sequences of a packed row when the first one changes, relative; or None.
        rounding: the largest relative difference that rounding makes in the precision of the network.
        allowed: the same, or four times what `together` shows, which may be more in a deep network.
        allowed_leak: the same of `leak`.
        not_packed: why there was no packed row.
        per_sequence: why attention of the packed row took a launch a sequence; None if it took one a layer.
        shared: all in one row in which one row and another response to its prompt share that prompt; or None.
        shared_leak: the largest change of the other responses there when the one behind the prompt changes; or None.
    """

    lengths: tuple[int, ...]
    repeated: Difference
    together: Difference
    padded: Difference
    has_padded_gradient: bool
    packed: Difference | None
    leak: float | None
    rounding: float
    allowed: float
    allowed_leak: float
    not_packed: str | None = None
    per_sequence: str | None = None
    shared: Difference | None = None
    shared_leak: float | None = None

    @property
    def is_repeatable(self) -> bool:
        return self.repeated.relative <= self.rounding

    @property
    def is_exact_together(self) -> bool:
        return self.together.relative <= self.allowed

    @property
    def is_exact_padded(self) -> bool:
        return self.padded.relative <= self.allowed and self.has_padded_gradient

    @property
    def is_exact_packed(self) -> bool:
        if self.packed is None or self.leak is None:
            return False
        return self.packed.relative <= self.allowed and self.leak <= self.allowed_leak

    @property
    def is_exact_shared(self) -> bool:
        if self.shared is None or self.shared_leak is None:
            return False
        exact = self.shared.relative <= self.allowed and self.shared_leak <= self.allowed_leak
        return exact and self.is_exact_packed


def boundaries(config: PreTrainedConfig) -> tuple[int, ...]:
    """Numbers of tokens after which a network may do otherwise, by its config, in order."""
    text = config.get_text_config()
    found: set[int] = set() if (limit := rope_limit(config)) is None else {limit}

    def look(options: dict[str, Any]) -> None:
        for name, value in options.items():
            if isinstance(value, dict) and name != "quantization_config":
                look(value)
            elif BOUNDARIES.search(str(name)) and not OF_LAYERS.search(str(name)):
                numbers = value if isinstance(value, list | tuple) else [value]
                found.update(number for number in numbers if type(number) is int and number > 1)

    look(text.to_dict())
    return tuple(sorted(found))


def rope_limit(config: PreTrainedConfig) -> int | None:
    """Tokens after which the longest row of a batch changes the RoPE of all of them; None if it never does."""
    text = config.get_text_config()
    limits = []
    for options in rope_options(config):
        if options.get("rope_type") == "longrope":
            limits.append(options.get("original_max_position_embeddings"))
        elif "dynamic" in (options.get("rope_type") or ""):
            limits.append(getattr(text, "max_position_embeddings", None))
    return min((limit for limit in limits if limit), default=None)


def trial_lengths(config: PreTrainedConfig, longest: int) -> tuple[int, ...]:
    """Tokens of a short row and of a long one, which crosses the boundaries of the config that `longest` crosses.

    Where the short one does not cross the first of them, a third between them does by one token: layers that compress
    blocks, say, may do otherwise with pads behind a block that has begun.
    """
    limits = boundaries(config)
    crossed = max((limit for limit in limits if limit < longest), default=0)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    ahead = [limit for limit in (*limits, positions) if limit is not None and limit > crossed]
    long = max(2, min(max(crossed + COMPARED + 1, LONG), *ahead, 2**62))
    short = max(2, min(SHORT, long - 1, *limits[:1]))
    return (short, *(limit + 1 for limit in limits[:1] if short <= limit < long - 1), long)


def trial_rows(network: Network, lengths: Iterable[int], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and responses with these total lengths, of ordinary token ids, on the network's device.

    The first query has one token, so it is padded in a batch with the others. The encoder and the decoder of an
    encoder-decoder each get that many tokens.
    """
    base = inner_model(network)
    known, generator = torch.tensor(ordinary_tokens(base)), torch.Generator().manual_seed(seed)
    queries, responses = [], []
    for number, length in enumerate(lengths):
        row = known[torch.randint(len(known), (length,), generator=generator)].to(base.device)
        of_query = 1 if number == 0 else max(length - COMPARED, length // 2)
        queries.append(row if base.config.is_encoder_decoder else row[:of_query])
        responses.append(row[1:] if base.config.is_encoder_decoder else row[of_query:])
    return queries, responses


def ordinary_tokens(network: Network) -> list[int]:
    """Ids that mean nothing special: the embedding of a pad token is zero in new models, which hides who reads it."""
    configs = (network.config, network.config.get_text_config())
    named = [pair for config in configs for pair in config.to_dict().items()]
    special = {value for name, value in named if name.endswith(("_token_id", "_token_index")) and type(value) is int}
    # CPM-Ant's embedding has rows for more than its vocabulary.
    known = min(num_token_ids(network) or configs[1].vocab_size, configs[1].vocab_size, 1000)
    return [token for token in range(known) if token not in special] or [0]


@torch.no_grad()
def alone(network: Network, query: Tensor, response: Tensor, start: int | None = None) -> Tensor:
    """What the plain forward of a network says before each token of one response, float32 `(tokens, V or H)`.

    Args:
        network: a language model or a trunk, with or without adapters.
        query, response: 1-D token ids.
        start: for an encoder-decoder, the decoder's input before a response.
    """
    base, width = inner_model(network), len(response)
    if start is None:
        inputs = {"input_ids": torch.cat([query, response])[None]}
    else:
        decoder_input_ids = torch.cat([response.new_full((1,), start), response])[None]
        inputs = {"input_ids": query[None], "decoder_input_ids": decoder_input_ids}
    options: dict[str, Any] = {"logits_to_keep": width + 1} if "logits_to_keep" in forward_parameters(base) else {}
    output = base(**inputs, **options, use_cache=False)
    states = last_hidden_states(output) if base.get_output_embeddings() is None else output.logits
    return states[0, -width - 1 : -1].float().cpu()


@torch.no_grad()
def in_layout(
    network: Network,
    layout: Layout,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    pad_token_id: int,
    start: int | None = None,
    prompts: Sequence[int] | None = None,
) -> list[Tensor]:
    """The same of several rows in one of the layouts, by the functions that the trainer uses."""
    states = _states(network, layout, queries, responses, pad_token_id, start, prompts)
    return [of_row.float().cpu() for of_row in states]


def _states(
    network: Network,
    layout: Layout,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    pad_token_id: int,
    start: int | None,
    prompts: Sequence[int] | None = None,
) -> list[Tensor]:
    tokens = lay_out(layout, queries, responses, pad_token_id, start, prompts)
    width = max(len(response) for response in responses)
    base = inner_model(network)
    if base.get_output_embeddings() is None:
        states_BRK = response_rows(response_states(trunk_of(base), tokens), tokens, width)
    elif (parts := trunk_and_head(network)) is not None:
        trunk, head = parts
        hidden_MH = response_states(trunk, tokens)
        states_BRK = response_rows(head(hidden_MH.to(next(head.parameters()).device)), tokens, width)
    else:
        states_BRK = cast(Tensor, policy_outputs(network, tokens, width, with_logits=True).logits_BRV)
    return [states[: len(response)] for states, response in zip(states_BRK, responses, strict=True)]


def difference(
    expected: Sequence[Tensor],
    actual: Sequence[Tensor],
    responses: Sequence[Tensor] | None,
    exact: bool,
    smallest_size: float = 0.0,
) -> Difference:
    """How far `actual` outputs `(tokens, K)` of each row are from those expected.

    Args:
        expected, actual: on the CPU.
        responses: the token ids that logits predict; None for hidden states.
        exact: whether every token counts, or the median of each row.
        smallest_size: what differences are relative to where all outputs are smaller.

    Raises:
        ValueError: if an expected output is not a number.
    """
    if any(float(row.isnan().sum()) for row in expected):
        raise ValueError("its outputs are not numbers")
    # Some families say of tokens that there are not: -inf, or the least number that there is.
    size = max(float(row.masked_fill(row.abs() > ENORMOUS, 0.0).abs().max()) for row in expected) or 1.0
    size = max(size, smallest_size)
    reduce = torch.max if exact else torch.median
    changes = [
        (one - other).abs().masked_fill(one == other, 0.0).amax(dim=-1)
        for one, other in zip(actual, expected, strict=True)
    ]
    # Not a number is no small difference.
    relative = max(float(torch.nan_to_num(reduce(change), nan=torch.inf)) for change in changes) / size
    if responses is None:
        return Difference(relative)
    nats = torch.cat(
        [
            (one.log_softmax(-1) - other.log_softmax(-1)).gather(-1, response[:, None].cpu()).abs().flatten()
            for one, other, response in zip(actual, expected, responses, strict=True)
        ]
    )
    return Difference(relative, float(nats.max()), float(nats.mean()))


def try_layouts(
    network: Network,
    longest: int = LONG,
    pad_token_id: int | None = None,
    start: int | None = None,
) -> LayoutTrial:
    """Compare a network's results for a short and a long row in each layout with those for each row alone.

    Args:
        network: a language model or a trunk, with or without PEFT adapters; tried in its present mode.
        longest: tokens of the rows that it will read: those of the trial cross the same boundaries of its config.
        pad_token_id: what batches are filled with; by default with an ordinary token.
        start: for an encoder-decoder, the decoder's input before a response; by default as the config says.

    Raises:
        Exception: what the network raises when it reads a row alone, or a padded batch.
    """
    base = inner_model(network)
    pad_token_id, start = special_tokens(base, pad_token_id, start)
    lengths, exact = trial_lengths(base.config, longest), is_precise(base)
    queries, responses = trial_rows(network, lengths)
    expected = [alone(network, query, response, start) for query, response in zip(queries, responses, strict=True)]

    def compared(actual: Sequence[Tensor], first: int = 0) -> Difference:
        targets = None if base.get_output_embeddings() is None else responses[first:]
        return difference(expected[first:], actual, targets, exact)

    twice = [queries[-1], queries[-1].flip(0)], [responses[-1], responses[-1].flip(0)]
    together = compared(in_layout(network, Layout.SEPARATE, *twice, pad_token_id, start)[:1], first=-1)
    padded = compared(in_layout(network, Layout.PADDED, queries, responses, pad_token_id, start))
    why_not = why_unsuitable(network, longest)
    with noting_launches() as launches:
        in_one_row, leak, why_not = (None, None, why_not) if why_not else _packed(network, queries, responses, exact)
        shared = None if in_one_row is None else _shared(network, queries, responses, expected, exact)
    return LayoutTrial(
        lengths=lengths,
        repeated=compared([alone(network, queries[-1], responses[-1], start)], first=-1),
        together=together,
        padded=padded,
        has_padded_gradient=_has_padded_gradient(network, pad_token_id, start),
        packed=None if in_one_row is None else compared(in_one_row),
        leak=leak,
        rounding=allowed_difference(base),
        allowed=(allowed := allowed_difference(base, together)),
        # Experts see the tokens of all sequences together, and an int8 kernel treats a column alike for all of them.
        allowed_leak=allowed if has_experts(base.config) or getattr(base, "is_quantized", False) else 0.0,
        not_packed=why_not,
        per_sequence=launches[0] if launches else None,
        shared=None if shared is None else shared[0],
        shared_leak=None if shared is None else shared[1],
    )


def _has_padded_gradient(network: Network, pad_token_id: int, start: int | None) -> bool:
    """Whether a padded batch has a gradient that is a number; of short rows, whose pads are as those of long ones.

    What a network makes of pads has no weight in a loss; but where the derivative at a pad is infinite, as that of a
    norm of nothing is, no weight at all makes it NaN.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not trained:
        return True
    base = inner_model(network)
    own_pad = first_id(base.config.get_text_config(), "pad_token_id")  # whose embedding is zero
    if own_pad is not None and 0 <= own_pad < (num_token_ids(base) or 0):
        pad_token_id = own_pad
    queries, responses = trial_rows(network, trial_lengths(base.config, LONG))
    with torch.enable_grad(), _without_checkpointing(network):
        states = _states(network, Layout.PADDED, queries, responses, pad_token_id, start)
        total = torch.stack([row.float().square().mean() for row in states]).sum()
        if not total.requires_grad or not total.isfinite():
            return True
        # What is wrong above a layer is wrong in the gradient of all below it.
        parts = torch.autograd.grad(total, [*trained[:2], trained[-1]], allow_unused=True)
    return all(bool(part.isfinite().all()) for part in parts if part is not None)


@contextmanager
def _without_checkpointing(network: Network) -> Iterator[None]:
    """Reentrant checkpointing gives no gradient but that of `backward`."""
    layers = [layer for layer in network.modules() if isinstance(layer, GradientCheckpointingLayer) and layer.training]
    try:
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer in layers:
            layer.training = True


def _packed(
    network: Network, queries: list[Tensor], responses: list[Tensor], exact: bool
) -> tuple[list[Tensor] | None, float | None, str | None]:
    """Outputs of a packed row, and how far those of the other sequences change with the first one; or why there are
    none."""
    base = inner_model(network)
    others, other_responses = trial_rows(network, [len(queries[0]) + len(responses[0])], seed=1)
    try:
        with attending_with(base, for_packed_rows(base)):
            outputs = in_layout(network, Layout.PACKED, queries, responses, 0)
            changed = in_layout(network, Layout.PACKED, [*others, *queries[1:]], [*other_responses, *responses[1:]], 0)
    except Exception as error:  # a kernel that is not for this device, attention that reads the mask
        return None, None, f"could not be tried out: {error}"
    return outputs, difference(outputs[1:], changed[1:], None, exact).relative, None


def _shared(
    network: Network, queries: list[Tensor], responses: list[Tensor], expected: list[Tensor], exact: bool
) -> tuple[Difference, float] | None:
    """How far rows are from those alone where the last one and another response to its prompt share the prompt.

    Returns:
        Their difference from `expected`, and how far the other responses change with the one behind the prompt; None
        where its attention cannot be told of a shared prompt, or that fails.
    """
    base = inner_model(network)
    if not let_share(implementation := for_packed_rows(base)):
        return None
    query, response = queries[-1], responses[-1]
    # Shorter, so that their ends are not taken for each other's; the other row lies between the two of one prompt.
    other = response.flip(0)[: max(1, len(response) - 1)]
    rows, prompts = ([query, queries[0], query], [response, responses[0], other]), (0, 1, 0)
    alone_each = [expected[-1], expected[0], alone(network, query, other)]
    targets = None if base.get_output_embeddings() is None else rows[1]
    changed_rows = rows[0], [response.flip(0), *rows[1][1:]]
    try:
        with attending_with(base, implementation):
            outputs = in_layout(network, Layout.SHARED, *rows, 0, prompts=prompts)
            changed = in_layout(network, Layout.SHARED, *changed_rows, 0, prompts=prompts)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a kernel that takes no mask
        return None
    leak = difference(outputs[1:], changed[1:], None, exact).relative
    return difference(alone_each, outputs, targets, exact), leak


@torch.no_grad()
def try_reading(read: Callable[[list[Tensor]], Tensor], network: Network, longest: int = LONG) -> Difference:
    """Compare the results of `read` for a short and a long row in a padded batch with those for each row alone.

    Args:
        read: 1-D token ids of several rows to a network's results, `(B, K)`.
        network: whose config says how long the rows have to be.
        longest: see `try_layouts`.
    """
    base = inner_model(network)
    queries, responses = trial_rows(network, trial_lengths(base.config, longest))
    rows = queries if base.config.is_encoder_decoder else [torch.cat(p) for p in zip(queries, responses, strict=True)]
    if (end := first_id(base.config, "eos_token_id")) is not None:
        for row in rows:
            row[-1] = end  # of which some classifiers read their score
    expected = [read([row]).float().cpu() for row in rows]
    # A single score of a random text may be near 0.
    smallest_size = 1.0 if expected[0].shape[-1] == 1 else 0.0
    return difference(expected, read(rows).float().cpu().split(1), None, is_precise(base), smallest_size)


def allowed_difference(network: Network, rounding: Difference | None = None) -> float:
    """The largest relative difference that counts as rounding, in the precision that the network computes in.

    Args:
        network: what computes.
        rounding: a difference known to be rounding; up to four times as much is allowed.
    """
    usual, most = HALF
    if is_precise(network):
        by_tensor_cores = network.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        usual, most = TF32 if by_tensor_cores else FLOAT32
    return usual if rounding is None else min(max(usual, 4 * rounding.relative), most)


def is_precise(network: Network) -> bool:
    """Whether rounding is all that float32 makes of another order of the same operations."""
    low = getattr(network, "is_quantized", False) or torch.is_autocast_enabled(network.device.type)
    return not low and network.dtype in (torch.float32, torch.float64)


def has_experts(config: PreTrainedConfig) -> bool:
    return any("expert" in str(name) for name in config.get_text_config().to_dict())


def special_tokens(network: Network, pad_token_id: int | None, start: int | None) -> tuple[int, int | None]:
    """The pad token and, for an encoder-decoder, the decoder's first token."""
    pad_token_id = ordinary_tokens(network)[-1] if pad_token_id is None else pad_token_id
    if network.config.is_encoder_decoder and start is None:
        start = first_id(network.config, *START_TOKENS) or 0
    return pad_token_id, start


def first_id(config: PreTrainedConfig, *names: str) -> int | None:
    """The first token id under these names in a config, the first of several; None if there is none."""
    given = [getattr(config, name, None) for name in names]
    ids = [value[0] if isinstance(value, list) else value for value in given if value not in (None, [])]
    return ids[0] if ids else None
