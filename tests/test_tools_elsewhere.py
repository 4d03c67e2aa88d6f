"""Rollouts with tools where vLLM samples, and in two processes."""

import pytest
import torch

from tests._engines import announce_rank
from tests._two_processes import run_in_two_processes
from tests.fake_vllm import install
from tests.test_tools import collected, length_reward
from tests.tool_dialogues import add, ask, call, tool_model, tool_trainer
from trl_apa.tools.template import ToolTemplate


def look() -> str:
    """Looks."""
    return "seen"


def always_calls(self, ids, context, tools):
    asked = {"type": "function", "function": {"name": "look", "arguments": {}}}
    return {"role": "assistant", "content": "", "tool_calls": [asked]}


def test_vllm_samples_every_turn_as_generate_does(tmp_path, monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(ToolTemplate, "read", always_calls)
    model = tool_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # answers that are not all alike
    model.save_pretrained(tmp_path / "model")
    options = {"max_completion_length": 90, "max_tool_calling_iterations": 1, "stop_strings": ["a", "e", "t"],
               "top_k": 1, "max_steps": 1, "learning_rate": 1e-3}  # fmt: skip
    kept = []
    for use_vllm in (False, True):
        made, _ = tool_trainer(
            tmp_path, None, ask("one?", "two?"), model=type(model).from_pretrained(tmp_path / "model"),
            reward=length_reward, tools=[look], config={**options, "use_vllm": use_vllm},
        )  # fmt: skip
        kept.append(collected(made))
        made.train()
    for plain, sampled in zip(*kept, strict=True):
        for column in (0, 1, 3):
            assert [row.tolist() for row in plain[column]] == [row.tolist() for row in sampled[column]]
    assert any(not mask.all() for _, _, _, masks in kept[0] for mask in masks)


def unequal(rank, folder):
    """Each process has as many prompts; those of one call twice, of the other never."""
    announce_rank(rank)
    turns = {"first?": [call("add", a=1, b=2), call("add", a=3, b=4), "Done."], "second?": ["No."]}
    rows = ask("first?", "second?")
    made, script = tool_trainer(
        f"{folder}/{rank}", turns, rows, reward=length_reward, tools=[add],
        config={"batch_size": 1, "mini_batch_size": 1, "max_steps": 2, "learning_rate": 1e-3},
    )  # fmt: skip
    kept = collected(made)
    made.train()
    weights = [parameter.detach() for parameter in made.model.parameters()]
    logs = [log["turns/mean"] for log in made.state.log_history if "turns/mean" in log]
    return [len(prompts) for prompts, _ in script.asked], [len(row) for k in kept for row in k[1]], weights, logs


@pytest.mark.slow
def test_processes_with_other_turns_stay_together(tmp_path):
    (asked, own, weights, logs), (others, other_own, other_weights, other_logs) = run_in_two_processes(
        unequal, str(tmp_path)
    )
    assert asked == others == [1] * 6  # three turns an iteration in both, of which one process needs only the first
    assert [{one, other} for one, other in zip(own, other_own, strict=True)] == [{216, 4}] * 2
    assert all(torch.equal(one, other) for one, other in zip(weights, other_weights, strict=True))
    assert logs == [2.0, 2.0] and all(log == 2.0 for log in other_logs)
