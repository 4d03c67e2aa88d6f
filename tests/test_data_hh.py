"""Rows in both layouts, in every kind of file, become pairs; rows that are none are reported by number and reason."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from trl_apa.data import (
    Preference,
    opening,
    preference_rows,
    prompts,
    read_preferences,
    sft_rows,
    split_by_prompt,
)
from trl_apa.data.sources import is_local, load_table


REAL_FILE = Path(__file__).parents[2] / "shared" / "data" / "hh-harmless-base-test.jsonl.gz"

PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant:"
GOOD = {"chosen": PROMPT + " Yes, please.", "rejected": PROMPT + " No."}
PAIR = Preference(PROMPT, " Yes, please.", " No.", 1)


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(tmp_path: Path, *rows, **options):
    return read_preferences(write_lines(tmp_path / "rows.jsonl", list(rows)), **options)


def test_dialogues_split_at_the_last_assistant_turn(tmp_path):
    preferences = read_rows(tmp_path, GOOD)
    assert preferences.pairs == [PAIR]
    assert PAIR.prompt + PAIR.chosen == GOOD["chosen"]
    assert preferences.bad_rows == []


def test_columns_of_strings_are_taken_as_they_are(tmp_path):
    row = {"prompt": "POST: hi\nTL;DR:", "chosen": " short", "rejected": "long", "other": 3}
    assert read_rows(tmp_path, row).pairs == [Preference("POST: hi\nTL;DR:", " short", "long", 1)]


@pytest.mark.parametrize("layout", ["prompt", "no prompt", "text prompt", "text prompt beside conversations"])
def test_chat_messages_become_hh_turns(tmp_path, layout):
    context = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Tea?"},
    ]
    yes, no = ({"role": "assistant", "content": text} for text in ("Yes, please.", "No."))
    expected = PAIR
    if layout == "prompt":
        row = {"prompt": context, "chosen": [yes], "rejected": [no]}
    elif layout == "no prompt":
        row = {"chosen": [*context, yes], "rejected": [*context, no]}
    elif layout == "text prompt":
        row = {"prompt": "Tea?", "chosen": [yes], "rejected": [no]}
        expected = PAIR._replace(prompt="\n\nHuman: Tea?\n\nAssistant:")
    else:
        row = {"prompt": "Hi", "chosen": [*context, yes], "rejected": [*context, no]}
    assert read_rows(tmp_path, row).pairs == [expected]


class ChatTokenizer:
    """As much of a tokenizer as writing messages takes."""

    chat_template = "given"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        assert not tokenize and add_generation_prompt
        if messages[0]["role"] == "system":
            from jinja2 import TemplateError

            raise TemplateError("no system turn")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>"


def test_chat_messages_are_written_with_a_chat_template(tmp_path):
    yes, no = ([{"role": "assistant", "content": text}] for text in ("Yes", "No"))
    good = {"prompt": [{"role": "user", "content": "Tea?"}], "chosen": yes, "rejected": no}
    refused = {"prompt": [{"role": "system", "content": "Be brief"}, *good["prompt"]], "chosen": yes, "rejected": no}
    preferences = read_rows(tmp_path, good, refused, GOOD, chat_tokenizer=ChatTokenizer())
    assert preferences.pairs[0] == Preference("<user>Tea?<assistant>", "Yes", "No", 1)
    assert preferences.pairs[1] == PAIR._replace(row=3)
    assert preferences.bad_rows == [(2, "the chat template refuses the prompt: no system turn")]


def message(role, content):
    return {"role": role, "content": content}


BAD_ROWS = [
    ("{not json", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[1, 2]", "a list, expected an object"),
    ({"chosen": GOOD["chosen"]}, "has no 'rejected' column"),
    ({"text": "x"}, "has no 'chosen' column"),
    ({"chosen": None, "rejected": "x"}, "has no 'chosen' column"),
    ({"chosen": 5, "rejected": GOOD["rejected"]}, "chosen is a int, expected a text"),
    ({"chosen": "no turns", "rejected": GOOD["rejected"]}, "chosen: has no '\\n\\nAssistant:' turn"),
    ({**GOOD, "rejected": PROMPT + " No.\n\nHuman: Why?"}, "rejected: ends with a human turn"),
    ({**GOOD, "rejected": "\n\nHuman: Tea!\n\nAssistant: No."}, "the prompts of chosen and rejected differ"),
    ({**GOOD, "chosen": PROMPT + " "}, "the chosen response is empty"),
    ({**GOOD, "rejected": PROMPT}, "the rejected response is empty"),
    ({**GOOD, "rejected": GOOD["chosen"]}, "the two responses are the same"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
    ({"prompt": ["a"], "chosen": "a", "rejected": "b"}, "prompt is a list, expected a text"),
    ({"prompt": 1, "chosen": [{}], "rejected": [{}]}, "prompt is a int, expected a text or a list of messages"),
    ({"prompt": "a", "chosen": [message("assistant", 1)], "rejected": [message("assistant", "b")]}, "no object with"),
    ({"prompt": "a", "chosen": [message("tool", "a")], "rejected": [message("assistant", "b")]}, "the role 'tool'"),
    ({"prompt": "a", "chosen": [message("user", "a")], "rejected": [message("user", "b")]}, "ends with an assistant"),
    ({"prompt": "a", "chosen": [], "rejected": []}, "ends with an assistant"),
    ({"prompt": "a", "chosen": [message("assistant", "")], "rejected": [message("assistant", "b")]}, "is empty"),
    (
        {
            "chosen": [message("user", "a"), message("assistant", "b")],
            "rejected": [message("user", "c"), message("assistant", "d")],
        },
        "the prompts of chosen and rejected differ",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_bad_rows_are_listed_with_number_and_reason(tmp_path, row, reason):
    preferences = read_rows(tmp_path, GOOD, row, GOOD)
    assert [pair.row for pair in preferences.pairs] == [1, 3]
    (bad,) = preferences.bad_rows
    assert bad.row == 2
    assert reason in bad.reason
    with pytest.raises(ValueError, match="row 2: ") as raised:
        read_rows(tmp_path, GOOD, row, GOOD, strict=True)
    assert reason in str(raised.value)


def test_report_counts_each_reason_and_names_the_first_rows(tmp_path):
    empty = {**GOOD, "chosen": PROMPT}
    report = read_rows(tmp_path, empty, empty, GOOD, "{", empty, empty).report(examples=2)
    assert "1 preference pairs, 5 bad rows" in report
    assert "4 x the chosen response is empty (row 1, 2, ...)" in report
    assert "1 x not JSON" in report and "(row 4)" in report


def test_row_numbers_are_line_numbers_and_blank_lines_are_no_rows(tmp_path):
    preferences = read_rows(tmp_path, GOOD, "", "  ", GOOD)
    assert [pair.row for pair in preferences.pairs] == [1, 4]
    assert preferences.bad_rows == []


def test_no_pair_at_all_is_an_error_that_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"no preference pair found(.|\n)*2 x has no 'chosen' column"):
        read_rows(tmp_path, {"text": "a"}, {"text": "b"})


def write_as(path: Path, rows: list[dict]) -> Path:
    if path.name.endswith(".jsonl"):
        return write_lines(path, rows)
    if path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
        return path
    lines = path.name.endswith(".jsonl.gz")
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_same(tmp_path, name):
    empty = {**GOOD, "chosen": PROMPT}
    preferences = read_preferences(write_as(tmp_path / name, [GOOD, empty, GOOD]))
    assert preferences.pairs == [PAIR, PAIR._replace(row=3)]
    assert preferences.bad_rows == [(2, "the chosen response is empty")]


def test_a_folder_of_files_is_read_by_datasets(tmp_path):
    write_as(tmp_path / "test.parquet", [GOOD])
    assert read_preferences(tmp_path, split="test").pairs == [PAIR]


def test_limit_counts_rows(tmp_path):
    assert len(read_rows(tmp_path, GOOD, GOOD, GOOD, limit=2).pairs) == 2
    with pytest.raises(ValueError, match="limit=0"):
        read_rows(tmp_path, GOOD, limit=0)


def test_files_that_cannot_be_read_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        read_preferences(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=r"rows\.parquet"):
        read_preferences("rows.parquet")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"expected one of \.jsonl"):
        read_preferences(tmp_path / "a.txt")
    (tmp_path / "a.json").write_text('{"chosen": "x"}')
    with pytest.raises(ValueError, match="holds a dict, expected a list"):
        read_preferences(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"chosen": "x"}\n{"chosen": "y"}\n')
    with pytest.raises(ValueError, match=r"belong in a \.jsonl file"):
        read_preferences(tmp_path / "b.json")
    whole = gzip.compress("".join(json.dumps({**GOOD, "n": n}) + "\n" for n in range(2000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete gzip file"):
        read_preferences(tmp_path / "a.jsonl.gz")


def test_paths_and_hub_names_are_told_apart(tmp_path):
    assert is_local(tmp_path) and is_local(str(tmp_path)) and is_local("../data") and is_local("some.jsonl.gz")
    assert not is_local("Anthropic/hh-rlhf")


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.csv.gz", "rows.parquet"]
)
def test_a_file_of_every_kind_becomes_the_same_table(tmp_path, name):
    table = Dataset.from_dict({"question": ["a", 'b, "c"', "d\ne"], "votes": [1, 2, 3]})
    path = tmp_path / name
    write = {"csv": table.to_csv, "parquet": table.to_parquet}
    plain = str(path).removesuffix(".gz")
    if ".json" in name:
        table.to_json(plain, lines=".jsonl" in name)
    else:
        write[plain.rsplit(".", 1)[1]](plain)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(Path(plain).read_bytes()))
    loaded = load_table(str(path), data_dir="of/a/hub/name", verification_mode="no_checks")
    assert loaded.to_dict() == table.to_dict()


def test_a_folder_and_a_hub_name_are_loaded_as_a_table(tmp_path, monkeypatch):
    table = Dataset.from_dict({"question": ["a", "b"]})
    table.to_parquet(str(tmp_path / "train.parquet"))
    assert load_table(tmp_path).to_dict() == table.to_dict()
    asked = {}
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: asked.update({"args": args, **kwargs}))
    load_table("lvwerra/stack-exchange-paired", data_dir="data/rl", split="test", streaming=True)
    expected = {"name": None, "data_dir": "data/rl", "split": "test", "streaming": True}
    assert asked == {"args": ("lvwerra/stack-exchange-paired",), **expected}


def test_a_table_that_is_not_there_or_of_no_known_kind_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.csv"):
        load_table(tmp_path / "no.csv")
    (tmp_path / "rows.xls").touch()
    with pytest.raises(ValueError, match=r"rows\.xls.*expected one of \.jsonl.*\.csv"):
        load_table(tmp_path / "rows.xls")


def make_pairs(count: int, rows_each: int = 3) -> list[Preference]:
    """`count` dialogues, each with `rows_each` rows that grew out of it."""
    pairs = []
    for number in range(count):
        prompt = f"\n\nHuman: Question {number}"
        for turn in range(rows_each):
            prompt += f"\n\nAssistant: {turn}\n\nHuman: And?"
            pairs.append(Preference(prompt + "\n\nAssistant:", " yes", " no", len(pairs) + 1))
    return pairs


def test_split_keeps_dialogues_together_and_loses_nothing():
    pairs = make_pairs(100)
    parts = split_by_prompt(pairs, {"held_out": 0.2, "sft": 0.3, "rl": 0.5}, seed=1)
    assert sorted(pair for part in parts.values() for pair in part) == sorted(pairs)
    openings = {name: {opening(pair.prompt) for pair in part} for name, part in parts.items()}
    assert not openings["held_out"] & openings["sft"]
    assert not openings["held_out"] & openings["rl"]
    assert not openings["sft"] & openings["rl"]
    # Dialogues of 3 rows: 0.2 * 300 = 60 and 0.3 * 300 = 90 are multiples of 3, so the shares are met exactly.
    assert {name: len(part) for name, part in parts.items()} == {"held_out": 60, "sft": 90, "rl": 150}


def test_split_follows_from_the_seed():
    pairs = make_pairs(50)
    shares = {"a": 0.5, "b": 0.5}
    assert split_by_prompt(pairs, shares, seed=3) == split_by_prompt(pairs, shares, seed=3)
    assert split_by_prompt(pairs, shares, seed=3) != split_by_prompt(pairs, shares, seed=4)


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 0.0, "b": 1.0}])
def test_shares_that_are_none(shares):
    with pytest.raises(ValueError, match="add up to 1"):
        split_by_prompt(make_pairs(5), shares)


def test_too_few_dialogues_for_the_parts():
    with pytest.raises(ValueError, match="nothing for b"):
        split_by_prompt(make_pairs(1), {"a": 0.5, "b": 0.5})


def test_rows_for_trl():
    pairs = [PAIR, PAIR._replace(rejected=" Never."), PAIR._replace(prompt="\n\nHuman: Milk?\n\nAssistant:")]
    assert prompts(pairs) == [PROMPT, "\n\nHuman: Milk?\n\nAssistant:"]
    assert sft_rows(pairs)[0] == {"prompt": PROMPT, "completion": " Yes, please."}
    assert len(sft_rows(pairs)) == 2
    assert preference_rows(pairs)[1] == {"prompt": PROMPT, "chosen": " Yes, please.", "rejected": " Never."}
    assert len(preference_rows(pairs)) == 3


def test_importing_the_data_layer_imports_no_model_library():
    code = "import sys, trl_apa.data; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'trl')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


@pytest.mark.skipif(not REAL_FILE.exists(), reason="the file of real preferences is not beside this checkout")
def test_real_preferences():
    preferences = read_preferences(REAL_FILE)
    # Counted by hand in the file: 4 rows whose preferred response is a blank, 5 whose prompts differ.
    assert len(preferences.pairs) + len(preferences.bad_rows) == 2312
    assert [bad.row for bad in preferences.bad_rows if "empty" in bad.reason] == [87, 517, 926, 1104]
    assert [bad.row for bad in preferences.bad_rows if "differ" in bad.reason] == [1255, 1689, 1951, 1953, 2037]
    assert len(preferences.bad_rows) == 9
    parts = split_by_prompt(preferences.pairs, {"held_out": 0.15, "training": 0.85})
    held_out = {opening(pair.prompt) for pair in parts["held_out"]}
    assert not held_out & {opening(pair.prompt) for pair in parts["training"]}
