"""The demo: its grammar and gold reward by hand, its measurements against naive loops, and small whole runs."""

import io
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_apa import demo
from trl_apa.demo import networks
from trl_apa.demo.corpus import (
    ALL_REASONS,
    PRODUCTS,
    TRUE_REASONS,
    AnswerStyle,
    all_prompts,
    build_corpus,
    gold_quality,
    item_of,
    vocabulary,
    write_answer,
)
from trl_apa.demo.evaluation import divergence_and_entropy
from trl_apa.demo.networks import build_policy, build_tokenizer, decode, draw_prompts, encode, sample
from trl_apa.demo.options import DemoOptions, parse_options
from trl_apa.demo.reward import RewardModel, gold_rewards, joined_ids, make_pairs
from trl_apa.rollout import generation


QUESTION = "question : is the red lamp good ? answer :"
MEASURED = ("proxy_reward", "gold_reward", "kl", "entropy", "distinct", "length", "eos_share")
TINY = {
    "iterations": 2,
    "batch_size": 8,
    "sft_steps": 3,
    "num_pairs": 16,
    "reward_steps": 2,
    "num_eval_prompts": 6,
    "samples_per_prompt": 1,
}


# ---- the grammar and the gold reward ----


@pytest.mark.parametrize(
    ("answer", "quality"),
    [
        # named 1 + bright, cheap 2 * 0.5 + polite 1 = 3, the best there is
        ("the red lamp is bright and cheap . thank you !", 3.0),
        # a third true reason adds nothing
        ("the red lamp is bright and cheap and quiet . thank you !", 3.0),
        # named 1 + one true reason 0.5
        ("yes , the red lamp is bright .", 1.5),
        # the same with its reason said twice: - 0.25
        ("yes , the red lamp is bright and bright .", 1.25),
        # named 1 + true 0.5 - false 0.5
        ("the red lamp is bright and warm .", 1.0),
        # another product: - 0.5; "fast" is false of a lamp: - 0.5
        ("the red bike is fast .", -1.0),
        # the right product in another colour: not the item asked for, and another colour: - 0.5
        ("the blue lamp is nice .", -0.5),
        # no item: one true reason 0.5
        ("it is cheap .", 0.5),
        # evasion - 1, polite + 1
        ("i do not know . have a nice day !", 0.0),
        # "good" three times: - 2 * 0.25; named 1
        ("the red lamp is good . it is good . it is good .", 0.5),
        # a closing that does not close is not polite
        ("thank you ! it is cheap .", 0.5),
        ("", 0.0),
    ],
)
def test_gold_quality_by_hand(answer, quality):
    assert gold_quality(QUESTION, answer) == quality
    assert gold_quality(QUESTION, answer, finished=False) == quality - 1.0


def test_item_of_reads_every_prompt_and_refuses_others():
    assert tuple(item_of(QUESTION)) == ("red", "lamp")
    assert len({item_of(prompt) for prompt in all_prompts()}) == 36
    with pytest.raises(ValueError, match="red lamp"):
        item_of("question : is the lamp good ? answer :")


def test_every_reason_is_true_of_some_products_and_false_of_others():
    for reason in ALL_REASONS:
        assert 0 < sum(reason in TRUE_REASONS[product] for product in PRODUCTS) < len(PRODUCTS)


def test_better_writers_earn_more_gold():
    """Styles far apart; with 400 answers each the standard error of a mean is about 0.05."""
    good = AnswerStyle(evasive=0.0, names_item=1.0, true_reason=1.0, polite=1.0, repetitive=0.0)
    poor = AnswerStyle(evasive=0.5, names_item=0.0, true_reason=0.0, polite=0.0, repetitive=1.0)
    means = []
    for style in (poor, AnswerStyle(), good):
        rng = random.Random(0)
        golds = [gold_quality(QUESTION, write_answer(rng, QUESTION, style)) for _ in range(400)]
        assert max(golds) <= 3.0
        means.append(sum(golds) / len(golds))
    assert means[0] + 0.5 < means[1] < means[2] - 0.5


def test_same_seed_same_corpus():
    corpus = build_corpus(7, 50, 20)
    assert corpus == build_corpus(7, 50, 20)
    assert corpus != build_corpus(8, 50, 20)


def test_corpus_keeps_evaluation_prompts_apart():
    corpus = build_corpus(0, 500, 20)
    assert sorted(corpus.train_prompts + corpus.eval_prompts) == sorted(all_prompts())
    assert len(corpus.eval_prompts) == 20
    assert {row["prompt"] for row in corpus.demonstrations} <= set(corpus.train_prompts)
    with pytest.raises(ValueError, match="num_eval_prompts"):
        build_corpus(0, 10, len(all_prompts()))


# ---- tokenizer, sampling, reward model ----


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def policy(tokenizer):
    return build_policy(tokenizer, seed=0).eval()


def test_tokenizer_round_trip(tokenizer):
    assert len(tokenizer) == len(vocabulary()) + 3
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    rows = build_corpus(0, 300, 20).demonstrations
    texts = [row["prompt"] for row in rows] + [row["completion"] for row in rows]
    ids = encode(tokenizer, texts)
    assert not any((row == tokenizer.unk_token_id).any() for row in ids)
    assert [len(row) for row in ids] == [len(text.split()) for text in texts]
    assert decode(tokenizer, ids) == texts


def test_policy_is_small(policy):
    assert 100_000 < policy.num_parameters() < 120_000
    assert policy.config.model_type == "gpt_neox"


def test_sampling_has_a_generator_of_its_own(policy, tokenizer):
    prompts = all_prompts()[:5]
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = sample(policy, tokenizer, prompts, 6, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert decode(tokenizer, first) == decode(tokenizer, sample(policy, tokenizer, prompts, 6, seed=3))
    assert decode(tokenizer, first) != decode(tokenizer, sample(policy, tokenizer, prompts, 6, seed=4))


def test_draw_prompts_repeats_none_before_all_are_drawn():
    drawn = draw_prompts(random.Random(0), ["a", "b", "c"], 7)
    counts = sorted(drawn.count(prompt) for prompt in "abc")
    assert counts == [2, 2, 3]


@pytest.mark.parametrize(("sharpness", "low", "high"), [(1e6, 1.0, 1.0), (0.0, 0.3, 0.7), (-1e6, 0.0, 0.0)])
def test_judge_follows_gold_as_sharply_as_told(policy, tokenizer, sharpness, low, high):
    """A judge with sharpness 0 tosses a coin: 100 tosses leave [0.3, 0.7] with probability below 1e-4."""
    pairs = make_pairs(policy, tokenizer, all_prompts(), 400, 12, seed=0, sharpness=sharpness)
    chosen = gold_rewards(tokenizer, pairs.prompts, pairs.chosen)
    rejected = gold_rewards(tokenizer, pairs.prompts, pairs.rejected)
    unequal = [better > worse for better, worse in zip(chosen, rejected, strict=True) if better != worse]
    assert len(pairs) == 400
    assert len(unequal) > 100
    assert low <= sum(unequal) / len(unequal) <= high
    assert pairs.gold_agreement == pytest.approx((sum(unequal) + 0.5 * (400 - len(unequal))) / 400)


def test_joined_ids_do_not_end_an_unfinished_response(tokenizer):
    response = encode(tokenizer, ["it is good"])[0]
    (row,) = joined_ids(tokenizer, [QUESTION], [response])
    assert decode(tokenizer, [torch.tensor(row)]) == [f"{QUESTION} it is good"]
    assert tokenizer.eos_token_id not in row


class LastTokenNetwork:
    """Scores a sequence by its last real token id plus its length."""

    def __call__(self, input_ids, attention_mask):
        lengths_B = attention_mask.sum(dim=1)
        last_B = input_ids.gather(1, lengths_B[:, None] - 1)[:, 0]
        return type("Output", (), {"logits": (last_B + lengths_B).float()[:, None]})()


def test_reward_model_standardises(tokenizer):
    prompts = [QUESTION] * 3
    responses = [torch.tensor([5]), torch.tensor([5, 6]), torch.tensor([5, 6, 7])]
    reward_model = RewardModel(LastTokenNetwork(), tokenizer)
    # The question has 10 tokens: 5 + 11, 6 + 12, 7 + 13.
    assert [float(score) for score in reward_model(prompts, responses)] == [16.0, 18.0, 20.0]
    reward_model.standardise_on(prompts, responses)
    # mean 18, standard deviation (n - 1) 2
    assert [float(score) for score in reward_model(prompts, responses)] == [-1.0, 0.0, 1.0]
    assert all(score.dim() == 0 for score in reward_model(prompts, responses))


# ---- measurements ----


def test_divergence_and_entropy_against_a_loop(policy, tokenizer):
    """One sequence at a time, one token at a time, without padding."""
    other = build_policy(tokenizer, seed=1).eval()
    prompts = [QUESTION, "question : should i buy the black bike ? answer :"]
    responses = [torch.tensor([5, 9, 30]), torch.tensor([11, 12, 13, 14, 1])]
    kl_B, entropy = divergence_and_entropy(policy, other, tokenizer, prompts, responses)
    entropies = []
    for row, (prompt, response) in enumerate(zip(encode(tokenizer, prompts), responses, strict=True)):
        kl = 0.0
        for position in range(len(response)):
            context = torch.cat([prompt, response[:position]])[None]
            with torch.no_grad():
                p = policy(input_ids=context).logits[0, -1].double().softmax(-1)
                q = other(input_ids=context).logits[0, -1].double().softmax(-1)
            kl += float((p * (p / q).log()).sum())
            entropies.append(float(-(p * p.log()).sum()))
        assert float(kl_B[row]) == pytest.approx(kl, rel=1e-4)
    assert float(entropy) == pytest.approx(sum(entropies) / 8, rel=1e-4)


def test_divergence_to_itself_is_zero(policy, tokenizer):
    responses = [torch.tensor([5, 9, 30])]
    kl_B, _ = divergence_and_entropy(policy, policy, tokenizer, [QUESTION], responses)
    assert float(kl_B[0]) == 0.0


# ---- options ----


def test_options_from_the_command_line(tmp_path):
    argv = [
        "--loss-type",
        "ppo",
        "--seed",
        "3",
        "--iterations",
        "7",
        "--output-dir",
        str(tmp_path),
        "--kl-coef",
        "0.2",
    ]
    options = parse_options([*argv, "--learning-rate", "1e-3"])
    assert options == DemoOptions("ppo", 3, 7, tmp_path, 0.2, 1e-3)
    assert parse_options([]) == DemoOptions()


@pytest.mark.parametrize(
    "argv",
    [["--loss-type", "dpo"], ["--seed", "-1"], ["--iterations", "0"], ["--kl-coef", "0"], ["--learning-rate", "nan"]],
)
def test_wrong_options_exit_with_their_name(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_options(argv)
    assert exit_info.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "matplotlib" else object())
    assert demo.main([]) == 1
    assert "matplotlib: pip install 'trl-apa[demo]'" in capsys.readouterr().err


# ---- whole runs ----


def quiet_run(output_dir, terminal=False, **options):
    from rich.console import Console

    from trl_apa.demo.pipeline import run_demo
    from trl_apa.demo.report import Report

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=150)
    result = run_demo(DemoOptions(output_dir=output_dir, **options), Report(console))
    return result, screen.getvalue()


@pytest.fixture(scope="module")
def learning_run(tmp_path_factory):
    """A quarter of the default sizes."""
    directory = tmp_path_factory.mktemp("learning")
    sizes = {"sft_steps": 70, "num_pairs": 400, "reward_steps": 40, "iterations": 5, "samples_per_prompt": 2}
    result, _ = quiet_run(directory, **sizes)
    return directory, result


def test_it_learns(learning_run):
    """The same on every run of a machine, being seeded.

    Another machine rounds differently, which is like another seed: over seeds 0 to 4 the proxy reward rose by 0.80
    with standard deviation 0.17, so a rise below 0.3 has odds of about 1 in 600; gold rose by 0.44, deviation 0.11.
    """
    _, result = learning_run
    before, after = result["before"], result["after"]
    assert abs(before["proxy_reward"]) < 0.5
    assert after["proxy_reward"] > before["proxy_reward"] + 0.3
    assert after["gold_reward"] > before["gold_reward"]
    assert result["reward_model"]["held_out_accuracy"] > 0.5


def test_divergence_starts_at_zero_and_grows(learning_run):
    """The reference stays where it was although policy and reference came out of one supervised trainer."""
    directory, result = learning_run
    assert result["before"]["kl"] == 0.0
    assert result["after"]["kl"] > 0.1
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["kl"] == 0.0
    assert lines[-2]["objective/kl_k3"] > 0.1


def test_saved_models_are_the_ones_measured(learning_run, tokenizer):
    directory, _ = learning_run
    tokens = torch.tensor([tokenizer(QUESTION)["input_ids"]])
    logits = [AutoModelForCausalLM.from_pretrained(directory / name)(tokens).logits for name in ("sft_model", "model")]
    assert (logits[0] - logits[1]).abs().max() > 1e-2
    assert (directory / "reward_model" / "config.json").exists()
    assert (directory / "model" / "tokenizer.json").exists()


def test_metrics_file(learning_run):
    directory, result = learning_run
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4, 5, 5]
    assert {name: lines[0][f"eval/{name}"] for name in MEASURED} == result["before"]
    assert {name: lines[-1][f"eval/{name}"] for name in MEASURED} == result["after"]
    for line in lines[1:-1]:
        assert {*MEASURED, "objective/kl", "apa/loss/policy", "apa/val/var_explained"} <= line.keys()
        assert not any(name.startswith("time/") for name in line)
    timings = json.loads((directory / "timings.json").read_text())
    assert {"supervised fine-tuning", "reward model", "APA", "total"} <= timings["stages"].keys()
    assert len(timings["iterations"]) == 5


def test_picture(learning_run):
    directory, _ = learning_run
    header = (directory / "curves.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") == 1080


@pytest.mark.slow
def test_same_seed_same_numbers(tmp_path):
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    quiet_run(first, seed=5, **TINY)
    torch.manual_seed(123)
    random.seed(123)
    quiet_run(second, seed=5, **TINY)
    quiet_run(other, seed=6, **TINY)
    for name in ("metrics.jsonl", "result.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()


@pytest.mark.parametrize("loss_type", [pytest.param("awr", marks=pytest.mark.slow), "ppo"])
def test_other_losses_run_in_a_terminal(tmp_path, loss_type):
    result, screen = quiet_run(tmp_path, terminal=True, loss_type=loss_type, kl_coef=0.5, **TINY)
    assert result["options"]["loss_type"] == loss_type
    assert result["options"]["kl_coef"] == 0.5
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["objective/kl_coef"] == 0.5
    assert "\x1b[" in screen
    for text in ("supervised fine-tuning", "reward model", "iteration", "gold reward", "before (SFT)", "after"):
        assert text in screen


def test_main_prints_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    argv = ["--iterations", "1", "--sft-steps", "2", "--pairs", "8", "--reward-steps", "1"]
    assert demo.main([*argv, "--output-dir", str(tmp_path)]) == 0
    screen = capsys.readouterr()
    assert "iteration 1/1: proxy reward" in screen.out
    assert "\x1b" not in screen.out
    assert screen.err == ""


def test_many_prompts_are_answered_batch_after_batch_with_the_numbers_of_published_results(monkeypatch):
    """Rows that take the places of others would draw other random numbers."""
    asked, original = [], generation._tokens_of_batch
    monkeypatch.setattr(networks, "AT_ONCE", 3)
    monkeypatch.setattr(generation, "_tokens_of_batch", lambda *a, **k: asked.append(a[1]) or original(*a, **k))
    tokenizer = networks.build_tokenizer()
    policy, prompts = networks.build_policy(tokenizer, 0), ["maybe .", "yes , it is good .", "well ,"] * 3
    responses = networks.sample(policy, tokenizer, prompts, 5, seed=1)
    assert [len(batch) for batch in asked] == [3, 3, 3] and len(responses) == 9
    lengths = [len(query) for batch in asked for query in batch]
    assert lengths == sorted(lengths)
