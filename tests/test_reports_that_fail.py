"""A report that cannot be written or sent is one warning, and the run is the one that it would have been without."""

import json
import os
import resource
import signal
import sys
import warnings
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from accelerate import Accelerator
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback

from reproduction.drawing import draw_figure
from reproduction.drawing_win_rates import draw_win_rates
from reproduction.win_rates import WinRates
from tests.test_reporting import (
    CometStandIn,
    failures,
    report_twice,
    table_of,
    texts,
    wandb_offline,  # noqa: F401
)
from tests.test_training import PROMPTS, few_nines, parameters, trainer_for
from tests.test_update import assert_same
from tests.tiny import tiny_rollouts, tiny_trainer
from trl_apa.commands.progress import ProgressLines
from trl_apa.demo.options import DemoOptions
from trl_apa.demo.pipeline import save
from trl_apa.offline import OfflineAPATrainer, OfflineConfig
from trl_apa.trainer.reporting import Table, gather_table, save_table, show_table, split_statistics


# Two iterations of one optimizer step.
SHORT = {"max_steps": 2, "ppo_epochs": 1, "mini_batch_size": 4, "disable_tqdm": True}
LOGGED = {"log_completions": True, "num_completions_to_print": 2, **SHORT}
TABLE = Table(["prompt", "completion", "reward"], [["w2", "w3", 0.5]])


@pytest.fixture(scope="module")
def without_reports(tmp_path_factory):
    trainer = trainer_for(tmp_path_factory.mktemp("plain"), **SHORT)
    trainer.train()
    return parameters(trainer)


@contextmanager
def recorded():
    """The warnings of reports that failed, as texts."""
    messages = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += failures(caught)


# ---- completions ----


def test_everything_arrives_and_nobody_is_warned(wandb_offline, without_reports, capsys):  # noqa: F811
    with recorded() as warned:
        trainer = trainer_for(wandb_offline, report_to=["wandb", "tensorboard"], **LOGGED)
        trainer.train()
    assert warned == []
    assert_same(parameters(trainer), without_reports, tolerance=1e-30)
    printed = capsys.readouterr().out
    assert "Step 0" in printed and "Step 1" in printed
    files = sorted((wandb_offline / "completions").iterdir())
    assert [file.name for file in files] == ["completions_000000.parquet", "completions_000001.parquet"]
    table = Dataset.from_parquet(str(files[1]), cache_dir=wandb_offline / "cache")
    columns, rows = table_of(wandb.run)
    assert columns == table.column_names and rows == [list(row.values()) for row in table]
    (path,) = (wandb_offline / "runs").glob("*/events*")
    events = EventAccumulator(str(path)).Reload()
    assert len(events.Tensors("game_log/text_summary")) == 2 and len(events.Scalars("train/objective/kl")) == 2


@contextmanager
def a_full_disk(folder):
    """No file of this process grows beyond a few bytes; what it prints goes nowhere."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with open(os.devnull, "w") as nowhere, stdout(nowhere):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def a_file_instead_of_the_folder(folder):
    (folder / "completions").write_text("")
    yield


@contextmanager
def a_folder_instead_of_the_file(folder):
    (folder / "completions" / "completions_000000.parquet").mkdir(parents=True)
    yield


@contextmanager
def a_folder_in_which_nothing_can_be_written(folder):
    """Not by the superuser either."""
    (folder / "completions").symlink_to("/proc/self")
    yield


@contextmanager
def stdout(file):
    before, sys.stdout = sys.stdout, file
    try:
        yield
    finally:
        sys.stdout = before


@contextmanager
def a_closed_stdout(folder):
    file = open(os.devnull, "w")
    file.close()
    with stdout(file):
        yield


@contextmanager
def a_pipe_that_nobody_reads(folder):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file, stdout(file):
        yield


@contextmanager
def a_console_that_fails(folder):
    def fail(*args, **kwargs):
        raise RuntimeError("no terminal of that size")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("trl_apa.trainer.reporting.print_prompt_completions_sample", fail)
        yield


@contextmanager
def columns_that_arrow_refuses(folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        columns = SimpleNamespace(from_dict=lambda columns: Dataset.from_dict({"mixed": [1, "a"], **columns}))
        monkeypatch.setattr("trl_apa.trainer.reporting.Dataset", columns)
        yield


FILES, TERMINAL = "writing completions to {} failed", "printing completions failed"
FAULTS = [
    (a_full_disk, FILES, "File too large"),
    (a_file_instead_of_the_folder, FILES, "File exists"),
    (a_folder_instead_of_the_file, FILES, "Is a directory"),
    (a_folder_in_which_nothing_can_be_written, FILES, "Error: [Errno"),
    (columns_that_arrow_refuses, FILES, "Arrow"),
    (a_closed_stdout, TERMINAL, "closed file"),
    (a_pipe_that_nobody_reads, TERMINAL, "nobody reads"),
    (a_console_that_fails, TERMINAL, "no terminal of that size"),
]


@pytest.fixture(scope="module")
def asking(tmp_path_factory):
    """A trainer with three prompts to ask."""
    trainer = trainer_for(tmp_path_factory.mktemp("asking"), eval_dataset=PROMPTS[:3], **SHORT)
    return trainer


@pytest.mark.parametrize(("fault", "what", "why"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_completions_that_cannot_be_written_are_one_warning(tmp_path, asking, fault, what, why):
    """Asked for three times; the half that can be written is."""
    asking.args.output_dir = str(tmp_path)
    vars(asking).pop("_failed_reports", None)
    with recorded() as warned, fault(tmp_path):
        for step in range(3):
            asking.state.global_step = step
            asking.generate_completions()
    (warning,) = warned
    assert warning.startswith(what.format(tmp_path / "completions")) and why in warning
    written = [path for path in tmp_path.glob("completions/completions*") if path.is_file()]
    expected = {TERMINAL: 3}.get(what, 2 if fault is a_folder_instead_of_the_file else 0)
    assert len(written) == expected and all(path.suffix == ".parquet" for path in written)


@pytest.mark.parametrize("fault", [a_full_disk, a_pipe_that_nobody_reads])
def test_training_is_what_it_would_have_been(tmp_path, without_reports, fault):
    trainer = trainer_for(tmp_path, **LOGGED)
    with recorded() as warned, fault(tmp_path):
        trainer.train()
    assert len(warned) == 1 and trainer.state.global_step == 2
    assert_same(parameters(trainer), without_reports, tolerance=1e-30)


def test_generate_completions_asks_for_rows(asking):
    asking.eval_dataset = []
    with pytest.raises(ValueError, match="eval_dataset has no rows"):
        asking.generate_completions()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_printed_as_escapes(tmp_path, encoding):
    with open(tmp_path / "out", "w", encoding=encoding) as file, stdout(file):
        show_table(TABLE._replace(rows=[["caf\u00e9 \u4e16", "w3", 0.5]]), 0, 1)
        assert file.errors == "strict"
    printed = (tmp_path / "out").read_text(encoding=encoding)
    assert "\\u4e16" in printed.replace("\n", "") and ("\\xe9" in printed) == (encoding == "ascii")


def test_a_file_of_completions_is_there_whole_or_not_at_all(tmp_path):
    with a_full_disk(tmp_path), pytest.raises(OSError):
        save_table(TABLE, tmp_path / "t.parquet")
    assert list(tmp_path.iterdir()) == []
    save_table(TABLE, tmp_path / "t.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


# ---- columns and vectors of every kind ----


class Unprintable:
    def __str__(self):
        raise RuntimeError("not to be shown")


COLUMNS = {
    "mixed": ["a", 1, 2.5, None],
    "none": [None] * 4,
    "partly": [1, None, 2.5, 3],
    "flags": [True, False, None, True],
    "flag or number": [True, 1, 0.5, 2],
    "huge": [10**30, 1, 2, 3],
    "too long for a fraction": [2**60 + 1, 0.5, 1, 2],
    "dicts": [{"a": 1}, {"b": [1]}, {}, None],
    "messages": [[{"role": "user", "content": "hi"}]] * 4,
    "bytes": [b"\xff", b"", b"x", b"y"],
    "exact": [Fraction(1, 3), Decimal("0.1"), 1j, object],
    "surrogates": ["\ud800", "a\udfff", "caf\u00e9", "\x00"],
    "numpy": np.array([1, 2, 3, 4]),
    "tensors": [torch.tensor(1.0), torch.tensor([2.0]), torch.arange(2), torch.tensor(3)],
    "half": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16),
    "not finite": [float("nan"), float("inf"), 1.0, 2.0],
    "iterator": iter("abcd"),
    "na\ud800me": ["a", "b", "c", "d"],
}


def test_a_table_of_any_columns_is_one_that_every_tracker_and_every_file_takes(tmp_path):
    with recorded() as warned:
        table = gather_table(COLUMNS, list(COLUMNS), [0.5, 1, 2, 3], Accelerator(cpu=True))
    assert warned == []
    assert table.columns == [*list(COLUMNS)[:-1], "na\\ud800me", "reward"]
    columns = dict(zip(table.columns, zip(*table.rows, strict=True), strict=True))
    assert columns["mixed"] == ("a", "1", "2.5", "None")
    assert columns["partly"] == (1, None, 2.5, 3) and columns["flags"] == (True, False, None, True)
    assert columns["flag or number"] == ("True", "1", "0.5", "2") and columns["huge"] == (str(10**30), "1", "2", "3")
    assert columns["surrogates"] == ("\\ud800", "a\\udfff", "caf\u00e9", "\x00")
    assert columns["numpy"] == (1, 2, 3, 4) and columns["half"] == (1.0, 2.0, 3.0, 4.0)
    save_table(table, tmp_path / "t.parquet")
    kept = Dataset.from_parquet(str(tmp_path / "t.parquet"), cache_dir=tmp_path / "cache")
    assert kept.column_names == table.columns and list(kept["mixed"]) == ["a", "1", "2.5", "None"]
    assert list(kept["exact"]) == ["1/3", "0.1", "1j", "<class 'object'>"]
    wandb.Table(columns=table.columns, data=table.rows)
    with SummaryWriter(tmp_path / "events") as writer:
        writer.add_text("table", str(table.rows), 0)


def test_columns_that_cannot_be_read_are_left_out_with_a_warning(tmp_path):
    batch = {"query": ["a", "b"], "odd": [Unprintable()] * 2, "number": 3, "meta": torch.ones(2, device="meta")}
    with pytest.warns(UserWarning) as caught:
        table = gather_table(batch, list(batch), [1.0, 2.0], Accelerator(cpu=True))
    assert table == Table(["query", "reward"], [["a", 1.0], ["b", 2.0]])
    said = [str(warning.message) for warning in caught]
    assert [text for text in said if text.startswith("batch['odd'] cannot be logged: RuntimeError: not to be")]
    for name in ("odd", "number", "meta"):
        assert sum(text.startswith(f"batch['{name}'] ") for text in said) == 1
    # a column of the data set that is called as the rewards are
    table = gather_table({"query": ["a"], "reward": ["x"]}, ("reward", "query"), [1.0], Accelerator(cpu=True))
    assert table == Table(["query", "reward"], [["a", 1.0]])


VECTORS = {
    "texts": np.array(["a", "b"]),
    "objects": np.array([{}, None]),
    "text": np.array("a"),
    "complex": torch.tensor(1j),
    "integer": 10**400,
    "meta": torch.ones(3, device="meta"),
    "nothing finite": np.array([np.nan, np.inf]),
    "far apart": np.array([3e19, -3e19], dtype=np.float32),
    "beyond float32": np.array([1.0, 1e300]),
    "one value": np.zeros(5),
    "flags": np.array([True, False]),
    "holes": torch.tensor([1.0, float("nan"), -float("inf")]),
}
SHOWN = {"far apart", "beyond float32", "one value", "flags", "holes"}


def test_vectors_of_any_values_become_histograms_or_are_left_out(tmp_path):
    numbers, vectors = split_statistics(VECTORS)
    assert numbers == {} and set(vectors) == SHOWN
    for vector in vectors.values():
        assert np.isfinite(vector).all() and wandb.Histogram(vector).histogram
    trainer = tiny_trainer(tmp_path, report_to="tensorboard")
    queries, responses, scores = tiny_rollouts()
    with recorded() as warned:
        trainer.log_stats(trainer.step(queries, responses, scores) | VECTORS, texts(), scores)
    assert warned == []
    (path,) = (tmp_path / "runs").glob("*/events*")
    found = EventAccumulator(str(path)).Reload().Tags()["histograms"]
    assert {f"train/{name}" for name in SHOWN} <= set(found) and "train/env/reward_dist" in found


# ---- trackers ----


def refuse(*args, **kwargs):
    raise TypeError("not that")


@pytest.mark.parametrize(("thing", "name"), [("Histogram", "train/"), ("Table", "game_log")])
def test_wandb_without_what_it_refuses_gets_the_rest(wandb_offline, monkeypatch, thing, name):  # noqa: F811
    trainer = tiny_trainer(wandb_offline, report_to="wandb")
    monkeypatch.setattr(getattr(wandb, thing), "__init__", refuse)
    with recorded() as warned:
        stats, _ = report_twice(trainer)
    (warning,) = warned
    assert warning.startswith(f"logging {name}") and "to wandb failed" in warning and "TypeError: not that" in warning
    summary = wandb.run.summary
    assert summary["train/objective/kl"] == stats["objective/kl"]
    assert ("train/env/reward_dist" in summary.keys(), "game_log" in summary.keys()) == (
        thing == "Table",
        thing == "Histogram",
    )


def test_of_one_tracker_there_is_one_warning_and_the_log_has_what_follows(wandb_offline, monkeypatch, caplog):  # noqa: F811
    trainer = tiny_trainer(wandb_offline, report_to="wandb")
    monkeypatch.setattr(wandb, "Table", refuse)  # no class any more: W&B's own `log` fails over it
    with recorded() as warned:
        stats, _ = report_twice(trainer)
    (warning,) = warned
    assert warning.startswith("logging game_log to wandb failed")
    assert caplog.text.count("the run continues without it") == 1 and "wandb failed in log_media" in caplog.text
    assert trainer.state.log_history[-1]["objective/kl"] == stats["objective/kl"]


@pytest.mark.parametrize("thing", ["add_histogram", "add_text"])
def test_tensorboard_without_what_it_refuses_gets_the_rest(tmp_path, monkeypatch, thing):
    trainer = tiny_trainer(tmp_path, report_to="tensorboard")
    trainer._start_reporters()  # which writes texts of its own
    monkeypatch.setattr(SummaryWriter, thing, refuse)
    with recorded() as warned:
        report_twice(trainer)
    assert len(warned) == 1 and "to tensorboard failed" in warned[0] and "TypeError: not that" in warned[0]
    (path,) = (tmp_path / "runs").glob("*/events*")
    events = EventAccumulator(str(path)).Reload()
    assert len(events.Scalars("train/objective/kl")) == 2
    kept = "game_log/text_summary" if thing == "add_histogram" else "train/env/reward_dist"
    assert kept in {*events.Tags()["tensors"], *events.Tags()["histograms"]}


def test_comet_without_what_it_refuses_gets_the_rest(tmp_path, monkeypatch):
    comet = CometStandIn()
    comet.log_table = refuse
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    for flag in ("_is_comet_installed", "_is_comet_recent_enough"):
        monkeypatch.setattr(f"transformers.integrations.integration_utils.{flag}", True)
    with recorded() as warned:
        report_twice(tiny_trainer(tmp_path, report_to="comet_ml"))
    (warning,) = warned
    assert warning.startswith("logging game_log to comet_ml failed")
    names = [name for name, *_ in comet.logged]
    assert names.count("__internal_api__log_metrics__") == 2 and "log_histogram_3d" in names


def test_a_tracker_whose_run_cannot_be_opened_is_done_without(tmp_path, monkeypatch):
    """Its options are made into objects of its library before its reporter is asked."""
    comet = CometStandIn()
    comet.ExperimentConfig = refuse
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    for flag in ("_is_comet_installed", "_is_comet_recent_enough"):
        monkeypatch.setattr(f"transformers.integrations.integration_utils.{flag}", True)
    options = {"tracker_kwargs": {"comet_ml": {"experiment_config": {"tags": ["a"]}}}}
    with recorded() as warned:
        trainer = tiny_trainer(tmp_path, report_to="comet_ml", **options)
        report_twice(trainer)
    assert warned == [
        "comet_ml failed in opening its run, and the run continues without it: TypeError: not that",
    ]
    assert len(trainer.state.log_history) == 2 and comet.started == []


# ---- the terminal ----


@pytest.mark.parametrize("display", [PrinterCallback, lambda: ProgressLines([("loss", "loss", "{:.3f}")])])
def test_a_terminal_that_is_gone_does_not_end_the_run(tmp_path, without_reports, display):
    trainer = trainer_for(tmp_path, **SHORT)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(display())
    with recorded() as warned, a_closed_stdout(tmp_path):
        trainer.train()
    (warning,) = warned
    assert "failed in on_log, and the run continues without it: ValueError: I/O operation on closed file" in warning
    assert_same(parameters(trainer), without_reports, tolerance=1e-30)


def test_learning_offline_goes_on_without_a_terminal(tmp_path):
    rows = [{"prompt": "w2", "completion": "w3 w4", "reward": float(number)} for number in range(8)]
    plain = tiny_trainer(tmp_path)
    options = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    config = OfflineConfig(str(tmp_path), max_steps=2, logging_steps=1, value_epochs=0, **options)
    trainer = OfflineAPATrainer(config, plain.model.policy, None, plain.tokenizer, rows, reward_funcs=few_nines)
    with recorded() as warned, a_closed_stdout(tmp_path):
        trainer.train()
    assert len(warned) == 1 and "PrinterCallback failed in on_log" in warned[0] and trainer.state.global_step == 2


# ---- pictures ----


def test_a_demo_whose_picture_cannot_be_drawn_has_the_rest(tmp_path):
    names = ("proxy_reward", "gold_reward", "kl", "entropy")
    metrics = dict.fromkeys(names, 1.0)
    result = {"before": metrics, "after": metrics}
    options, report = DemoOptions(output_dir=tmp_path, iterations=1), SimpleNamespace(seconds={})
    with recorded() as warned:
        save(options, result, [{"iteration": 1, **metrics}], report)
    assert warned == [] and (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "curves.png").unlink()
    (tmp_path / "curves.png").mkdir()
    (tmp_path / "result.json").unlink()
    with recorded() as warned:
        save(options, result, [{"iteration": 1, **metrics}], report)
    assert len(warned) == 1 and warned[0].startswith(f"drawing {tmp_path / 'curves.png'} failed")
    assert json.loads((tmp_path / "result.json").read_text()) == result


RATE = {"win_rate": 0.5, "low": 0.4, "high": 0.6, "wins": 1, "ties": 0, "losses": 1, "pairs": 2, "unreadable": 0}
FIGURES = {
    "curves": lambda path: draw_figure("t", {"p": {"A": [[{"step": 0, "reward": 1.0, "kl": 0.0}]]}}, path),
    "win rates": lambda path: draw_win_rates("t", WinRates("x", 0.95, {"A vs B": {0: RATE}}, {"A vs B": RATE}), path),
}


@pytest.mark.parametrize("figure", FIGURES)
def test_each_file_of_a_figure_is_written_whatever_becomes_of_the_others(tmp_path, figure):
    suffixes = {"curves": [".png", ".json"], "win rates": [".png", ".json", ".md"]}[figure]
    with recorded() as warned:
        FIGURES[figure](tmp_path / "good.png")
    assert warned == [] and sorted(path.suffix for path in tmp_path.iterdir()) == sorted(suffixes)
    for suffix in suffixes:
        (tmp_path / suffix / "f").with_suffix(suffix).mkdir(parents=True)
        with recorded() as warned:
            FIGURES[figure](tmp_path / suffix / "f.png")
        assert len(warned) == 1 and str(tmp_path / suffix / f"f{suffix}") in warned[0]
        assert {path.suffix for path in (tmp_path / suffix).iterdir() if path.is_file()} == {*suffixes} - {suffix}
