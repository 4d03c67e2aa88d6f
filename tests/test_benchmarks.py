"""The benchmarks run, and measure what they say."""

import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import soak, vocabulary
from benchmarks.plain_calls import PlainUpdate
from benchmarks.speed import tokens_of
from benchmarks.workload import SPREADS, Workload
from trl_apa import fused_head, logprobs


ROOT = Path(__file__).resolve().parents[1]
SMALL = Workload(size="32 x 2", vocabulary=64, batch_size=4, mini_batch_size=2, epochs=1)


def test_make_bench_measures_ours_and_the_plain_calls():
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.speed", "--quick", "--no-growth"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in printed.splitlines()]
    assert [row[5] for row in rows if row[:3] == ["32", "x", "2"]] == ["step", "generate"]
    assert all(float(row[-4]) > 0 for row in rows if row[:3] == ["32", "x", "2"])


def test_the_spreads_differ_in_padding_and_hardly_in_tokens():
    tokens, shares = zip(*(tokens_of(Workload(spread=spread)) for spread in SPREADS), strict=True)
    assert max(tokens) < 1.1 * min(tokens)
    assert shares[0] == 1.0 > 0.5 > shares[1] > shares[2]


def test_the_plain_calls_train_both_networks():
    update = PlainUpdate(SMALL)
    before = [parameter.detach().clone() for parameter in update.parameters]
    update.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, update.parameters, strict=True)]
    # The head of the value network starts anywhere, so its trunk learns at once; the embedding of pad never does.
    assert all(moved)


def test_memory_by_vocabulary_prints_two_numbers(monkeypatch, capsys):
    monkeypatch.setattr(vocabulary, "VOCABULARY", 50)
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 100)
    monkeypatch.setattr(fused_head, "runs_kernel", fused_head.runs_kernel)
    vocabulary.run(num_tokens=4, way="in chunks")
    assert [float(number) >= 0 for number in capsys.readouterr().out.split()] == [True, True]


def test_make_soak_reads_the_memory_of_every_step(tmp_path, capsys):
    table = soak.run(6, str(tmp_path))
    assert [step for step, _ in table] == [1, 2, 3, 4, 5, 6] and all(mib > 50 for _, mib in table)
    assert capsys.readouterr().out.count(" MiB ") == 6
