"""The benchmarks run, and measure what they say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import chaos, finished_rows, groups, methods, sampled_lengths, soak, vocabulary
from benchmarks.grpo_side import GRPOUpdate
from benchmarks.our_side import OPTIONS, make_trainer
from benchmarks.plain_calls import PlainUpdate
from benchmarks.speed import tokens_of
from benchmarks.workload import ENDS, EOS, PAD, SPREADS, Workload
from trl_apa.models import fused_head, logprobs


ROOT = Path(__file__).resolve().parents[1]
SMALL = Workload(size="32 x 2", vocabulary=64, batch_size=4, mini_batch_size=2, epochs=1)


@pytest.mark.slow
def test_make_bench_prints_every_ratio_with_its_aim():
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.speed", "--quick", "--no-growth"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    calls, of_groups, of_sampling = (part.splitlines() for part in printed.split("\n\n"))
    rows = [line.split() for line in calls[1:]]
    assert [row[5] for row in rows] == ["step", "generate"] and all(float(row[9]) > 0 for row in rows)
    assert "sampled 0.38, TRL 0.42, plain 1.05" in calls[1]
    headings, row = of_groups[1:]
    assert (
        "no critic / TRL" in headings and "GRPO / TRL GRPO" in headings and row.split()[3:6] == ["128", "8", "groups"]
    )
    headings, row = of_sampling[1:]
    assert "ours / transformers" in headings and row.split()[3:6] == ["long", "tail", "4"] and " 0.75 " in row


@pytest.mark.slow
def test_the_benchmark_of_groups_compares_shared_prompts_with_none():
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.groups", "--quick"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (row,) = (line.split() for line in printed.splitlines() if line.startswith("32 x 2"))
    assert row[3:7] == ["128", "8", "groups", "18%"]
    assert float(row[7]) > 0  # a ratio of times, of which other processes of this machine have a say


@pytest.mark.slow
def test_the_benchmark_of_finished_rows_compares_the_ways_of_sampling(capsys):
    finished_rows.main(["--small"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows if row[1] == "4"] == [f"| {kind}" for kind in ENDS]
    assert [row[0] for row in rows if len(row) == 3][2:] == [f"| {prompt}" for prompt in finished_rows.PROMPTS]


def test_a_workload_of_groups_repeats_its_queries():
    workload = groups.workload_of(20, 5, batch_size=16)
    queries, responses, _ = workload.rollouts()
    assert len(queries) == 16 and len({tuple(query.tolist()) for query in queries}) == 2
    assert {len(query) for query in queries} == {20} and {len(response) for response in responses} == {5}
    assert groups.share_of_tokens(workload) == (2 * 20 + 16 * 5) / (16 * 25)


def test_grpos_update_is_ours_of_the_same_rows(tmp_path):
    """One optimizer step from the same weights: both trainers clip the gradient of one loss, and their Adam takes it.

    By different sums, so that a parameter with hardly a gradient may move otherwise.
    """
    workload = groups.workload_of(20, 5, size="32 x 2", vocabulary=64, batch_size=8)
    theirs = GRPOUpdate(workload, str(tmp_path))
    ours = make_trainer(workload, str(tmp_path), **OPTIONS["ours, GRPO"])
    before = {name: value.clone() for name, value in ours.model.policy.named_parameters()}
    theirs.step()
    ours.step(*workload.rollouts())
    moves = [
        torch.cat([(after[name] - before[name]).flatten() for name in before]).detach()
        for after in (dict(theirs.trainer.model.named_parameters()), dict(ours.model.policy.named_parameters()))
    ]
    assert ours.model.value_model is None and moves[0].abs().max() > 1e-6
    assert torch.cosine_similarity(*moves, dim=0) > 0.99


def test_sampled_responses_end_as_a_workload_says():
    """64 responses of at most 30 tokens: if one in eight tokens is an end, they have 8 on average."""
    for kind, low, high in (("equal", 30, 30), ("short", 5, 11), ("long tail", 13, 26)):
        small = {"size": "32 x 2", "vocabulary": 64, "batch_size": 64}
        workload = Workload(**small, ends=ENDS[kind], limit=30, prompt=4, response=1)
        inputs = torch.stack(workload.rollouts()[0])
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": workload.limit, "pad_token_id": PAD}
        mask = torch.ones_like(inputs)
        sampled = workload.model().eval().generate(inputs, attention_mask=mask, eos_token_id=EOS, **options)[:, 4:]
        ends = sampled == EOS
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, sampled.shape[1]).float()
        assert low <= lengths.mean() <= high, kind
    rows = {(workload.generation_batch_size, workload.ends) for workload in sampled_lengths.workloads_of("32 x 2")}
    assert len(rows) == 9 and sampled_lengths.AIMS.keys() <= {(kind, size) for kind in ENDS for size in (4, 16, 64)}


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


@pytest.mark.slow
def test_make_chaos_kills_a_run_resumes_it_and_compares_its_bits(tmp_path):
    # In a process of its own, which forks before it has run anything.
    program = (
        "import random, sys, pathlib; from benchmarks.chaos import Setup, survive\n"
        "print(survive(Setup(1, 'apa', 1), 1, pathlib.Path(sys.argv[1]), random.Random(0)))"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("Tally(runs=") and "Tally(runs=0" not in printed
    assert (tmp_path / "run-0" / f"checkpoint-{chaos.STEPS}").is_dir()


def test_make_chaos_sees_an_incomplete_checkpoint_and_a_changed_bit(tmp_path):
    one = {"weights": torch.ones(3), "step": 4}
    assert chaos.differing(one, {"weights": torch.ones(3), "step": 4}) == []
    assert chaos.differing(one, {"weights": torch.tensor([1, 1, 1 + 2**-23]), "step": 5}) == ["step", "weights"]
    assert chaos.differing(one, {"weights": torch.ones(3)}) == ["step"]
    assert chaos.age_of_newest(tmp_path) == (0, 0)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(chaos.Broken, match=r"checkpoint-3: trainer_state\.json is missing"):
        chaos.age_of_newest(tmp_path)


@pytest.mark.slow
def test_the_benchmark_of_methods_measures_each_beside_its_prediction(capsys):
    """In small; without a value network a step needs less. At this size what the process had is noise."""
    for method in ("APA, GAE, a value network", "APA, batch"):
        methods.main(["--small", "--only", method])
    rows = [line.split(" | ")[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("| APA")]
    (predicted, held, resident), without = ([float(cell.strip(" |")) for cell in row] for row in rows)
    assert held == pytest.approx(predicted, rel=0.08) and without[1] == pytest.approx(without[0], rel=0.08)
    assert without[1] < 0.9 * held and min(resident, without[2]) > 0
