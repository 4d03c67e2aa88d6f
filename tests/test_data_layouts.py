"""TL;DR and StackExchange rows become prompts, demonstrations and pairs; rows that hold none are reported."""

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer
from trl_apa.commands.data_options import DataArguments
from trl_apa.commands.generate import answer_text
from trl_apa.commands.rows import demonstration, load_prompts, load_rows, preference
from trl_apa.data import (
    Demonstration,
    Preference,
    answer_score,
    cut_tldr_prompt,
    preference_rows,
    prompts,
    read_preferences,
    read_stack_exchange,
    read_tldr_comparisons,
    read_tldr_demonstrations,
    sft_rows,
    stack_exchange_prompt,
    tldr_prompt,
)


POST = "SUBREDDIT: r/tea\n\nTITLE: Milk first?\n\nPOST: I pour the milk first."


def jsonl(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


# ---- HH ----


def test_the_static_layout_of_hh_holds_the_same_pairs_as_the_raw_one(tmp_path):
    prompt = "\n\nHuman: Tea?\n\nAssistant:"
    raw = {"chosen": f"{prompt} Yes.", "rejected": f"{prompt} No."}
    static = {"prompt": prompt, "response": " Yes.", "chosen": " Yes.", "rejected": " No."}
    pairs = read_preferences(jsonl(tmp_path, raw, static)).pairs
    assert pairs == [Preference(prompt, " Yes.", " No.", row) for row in (1, 2)]


# ---- TL;DR ----


@pytest.mark.parametrize("ending", ["", "\nTL;DR:", "\nTL;DR: ", "\n\nTL;DR:\n"])
def test_every_prompt_ends_with_one_marker_on_a_line_of_its_own(ending):
    assert tldr_prompt(f"{POST}{ending}") == f"{POST}\nTL;DR:"


def test_demonstrations_and_comparisons_have_the_same_prompts_and_spacing(tmp_path):
    demonstration = {"prompt": f"{POST}\nTL;DR: ", "label": "Milk comes first."}
    comparison = {"prompt": POST, "chosen": "TL;DR:  Milk comes first.", "rejected": "TL;DR: Tea is hot.\n"}
    shown = read_tldr_demonstrations(jsonl(tmp_path, demonstration)).rows
    pairs = read_tldr_comparisons(jsonl(tmp_path, comparison)).pairs
    assert shown == [Demonstration(f"{POST}\nTL;DR:", " Milk comes first.", 1)]
    assert pairs == [Preference(f"{POST}\nTL;DR:", " Milk comes first.", " Tea is hot.", 1)]
    assert prompts(shown) == prompts(pairs) == [f"{POST}\nTL;DR:"]
    assert sft_rows(shown) == sft_rows(pairs) == [{"prompt": f"{POST}\nTL;DR:", "completion": " Milk comes first."}]
    assert preference_rows(pairs)[0]["rejected"] == " Tea is hot."


def test_bad_summaries_are_listed_with_number_and_reason(tmp_path):
    good = {"prompt": POST, "label": "x"}
    rows = [good, {**good, "label": "TL;DR: "}, "{", {"prompt": "TL;DR:", "label": "x"}, {"prompt": POST}, good]
    found = read_tldr_demonstrations(jsonl(tmp_path, *rows))
    assert [row.row for row in found.rows] == [1, 6]
    assert [(bad.row, bad.reason.partition(":")[0]) for bad in found.bad_rows] == [
        (2, "the label summary is empty"),
        (3, "not JSON"),
        (4, "the prompt is empty"),
        (5, "has no 'label' column"),
    ]
    assert "2 demonstrations, 4 bad rows" in found.report()
    with pytest.raises(ValueError, match="row 2: the label summary is empty"):
        read_tldr_demonstrations(jsonl(tmp_path, *rows), strict=True)
    same = {"prompt": POST, "chosen": "TL;DR: a", "rejected": "a"}
    with pytest.raises(ValueError, match=r"no preference pair found(.|\n)*1 x the two responses are the same"):
        read_tldr_comparisons(jsonl(tmp_path, same))
    with pytest.raises(ValueError, match=r"no summary found(.|\n)*1 x prompt is a list, expected a text"):
        read_tldr_demonstrations(jsonl(tmp_path, {"prompt": [], "label": "x"}))


def test_a_long_post_is_cut_at_its_end_and_the_marker_survives():
    tokenizer = byte_tokenizer()
    # A token a byte: of 40 tokens the marker and the line break before it take 7, and 33 are left for the post.
    cut = cut_tldr_prompt(f"{POST}\nTL;DR:", tokenizer, max_tokens=40)
    assert cut == f"{POST[:33].strip()}\nTL;DR:"
    assert len(tokenizer(cut)["input_ids"]) <= 40
    assert cut_tldr_prompt(POST, tokenizer, max_tokens=500) == f"{POST}\nTL;DR:"
    with pytest.raises(ValueError, match="max_tokens=7"):
        cut_tldr_prompt(POST, tokenizer, max_tokens=7)


# ---- StackExchange ----


@pytest.mark.parametrize(
    ("upvotes", "accepted", "score"),
    # log2(1 + 1) = 1; log2(3) = 1.58 and log2(5) = 2.32 are rounded to 2, log2(6) = 2.58 to 3; log2(1 + 1023) = 10
    [
        (-3, False, -1),
        (0, False, -1),
        (0, True, -1),
        (1, False, 1),
        (2, False, 2),
        (4, False, 2),
        (5, False, 3),
        (1023, False, 10),
        (1, True, 2),
        (5, True, 4),
    ],
)
def test_the_score_of_an_answer_hand_worked(upvotes, accepted, score):
    assert answer_score(upvotes, accepted) == score


@pytest.mark.parametrize("upvotes", [1.5, "3", None, True])
def test_votes_are_whole_numbers(upvotes):
    with pytest.raises(ValueError, match="expected a whole number"):
        answer_score(upvotes)


def test_paired_answers_become_prompts_demonstrations_and_pairs(tmp_path):
    row = {"question": "How?", "response_j": "So.", "response_k": "Not so.", "qid": 7}
    pairs = read_stack_exchange(jsonl(tmp_path, row, {**row, "response_k": "Or so."})).pairs
    assert pairs[0] == Preference("Question: How?\n\nAnswer:", " So.", " Not so.", 1)
    assert prompts(pairs) == [stack_exchange_prompt("How?")]
    assert sft_rows(pairs) == [{"prompt": "Question: How?\n\nAnswer:", "completion": " So."}]
    assert preference_rows(pairs)[1]["rejected"] == " Or so."


def test_the_tokens_of_prompt_and_answer_are_those_of_the_whole_text(tmp_path):
    """With a token a word and its space before it, as Llama's tokenizers have them; the answer keeps that space."""
    tokenizer = tokenizer_of_words("Question:", "How?\n\nAnswer:", "So", "it", "is.")
    (row,) = sft_rows(
        read_stack_exchange(
            jsonl(tmp_path, {"question": "How?", "response_j": "So it is.", "response_k": "No."})
        ).pairs
    )
    prompt, whole = (torch.tensor(tokenizer(text)["input_ids"]) for text in (row["prompt"], "".join(row.values())))
    assert whole[: len(prompt)].equal(prompt) and len(whole) == len(prompt) + 3
    ends_in_a_space = tokenizer(f"{row['prompt']} ")["input_ids"]
    assert whole[: len(ends_in_a_space)].tolist() != ends_in_a_space
    assert tokenizer.decode(whole[len(prompt) :]) == "So it is."
    assert answer_text(tokenizer, prompt, whole[len(prompt) :]) == " So it is."


def tokenizer_of_words(*words):
    vocabulary = {token: number for number, token in enumerate(["<unk>", "▁", *(f"▁{word}" for word in words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_voted_answers_become_pairs_of_different_scores(tmp_path):
    answers = [
        {"text": "unloved", "upvotes": -2},
        {"text": "liked", "upvotes": 3},
        {"text": "accepted", "upvotes": 1, "selected": True},
        {"text": "best", "upvotes": 30},
    ]
    # Scores -1, 2, 1 + 1 = 2 and 5: of six pairs one is a tie.
    path = jsonl(tmp_path, {"question": "How?", "answers": answers})
    pairs = [(pair.chosen.strip(), pair.rejected.strip()) for pair in read_stack_exchange(path).pairs]
    better = [("liked", "unloved"), ("accepted", "unloved"), ("best", "unloved"), ("best", "liked")]
    assert pairs == [*better, ("best", "accepted")]
    assert len(read_stack_exchange(path, max_pairs=2).pairs) == 2
    with pytest.raises(ValueError, match="max_pairs=0"):
        read_stack_exchange(path, max_pairs=0)


def test_scores_that_the_source_gives_are_taken(tmp_path):
    # as a table of the hub holds them
    answers = [{"text": "a", "pm_score": 1, "selected": False}, {"text": "b", "pm_score": 4, "selected": True}]
    path = tmp_path / "rows.parquet"
    Dataset.from_list([{"question": "How?", "answers": answers}]).to_parquet(path)
    assert read_stack_exchange(path).pairs == [Preference("Question: How?\n\nAnswer:", " b", " a", 1)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": " ", "response_j": "a", "response_k": "b"}, "the question is empty"),
        ({"question": "q", "response_j": "a"}, "has no 'response_k' column"),
        ({"question": "q", "response_j": "a", "response_k": "a"}, "the two responses are the same"),
        ({"question": "q", "response_j": "a", "response_k": 1}, "response_k is a int, expected a text"),
        ({"question": "q", "answers": "a"}, "answers is a str, expected a list"),
        ({"question": "q", "answers": ["a", "b"]}, "answer 1 is a str, expected an object"),
        ({"question": "q", "answers": [{"text": "a"}]}, "answer 1 has neither pm_score nor upvotes"),
        ({"question": "q", "answers": [{"text": "a", "upvotes": 0}]}, "has no two answers of different scores"),
        ({"question": "q", "answers": [{"text": "a", "upvotes": 0.5}]}, "expected a whole number"),
    ],
)
def test_bad_questions_are_listed_with_number_and_reason(tmp_path, row, reason):
    good = {"question": "q", "response_j": "a", "response_k": "b"}
    found = read_stack_exchange(jsonl(tmp_path, good, row, good))
    assert [pair.row for pair in found.pairs] == [1, 3]
    (bad,) = found.bad_rows
    assert bad.row == 2 and reason in bad.reason


# ---- the command line ----


def test_commands_read_both_layouts(tmp_path):
    questions = [
        {"question": "How?", "response_j": "So.", "response_k": "Not so."},
        {"question": "Why?", "answers": [{"text": text, "upvotes": n} for n, text in enumerate("abc")]},
        {"question": "When?"},
    ]
    arguments = DataArguments(str(jsonl(tmp_path, *questions)), dataset_layout="stack_exchange")
    asked = [f"Question: {word}?\n\nAnswer:" for word in ("How", "Why", "When")]
    assert load_prompts(arguments)["prompt"] == asked
    pairs = load_rows(arguments, preference)[0]
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [
        (" So.", " Not so."),
        (" b", " a"),
        (" c", " a"),
        (" c", " b"),
    ]
    posts = [{"prompt": POST, "label": "Milk."}, {"prompt": POST, "label": ""}]
    arguments = DataArguments(str(jsonl(tmp_path, *posts)), dataset_layout="tldr")
    assert list(load_rows(arguments, demonstration)[0]) == [{"prompt": f"{POST}\nTL;DR:", "completion": " Milk."}]
    compared = [{"prompt": POST, "chosen": "TL;DR: Milk.", "rejected": "TL;DR: Tea.", "batch": 4}, {"prompt": POST}]
    arguments = DataArguments(str(jsonl(tmp_path, *compared)), dataset_layout="tldr")
    assert [row["prompt"] for row in load_prompts(arguments)] == [f"{POST}\nTL;DR:"] * 2
    assert load_rows(arguments, preference)[0][0]["chosen"] == " Milk."
    with pytest.raises(ValueError, match="dataset_layout='reddit': it should be one of stack_exchange, tldr"):
        DataArguments(dataset_layout="reddit")


def test_a_row_that_does_not_fit_the_layout_is_left_out_and_counted(tmp_path, capsys):
    path = jsonl(tmp_path, {"question": "q", "response_j": "a", "response_k": "b"}, {"text": "x"}, "{")
    assert len(load_prompts(DataArguments(str(path), dataset_layout="stack_exchange"))) == 1
    assert "rows left out: 2: 1 x has no 'question' column (row 2); 1 x not JSON" in capsys.readouterr().err
