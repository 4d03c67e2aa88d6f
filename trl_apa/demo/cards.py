"""The model cards of the demo: what it measured before and after, and its options."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl_apa.cards import Card, Figure, write_card
from trl_apa.cards.papers import papers_of
from trl_apa.trainer.tracker_failures import warn_if_report_fails


LANGUAGE_MODEL = Card(
    name="",
    what="",
    imports=["from transformers import AutoModelForCausalLM, AutoTokenizer"],
    loading="model = AutoModelForCausalLM.from_pretrained(folder)\ntokenizer = AutoTokenizer.from_pretrained(folder)",
    task="text-generation",
    tags=["trl", "apa", "rlhf"],
)
ADAPTER = replace(
    LANGUAGE_MODEL,
    imports=["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"],
    loading=LANGUAGE_MODEL.loading.replace("AutoModel", "AutoPeftModel"),
    library="peft",
)
REWARD_MODEL = replace(
    LANGUAGE_MODEL,
    imports=["from transformers import AutoModelForSequenceClassification, AutoTokenizer"],
    loading=LANGUAGE_MODEL.loading.replace("CausalLM", "SequenceClassification"),
    task="text-classification",
)
WITH_VALUES = """
# To train on: APATrainer(..., value_model=value_model)
value_model = ValueModel.from_pretrained(f"{folder}/value_model")"""


def policy_card(
    kind: Card, result: Mapping[str, Any], metrics: Sequence[tuple[str, str, str, str]], has_values: bool
) -> Card:
    """Of the aligned policy.

    Args:
        kind: how it is loaded.
        result: with the `options`, and the metrics `before` and `after`.
        metrics: of each, its name, its heading in a table, its meaning, and its format.
        has_values: whether a value model lies beside it.
    """
    loss_type = result["options"]["loss_type"]
    figures = [
        Figure(meaning, form.format(result["before"][name]), form.format(result["after"][name]))
        for name, _, meaning, form in metrics
    ]
    return replace(
        kind,
        name=f"trl-apa demo, {loss_type.upper()}",
        what=f"A small language model that `trl-apa demo` aligned with {loss_type.upper()}, as an example, of no "
        "other use. The figures are of answers to held-out questions, before and after.",
        imports=[*kind.imports, *(["from trl_apa import ValueModel"] if has_values else [])],
        loading=kind.loading + (WITH_VALUES if has_values else ""),
        options=result["options"],
        figures=figures,
        papers=papers_of(loss_type),
    )


def write_cards(folder: Path, cards: Mapping[str, Card]) -> None:
    """Each into the folder of its name below `folder`; what cannot be written is a warning."""
    for name, card in cards.items():
        with warn_if_report_fails(None, f"writing the model card of {name}"):
            write_card(card, folder / name)


def supervised_cards(result: Mapping[str, Any], metrics: Sequence[tuple[str, str, str, str]]) -> dict[str, Card]:
    """Of the fine-tuned model and of the reward model; arguments as of `policy_card`."""
    made = {"options": result["options"], "papers": papers_of("apa")}
    tuned = [Figure(meaning, "", form.format(result["before"][name])) for name, _, meaning, form in metrics]
    agreement = [
        Figure(f"share of pairs: {name.replace('_', ' ')}", "", f"{value:.3f}")
        for name, value in result["reward_model"].items()
    ]
    what = {
        "sft_model": "The small language model that `trl-apa demo` fine-tunes on answers of mixed quality, before it "
        "is aligned. The figures are of its answers to held-out questions.",
        "reward_model": "The reward model of `trl-apa demo`: it scores a question with its answer by one number, "
        "fitted to noisy preferences.",
    }
    return {
        "sft_model": replace(
            LANGUAGE_MODEL, name="trl-apa demo, fine-tuned", what=what["sft_model"], figures=tuned, **made
        ),
        "reward_model": replace(
            REWARD_MODEL, name="trl-apa demo, reward model", what=what["reward_model"], figures=agreement, **made
        ),
    }
