"""Tasks whose answers are right or wrong, and figures that compare methods on them."""

import json
import random
from pathlib import Path
from statistics import mean

import pytest
import torch

from reproduction import command as paper
from reproduction.figures import CONFIGS, INDEX, read_figure
from reproduction.mini import algorithm_options, config_of, run_mini, run_name
from reproduction.sizes import MiniSizes
from reproduction.tasks import make_task, task_folder
from reproduction.verifiable import KINDS, sorting, sums
from trl_apa.demo.networks import encode


SIZES = MiniSizes(iterations=2, evaluations=2, batch_size=8, sft_steps=1, samples_per_prompt=1, num_responses=12)
ROOT = Path(__file__).resolve().parents[1]
FAMILY = ["tune-family", "tune-family-sums", "tune-family-sorting"]


def value(text):
    """The number whose digits stand in `text`, the last one first."""
    return int("".join(reversed(text.split())))


def test_sums_have_one_right_answer_and_mistakes_that_are_wrong():
    problems = sums(random.Random(0))
    assert len({problem.prompt for problem in problems}) == len(problems) == 6**4
    for problem in problems:
        numbers = [int(word) for word in problem.prompt.split() if word.isdigit()]
        assert len(numbers) == 4 and value(problem.answer) == sum(numbers)
        assert problem.mistakes and problem.answer not in problem.mistakes


def test_sorted_lists_have_one_right_answer_and_mistakes_that_are_wrong():
    problems = sorting(random.Random(0))
    assert len({problem.prompt for problem in problems}) == len(problems) == 3000
    for problem in problems:
        numbers = problem.prompt.removesuffix(" >").split()
        assert problem.answer.split() == sorted(numbers)
        assert problem.mistakes and problem.answer not in problem.mistakes
    assert any(
        len(set(problem.answer)) == 2 for problem in problems
    )  # of one digit five times, and spaces: never none


@pytest.fixture(scope="module", params=KINDS)
def task(request, tmp_path_factory):
    return make_task(request.param, tmp_path_factory.mktemp(request.param), SIZES)


def test_the_reward_is_1_for_the_right_answer_that_ends_there(task):
    problem = task.kind.problems(random.Random(0))[0]
    end = torch.tensor([task.tokenizer.eos_token_id])
    right, wrong = encode(task.tokenizer, [problem.answer, problem.mistakes[0]])
    responses = [torch.cat([right, end]), right, torch.cat([right, right, end]), torch.cat([wrong, end]), end]
    scores = task.score([problem.prompt] * len(responses), responses)
    assert [score.item() for score in scores] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert max(len(right), *(len(ids) for ids in encode(task.tokenizer, problem.mistakes))) < task.max_new_tokens


def test_held_out_problems_are_not_learned_from(task):
    known = {problem.prompt for problem in task.kind.problems(random.Random(0))}
    held_out = known - set(task.train_prompts)
    assert len(held_out) == task.kind.held_out == len(known) - len(task.train_prompts)
    rows = task.fixed_rows
    assert len(rows) == 12 and {row["prompt"] for row in rows} <= set(task.train_prompts)
    assert {row["reward"] for row in rows} <= {0.0, 1.0}
    assert not any(
        ids == [task.tokenizer.unk_token_id] for ids in task.tokenizer(" ".join(known).split())["input_ids"]
    )


def test_a_run_asks_each_prompt_as_often_as_its_method_needs(task, tmp_path, monkeypatch):
    asked, score = [], task.score
    monkeypatch.setattr(task, "score", lambda prompts, responses: asked.append(prompts) or score(prompts, responses))
    options = {"loss_type": "grpo", "num_generations": 4, "mini_batch_size": 8, "learning_rate": 1e-3}
    run_mini(task, "train", options, 5, tmp_path)
    of_training = [prompts for prompts in asked if len(prompts) == 8]
    assert len(of_training) == 2
    for first, *_ in (prompts for prompts in of_training):
        assert first in task.train_prompts
    for prompts in of_training:
        assert prompts[:4] == [prompts[0]] * 4 and prompts[4:] == [prompts[4]] * 4 and prompts[0] != prompts[4]
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [row["samples"] for row in log] == [0, 8, 16] and log[0]["eval_kl"] == pytest.approx(0.0, abs=1e-4)
    assert 0 < log[1]["cpu_seconds"] < log[2]["cpu_seconds"] and 0.0 <= log[2]["eval_reward"] <= 1.0


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_s_curves_differ_in_their_methods_and_rates_alone(name, tmp_path):
    figure = read_figure(CONFIGS, name)
    task = make_task(figure.task, tmp_path, MiniSizes(**figure.sizes))
    rates = [[curve.mini["learning_rate"] for curve in curves.values()] for curves in figure.panels.values()]
    assert rates == [rates[0]] * len(rates) and len(rates[0]) == 5 and figure.seeds == [1, 2]
    assert list(figure.panels) == list(read_figure(CONFIGS, "tune-family").panels) and len(rates) == 13
    for curve in (curve for curves in figure.panels.values() for curve in curves.values()):
        config = config_of(figure.command, algorithm_options(figure.command, curve), 0, task, tmp_path)
        assert (config.mini_batch_size, config.batch_size, config.num_ppo_epochs) == (32, 64, 2)
        assert config.num_generations == (1 if config.estimator.needs_ref_rewards else 8)
        assert not config.scale_rewards


@pytest.mark.parametrize(("name", "quantity"), zip(FAMILY, ("gold_reward", "reward", "reward"), strict=True))
def test_the_compared_curves_have_the_rates_that_won(name, quantity):
    """The highest mean over the run and its seeds, among the stored numbers of all five rates."""
    stored = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    (curves,) = read_figure(CONFIGS, name.removeprefix("tune-")).panels.values()
    assert stored.keys() == curves.keys()
    for label, by_rate in stored.items():
        over_the_run = {
            float(rate.removeprefix("rate ")): mean(row[quantity] for rows in runs for row in rows if row["step"])
            for rate, runs in by_rate.items()
        }
        assert len(over_the_run) == 5 and {len(runs) for runs in by_rate.values()} == {2}
        assert curves[label].mini["learning_rate"] == max(over_the_run, key=over_the_run.get), label


@pytest.mark.parametrize("loss_type", ["astar_po", "qrpo"])
def test_answers_of_the_fine_tuned_model_are_scored_once_for_each_prompt(task, tmp_path, monkeypatch, loss_type):
    asked, found = [], task.reference_rewards
    monkeypatch.setattr(task, "reference_rewards", lambda prompt, count: asked.append(prompt) or found(prompt, count))
    options = {"loss_type": loss_type, "num_ref_samples": 4, "mini_batch_size": 8, "learning_rate": 1e-3}
    logs = []
    for run in ("first", "again"):
        run_mini(task, "train", options, 5, tmp_path / run)
        assert len(asked) == len(set(asked)) > 4
        rows = json.loads((tmp_path / run / "trainer_state.json").read_text())["log_history"]
        logs.append([{name: value for name, value in row.items() if name != "cpu_seconds"} for row in rows])
        asked.clear()
    # What other runs have asked before does not change a run.
    assert logs[0] == logs[1] and [row["samples"] for row in logs[0]] == [0, 8, 16]
    assert len(found(task.train_prompts[0], 4)) == 4 and found(task.train_prompts[0], 4) == found(
        task.train_prompts[0], 4
    )


def test_a_figure_takes_over_another_s_curves_and_gives_each_its_rate(tmp_path):
    index = {
        "first": {
            "title": "t",
            "command": "train",
            "seeds": [0],
            "only_mini": True,
            "common": {"num_generations": 2},
            "panels": {"p": {"A": {"mini": {"loss_type": "apa"}}, "B": {"mini": {"loss_type": "awr"}}}},
        },
        "second": {"curves_of": "first", "task": "sums", "learning_rates": {"A": 1, "B": 2}},
        "third": {"curves_of": "second", "rates": [0.5, 1], "seeds": [7], "sizes": {"iterations": 3}},
        "fourth": {"curves_of": "first", "learning_rates": {"A": 1}},
    }
    (tmp_path / INDEX).write_text(json.dumps(index))
    second, third = read_figure(tmp_path, "second"), read_figure(tmp_path, "third")
    a, b = second.panels["p"]["A"], second.panels["p"]["B"]
    assert a.mini == {"num_generations": 2, "loss_type": "apa", "learning_rate": 1.0}
    assert b.mini == {"num_generations": 2, "loss_type": "awr", "learning_rate": 2.0}
    assert (second.task, second.seeds, second.only_mini, third.task, third.seeds) == ("sums", [0], True, "sums", [7])
    assert third.sizes == {"iterations": 3}
    found = {p: {label: curve.mini["learning_rate"] for label, curve in c.items()} for p, c in third.panels.items()}
    assert found == {panel: {"rate 0.5": 0.5, "rate 1": 1.0} for panel in ("A", "B")}
    with pytest.raises(ValueError, match="fourth is not laid out as it should be: KeyError: 'B'"):
        read_figure(tmp_path, "fourth")


def test_a_run_s_name_and_folder_tell_tasks_apart(tmp_path):
    options = {"loss_type": "apa"}
    names = {run_name("train", options, 0, SIZES, task) for task in ("demo", *KINDS)}
    folders = {task_folder(tmp_path, SIZES, task) for task in ("demo", *KINDS)}
    assert len(names) == len(folders) == 1 + len(KINDS)
    with pytest.raises(ValueError, match="task is 'chess'; it should be demo, sums or sorting"):
        make_task("chess", tmp_path, SIZES)


def test_the_command_runs_a_figure_on_its_own_task_and_sizes(tmp_path):
    curve = {"mini": {"loss_type": "rloo", "num_generations": 4, "mini_batch_size": 8, "learning_rate": 1e-3}}
    sizes = {"iterations": 2, "evaluations": 1, "batch_size": 8, "sft_steps": 1, "samples_per_prompt": 1}
    entry = {"title": "t", "command": "train", "seeds": [3], "only_mini": True, "task": "sorting", "sizes": sizes}
    (tmp_path / INDEX).write_text(json.dumps({"f": {**entry, "panels": {"p": {"RLOO": curve}}}}))
    argv = ["f", "--scale", "mini", "--configs", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert paper.main([*argv, "--iterations", "1"]) == 0  # the command line's sizes win
    (runs,) = json.loads((tmp_path / "out" / "f.json").read_text())["in small"].values()
    assert [row["samples"] for row in runs[0]] == [0, 8] and "gold" not in (tmp_path / "out" / "f.md").read_text()
