"""`examples/calculator`: its task is what it says it is, and its command runs to the end in small."""

import importlib
import json
import random
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from trl_apa.tools.messages import asked_calls
from trl_apa.tools.template import ToolTemplate


ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "calculator"


@pytest.fixture
def example_module(monkeypatch):
    """Import a module of the example, which is no package, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    names = {path.stem for path in EXAMPLE.glob("*.py")}
    for name in names & set(sys.modules):
        monkeypatch.delitem(sys.modules, name)
    yield importlib.import_module
    for name in names & set(sys.modules):
        del sys.modules[name]


def test_demonstrations_are_written_as_the_chat_template_and_the_tool_write(example_module):
    task = example_module("task")
    tokenizer, rng = task.build_tokenizer(), random.Random(3)
    template = ToolTemplate(tokenizer, [tokenizer.eos_token_id])
    context = tokenizer.apply_chat_template(task.rows_of([[12, 34, 56]])[0]["prompt"], add_generation_prompt=True)
    assert tokenizer.decode(context["input_ids"]) == "<user>12+34+56<end><policy>"
    seen = 0
    for numbers in task.draw_sums(rng, 200):
        pieces = task.demonstration(numbers, rng)
        for (text, own), (following, _) in pairwise(pieces):
            if own:
                ids = tokenizer(text)["input_ids"]
                message = template.read(ids, context["input_ids"], [])
                [(name, arguments)] = asked_calls(message)
                answer = [{"role": "tool", "name": name, "content": str(task.add(**arguments))}]
                assert tokenizer.decode(template.told_ids(answer, ids[-1])) == following
                seen += 1
        assert re.fullmatch(r"\d+<end>", pieces[-1][0]) and task.UNKNOWN not in tokenizer.decode(
            tokenizer("".join(text for text, _ in pieces))["input_ids"]
        )
    assert seen > 50


def test_the_reward_is_exact_and_sums_are_drawn_once(example_module):
    task = example_module("task")
    sums = task.draw_sums(random.Random(0), 5000)
    assert len(set(map(tuple, sums))) == 5000 and {len(str(n)) for numbers in sums for n in numbers} == {2}
    assert {n for numbers in sums for n in numbers} == set(range(10, 100))
    called = [{"role": "assistant", "content": "", "tool_calls": [{}]}, {"role": "tool", "content": "46"}]
    completions = [[{"content": "102"}], [*called, {"content": "102"}], [*called, {"content": "1020"}], called]
    assert task.is_right(completions, [102, 102, 102, 46]) == [1.0, 1.0, 0.0, 1.0]
    assert task.num_calls(completions) == [0.0, 1.0, 1.0, 1.0]


def test_the_command_of_its_readme_runs_in_small(example_module, tmp_path):
    [command] = re.findall(r"^python (examples/calculator/run.py .*)$", (EXAMPLE / "README.md").read_text(), re.M)
    script, *arguments = shlex.split(command)
    assert (ROOT / script).exists() and arguments[0] == "--output_dir"
    curves = example_module("run").main(["--output_dir", str(tmp_path / "out"), "--quick", "True"])
    assert list(curves) == ["critic", "critic_turns", "group"]
    for method, [rows] in curves.items():
        assert [row["rollouts"] for row in rows] == [0, 32, 64]
        assert all(0 <= row["solved"] <= 1 and row["calls"] >= 0 for row in rows)
        assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-4)
        log = [json.loads(line) for line in (tmp_path / "out" / f"{method}-seed0" / "log.jsonl").open()]
        assert {"turns/mean", "tools/call_frequency"} < set().union(*log)
        assert any("apa/val/error" in row for row in log) == (method != "group")
    assert json.loads((tmp_path / "out" / "curves.json").read_text()) == curves
    assert (tmp_path / "out" / "calculator.png").read_bytes()[:4] == b"\x89PNG"
