"""Generation without the defaults that a model brings along."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import GenerationConfig

from trl_apa._trl import is_peft_model
from trl_apa.models.network_parts import Network


@contextmanager
def neutral_generation_config(model: Network) -> Iterator[None]:
    """Inside, `generate` ignores the model's own generation defaults."""
    owners = [model, model.get_base_model()] if is_peft_model(model) else [model]
    saved = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in zip(owners, saved, strict=True):
            owner.generation_config = config
