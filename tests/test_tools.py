"""`tools=`: what the policy may call in `train` and `evaluate`, what it learns from, and what reward functions see."""

import asyncio
import copy
import json
import threading

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import LlamaConfig, LlamaForSequenceClassification, TrainerCallback

from tests.tool_dialogues import Script, add, ask, call, tool_model, tool_tokenizer, tool_trainer
from trl_apa.rollout.reward_calls import private_copy
from trl_apa.rollout.scoring import RewardModel
from trl_apa.rollout.texts import scored_conversation_ids
from trl_apa.tools.template import ToolTemplate


def length_reward(completion_ids, **_):
    return [len(ids) / 100 for ids in completion_ids]


def told_apart(trainer, response, mask):
    """The texts that were sampled and told, in turn."""
    pieces, before = [], None
    for token, sampled in zip(response.tolist(), mask.tolist(), strict=True):
        if sampled != before:
            pieces.append([])
        pieces[-1].append(token)
        before = sampled
    return [trainer.processing_class.decode(piece) for piece in pieces]


def collected(trainer):
    """What every iteration of a run learns from."""
    kept, collect = [], trainer._collect

    def spy(*arguments):
        kept.append(copy.deepcopy(arguments))
        return collect(*arguments)

    trainer._collect = spy
    return kept


def test_tools_are_called_and_their_answers_are_masked(tmp_path):
    seen = {}

    def reward(prompts, completions, completion_ids, level, **_):
        seen.update(prompts=prompts, completions=completions, level=level)
        return [1.0, 0.0]

    async def multiply(a: int, b: int) -> int:
        """Multiplies two numbers.

        Args:
            a: the first.
            b: the second.
        """
        await asyncio.sleep(0)
        return a * b

    both = f"{call('multiply', a=6, b=7)}\n{call('add', a=10, b=20)}"
    turns = {"first?": [both, call("add", a=12, b=0), "So 42."], "second?": ["I do not know."]}
    rows = [{**row, "level": i} for i, row in enumerate(ask("first?", "second?"))]
    trainer, script = tool_trainer(tmp_path, turns, rows, reward=reward, tools=[add, multiply])
    kept = collected(trainer)
    trainer.train()
    [(queries, responses, _, masks)] = kept
    row = seen["level"].index(0)
    assert told_apart(trainer, responses[row], masks[row]) == [
        f"{both}<|im_end|>",
        "\n<|im_start|>user\n<tool_response>\n42\n</tool_response>\n<tool_response>\n30\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n",
        f"{call('add', a=12, b=0)}<|im_end|>",
        "\n<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        "So 42.<|im_end|>",
    ]
    assert masks[1 - row].all()
    assert [message["role"] for message in seen["completions"][row]] == ["assistant", "tool", "tool", "assistant",
                                                                        "tool", "assistant"]  # fmt: skip
    assert seen["completions"][row][1] == {"role": "tool", "name": "multiply", "content": "42"}
    assert seen["prompts"][row] == [{"role": "user", "content": "first?"}]
    assert '"name": "multiply"' in trainer.processing_class.decode(queries[row])
    assert [len(prompts) for prompts, _ in script.asked] == [2, 1, 1]
    [log] = [log for log in trainer.state.log_history if "turns/mean" in log]
    assert (log["turns/mean"], log["tools/call_frequency"], log["tools/failure_frequency"]) == (2.0, 1.5, 0.0)


def test_token_ids_stay_as_sampled_where_the_tokenizer_and_the_template_would_write_others(tmp_path):
    tokenizer = tool_tokenizer()

    def ids(text):
        return tokenizer(text)["input_ids"]

    # "42" has a token of its own; the policy writes it with two, and thoughts that Qwen3's template drops later.
    apart = tokenizer.convert_tokens_to_ids(["4", "2"])
    first = [
        *ids("<think>\n\n</think>\n\n"),
        *ids(call("add", a=7, b=0))[:-1],
        *ids("\n"),
        *ids("</tool_call><|im_end|>"),
    ]
    last = [*ids("It is "), *apart, *ids("<|im_end|>")]
    assert tokenizer.convert_tokens_to_ids("42") in ids(tokenizer.decode(last))
    trainer, script = tool_trainer(
        tmp_path, {"sum?": [first, last]}, ask("sum?"), tokenizer=tokenizer, reward=length_reward, tools=[add]
    )
    kept = collected(trainer)
    trainer.train()
    [(queries, [response], _, [mask])] = kept
    assert response[mask].tolist() == [*first, *last]
    assert script.asked[1][0] == [[*queries[0].tolist(), *response[: -len(last)].tolist()]]


@pytest.mark.parametrize("credit", [{}, {"turn_discount": 0.5, "gae_over": "turns"}])
def test_a_run_with_a_tool_learns_what_step_learns_from_the_same_tokens(tmp_path, credit):
    turns = {"first?": [call("add", a=40, b=2), "So 42."], "second?": ["No."]}
    rows, options = ask("first?", "second?"), {"max_steps": 4, "ppo_epochs": 2, "learning_rate": 1e-3, **credit}
    trainer, _ = tool_trainer(tmp_path / "a", turns, rows, reward=length_reward, tools=[add], config=options)
    kept = collected(trainer)
    trainer.train()
    assert len(kept) == 2 and not kept[0][3][[len(q) for q in kept[0][1]].index(max(map(len, kept[0][1])))].all()
    by_hand, _ = tool_trainer(tmp_path / "b", None, rows, config={**options, "steps": 4})
    logs = [log for log in trainer.state.log_history if "objective/kl" in log]
    for number, (queries, responses, scores, masks) in enumerate(kept):
        stats = by_hand.step(queries, responses, scores, masks)
        for name in ("apa/loss/total", "tokens/counted", "objective/kl", "apa/val/error", "apa/returns/mean"):
            assert stats[name] == pytest.approx(logs[number][name], rel=1e-4, abs=1e-6), name
    for one, other in zip(trainer.model.parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("said", ["42", "9" * 40])
def test_no_token_of_a_tool_counts(tmp_path, said):
    def tell(a: int, b: int) -> str:
        """Tells.

        Args:
            a: a number.
            b: a number.
        """
        return said

    tell.__name__ = "add"
    turns = {"first?": [call("add", a=40, b=2), "So 42."]}
    trainer, _ = tool_trainer(tmp_path, turns, ask("first?"), reward=lambda completions, **_: [0.5], tools=[tell])
    trainer.train()
    [log] = [log for log in trainer.state.log_history if "tokens/counted" in log]
    sampled = f"{turns['first?'][0]}<|im_end|>So 42.<|im_end|>"
    assert log["tokens/counted"] == len(trainer.processing_class(sampled)["input_ids"])
    assert log["turns/told_tokens_mean"] > len(said) / 2


def test_the_policy_s_own_samples_are_noted_with_their_log_probs_in_every_turn(tmp_path):
    """Sampled by the model itself, every turn of which is read as a call."""
    tokenizer = tool_tokenizer()

    def look() -> str:
        """Looks."""
        return "seen"

    def always_calls(self, ids, context, tools):
        asked = {"type": "function", "function": {"name": "look", "arguments": {}}}
        return {"role": "assistant", "content": "", "tool_calls": [asked]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToolTemplate, "read", always_calls)
        options = {"max_completion_length": 150, "max_tool_calling_iterations": 2, "stop_strings": ["a", "e"]}
        trainer, _ = tool_trainer(
            tmp_path,
            None,
            ask("one?", "two?"),
            tokenizer=tokenizer,
            reward=length_reward,
            tools=[look],
            config=options,
        )
        kept = collected(trainer)
        trainer.train()
    [log] = [log for log in trainer.state.log_history if "turns/mean" in log]
    assert log["turns/mean"] > 1 and log["turns/told_tokens_mean"] > 0
    assert log["sampling/logprob_difference_max"] < 1e-4
    [(_, responses, _, masks)] = kept
    assert all(len(response) <= 150 and mask[-1] for response, mask in zip(responses, masks, strict=True))


def failing(a: int, b: int) -> int:
    """Fails.

    Args:
        a: a number.
        b: a number.
    """
    raise ZeroDivisionError(f"cannot add {a} and {b}")


def test_failures_are_told_and_counted_and_nothing_ends_the_run(tmp_path):
    release = threading.Event()

    def hang() -> str:
        """Hangs."""
        release.wait(20)
        return "late"

    seen = []

    def reward(prompts, completions, **_):
        seen.extend(completions)
        return [0.0] * len(prompts)

    turns = {
        "first?": [call("failing", a=1, b=2), "Well."],
        "second?": [call("nothing_such"), "Well."],
        "third?": [call("hang"), "Well."],
        "fourth?": [call("add", a=1), "<tool_call>\nno json\n</tool_call>"],
    }
    trainer, _ = tool_trainer(
        tmp_path, turns, ask(*turns), reward=reward, tools=[failing, add, hang], config={"tool_timeout": 0.3}
    )
    trainer.train()
    release.set()
    told = [message["content"] for row in seen for message in row if message["role"] == "tool"]
    assert sorted(told) == sorted([
        "{'error': 'Tool nothing_such not found.'}",
        "{'error': 'cannot add 1 and 2'}",
        "{'error': 'hang gave no answer within 0.3 seconds'}",
        "{'error': \"add() missing 1 required positional argument: 'b'\"}",
    ])  # fmt: skip
    [log] = [log for log in trainer.state.log_history if "turns/mean" in log]
    assert (log["tools/failure_frequency"], log["tools/timeout_frequency"]) == (1.0, 0.25)


def test_limits_of_tokens_and_of_rounds(tmp_path):
    turns = {"first?": [call("add", a=1, b=2)]}
    options = {"max_completion_length": 150}
    trainer, script = tool_trainer(tmp_path, turns, ask("first?"), reward=length_reward, tools=[add], config=options)
    kept = collected(trainer)
    trainer.train()
    assert script.asked[0][1] == [150] and len(kept[0][1][0]) == 150  # the second turn is cut
    [log] = [log for log in trainer.state.log_history if "turns/mean" in log]
    assert (log["turns/mean"], log["tokens/eos_share"]) == (2.0, 0.0)
    options = {"max_completion_length": 60}
    trainer, script = tool_trainer(tmp_path, turns, ask("first?"), reward=length_reward, tools=[add], config=options)
    trainer.train()
    [log] = [log for log in trainer.state.log_history if "turns/mean" in log]
    assert (log["turns/dropped_share"], log["turns/told_tokens_mean"]) == (1.0, 0.0)
    options = {"max_tool_calling_iterations": 1}
    trainer, script = tool_trainer(tmp_path, turns, ask("first?"), reward=length_reward, tools=[add], config=options)
    trainer.train()
    assert len(script.asked) == 2
    [log] = [log for log in trainer.state.log_history if "turns/mean" in log]
    assert log["turns/unanswered_share"] == 1.0


def test_evaluation_has_tools_too_for_the_policy_and_for_pi_init(tmp_path):
    turns = {"first?": [call("add", a=40, b=2), "So 42."]}
    trainer, script = tool_trainer(tmp_path, turns, ask("first?"), reward=length_reward, tools=[add])
    metrics = trainer.evaluate(ask("first?"))
    assert len(script.asked) == 2  # the policy is not sampled beside pi_init
    sampled = len(trainer.processing_class(f"{call('add', a=40, b=2)}<|im_end|>So 42.<|im_end|>")["input_ids"])
    assert metrics["eval_response_length"] == sampled and metrics["eval_eos_share"] == 1.0
    assert "eval_win_rate" in metrics


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


class Drawing(Script):
    """Says what a random number decides."""

    def sample(self, policy, prompts, request):
        replies = []
        for prompt in prompts:
            first = "<tool_response>" not in self.tokenizer.decode(prompt)
            number = int(torch.randint(0, 50, ()))
            text = call("add", a=number, b=1) if first and number % 3 else f"So {number}."
            replies.append(self.tokenizer(text + self.end)["input_ids"])
        return replies


def test_a_resumed_run_with_tools_is_the_run_that_did_not_stop(tmp_path):
    tokenizer = tool_tokenizer()
    options = {"max_steps": 4, "ppo_epochs": 2, "save_strategy": "steps", "save_steps": 1,
               "learning_rate": 1e-3}  # fmt: skip

    def trainer_in(folder, **kwargs):
        trainer, script = tool_trainer(
            folder, {}, ask("first?", "second?"), tokenizer=tokenizer, reward=length_reward, tools=[add],
            config=options, **kwargs,
        )  # fmt: skip
        script.__class__ = Drawing
        return trainer

    whole = trainer_in(tmp_path / "a")
    whole.train()
    trainer_in(tmp_path / "b", callbacks=[Stop(3)]).train()
    resumed = trainer_in(tmp_path / "b")
    resumed.train(resume_from_checkpoint=True)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    logs = [[log for log in t.state.log_history if "turns/mean" in log] for t in (whole, resumed)]
    assert [log["turns/mean"] for log in logs[0]] == [log["turns/mean"] for log in logs[1]]


def test_another_set_of_tools_is_another_run(tmp_path):
    turns, options = {"first?": ["No."]}, {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    options["lr_scheduler_type"] = "constant"
    tool_trainer(
        tmp_path, turns, ask("first?"), reward=length_reward, tools=[add], config=options, callbacks=[Stop(1)]
    )[0].train()
    other, _ = tool_trainer(tmp_path, turns, ask("first?"), reward=length_reward, tools=[failing], config=options)
    with pytest.raises(ValueError, match=r"tools was \['add'\], is \['failing'\]"):
        other.train(resume_from_checkpoint=True)


def undescribed(a, b):
    return a + b


def no_docstring(a: int) -> int:
    return a


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        (add, "tools is a function; it should be a list"),
        ("add", "tools is a str"),
        ([3], r"tools\[0\] is 3"),
        ([add, add], "two functions of the name 'add'"),
        ([undescribed], "'undescribed' cannot be described"),
        ([no_docstring], "'no_docstring' cannot be described"),
    ],
)
def test_tools_that_cannot_be_are_refused_before_anything_is_sampled(tmp_path, tools, problem):
    with pytest.raises(ValueError, match=problem):
        tool_trainer(tmp_path, {}, ask("first?"), reward=length_reward, tools=tools)


def test_prompts_that_are_no_chat_messages_are_refused(tmp_path):
    trainer, _ = tool_trainer(tmp_path, {}, [{"prompt": "first?"}], reward=length_reward, tools=[add])
    with pytest.raises(ValueError, match=r"a list of chat messages; one is 'first\?'"):
        trainer.train()


@pytest.mark.parametrize("loss_type", ["qrpo", "astar_po"])
def test_rewards_of_pi_init_have_to_be_given_where_rollouts_have_several_turns(tmp_path, loss_type):
    given = {"tools": [add], "reward": length_reward, "config": {"loss_type": loss_type}}
    turns = {"first?": [call("add", a=1, b=2), "3."]}
    trainer, _ = tool_trainer(tmp_path / "none", turns, ask("first?"), **given)
    problem = "row 0 of train_dataset has no ref_rewards: with tools, environment_factory"
    with pytest.raises(ValueError, match=problem):
        trainer.train()
    with pytest.raises(ValueError, match=r"reference_rewards\(\) samples responses of pi_init in one turn"):
        trainer.reference_rewards([torch.tensor([2, 3])])
    rows = [{**row, "ref_rewards": [1.0, 2.0, 3.0]} for row in ask("first?")]
    trainer, _ = tool_trainer(tmp_path / "given", turns, rows, **given)
    trainer.train()
    assert trainer.state.global_step > 0 and not trainer.run_state.ref_rewards


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("several_turns_by", ["tools", "rollout_func"])
@pytest.mark.parametrize(
    ("make_dataset", "problem"),
    [
        (list, "row 1 of train_dataset has no ref_rewards: with tools, environment_factory or rollout_func"),
        (Dataset.from_list, "row 1 of train_dataset has no ref_rewards"),
        (
            lambda rows: Dataset.from_list(rows).remove_columns("ref_rewards"),
            "train_dataset has no column ref_rewards",
        ),
        (stream, "row 1 of an iteration has no ref_rewards"),
        (lambda rows: stream([{"prompt": row["prompt"]} for row in rows]), "row 0 of an iteration has no ref_rewards"),
    ],
)
def test_a_single_row_without_rewards_of_pi_init_is_named_before_anything_is_sampled(
    tmp_path, make_dataset, problem, several_turns_by
):
    def never(*_, **__):
        raise AssertionError("a rollout was sampled")

    rows = [{**row, "ref_rewards": given} for row, given in zip(ask("a?", "b?"), ([1.0], None), strict=True)]
    several = {"tools": [add]} if several_turns_by == "tools" else {"rollout_func": never}
    config = {"loss_type": "qrpo", "batch_size": 2, "mini_batch_size": 2}
    trainer, _ = tool_trainer(tmp_path, None, rows, reward=length_reward, config=config, **several)
    trainer.train_dataset, trainer._respond = make_dataset(rows), never
    with pytest.raises(ValueError, match=problem):
        trainer.train()
    with pytest.raises(ValueError, match="row 1 has no ref_rewards, and responses of pi_init in one turn"):
        trainer._find_ref_rewards(rows, [torch.tensor([2, 3])] * 2)


@pytest.mark.parametrize(
    "options", [{"tool_timeout": 0.0}, {"tool_timeout": -1.0}, {"max_tool_calling_iterations": -1}]
)
def test_options_out_of_range_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        tool_trainer(tmp_path, {}, ask("first?"), config=options)


def test_reward_models_with_a_tokenizer_of_their_own_read_every_message():
    tokenizer = tool_tokenizer()
    messages = [{"role": "user", "content": "sum?"}, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}]  # fmt: skip
    messages += [{"role": "tool", "name": "add", "content": "30"}, {"role": "assistant", "content": "So 30."}]
    text = tokenizer.decode(scored_conversation_ids(private_copy(messages), True, tokenizer))
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)


REFUSES_TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


@pytest.mark.parametrize("template", [None, REFUSES_TOOLS])
@pytest.mark.filterwarnings("ignore:the chat template of reward model")
@pytest.mark.parametrize("arguments", ['"x"', "[1]", '{"a": "\\ud83d"}', '{"\\ud83d": 1}'])
def test_no_call_of_the_policy_s_ends_a_run_with_a_reward_model_of_another_tokenizer(tmp_path, arguments, template):
    bad = f'<tool_call>\n{{"name": "add", "arguments": {arguments}}}\n</tool_call>'
    own = tool_tokenizer()
    own.add_tokens(["another"])
    own.chat_template = template or own.chat_template
    policy = tool_tokenizer()
    config = LlamaConfig(**{**tool_model().config.to_dict(), "vocab_size": 300, "num_labels": 1})
    reward = RewardModel(LlamaForSequenceClassification(config), policy, own)
    seen = []

    def written(completions, **_):
        seen.extend(json.dumps(completions, ensure_ascii=False).encode() for _ in completions)
        return [0.0] * len(completions)

    turns = {"first?": [bad, "Done."]}
    rewards = [reward, written]
    trainer, _ = tool_trainer(tmp_path, turns, ask("first?"), policy, rewards, tools=[add])
    kept = collected(trainer)
    trainer.train()
    [(_, responses, scores, masks)] = kept
    assert seen and torch.isfinite(torch.as_tensor(scores[0]))
    assert "error" in told_apart(trainer, responses[0], masks[0])[1]  # the policy reads what was wrong


@pytest.mark.parametrize(("most", "share"), [(0, 1 / 2), (1, 0.0), (2, 0.0)])
def test_only_rollouts_that_ended_with_calls_are_unanswered(tmp_path, most, share):
    turns = {"first?": [call("add", a=1, b=2), "Three."], "second?": ["Two."]}
    config = {"max_tool_calling_iterations": most}
    rows = ask("first?", "second?")
    trainer, _ = tool_trainer(tmp_path, turns, rows, reward=length_reward, tools=[add], config=config)
    trainer.train()
    [log] = [log for log in trainer.state.log_history if "turns/mean" in log]
    assert log["turns/unanswered_share"] == share


def test_the_template_is_tried_once_and_again_only_if_its_options_change(tmp_path, monkeypatch):
    made, init = [], ToolTemplate.__init__
    monkeypatch.setattr(ToolTemplate, "__init__", lambda self, *args: (made.append(args[2]), init(self, *args))[1])
    turns = {"first?": [call("add", a=1, b=2), "3."]}
    options = {"max_steps": 3, "learning_rate": 1e-3, "ppo_epochs": 1}
    trainer, _ = tool_trainer(tmp_path, turns, ask("first?"), reward=length_reward, tools=[add], config=options)
    trainer.train()
    assert made == [None]
    trainer.args.chat_template_kwargs = {"enable_thinking": False}
    trainer.evaluate(ask("first?"))
    assert made == [None, {"enable_thinking": False}]
    trainer.processing_class.chat_template += "{# another #}"
    trainer.evaluate(ask("first?"))
    assert len(made) == 3


def test_options_set_later_count_from_the_next_iteration(tmp_path):
    turns = {"first?": [call("add", a=1, b=2)]}
    trainer, script = tool_trainer(tmp_path, turns, ask("first?"), reward=length_reward, tools=[add])
    trainer.args.max_tool_calling_iterations = 0
    trainer.train()
    assert len(script.asked) == 1
    with pytest.raises(ValueError, match="tool_timeout=-1"):
        trainer.args.tool_timeout = -1.0
