"""Data sets' columns to prompts, texts for supervised fine-tuning, and preference pairs."""

from trl_apa.data.hh import (
    ASSISTANT_TURN,
    HUMAN_TURN,
    STOP_STRINGS,
    BadRow,
    Preference,
    Preferences,
    opening,
    preference_rows,
    prompts,
    read_preferences,
    sft_rows,
    split_by_prompt,
)
from trl_apa.data.sources import load_table


__all__ = [
    "ASSISTANT_TURN",
    "HUMAN_TURN",
    "STOP_STRINGS",
    "BadRow",
    "Preference",
    "Preferences",
    "load_table",
    "opening",
    "preference_rows",
    "prompts",
    "read_preferences",
    "sft_rows",
    "split_by_prompt",
]
