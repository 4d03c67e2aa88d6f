"""Figure 1: its entry, its judge in small, its commands at full size, and what is drawn."""

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from reproduction import command as paper
from reproduction.drawing_win_rates import draw_win_rates
from reproduction.figures import INDEX
from reproduction.win_rates import read_comparison, sampling_seed, summarize
from reproduction.win_rates_full import _make, common_start, options_of
from reproduction.win_rates_mini import GoldJudge, compare_in_small, held_out_prompts, sample_answers
from tests._cli import refused
from trl_apa.commands import winrate
from trl_apa.commands.options import read_yaml
from trl_apa.demo.corpus import gold_quality
from trl_apa.demo.networks import build_policy, build_tokenizer, sample
from trl_apa.demo.options import DemoOptions
from trl_apa.demo.pipeline import prepare, save_model
from trl_apa.demo.report import Report
from trl_apa.demo.reward import gold_rewards
from trl_apa.winrate import Judgement, Pair, compare, win_rate
from trl_apa.winrate.comparing import FIRST, SECOND, TIE


FOLDER = Path(__file__).parents[1] / "reproduction" / "configs"
PROMPT = "question : is the red lamp good ? answer :"


# ---- the entry ----


def test_figure_1_compares_what_the_paper_compares():
    comparison = read_comparison(FOLDER, "fig1")
    assert comparison.pairs == [("PPO", "SFT"), ("APA", "SFT"), ("APA", "PPO")]
    options = options_of(comparison, [])
    assert (options.judging.judge, options.judging.judge_model) == ("openai", "gpt-4")
    assert options.judging.references_layout == "stack_exchange"
    answers, curve = read_yaml(str(comparison.generate)), read_yaml(str(FOLDER / "fig2-apa.yaml"))
    assert options.judging.references == answers["dataset_name"] == curve["dataset_name"]
    held_out = curve["eval_dataset_data_dir"]
    assert options.judging.references_data_dir == answers["dataset_data_dir"] == held_out != curve["dataset_data_dir"]
    for name in ("max_prompt_length", "max_completion_length"):
        assert answers[name] == curve[name]
    assert f"--config reproduction/configs/{comparison.generate.name}" in comparison.generate.read_text()


def index(folder, **changed):
    """An index with a figure of win rates, over a figure of one curve a policy; None takes a key away."""
    for name, text in {
        "ppo.yaml": "loss_type: ppo\nmodel_name_or_path: a/start\n",
        "apa.yaml": "loss_type: apa\nmodel_name_or_path: a/start\n",
        "g.yaml": "dataset_name: questions.jsonl\n",
        "w.yaml": "judge: local\njudge_model: a/judge\n",
    }.items():
        (folder / name).write_text(text)
    curves = {"PPO": "ppo.yaml", "AWR": "apa.yaml", "APA": "apa.yaml"}
    runs = {"title": "t", "command": "train", "seeds": [0], "panels": {"p": curves}}
    entry = {"title": "t", "command": "winrate", "seeds": [0], "runs_of": "figr", "start": "SFT"}
    entry |= {"policies": ["PPO", "APA"], "generate": "g.yaml", "winrate": "w.yaml", **changed}
    entry = {key: value for key, value in entry.items() if value is not None}
    twice = {**runs, "panels": {"p": curves, "q": curves}}
    (folder / INDEX).write_text(json.dumps({"figw": entry, "figr": runs, "fig2panels": twice}))
    return folder


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"runs_of": None, "start": None}, "figw lacks runs_of, start"),
        ({"command": "train"}, "command is 'train'; it should be winrate"),
        ({"runs_of": "figq"}, "but not 'figq'"),
        ({"runs_of": "fig2panels"}, "fig2panels, which has 2 panels; it should have one"),
        ({"policies": ["PPO", "DPO"]}, "figr has PPO, AWR, APA, but not DPO"),
        ({"policies": ["PPO", "PPO"]}, "all should differ"),
        ({"policies": []}, "all should differ"),
        ({"start": "APA"}, "all should differ"),
        ({"winrate": "none.yaml"}, r"names none\.yaml, which is not there"),
    ],
)
def test_an_entry_that_is_wrong_is_refused(tmp_path, changed, problem):
    with pytest.raises(ValueError, match=problem):
        read_comparison(index(tmp_path, **changed), "figw")


# ---- verdicts to numbers and a picture ----


def judgements_of(*verdicts_of_prompts):
    """Judgements on pairs that ours won ("w"), tied ("t") or lost ("l"): a string a prompt, a letter a pair."""
    verdicts = {"w": (FIRST, SECOND), "t": (TIE, TIE), "l": (SECOND, FIRST)}
    return [
        Judgement(Pair(f"prompt {number}", "a", "b"), verdicts[letter])
        for number, letters in enumerate(verdicts_of_prompts)
        for letter in letters
    ]


def test_each_seed_and_all_of_them_have_a_win_rate_hand_worked(tmp_path):
    judged = {("A", "B"): {0: judgements_of("ww", "tl"), 100: judgements_of("wl", "ll")}}
    found = summarize(judged, "a friend")
    # seed 0: (1 + 1 + 0.5 + 0) / 4; seed 100: 1 / 4; all: 3.5 / 8
    assert [rate["win_rate"] for rate in found.seeds["A vs B"].values()] == [0.625, 0.25]
    overall = found.overall["A vs B"]
    assert overall["win_rate"] == 3.5 / 8
    assert [overall[part] for part in ("wins", "ties", "losses")] == [3, 1, 4]
    # Both seeds' answers to a prompt stay together: 3 / 4 of prompt 0, 0.5 / 4 of prompt 1, and either is drawn twice
    # in a quarter of the resamples.
    assert (overall["low"], overall["high"]) == (0.125, 0.75)
    draw_win_rates("fig0: title", found, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "f.json").read_text())
    assert numbers["judge"] == "a friend" and numbers["seeds"]["A vs B"]["100"]["losses"] == 3
    rows = (tmp_path / "f.md").read_text().splitlines()[-3:]
    assert rows[0] == "| A vs B | 0 | 0.625 | 0.250 to 1.000 | 2 | 1 | 1 | 0 |"
    assert rows[2] == "| A vs B | all | 0.438 | 0.125 to 0.750 | 3 | 1 | 4 | 0 |"


def test_one_seed_has_no_row_for_all_and_verdicts_that_are_lacking_are_counted(tmp_path):
    unreadable = Judgement(Pair("prompt 0", "a", "b"), (None, FIRST))
    found = summarize({("A", "B"): {7: [*judgements_of("w"), unreadable]}}, "a friend", confidence=0.9)
    draw_win_rates("fig0", found, tmp_path / "f.png")
    *_, heading, _, row = (tmp_path / "f.md").read_text().splitlines()
    assert heading.startswith("| pair |") and row == "| A vs B | 7 | 1.000 | 1.000 to 1.000 | 1 | 0 | 0 | 1 |"
    assert "90%" in (tmp_path / "f.md").read_text()


# ---- in small ----


def test_the_gold_judge_hand_worked():
    answers = {
        "best": "the red lamp is bright and cheap . thank you ! <eos>",  # names it 1, two true reasons 1, polite 1: 3
        "good": "the red lamp is bright . <eos>",  # 1 + 0.5 = 1.5
        "equal": "the red lamp is cheap . <eos>",  # 1.5
        "cut": "the red lamp is bright .",  # 1.5 - 1 = 0.5
        "false": "the red lamp is soft . <eos>",  # 1 - 0.5 = 0.5
    }
    pairs = [("best", "good"), ("good", "equal"), ("cut", "good"), ("cut", "false"), ("false", "best")]
    found = compare(
        [Pair(PROMPT, answers[ours], answers[theirs]) for ours, theirs in pairs], GoldJudge(build_tokenizer())
    )
    assert [judgement.score for judgement in found] == [1.0, 0.5, 0.0, 0.5, 0.0]
    assert found[0].verdicts == (FIRST, SECOND)
    rate = win_rate(found)
    assert (rate["wins"], rate["ties"], rate["losses"], rate["agreement"]) == (1, 2, 2, 1.0)


def test_the_gold_judge_reads_as_text_what_the_gold_reward_says_of_the_tokens(tmp_path):
    tokenizer = build_tokenizer()
    policy = build_policy(tokenizer, 0).eval()
    save_model(policy, tokenizer, tmp_path)
    prompts = [PROMPT] * 64
    responses = sample(policy, tokenizer, prompts, 12, seed=5)
    finished = sum(int(response[-1]) == tokenizer.eos_token_id for response in responses)
    assert 0 < finished < 64  # of both kinds, and with padding and unknown words among them
    texts = sample_answers(tmp_path, AutoTokenizer.from_pretrained(tmp_path), prompts, 12, seed=5)
    assert GoldJudge(tokenizer)._golds(prompts, texts) == gold_rewards(tokenizer, prompts, responses)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Options and ingredients of a tiny task."""
    folder = tmp_path_factory.mktemp("task")
    options = replace(
        DemoOptions(),
        output_dir=folder,
        sft_steps=2,
        num_pairs=8,
        reward_steps=1,
        num_eval_prompts=5,
        samples_per_prompt=4,
    )
    return options, prepare(options, Report(Console(quiet=True)))


@pytest.mark.slow
def test_in_small_policies_are_judged_by_the_true_quality_of_their_answers(task, tmp_path):
    options, made = task
    assert held_out_prompts(options) == made.corpus.eval_prompts
    comparison = read_comparison(FOLDER, "fig1")
    sft = options.output_dir / "sft_model"
    policies = {}
    for seed in (0, 100):
        save_model(build_policy(made.tokenizer, seed + 1), made.tokenizer, tmp_path / f"apa{seed}")
        policies[seed] = {"SFT": sft, "PPO": sft, "APA": tmp_path / f"apa{seed}"}
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    found = compare_in_small(comparison, policies, tmp_path / "out", options)
    assert torch.equal(torch.random.get_rng_state(), state)

    def rows(label, seed):
        lines = (tmp_path / "out" / f"{label}-seed{seed}.jsonl").read_text().splitlines()
        return [(row["prompt"], row["completion"]) for row in map(json.loads, lines)]

    def gold(prompt, text):
        words = text.split()
        kept = " ".join(word for word in words if word not in ("<eos>", "<pad>", "<unk>"))
        return gold_quality(prompt, kept, finished=words[-1] == "<eos>")

    for ours, theirs in comparison.pairs:
        wins = 0
        for seed in (0, 100):
            both = list(zip(rows(ours.lower(), seed), rows(theirs.lower(), seed), strict=True))
            assert [one[0] for one, _ in both] == made.corpus.eval_prompts * 4
            better = sum(gold(*one) > gold(*other) for one, other in both)
            assert found.seeds[f"{ours} vs {theirs}"][seed]["wins"] == better
            wins += better
        overall = found.overall[f"{ours} vs {theirs}"]
        assert (overall["wins"], overall["pairs"], overall["agreement"]) == (wins, 2 * 5 * 4, 1.0)
    # Equal policies do not answer with the same random numbers, which would make every pair a tie.
    assert rows("ppo", 0) != rows("sft", 0) and rows("sft", 0) != rows("sft", 100)
    assert len({sampling_seed(comparison, label, 0) for label in comparison.labels}) == 3
    again = compare_in_small(comparison, policies, tmp_path / "again", options)
    assert again == found
    with pytest.raises(ValueError, match=r"nowhere holds no policy: remove .*, and run this again"):
        compare_in_small(comparison, {0: {**policies[0], "APA": tmp_path / "nowhere"}}, tmp_path / "out", options)


@pytest.mark.slow
def test_the_command_runs_what_is_compared_in_small(tmp_path, capsys):
    argv = f"fig1 --scale mini --seeds 0 --configs {FOLDER} --output_dir {tmp_path}/out --iterations 1".split()
    argv += (
        "--evaluations 1 --samples_per_prompt 1 --batch_size 8 --sft_steps 2 --num_pairs 8 --reward_steps 1".split()
    )
    assert paper.main(argv) == 0
    printed = capsys.readouterr().out
    assert "PPO, seed 0" in printed and "APA, seed 0" in printed and "AWR" not in printed
    assert len((tmp_path / "out" / "fig1" / "apa-seed0.jsonl").read_text().splitlines()) == 48
    assert printed.endswith(f"{tmp_path}/out/fig1.png\n") and "| APA vs PPO | 0 |" in printed
    assert "LLaMA" not in printed and (tmp_path / "out" / "fig1.png").is_file()
    before = (tmp_path / "out" / "fig1.json").read_text()
    assert paper.main(argv) == 0 and "PPO, seed 0" not in capsys.readouterr().out
    assert (tmp_path / "out" / "fig1.json").read_text() == before


# ---- at full size ----


def test_what_stands_after_the_dashes_goes_to_the_command_that_has_it(tmp_path):
    folder = index(tmp_path)
    (folder / "w.yaml").write_text(
        "judge: openai\njudge_model: m\nrequest: {top_p: 0.5}\ncut_at: [a, 'b c']\nuse_cpu: true\n"
    )
    comparison = read_comparison(folder, "figw")
    more = (
        "--base_url http://h/v1 --generation-batch-size=4 --stop_strings x y --dtype float16 --judge_model n".split()
    )
    options = options_of(comparison, more)
    of_file = ["--config", str(folder / "g.yaml")]
    assert options.generate == [
        *of_file,
        "--generation_batch_size=4",
        *"--stop_strings x y --dtype float16".split(),
    ]
    of_file = ["--judge", "openai", "--judge_model", "m", "--request", '{"top_p": 0.5}', "--cut_at", "a", "b c"]
    of_file += ["--use_cpu"]
    assert options.winrate == [*of_file, "--base_url", "http://h/v1", "--dtype", "float16", "--judge_model", "n"]
    assert (options.judging.judge_model, options.judging.request) == ("n", {"top_p": 0.5})
    with pytest.raises(ValueError, match="unknown option 'bass_url'; did you mean 'base_url'"):
        options_of(comparison, ["--bass_url", "x"])
    with pytest.raises(ValueError, match="unexpected argument 'x'"):
        options_of(comparison, ["x", "--use_cpu"])
    (folder / "w.yaml").write_text("judge: local\njudge_model: m\nreference: rows\n")
    with pytest.raises(ValueError, match=r"w\.yaml: unknown option 'reference'; did you mean 'references'"):
        options_of(comparison, [])
    (folder / "g.yaml").write_text("batch: 8\n")
    (folder / "w.yaml").write_text("judge: local\njudge_model: m\n")
    with pytest.raises(ValueError, match=r"g\.yaml: unknown option 'batch'"):
        options_of(comparison, [])


def test_policies_that_start_apart_are_refused():
    assert common_start([{"model_name_or_path": "a"}] * 2) == "a"
    with pytest.raises(ValueError, match="start from a, b; it should be one model"):
        common_start([{"model_name_or_path": "a"}, {"model_name_or_path": "b"}])
    with pytest.raises(ValueError, match="start from None"):
        common_start([{}])


class LongerIsBetter:
    """A judge whose verdicts anybody can check."""

    identity, sees_order = {"judge": "length"}, True

    def __call__(self, questions):
        for number, question in enumerate(questions):
            first, second = len(question.first), len(question.second)
            yield number, TIE if first == second else (FIRST if first > second else SECOND)


# Of each policy, to two prompts: PPO beats SFT on one and ties on the other; APA beats both on both.
ANSWERS = {"start": "xx xx", "ppo": "xxx xx", "apa": "xxxx xxx"}


class Processes:
    """Stands for `subprocess.run`: keeps the commands, and does their work, with ANSWERS in place of models."""

    def __init__(self):
        self.commands, self.fail_at = [], None

    def __call__(self, command, check):
        assert check and command[1:3] == ["-m", "trl_apa.cli"]
        if len(self.commands) == self.fail_at:
            self.fail_at = None
            Path(command[-1]).write_text('{"prompt": "torn')
            raise subprocess.CalledProcessError(3, command)
        self.commands.append(command[3:])
        {"generate": self.generate, "winrate": self.winrate}[command[3]](command[4:])

    def generate(self, argv):
        model = argv[argv.index("--model_name_or_path") + 1]
        (answers,) = (text.split() for name, text in ANSWERS.items() if name in Path(model).name)
        rows = [{"prompt": f"prompt {number}", "completion": text} for number, text in enumerate(answers)]
        Path(argv[argv.index("--output") + 1]).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def winrate(self, argv):
        options = winrate.make_parser().parse_args(argv)
        ours, theirs = winrate.read_answers(options.ours), winrate.read_answers(options.theirs)
        judgements = compare(winrate.make_pairs(ours, theirs, None, []), LongerIsBetter())
        winrate.write(options.output, options, win_rate(judgements, num_resamples=1), judgements)

    def names(self):
        """Which files were made, in order."""
        return [Path(command[-1]).name.removesuffix(".part") for command in self.commands]


def test_what_a_killed_process_left_is_kept_for_the_same_command_alone(tmp_path, monkeypatch):
    path, source = tmp_path / "answers.jsonl", tmp_path / "source"
    source.write_text("")
    found = []

    def run(command, check):
        part = Path(command[-1])
        found.append(part.read_text() if part.exists() else None)
        part.write_text("half" if len(found) < 6 else "complete")
        (tmp_path / f".{part.name}.run.json").write_text("{}")
        if len(found) < 6:
            raise subprocess.CalledProcessError(-9, command)

    monkeypatch.setattr(subprocess, "run", run)

    def make(*options):
        try:
            _make(["generate", *options], path, [source])
        except subprocess.CalledProcessError:
            assert not path.exists()

    make()
    make()  # continues
    make("--seed", "1")
    make("--seed", "1")
    later = time.time() + 10
    os.utime(source, (later, later))
    make("--seed", "1")  # of another policy
    os.utime(source, (0, 0))
    make("--seed", "1")
    assert found == [None, "half", None, "half", None, "half"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["answers.jsonl", "answers.jsonl.command", "source"]
    make("--seed", "1")
    assert len(found) == 6 and path.read_text() == "complete"


@pytest.mark.slow
def test_full_size_answers_and_judges_what_is_not_there_yet(tmp_path, monkeypatch, capsys):
    processes = Processes()
    monkeypatch.setattr(subprocess, "run", processes)
    folder, runs, out = index(tmp_path), tmp_path / "runs", tmp_path / "out"
    argv = ["figw", "--scale", "full", "--configs", str(folder), "--runs", str(runs), "--output_dir", str(out)]
    argv += ["--", "--tie_margin", "0.5"]
    assert "`trl-apa paper figr --scale full` comes first" in refused(capsys, "paper", *argv)
    for label in ("ppo", "apa"):
        (runs / f"p-{label}-seed0").mkdir(parents=True)
        (runs / f"p-{label}-seed0" / "trainer_state.json").write_text("{}")

    processes.fail_at = 2  # the answers of APA
    assert paper.main(argv) == 3
    assert "run this again to continue" in capsys.readouterr().err
    assert not (out / "apa-seed0.jsonl").exists() and not (out / "figw.png").exists()
    assert paper.main(argv) == 0
    answers = ["sft-seed0.jsonl", "ppo-seed0.jsonl", "apa-seed0.jsonl"]
    verdicts = ["ppo-vs-sft-seed0.json", "apa-vs-sft-seed0.json", "apa-vs-ppo-seed0.json"]
    assert processes.names() == [*answers, *verdicts]
    models = ["a/start", str(runs / "p-ppo-seed0"), str(runs / "p-apa-seed0")]
    for number, (model, command) in enumerate(zip(models, processes.commands[:3], strict=True)):
        expected = ["generate", "--config", str(folder / "g.yaml"), "--model_name_or_path", model]
        assert command == [*expected, "--seed", str(number), "--output", str(out / f"{answers[number]}.part")]
    judge = ["--judge", "local", "--judge_model", "a/judge", "--tie_margin", "0.5"]
    of_ppo = ["winrate", str(out / "ppo-seed0.jsonl"), str(out / "sft-seed0.jsonl"), *judge]
    assert processes.commands[3] == [*of_ppo, "--output", str(out / f"{verdicts[0]}.part")]
    numbers = json.loads((out / "figw.json").read_text())
    assert {name: rate["win_rate"] for name, rate in numbers["overall"].items()} == {
        "PPO vs SFT": 0.75,  # (1 + 0.5) / 2
        "APA vs SFT": 1.0,
        "APA vs PPO": 1.0,
    }
    assert numbers["judge"] == "a/judge" and "| PPO vs SFT | 0 | 0.750 |" in (out / "figw.md").read_text()

    processes.commands.clear()
    assert paper.main(argv) == 0 and processes.commands == []
    # another judge, or answers that were made anew, make verdicts anew, and only those
    assert paper.main([*argv, "--judge_model", "another"]) == 0 and processes.names() == verdicts
    processes.commands.clear()
    later = (out / verdicts[2]).stat().st_mtime + 10
    os.utime(out / answers[1], (later, later))
    assert paper.main([*argv, "--judge_model", "another"]) == 0
    assert processes.names() == [verdicts[0], verdicts[2]]

    # other options of the answers, or other policies, make everything anew
    processes.commands.clear()
    assert paper.main([*argv, "--temperature", "0.7"]) == 0 and processes.names() == [*answers, *verdicts]
    processes.commands.clear()
    (folder / "g.yaml").write_text("dataset_name: others.jsonl\n")
    assert paper.main([*argv, "--temperature", "0.7"]) == 0 and processes.names() == [*answers, *verdicts]
