"""The cache of keys and values by its name in transformers: `past_key_values`, or `cache` in newer versions."""

from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast


# The argument of `generate`.
CACHE_ARGUMENT = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def cache_of(output: Any) -> Any:
    """The cache in what a network or `generate` returns, of which some keep the old name; None if there is none."""
    return getattr(output, CACHE_ARGUMENT if hasattr(output, CACHE_ARGUMENT) else "past_key_values", None)
