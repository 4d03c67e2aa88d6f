"""The layout in which networks read a batch: one that gives the same results as each row alone."""

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from trl_apa.models.logprobs import is_sharded, trunk_and_head
from trl_apa.models.network_parts import Network, inner_model
from trl_apa.models.packing import crosses_a_window, let_pack, why_unsuitable
from trl_apa.models.trial_memory import once
from trl_apa.models.trials import (
    LONG,
    Difference,
    LayoutTrial,
    allowed_difference,
    boundaries,
    rope_limit,
    try_layouts,
    try_reading,
)
from trl_apa.models.varlen import launches_cost
from trl_apa.rollout.batch import Layout
from trl_apa.rollout.sampling_trial import SamplingTrial, try_joining, try_sampling


T = TypeVar("T")
# Each holds for the networks of which those before it do not.
WITHOUT_PACKING = (Layout.PADDED, Layout.SEPARATE, Layout.ONE_BY_ONE)
LONGEST_COUNTS = "has RoPE frequencies that depend on the longest row of a batch"


class Layouts:
    """The layout in which micro-batches of rows of a length go through all of some networks.

    Each network is tried (`trials.try_layouts`) on short rows when this is made, and on longer ones when rows
    first cross a boundary of its config: a window, say. What RoPE makes of long rows is known from the config.

    Args:
        networks: language models or trunks, with or without PEFT adapters.
        padding_free: False: never pack. True: raise where a row cannot be packed. None: pack where it is exact.
        around: entered around each trial; autocast, say.

    Raises:
        ValueError: naming the network that cannot be packed and why, with `padding_free=True`; or one that computes
            something else each time.
    """

    def __init__(
        self,
        networks: Iterable[Network],
        padding_free: bool | None = None,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.networks, self.padding_free, self.around = list(networks), padding_free, around
        self._kinds = _different(self.networks)
        limits = (boundaries(inner_model(network).config) for network in self._kinds)
        self._boundaries = sorted({limit for of_one in limits for limit in of_one})
        self._known: dict[tuple[int, bool, bool], Layout] = {}
        with around():
            for network in self._kinds:
                check_repeatable(network)
            for network in self.networks:
                with suppress(Exception):  # it is raised again where the network is used
                    trunk_and_head(network)  # tried out now too, where nothing waits for the device
        self(LONG)

    def __call__(self, longest: int, packable: bool = True, share: bool = False) -> Layout:
        """The layout for rows of at most `longest` tokens.

        Args:
            longest: tokens.
            packable: whether it may be a packed one.
            share: whether a prompt that rows have in common may be read once.
        """
        key = bisect_left(self._boundaries, longest), packable, share
        if key not in self._known:
            with self.around():
                self._known[key] = self._choose(longest, packable, share)
        return self._known[key]

    def try_up_to(self, longest: int) -> None:
        """Make now what trials rows of up to so many tokens need: a resumed run makes them with the same weights."""
        if not self.padding_free:  # what cannot be packed then raises when it occurs
            for length in _lengths_up_to(longest, self._boundaries):
                self(length)

    def _choose(self, longest: int, packable: bool, share: bool) -> Layout:
        if packable and self.padding_free is not False and self._all_pack(longest):
            for network in self.networks:
                let_pack(inner_model(network))
            shares = share and all(shares_prompts(network, longest) for network in self._kinds)
            return Layout.SHARED if shares else Layout.PACKED
        return max((unpacked_layout(network, longest) for network in self._kinds), key=WITHOUT_PACKING.index)

    def _all_pack(self, longest: int) -> bool:
        for network in self._kinds:
            if (reason := why_not_packed(network, longest)) is not None:
                if self.padding_free:
                    raise ValueError(f"padding_free=True, but {type(inner_model(network)).__name__} {reason}")
                return False
        return True


class ShardedLayouts:
    """The same for networks whose weights an engine spreads over processes, which all call them equally often.

    Packed and padded rows take one call each: which of them it is may differ between the processes.

    Args:
        networks: language models or trunks.
        padding_free: see [`Layouts`].
    """

    def __init__(self, networks: Iterable[Network], padding_free: bool | None = None):
        self.networks, self.padding_free = list(networks), padding_free
        self._kinds = _different(self.networks)
        limits = (boundaries(inner_model(network).config) for network in self._kinds)
        self._first_boundary = min((limit for of_one in limits for limit in of_one), default=None)
        self._is_exact_padded, self._packs = True, False

    def try_out(
        self, networks: Iterable[Network], around: Callable[[Callable[[Any], Any]], Any] = lambda work: work(None)
    ) -> None:
        """Called by all processes together.

        Args:
            networks: those that the processes may call.
            around: calls what it is given with the weights there, once: after a gradient they are divided again.

        Raises:
            ValueError: naming the network that cannot be packed and why, with `padding_free=True`.
        """
        kinds, longest = _different(networks), min(LONG, self._first_boundary or LONG)

        def tried(work: Callable[..., T], network: Network, *more: Any) -> T:
            found: T = around(lambda _: work(network, *more))
            return found

        layouts = [tried(unpacked_layout, network) for network in kinds]
        self._is_exact_padded = all(layout is Layout.PADDED for layout in layouts)
        if self.padding_free is False:
            return
        reasons = [tried(why_not_packed, network, longest) for network in kinds]
        if len(_different([*kinds, *self._kinds])) > len(kinds):
            kinds, reasons = [*kinds, self.networks[-1]], [*reasons, "has not been tried"]
        # Where rounding is near the tolerance processes may differ, and rows one by one take many calls.
        self._packs = not _largest_anywhere(sum(map(bool, reasons)), self._kinds[0])
        if self._packs:
            for network in self.networks:
                let_pack(inner_model(network))
        elif self.padding_free:
            told = [f"{type(inner_model(n)).__name__} {why}" for n, why in zip(kinds, reasons, strict=True) if why]
            raise ValueError(f"padding_free=True, but {[*told, 'a network of another process cannot be packed'][0]}")

    def try_up_to(self, longest: int) -> None:
        """Do nothing: the only trial is the one that all processes make together."""

    def __call__(self, longest: int, packable: bool = True, share: bool = False) -> Layout:
        """The layout for micro-batches of rows of at most `longest` tokens on this process; all call this together."""
        exact, here = self._is_exact_padded, longest
        if any(rope_limit(inner_model(network).config) for network in self._kinds):
            longest = _largest_anywhere(longest, self._kinds[0])
            exact = exact and not any(_crosses_rope(network, longest) for network in self._kinds)
        limit = self._first_boundary
        # Rows one by one take many calls: then all processes have to pack, or none.
        packs = limit is None or (exact and here <= limit)
        if packable and self._packs and packs:
            return Layout.PACKED
        return Layout.PADDED if exact else Layout.ONE_BY_ONE


def _lengths_up_to(longest: int, limits: Sequence[int]) -> list[int]:
    """One number of tokens between each two of the limits, up to `longest`."""
    return [*(limit for limit in limits if limit < longest), longest]


def _largest_anywhere(longest: int, network: Network) -> int:
    """The largest of what the processes give."""
    if not torch.distributed.is_initialized():
        return longest
    largest = torch.tensor(longest, device=inner_model(network).device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return int(largest)


def _different(networks: Iterable[Network]) -> list[Network]:
    """Without those that compute what one before them does with other weights: pi_init as a copy of the policy."""
    kept: dict[tuple[Any, ...], Network] = {}
    for network in networks:
        base = inner_model(network)
        kind = (type(base), base.dtype, base.config._attn_implementation, repr(base.config.to_dict()))
        kept.setdefault(kind, network)
    return list(kept.values())


def why_not_packed(network: Network, longest: int = LONG) -> str | None:
    """Why packed sequences of at most `longest` tokens would differ from the sequences alone; None if they do not."""
    if (reason := why_unsuitable(network, longest)) is not None:
        return reason
    if _crosses_rope(network, longest):
        return LONGEST_COUNTS
    trial = layout_trial(network, longest)
    if isinstance(trial, Exception):
        return f"could not be tried out: {trial}"
    if trial.not_packed is not None:
        return trial.not_packed
    if not trial.is_exact_packed:
        return "computes something else from a packed row"
    if (why := _launches_per_sequence(network, trial)) is None:
        return None
    if crosses_a_window(network, longest):
        return f"has layers with a window, whose mask each sequence of a packed row would need: {why}"
    text = f"attention of its packed rows takes a launch a sequence instead of one a layer: {why}"
    _warn_once((inner_model(network).config.model_type, "launches"), f"{type(inner_model(network)).__name__}: {text}")
    return None


def _launches_per_sequence(network: Network, trial: LayoutTrial) -> str | None:
    """Why launches may cost more than a packed row saves in tokens; None on a CPU, and with one launch a layer."""
    return trial.per_sequence if launches_cost(next(inner_model(network).parameters())) else None


def shares_prompts(network: Network, longest: int = LONG) -> bool:
    """Whether packed responses behind a prompt that is read once cost less than each row alone, and give the same.

    Not on a GPU where each response behind a shared prompt is several more kernel launches a layer, which may take
    longer than the tokens that they save.
    """
    trial = layout_trial(network, longest)
    if not isinstance(trial, LayoutTrial) or not trial.is_exact_shared:
        return False
    return _launches_per_sequence(network, trial) is None


def unpacked_layout(network: Network, longest: int = LONG) -> Layout:
    """The first layout, except packed, in which rows of at most `longest` tokens give the same as alone.

    If that is not the padded one a warning says so, once for each kind of model.
    """
    if _crosses_rope(network, longest):
        return _say(network, LONGEST_COUNTS, Layout.SEPARATE)
    trial = layout_trial(network, longest)
    if isinstance(trial, Exception) or trial.is_exact_padded:
        return Layout.PADDED
    why = f"gives other results for a padded batch than for each row alone, {_size(trial.padded)}"
    if not trial.has_padded_gradient:
        why = "has no finite gradient of a padded batch"
    return _say(network, why, Layout.SEPARATE if trial.is_exact_together else Layout.ONE_BY_ONE)


def check_repeatable(network: Network) -> None:
    """Raise ValueError if a network gives different results for the same tokens."""
    trial = layout_trial(network, LONG)
    if isinstance(trial, LayoutTrial) and not trial.is_repeatable:
        raise ValueError(
            f"{type(inner_model(network)).__name__} is random even in eval mode: the same tokens give different "
            "results, "
            f"{_size(trial.repeated)}. The log-ratio to pi_init would be noise"
        )


def layout_trial(network: Network, longest: int) -> LayoutTrial | Exception:
    """`trials.try_layouts`, once for a network and rows that cross the same boundaries of its config."""
    return _tried("layouts", network, longest, lambda: try_layouts(network, longest))


def sampling_trial(model: Network, longest: int) -> SamplingTrial | Exception:
    """`try_sampling`, once for a model and rows that cross the same boundaries of its config."""
    return _tried("sampling", model, longest, lambda: try_sampling(model, longest))


def _tried(kind: str, network: Network, longest: int, work: Callable[[], T]) -> T | Exception:
    trial: T | Exception = once(kind, network, longest, work)
    if isinstance(trial, Exception):
        _say(network, f"could not be tried out ({trial})", Layout.PADDED)
    return trial


def _crosses_rope(network: Network, longest: int) -> bool:
    limit = rope_limit(inner_model(network).config)
    return limit is not None and longest > limit


def sampling_batches(
    model: Network, lengths: Sequence[int], longest: int, pads: bool = False
) -> tuple[list[list[int]], bool]:
    """Rows of a batch of prompts in the batches in which each is answered as it is alone, and whether to pad these.

    Args:
        model: a language model. If its weights are spread over processes all call this together.
        lengths: tokens of each prompt, from the shortest to the longest.
        longest: most tokens of a prompt and its response.
        pads: whether a batch is padded even if its prompts are equally long.
    """
    rows, sharded = list(range(len(lengths))), is_sharded(model)
    if len(rows) == 1 and not pads and not sharded:
        return [rows], False
    layout = _sampling_layout(model, longest)
    if layout is Layout.PADDED:
        return [rows], True
    if layout is Layout.ONE_BY_ONE or sharded:  # as many calls on every process
        return [[row] for row in rows], False
    return [list(group) for _, group in groupby(rows, key=lengths.__getitem__)], False


def try_sampling_up_to(model: Network, longest: int, joins: bool) -> None:
    """Make now what trials of sampling rows of up to so many tokens need; see `Layouts.try_up_to`.

    Args:
        model: a language model.
        longest: tokens.
        joins: whether there are more rows than are sampled at a time.
    """
    for length in _lengths_up_to(longest, boundaries(inner_model(model).config)):
        if not _crosses_rope(model, length):
            sampling_trial(model, length)
            if joins:
                rows_can_be_joined(model, length)


def _sampling_layout(model: Network, longest: int) -> Layout:
    if sharded := is_sharded(model):
        longest = _largest_anywhere(longest, model)
    if _crosses_rope(model, longest):
        return _say(model, LONGEST_COUNTS, Layout.SEPARATE)
    trial = sampling_trial(model, LONG if sharded else longest)
    if isinstance(trial, Exception) or trial.is_exact_batched:
        return Layout.PADDED
    if not trial.is_exact_together:
        why = f"answers two prompts in a batch differently from each prompt alone, {_size(trial.together)}"
        return _say(model, why, Layout.ONE_BY_ONE)
    why = f"answers a padded batch of prompts differently from each prompt alone, {_size(trial.batched)}"
    return _say(model, why, Layout.SEPARATE)


def cache_is_exact(model: Network, longest: int) -> bool:
    """Whether tokens that are sampled with a cache come from what the forward pass of the finished row says.

    If not, a warning says so, once for each kind of model; responses are to be sampled without a cache then.

    Args:
        model: a language model. If its weights are spread over processes all call this together.
        longest: most tokens of a prompt and its response.
    """
    if _crosses_rope(model, longest):
        return True  # the finished row is read with other frequencies than its beginning, with a cache or without
    trial = sampling_trial(model, LONG if is_sharded(model) else longest)
    if isinstance(trial, Exception) or trial.is_exact_cached:
        return True
    base = inner_model(model)
    why = f"gives other results with its cache than without, {_size(trial.cached)}: no cache is used"
    _warn_once((base.config.model_type, "cache"), f"{type(base).__name__} {why}")
    return False


def rows_can_be_selected(model: Network, longest: int) -> bool:
    """Whether a row continues as before when it is chosen from the cache, once or more often, and others are deleted.

    Args:
        model: a language model.
        longest: most tokens of a prompt and its response.
    """
    if is_sharded(model) or inner_model(model).config.is_encoder_decoder or _crosses_rope(model, longest):
        return False
    if inner_model(model).device.type == "mps":  # where `generate` may take back its last step
        return False
    trial = sampling_trial(model, longest)
    return not isinstance(trial, Exception) and trial.is_exact_selected


def rows_can_be_joined(model: Network, longest: int) -> bool:
    """Whether rows continue as before when others, which begin later, are put beside them in the cache.

    Args:
        model: a language model.
        longest: most tokens of a prompt and its response.
    """
    if not rows_can_be_selected(model, longest):
        return False
    joined: Difference | Exception = once("joining", model, longest, lambda: try_joining(model, longest))
    trial = sampling_trial(model, longest)
    if isinstance(joined, Exception) or isinstance(trial, Exception):
        return False
    return joined.relative <= trial.allowed


def readable_batches(
    read: Callable[[list[Tensor]], Tensor], network: Network, sequences: Sequence[Tensor]
) -> list[list[int]]:
    """Split sequences into batches in which `read` gives the same results as for each sequence alone.

    Args:
        read: pads sequences and returns a network's results, `(B, K)`; it is tried like the layouts.
        network: what reads them. If its weights are spread over processes all call this together.
        sequences: 1-D token ids.
    """
    rows, sharded = list(range(len(sequences))), is_sharded(network)
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths)
    if sharded:
        longest = _largest_anywhere(longest, network)
    elif min(lengths) == longest:
        return [rows]
    if _reads_padded(read, network, longest):
        return [rows]
    if sharded:  # as many calls on every process
        return [[row] for row in rows]
    by_length = sorted(rows, key=lengths.__getitem__)
    return [list(group) for _, group in groupby(by_length, key=lengths.__getitem__)]


def _reads_padded(read: Callable[[list[Tensor]], Tensor], network: Network, longest: int) -> bool:
    if _crosses_rope(network, longest):
        _say(network, LONGEST_COUNTS, Layout.SEPARATE)
        return False
    longest = LONG if is_sharded(network) else longest
    trial = _tried(read.__qualname__, network, longest, lambda: try_reading(read, network, longest))
    if isinstance(trial, Exception) or trial.relative <= allowed_difference(inner_model(network)):
        return True
    _say(network, f"scores a padded batch differently from each row alone, {_size(trial)}", Layout.SEPARATE)
    return False


CONSEQUENCES = {
    Layout.PADDED: "batches are padded",
    Layout.SEPARATE: "rows are processed one by one, or batched by equal length",
    Layout.ONE_BY_ONE: "rows are processed one by one",
}
_SAID: set[tuple[str, str]] = set()


def _say(network: Network, why: str, layout: Layout) -> Layout:
    """One line for each kind of model and layout, however many networks there are; hands `layout` back."""
    base = inner_model(network)
    _warn_once((base.config.model_type, layout.value), f"{type(base).__name__} {why}: {CONSEQUENCES[layout]}")
    return layout


def _warn_once(key: tuple[str, str], text: str) -> None:
    if key not in _SAID:
        _SAID.add(key)
        warnings.warn(text, UserWarning, stacklevel=3)


def _size(difference: Difference) -> str:
    if difference.max_nats is None:
        return f"by {difference.relative:.1%} of its largest output"
    return f"by up to {difference.max_nats:.2g} nats a token"
