"""The page on tools: its scripts run, and its statistics are those that a run reports."""

import re
from pathlib import Path

import pytest

from tests.test_tools import length_reward
from tests.tool_dialogues import Script, add, ask, call, tool_model, tool_tokenizer, tool_trainer


DOCS = Path(__file__).resolve().parents[1] / "docs"
CALCULATOR, COUNTER, _ = re.findall(r"```python\n(.*?)```", (DOCS / "tools.md").read_text(), flags=re.DOTALL)


def test_the_calculator_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tool_tokenizer()
    script = Script(tokenizer, {"40 + 2?": [call("add", a=40, b=2), "It is 42."]})
    code = CALCULATOR.replace('"Qwen/Qwen3-0.6B"', "tool_model(), processing_class=tokenizer, sampler=script")
    code = code.replace(
        "max_steps=1000", "max_steps=1, ppo_epochs=1, batch_size=2, mini_batch_size=2, logging_steps=1, use_cpu=True"
    )
    scope = {"tool_model": tool_model, "tokenizer": tokenizer, "script": script}
    exec(code, scope)
    [log] = [log for log in scope["trainer"].state.log_history if "apa/mean_scores" in log]
    assert log["apa/mean_scores"] == 1.0 and log["turns/mean"] == 2.0


def test_the_counter_is_an_environment(tmp_path):
    scope = {}
    exec(COUNTER, scope)
    turns = {"Count.": [call("increase", by=2), call("increase", by=1), "Done."]}
    rows = [{**ask("Count.")[0], "goal": 3}]
    trainer, _ = tool_trainer(tmp_path, turns, rows, environment_factory=scope["Counter"])
    trainer.train()
    [log] = [log for log in trainer.state.log_history if "turns/mean" in log]
    assert log["apa/mean_scores"] == pytest.approx(0.0) and log["turns/reward_2"] == pytest.approx(-0.1)


def test_the_statistics_are_documented(tmp_path):
    part = (DOCS / "statistics.md").read_text().partition("## With tools and environments")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `([\w/]+)`", part, flags=re.MULTILINE)) - {"turns/reward_1"}
    trainer, _ = tool_trainer(tmp_path, {"?": ["No."]}, ask("What?"), reward=length_reward, tools=[add])
    trainer.train()
    reported = {name for log in trainer.state.log_history for name in log if name.startswith(("turns/", "tools/"))}
    assert documented == reported
