"""`rollout_func=`: a function of the user's that samples, with TRL's signature."""

import numpy as np
import pytest
import torch

from tests.test_tools import collected, length_reward
from tests.tool_dialogues import add, ask, tool_tokenizer, tool_trainer
from trl_apa.tools.rollout_function import read_rollouts


def fixed(prompts, trainer):
    """Two prompts, each with a tool's answer in the middle of its completion."""
    count = len(prompts)
    return {
        "prompt_ids": [[10 + row, 11] for row in range(count)],
        "completion_ids": [[20, 21, 22, 23 + row] for row in range(count)],
        "logprobs": [[-1.0] * 4 for _ in range(count)],
        "env_mask": [[1, 0, 0, 1] for _ in range(count)],
        "steps": list(range(count)),
        "game": "chess",
    }


def test_what_the_function_returns_is_learned_from_and_its_columns_are_read_by_reward_functions(tmp_path):
    seen = {}

    def reward(prompts, completions, completion_ids, steps, game, **columns):
        seen.update(prompts=prompts, ids=completion_ids, steps=steps, game=game, more=set(columns))
        return [float(step) for step in steps]

    trainer, _ = tool_trainer(tmp_path, None, ask("one?", "two?"), reward=reward, rollout_func=fixed)
    kept = collected(trainer)
    trainer.train()
    [(queries, responses, scores, masks)] = kept
    assert [query.tolist() for query in queries] == [[10, 11], [11, 11]]
    assert [response.tolist() for response in responses] == [[20, 21, 22, 23], [20, 21, 22, 24]]
    assert [mask.tolist() for mask in masks] == [[True, False, False, True]] * 2
    assert list(map(float, scores)) == [0.0, 1.0] and seen["game"] == ["chess"] * 2
    assert {message["content"] for [message] in seen["prompts"]} == {"one?", "two?"}
    assert "env_mask" not in seen["more"] and "logprobs" not in seen["more"]
    log = next(log for log in trainer.state.log_history if "tokens/counted" in log)
    assert log["tokens/counted"] == 4


def test_it_may_sample_with_the_trainer_whose_log_probs_are_then_known(tmp_path):
    calls = []

    def sample(prompts, trainer):
        calls.append(prompts)
        tokenizer = trainer.processing_class
        ids = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False) for prompt in prompts
        ]
        responses = trainer.generate([torch.tensor(row) for row in ids], return_prompt=False, max_new_tokens=9)
        return {"prompt_ids": ids, "completion_ids": responses}

    options = {"num_generations": 2, "batch_size": 4, "mini_batch_size": 4}
    trainer, _ = tool_trainer(
        tmp_path, None, ask("one?", "two?"), reward=length_reward, rollout_func=sample, config=options
    )
    trainer.train()
    [prompts] = calls
    assert len(prompts) == 4 and sorted(map(str, prompts))[0] == sorted(map(str, prompts))[1]  # each twice
    assert any(log.get("sampling/logprob_difference_max", 1.0) < 1e-4 for log in trainer.state.log_history)
    assert "eval_reward" in trainer.evaluate(ask("one?", "two?"))


def test_the_function_may_edit_its_prompts(tmp_path):
    def edit(prompts, trainer):
        answer = fixed(prompts, trainer)
        prompts.clear()
        return answer

    rows = ask("one?", "two?")
    trainer, _ = tool_trainer(tmp_path, None, rows, reward=length_reward, rollout_func=edit)
    trainer.train()
    assert trainer.state.global_step == 1 and rows == ask("one?", "two?")


GOOD = {"prompt_ids": [[1], [1]], "completion_ids": [[5, 6], [5]]}


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, "returned a NoneType; it should return a dict"),
        ([GOOD], "returned a list"),
        ({"completion_ids": [[1], [1]]}, "returned no prompt_ids"),
        ({}, "no prompt_ids and no completion_ids"),
        ({**GOOD, "completion_ids": [[5]]}, "a list of 1 as 'completion_ids'; it should hold 2 rows"),
        ({**GOOD, "completion_ids": [[5], []]}, r"\[\] as completion_ids\[1\]"),
        ({**GOOD, "completion_ids": [[5], ["a"]]}, r"completion_ids\[1\]; it should be a list of token ids"),
        ({**GOOD, "completion_ids": [[5], [999]]}, r"responses\[1\] .*999"),
        ({**GOOD, "prompt_ids": "ab"}, "a str as 'prompt_ids'"),
        ({**GOOD, "env_mask": [[1, 0]]}, "'env_mask'"),
        ({**GOOD, "env_mask": [[1], [1]]}, r"env_mask\[0\]; it should hold 0 or 1 for each of the 2 tokens"),
        ({**GOOD, "env_mask": [[1, 2], [1]]}, r"env_mask\[0\]"),
        ({**GOOD, "env_mask": [[1, 1], [0]]}, r"only zeros as env_mask\[1\]"),
        ({**GOOD, "score": [1]}, "a list of 1 as 'score'"),
    ],
)
def test_an_answer_that_cannot_be_learned_from_names_the_key_and_the_row(tmp_path, answer, problem):
    trainer, _ = tool_trainer(
        tmp_path, None, ask("one?", "two?"), reward=length_reward, rollout_func=lambda prompts, trainer: answer
    )
    with pytest.raises(ValueError, match=problem):
        trainer.train()


def test_a_function_that_fails_raises_its_own_error(tmp_path):
    def fail(prompts, trainer):
        raise OSError("the engine is away")

    trainer, _ = tool_trainer(tmp_path, None, ask("one?"), reward=length_reward, rollout_func=fail)
    with pytest.raises(OSError, match="the engine is away"):
        trainer.train()


@pytest.mark.parametrize("more", [{"tools": [add]}, {"environment_factory": object}])
def test_it_does_not_go_with_tools(tmp_path, more):
    with pytest.raises(ValueError, match="rollout_func samples by itself"):
        tool_trainer(tmp_path, None, ask("one?"), rollout_func=fixed, **more)


def test_it_must_be_a_function(tmp_path):
    with pytest.raises(ValueError, match="rollout_func is a str"):
        tool_trainer(tmp_path, None, ask("one?"), rollout_func="sample", tokenizer=tool_tokenizer())


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ([1, 2], [1, 2]),
        ((1, 2), [1, 2]),
        (torch.tensor([1.5, 2.5]), [1.5, 2.5]),
        (np.array([1, 2]), [1, 2]),
        (np.array(["a", "b"]), ["a", "b"]),
        ((1, 2, 3), [(1, 2, 3)] * 2),
        (np.array(3), [np.array(3)] * 2),
        ("ab", ["ab"] * 2),
        ({"a": 1, "b": 2}, [{"a": 1, "b": 2}] * 2),
    ],
)
def test_a_column_has_a_row_for_each_rollout_or_one_value_for_all(given, rows):
    ids = {"prompt_ids": np.array([[1, 2], [3, 4]]), "completion_ids": [np.array([5]), torch.tensor([6, 7])]}
    read = read_rollouts({**ids, "env_mask": [np.array([1]), [1, 0]], "column": given}, 2)
    assert read.columns == {"column": rows}
    assert [response.tolist() for response in read.responses] == [[5], [6, 7]]


def test_a_column_of_a_tensor_s_rows_is_a_list_of_them():
    ids = {"prompt_ids": [[1], [1]], "completion_ids": [[5], [6]]}
    read = read_rollouts({**ids, "states": torch.eye(2)}, 2)
    assert [row.tolist() for row in read.columns["states"]] == [[1.0, 0.0], [0.0, 1.0]]
