"""Several data sets in place of one, as TRL's YAML files name them, and streams."""

import json
import os

import pytest
import yaml
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from trl import DatasetMixtureConfig, get_dataset
from trl.scripts.utils import DatasetConfig

from tests._cli import refused, run
from tests.test_cli import hh_rows, jsonl, make_model
from trl_apa.commands import offline, reward, sft, train_options
from trl_apa.commands.data_options import DataArguments
from trl_apa.commands.mixture import KEYS, READERS, entries_of, mixture_rows
from trl_apa.commands.rows import demonstration, load_rows, preference, prompts_by


COMMANDS = {"sft": sft, "reward": reward, "train": train_options, "offline": offline}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files of preferences, of which the second has a column more."""
    monkeypatch.chdir(tmp_path)
    rows = hh_rows(40)
    jsonl(tmp_path / "first.jsonl", rows[:10])
    jsonl(tmp_path / "second.jsonl", [{**row, "source": "b"} for row in rows[10:]])
    return tmp_path


def yaml_with(path, **options):
    path.write_text(yaml.safe_dump(options))
    return str(path)


def data_of(command, path):
    values = COMMANDS[command].make_parser().parse(["--config", path])
    return DataArguments(**{name: values[name] for name in DataArguments.__dataclass_fields__ if name in values})


def test_an_entry_has_what_trls_has():
    assert set(KEYS) == set(DatasetConfig.__dataclass_fields__)
    config = DatasetMixtureConfig.__dataclass_fields__
    assert config.keys() <= DataArguments.__dataclass_fields__.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mixture_of_trls_yaml_gives_the_rows_that_trl_reads(files, command):
    entries = [
        {"path": "json", "data_files": "first.jsonl", "split": "train[2:6]"},
        {"path": "json", "data_files": ["second.jsonl"], "columns": ["chosen", "rejected"]},
    ]
    data = data_of(command, yaml_with(files / "run.yaml", datasets=entries))
    rows, held_out = load_rows(data, preference)
    theirs = get_dataset(DatasetMixtureConfig(datasets=[DatasetConfig(**entry) for entry in entries]))["train"]
    assert len(rows) == 4 + 30 and held_out is None
    assert [row["prompt"] + row["chosen"] for row in rows] == theirs["chosen"]


def test_a_path_may_be_a_file_and_fractions_are_shares_of_the_mixture(files):
    (files / "table.csv").write_text("prompt,n\n" + "".join(f"What is {n}?,{n}\n" for n in range(8)))
    jsonl(files / "prompts.jsonl", [{"prompt": f"Is {n} even?"} for n in range(30)])
    # Largest mixture with 3 of 4 from the first without taking a row twice: 8 / 0.75 = 10.67 rows, of which
    # round(8.0) = 8 and round(2.67) = 3.
    entries = [{"path": "table.csv", "fraction": 0.6}, {"path": "prompts.jsonl", "fraction": 0.2}]
    data = data_of("train", yaml_with(files / "run.yaml", datasets=entries))
    rows, _ = load_rows(data, prompts_by(data))
    assert rows["prompt"] == [f"What is {n}?" for n in range(8)] + [f"Is {n} even?" for n in range(3)]
    assert rows["n"] == [*range(8), None, None, None]
    theirs = [{**entry, "path": "json", "data_files": "prompts.jsonl"} for entry in entries]
    theirs = get_dataset(DatasetMixtureConfig(datasets=[DatasetConfig(**entry) for entry in theirs]))["train"]
    ours = [row.fields for row in mixture_rows([{**entry, "path": "prompts.jsonl"} for entry in entries])]
    assert ours == list(theirs) and len(ours) == 30 + 10
    assert next(row.fields for row in mixture_rows(entries_of(["prompts.jsonl"]))) == {"prompt": "Is 0 even?"}


def prompts_file(path, text, count):
    jsonl(path, [{"prompt": text.format(number)} for number in range(count)])


def test_a_data_set_of_fraction_0_has_no_row(files):
    """As in TRL, where a line of a YAML file is switched off so."""
    shares = {"first": 0.5, "second": 0}
    entries = [{"path": "json", "data_files": f"{name}.jsonl", "fraction": share} for name, share in shares.items()]
    theirs = get_dataset(DatasetMixtureConfig(datasets=[DatasetConfig(**entry) for entry in entries]))["train"]
    ours = [row.fields for row in mixture_rows(entries)]
    assert [row["chosen"] for row in ours] == theirs["chosen"] and len(ours) == 10


@pytest.mark.parametrize("limit", [4, 8, 12])
def test_a_limit_keeps_the_shares_of_a_mixture(files, limit):
    """Those of the sizes, 10 and 30, or those asked for; at each place to less than a row of each data set."""
    prompts_file(files / "a.jsonl", "a {}", 10)
    prompts_file(files / "b.jsonl", "b {}", 30)
    for fractions, share in ((None, 1 / 4), ((1, 1), 1 / 2)):
        entries = [{"path": f"{name}.jsonl"} for name in "ab"]
        if fractions is not None:
            entries = [{**entry, "fraction": part} for entry, part in zip(entries, fractions, strict=True)]
        data = data_of("train", yaml_with(files / "run.yaml", datasets=entries, max_train_rows=limit))
        rows, _ = load_rows(data, prompts_by(data))
        of_a = [prompt for prompt in rows["prompt"] if prompt.startswith("a")]
        assert len(rows) == limit and abs(len(of_a) - share * limit) <= 0.5
        assert of_a == [f"a {number}" for number in range(len(of_a))]


def test_streams_take_turns_and_the_longer_one_goes_on(files, monkeypatch):
    from datasets import IterableDataset

    def load_dataset(path, streaming, **options):
        return IterableDataset.from_generator(
            lambda: ({"prompt": f"{path} {n}"} for n in range({"a/a": 2, "b/b": 9}[path]))
        )

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    options = {"datasets": ["a/a", "b/b"], "streaming": True, "max_train_rows": 7}
    data = data_of("train", yaml_with(files / "run.yaml", **options))
    rows, _ = load_rows(data, prompts_by(data))
    assert rows["prompt"] == ["a/a 0", "b/b 0", "a/a 1", "b/b 1", "b/b 2", "b/b 3", "b/b 4"]


def test_what_is_said_of_a_row_names_its_data_set(files, capsys):
    prompts_file(files / "a.jsonl", "a {}", 3)
    jsonl(files / "b.jsonl", [{"prompt": "b", "other": "b"}, {"prompt": None, "other": "b"}])
    data = data_of("train", yaml_with(files / "run.yaml", datasets=["a.jsonl", "b.jsonl"]))
    load_rows(data, prompts_by(data))
    assert "(row 2 of b.jsonl)" in capsys.readouterr().err


@pytest.mark.parametrize("files_of_it", ["a.jsonl", ["a.jsonl", "b.jsonl"], {"train": "a.jsonl", "test": ["b.jsonl"]}])
def test_a_reader_of_files_is_not_taken_for_the_name_of_a_data_set(files_of_it):
    entry = json.dumps({"path": "json", "data_files": files_of_it})
    data = DataArguments(datasets=[entry, "owner/name"], eval_dataset_name="held/out")
    names = "a.jsonl" if files_of_it == "a.jsonl" else "a.jsonl, b.jsonl"
    assert data.names == [names, "owner/name"]  # what is trained on, which a model card links
    assert set(READERS) <= _PACKAGED_DATASETS_MODULES.keys()


def test_the_test_split_is_held_out_by_prompt_and_is_the_same_in_every_command(files):
    path = yaml_with(
        files / "run.yaml",
        datasets=[{"path": "first.jsonl"}, "second.jsonl"],
        test_split_size=0.25,
        dataset_test_split="test",
    )
    parts = set()
    for command, convert in (("sft", demonstration), ("reward", preference)):
        rows, held_out = load_rows(data_of(command, path), convert)
        assert len(rows) + len(held_out) == 40 and 5 <= len(held_out) <= 15
        assert not set(rows["prompt"]) & set(held_out["prompt"])
        parts.add(frozenset(held_out["prompt"]))
    assert len(parts) == 1


@pytest.mark.parametrize("name", ["dataset_streaming", "streaming"])
def test_a_stream_is_read_as_far_as_it_is_needed(files, monkeypatch, name):
    read = []

    def load_dataset(path, streaming, **options):
        assert streaming

        def rows():
            for number in range(10**9):
                read.append(number)
                yield {"prompt": f"What is {number}?"}

        from datasets import IterableDataset

        return IterableDataset.from_generator(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = {"datasets": [{"path": "someone/many"}]} if name == "streaming" else {"dataset_name": "someone/many"}
    data = data_of("train", yaml_with(files / "run.yaml", **source, **{name: True}, max_train_rows=5))
    rows, _ = load_rows(data, prompts_by(data))
    assert rows["prompt"] == [f"What is {number}?" for number in range(5)] and max(read) < 20


STREAM = "--dataset_name a/b --dataset_streaming"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (STREAM, "dataset_streaming without max_train_rows: the rows of a run are read before it begins"),
        (f"{STREAM} --max_train_rows 9 --dataset_test_split test", "dataset_streaming without max_eval_rows"),
        (f"{STREAM} --max_train_rows 9 --eval_share 0.1", "eval_share with dataset_streaming: a share"),
        ("--datasets a --streaming --max_train_rows 9 --test_split_size 0.1", "test_split_size with streaming"),
        ("--datasets a --dataset_name b", "dataset_name='b' and datasets both say which rows are read"),
        ("--datasets a --dataset_streaming", "dataset_streaming=True and datasets both say"),
        ("--dataset_name a --streaming", "streaming=True is of datasets; of dataset_name it is dataset_streaming"),
        ("--dataset_name a --test_split_size 0.1", "test_split_size=0.1 is of datasets; of dataset_name it is eval_s"),
        ("--datasets a --test_split_size 1.5", "test_split_size=1.5: it should be between 0 and 1"),
        ("--datasets a --dataset_test_split test", "dataset_test_split='test' is of dataset_name"),
        ("--datasets a --eval_share 0.1 --test_split_size 0.1", "test_split_size and eval_share both set"),
        ("--datasets a --eval_dataset_name b --test_split_size 0.1", "eval_dataset_name and test_split_size both set"),
        ("--datasets not-there.jsonl", "path='not-there.jsonl': there is no such file"),
        ("--datasets first.jsonl broken.jsonl", "datasets: broken.jsonl cannot be read"),
        ("""--datasets '{"path": "first.jsonl", "columns": ["no"]}'""", "Column"),
        (
            """--datasets '{"path": "first.jsonl", "fraction": 0.5}' second.jsonl""",
            "1 of 2 datasets have a fraction: all should, or none",
        ),
        (
            """--datasets '{"path": "a", "fraction": 1}' --streaming --max_train_rows 9""",
            "fraction with streaming: how many rows a stream has is not known",
        ),
        ("""--datasets '{"pth": "a"}'""", "datasets, number 1: there is no 'pth'; did you mean 'path'?"),
        ("""--datasets '{"name": "a"}'""", "datasets, number 1 has no path"),
        (
            """--datasets a '{"path": "a", "fraction": -1}'""",
            "datasets, number 2: fraction=-1: it should be a number from",
        ),
        (
            """--datasets a '{"path": "a", "fraction": NaN}'""",
            "datasets, number 2: fraction=nan: it should be a number f",
        ),
        (
            """--datasets '{"path": "first.jsonl", "fraction": 0}'""",
            "every fraction is 0: at least one data set should",
        ),
        ("""--datasets '{"path": "a", "columns": "b"}'""", "columns='b' should be a list"),
        ("""--datasets '{"path": '""", "datasets, number 1 is not JSON"),
    ],
)
def test_what_cannot_be_is_refused_and_says_why(files, capsys, options, problem):
    import shlex

    (files / "broken.jsonl").write_text("{\n")
    make_model(files / "model")
    arguments = [*shlex.split(options), "--model_name_or_path", "model", "--output_dir", "out", "--use_cpu"]
    assert problem in refused(capsys, "sft", *arguments)


def test_variables_under_env_are_set(files, monkeypatch, capsys):
    monkeypatch.setenv("OF_A_RUN", "before")
    monkeypatch.delenv("OF_ANOTHER", raising=False)
    path = yaml_with(files / "run.yaml", env={"OF_A_RUN": 1, "OF_ANOTHER": "x"}, seed=3)
    assert train_options.make_parser().parse(["--config", path])["seed"] == 3
    assert (os.environ["OF_A_RUN"], os.environ.pop("OF_ANOTHER")) == ("1", "x")
    path = yaml_with(files / "run.yaml", env=["A=1"])
    assert "env should hold variables" in refused(capsys, "train", "--config", path)


SMALL = {"model_name_or_path": "model", "max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none"}
OF_COMMAND = {
    "sft": {},
    "reward": {},
    "train": {"batch_size": 8, "max_completion_length": 4, "reward_funcs": "mixture_rewards.brevity"},
    "offline": {"reward_funcs": "mixture_rewards.brevity", "max_completion_length": 4, "value_epochs": 1},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_on_a_mixture(files, command):
    make_model(files / "model")
    (files / "mixture_rewards.py").write_text(
        "def brevity(completions, **columns):\n    return [-len(text) for text in completions]\n"
    )
    options = {**SMALL, **OF_COMMAND[command], "output_dir": f"out-{command}", "use_cpu": True}
    datasets = [{"path": "first.jsonl"}, {"path": "json", "data_files": "second.jsonl", "split": "train[:6]"}]
    path = yaml_with(files / "run.yaml", **options, datasets=datasets, test_split_size=0.25)
    assert run(command, "--config", path) == 0
    state = json.loads((files / f"out-{command}" / "trainer_state.json").read_text())
    assert state["global_step"] == 1


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_rows_that_trls_trainer_leaves_out_are_counted(files, capsys, command):
    """Of eight rows, two have a prompt that leaves no room."""
    make_model(files / "model")
    rows = [{"prompt": "p" * (60 if n < 2 else 3), "chosen": f" yes {n}", "rejected": f" no {n}"} for n in range(8)]
    jsonl(files / "rows.jsonl", rows)
    options = "--model_name_or_path model --dataset_name rows.jsonl --max_steps 1 --per_device_train_batch_size 2"
    options += " --max_length 40 --output_dir out --use_cpu --report_to none"
    assert run(command, *options.split()) == 0
    why = "no token to learn within max_length=40" if command == "sft" else "more than max_length=40 tokens"
    assert f"2 of 8 rows to train on are left out: {why}" in capsys.readouterr().out
