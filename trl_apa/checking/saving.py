"""Checks that a saved or merged policy gives the same results as in memory."""

import tempfile
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from trl_apa._trl import is_peft_model
from trl_apa.checking.report import Finding, compared, skipped
from trl_apa.checking.subject import Subject, moved, restore
from trl_apa.models import load_language_model, merge_and_save
from trl_apa.models.modes import make_repeatable
from trl_apa.models.network_parts import Network, inner_model
from trl_apa.models.policy_and_value import load_policy_and_value
from trl_apa.models.trials import Difference, difference


LOST = "a checkpoint of this model cannot be resumed or loaded: report this model"


def reloaded(subject: Subject) -> Iterator[Finding]:
    """Write moved weights, put the old ones back, and load: as a run is resumed, and as others load the model."""
    module = subject.module
    with tempfile.TemporaryDirectory() as folder, moved(module) as before:
        expected, values = subject.each_alone(), subject.values()
        module.save_pretrained(folder)
        restore(before)
        load_policy_and_value(module, folder)
        yield compared("saved and resumed", subject.difference(expected, subject.each_alone()), subject.allowed, LOST)
        if values is not None and (now := subject.values()) is not None:
            yield compared("values, saved and resumed", _of_values(values, now), subject.allowed, LOST)
        yield _loaded_anew(subject, folder, expected)


def _of_values(expected: Tensor, actual: Tensor) -> Difference:
    return difference([expected[:, :, None].flatten(0, 1)], [actual[:, :, None].flatten(0, 1)], None, exact=True)


def _loaded_anew(subject: Subject, folder: str, expected: list[Any]) -> Finding:
    name, policy = "saved and loaded anew", subject.policy
    if (why := _base_is_missing(policy)) is not None:
        return skipped(name, why)
    network = _like(load_language_model(folder, **_loading_options(policy)), policy)
    return compared(name, subject.difference(expected, subject.each_alone(network)), subject.allowed, LOST)


def merged(subject: Subject) -> Iterator[Finding]:
    """Compare a changed adapter merged into its base with the unmerged model."""
    name, policy = "adapter merged into its base", subject.policy
    if not is_peft_model(policy):
        yield skipped(name, "no adapter")
        return
    quantised = bool(getattr(inner_model(policy), "is_quantized", False))
    if quantised and (why := _base_is_missing(policy)) is not None:
        yield skipped(name, why)
        return
    with tempfile.TemporaryDirectory() as folder, moved(subject.module):
        expected = subject.each_alone()
        options = {"dtype": policy.dtype} if quantised else {}
        merge_and_save(policy, folder, **options)
        network = _like(load_language_model(folder, dtype=policy.dtype), policy)
        difference = subject.difference(expected, subject.each_alone(network))
    finding = compared(name, difference, subject.allowed, "use the adapter on its base, unmerged")
    if quantised:
        text = f"{finding.measured}: the adapter is merged into the unquantized base"
        yield Finding(name, None, text, finding.figures)
        return
    yield finding


def _base_is_missing(policy: Network) -> str | None:
    """Why the base of an adapter cannot be loaded; None if it can, or nothing has to be."""
    if not is_peft_model(policy):
        return None
    if policy.active_peft_config.base_model_name_or_path:
        return None
    return "not tried: the adapter does not say where its base is"


def _loading_options(policy: Network) -> dict[str, Any]:
    base = inner_model(policy)
    options: dict[str, Any] = {"dtype": policy.dtype, "attn_implementation": base.config._attn_implementation}
    if getattr(base, "is_quantized", False):
        options["quantization_config"] = base.config.quantization_config
        options["device_map"] = {"": policy.device}
    return options


def _like(network: Network, policy: Network) -> Network:
    """On the policy's device, without randomness."""
    if not getattr(inner_model(network), "is_quantized", False):
        network = network.to(policy.device)
    make_repeatable(network)
    return network
