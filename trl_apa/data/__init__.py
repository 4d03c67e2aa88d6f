"""Data sets' columns to prompts, texts for supervised fine-tuning, and preference pairs."""

from trl_apa.data.hh import (
    ASSISTANT_TURN,
    HUMAN_TURN,
    STOP_STRINGS,
    opening,
    read_preferences,
    split_by_prompt,
)
from trl_apa.data.pairs import (
    Demonstration,
    Demonstrations,
    Preference,
    Preferences,
    preference_rows,
    prompts,
    sft_rows,
)
from trl_apa.data.sources import BadRow, load_table
from trl_apa.data.stack_exchange import answer_score, read_stack_exchange, stack_exchange_prompt
from trl_apa.data.tldr import cut_tldr_prompt, read_tldr_comparisons, read_tldr_demonstrations, tldr_prompt


__all__ = [
    "ASSISTANT_TURN",
    "HUMAN_TURN",
    "STOP_STRINGS",
    "BadRow",
    "Demonstration",
    "Demonstrations",
    "Preference",
    "Preferences",
    "answer_score",
    "cut_tldr_prompt",
    "load_table",
    "opening",
    "preference_rows",
    "prompts",
    "read_preferences",
    "read_stack_exchange",
    "read_tldr_comparisons",
    "read_tldr_demonstrations",
    "sft_rows",
    "split_by_prompt",
    "stack_exchange_prompt",
    "tldr_prompt",
]
