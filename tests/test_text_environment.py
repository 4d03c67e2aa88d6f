"""Classic's `TextEnvironment` and `TextHistory`, and its calculator script."""

import re

import pytest
import torch

from tests.tiny import byte_tokenizer, tiny_model
from tests.tool_dialogues import tool_model
from trl_apa import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TextEnvironment, TextHistory


def ids(text):
    return torch.tensor(byte_tokenizer()(text)["input_ids"])


def environment(turns=None, model=None, tokenizer=None, **options):
    """An environment whose policy says what is written down for each turn, and then nothing new."""
    tokenizer = tokenizer or byte_tokenizer()
    defaults = {"tools": {"Echo": lambda text: text}, "reward_fn": lambda texts: [0.0] * len(texts), "prompt": "P\n"}
    made = TextEnvironment(model or tool_model(), tokenizer, **{**defaults, **options})
    if turns is not None:
        asked = []

        def generate(queries, **_):
            asked.append([tokenizer.decode(query) for query in queries])
            said = turns[min(len(asked), len(turns)) - 1]
            return [ids(said)] * len(queries)

        made._generate_batched, made.asked = generate, asked
    return made


def test_a_history_keeps_text_tokens_and_mask_in_segments():
    history = TextHistory("ab", torch.tensor([1, 2]))
    history.append_segment("cde", torch.tensor([3, 4, 5]), system=False)
    history.append_segment("f", torch.tensor([6]))
    assert history.text == "abcdef" and history.last_text_segment == "f"
    assert history.tokens.tolist() == [1, 2, 3, 4, 5, 6] and history.token_masks.tolist() == [0, 0, 1, 1, 1, 0]
    assert (history.text_spans, history.token_spans) == ([(0, 2), (2, 5), (5, 6)],) * 2
    assert history.system_spans == [True, False, True]
    query, response, mask = history.split_query_response_tokens()
    assert (query.tolist(), response.tolist(), mask.tolist()) == ([1, 2], [3, 4, 5, 6], [1, 1, 1, 0])
    assert not history.completed and history.reward == 0.0
    history.complete(truncated=True)
    assert history.completed and history.truncated
    assert TextHistory("a", torch.tensor([1]), system=False).token_masks.tolist() == [1]
    for text, tokens in (("", [1]), ("a", [])):
        with pytest.raises(ValueError, match="a segment should have text and tokens"):
            history.append_segment(text, torch.tensor(tokens))


def test_a_history_is_shown_with_its_colours(capsys):
    pytest.importorskip("rich")
    tokenizer = byte_tokenizer()
    history = TextHistory("ab", ids("ab"))
    history.append_segment("c", ids("c"), system=False)
    history.reward = 1.5
    history.show_text(show_legend=True)
    shown = capsys.readouterr().out
    assert "abc" in shown and "Reward: 1.5" in shown and "Prompt|System|Model|Reward" in shown
    history.show_tokens(tokenizer)
    assert "a b c" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("so <request><Tool1>Hello there!<call>", ("Tool1", "Hello there!")),
        ("<request><Py>\nif a > b:\n  f(x)<call>", ("Py", "\nif a > b:\n  f(x)")),
        ("<request><T>1<call><request><U>2<call>", ("T", "1")),
        ("so <Tool1>Hello there!<call>", (None, None)),
        ("so <request><Tool1>Hello there!", (None, None)),
        ("so <request>|Tool2|Hello there!<call>", (None, None)),
        ("<>abc<>def<>", (None, None)),
    ],
)
def test_a_call_is_read_out_of_the_text(text, call):
    assert environment().parse_tool_call(text) == call


@pytest.mark.parametrize("most", [1, 2, 4])
def test_turns_and_answers_follow_each_other_up_to_the_most_turns(most):
    made = environment(["<request><Echo>test<call>"], max_turns=most)
    queries, responses, masks, rewards, [history] = made.run(["task"])
    turn = "<request><Echo>test<call>test<response>"
    assert history.text == "P\ntask" + most * turn and not history.completed
    assert queries[0].tolist() == ids("P\ntask").tolist() and responses[0].tolist() == ids(most * turn).tolist()
    assert masks[0].tolist() == most * ([1] * len("<request><Echo>test<call>") + [0] * len("test<response>"))
    assert rewards == [0.0]


@pytest.mark.parametrize(
    ("said", "truncated"), [("no call", False), ("It is 3<submit>", False), ("<request><Echo>x<call><eos>", False)]
)
def test_a_rollout_ends_without_a_call_at_a_submission_and_at_the_eos(said, truncated):
    made = environment([said])
    _, responses, masks, _, [history] = made.run(["task"])
    assert history.completed and history.truncated == truncated and len(made.asked) == 1
    assert responses[0].tolist() == ids(said).tolist() and masks[0].all()


def test_a_rollout_ends_beyond_its_most_tokens():
    made = environment(["<request><Echo>x<call>"], max_length=40)
    _, _, _, _, [history] = made.run(["task"])
    assert history.completed and history.truncated and 40 < len(history.tokens) < 80


def test_finished_rollouts_are_not_sampled_again_and_rewards_read_the_last_segment():
    said = {"one": "2<submit>", "two": "<request><Echo>y<call>"}
    made = environment()

    def generate(queries, **_):
        texts = [made.tokenizer.decode(query) for query in queries]
        sampled.append(len(texts))
        return [ids("3<submit>" if "<response>" in t else said["one" if "one" in t else "two"]) for t in texts]

    sampled, seen = [], []

    def reward(texts, answers):
        seen.append((texts, answers))
        return [torch.tensor(1.0), torch.tensor(2.0)]

    made._generate_batched, made.reward_fn = generate, reward
    _, _, _, rewards, histories = made.run(["one", "two"], answers=[2, 3])
    assert sampled == [2, 1] and seen == [(["2<submit>", "3<submit>"], [2, 3])]
    assert [float(reward) for reward in rewards] == [1.0, 2.0] == [float(history.reward) for history in histories]


def fails(query):
    raise ZeroDivisionError("by nothing")


def fails_oddly(query):
    raise ValueError("half \udc00")


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<request><Fails>x<call>", "Tool error: by nothing<response>"),
        ("<request><Absent>x<call>", "Unknown tool Absent.<response>"),
        ("<request>x<call>", "Unknown tool call: <request>x<call><response>"),
        ("<request><Number>x<call>", "42<response>"),
        ("<request><Half>x<call>", "half \\ud83d<response>"),
        ("<request><Odd>x<call>", "Tool error: half \\udc00<response>"),
    ],
)
def test_what_a_tool_says_and_its_failures_are_told(said, answer):
    tools = {"Fails": fails, "Number": lambda query: 42, "Half": lambda query: "half \ud83d", "Odd": fails_oddly}
    made = environment([said], tools=tools, max_turns=1)
    assert made.run(["task"])[-1][0].last_text_segment == answer


@pytest.mark.parametrize(("most", "length"), [(100, 100), (500, 500), (1001, 1000), (2000, 1000)])
def test_long_answers_are_cut(most, length):
    made = environment(tools={"dummy": lambda query: "a" * 1000}, max_tool_reponse=most)
    history = made.step(TextHistory("<request><dummy>Hello!<call>", torch.tensor([1, 2, 3])))
    assert len(history.last_text_segment) - len("<response>") == length


class Shout:
    def __call__(self, text):
        return text.upper()


def test_tools_in_a_list_are_called_after_their_classes_or_functions():
    assert set(environment(tools=[Shout(), fails]).tools) == {"Shout", "fails"}
    for tools in (fails, "Shout", [3], {"a": 3}):
        with pytest.raises(ValueError, match="tools"):
            environment(tools=tools)


def test_inputs_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="queries is empty"):
        environment().run([])
    with pytest.raises(ValueError, match="reward_fn is None"):
        environment(reward_fn=None).run(["task"])
    with pytest.raises(ValueError, match="reward_fn gave 2 rewards for 1 texts"):
        environment(["x"], reward_fn=lambda texts: [1.0, 2.0]).run(["task"])
    with pytest.raises(ValueError, match="encoder-decoder"):
        environment(model=tiny_model("t5"))


KWARGS = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "eos_token_id": -1, "max_new_tokens": 12}


@pytest.mark.parametrize("wrap", [False, True])
def test_the_policy_samples_the_same_in_a_batch_as_alone_and_stops_at_a_call(wrap):
    tokenizer, model = byte_tokenizer(), tool_model()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(model) if wrap else model
    made = environment(model=model, tokenizer=tokenizer, generation_kwargs={"max_new_tokens": 8})
    queries = [ids("a task"), ids("another, longer task"), ids("b")]
    together = made._generate_batched(queries, batch_size=3)
    assert [row.tolist() for row in together] == [made._generate_batched([q])[0].tolist() for q in queries]
    row = together[0].tolist()
    first = next(place for place, token in enumerate(row) if tokenizer.decode([token]).isascii())
    made.call_token = tokenizer.decode([row[first]])
    assert made._generate_batched(queries[:1])[0].tolist() == row[: first + 1] and first < 7
    assert made.generation_kwargs == {"max_new_tokens": 8}


def test_a_rollout_is_cut_where_the_positions_of_the_model_end():
    model = tool_model(positions=32)
    made = environment(model=model, generation_kwargs={**KWARGS, "max_new_tokens": 30})
    queries, responses, _, _, histories = made.run(["a task of 20 bytes,", "b"])
    assert [len(q) + len(r) for q, r in zip(queries, responses, strict=True)] == [32, 33 - 1]
    assert all(history.completed for history in histories)


def exact_match(responses, answers):
    """Classic's: what is submitted is the answer."""
    found = [re.findall(r"Result\s*=\s*(-?\d+)\s*<submit>", response) for response in responses]
    return [torch.tensor(float(bool(f) and int(f[0]) == a)) for f, a in zip(found, answers, strict=True)]


def calculate(query):
    return str(eval(query, {"__builtins__": {}}))


def test_the_calculator_script_of_trl_0_11_runs(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tool_model(1))
    ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(tool_model(1))
    config = PPOConfig(batch_size=4, learning_rate=1e-3, mini_batch_size=2, ppo_epochs=1, output_dir=str(tmp_path),
                       report_to="none", use_cpu=True)  # fmt: skip
    trainer = PPOTrainer(config, model, ref_model, tokenizer)
    prompt = "What is 13-3?\n\n<request><Calc>13-3<call>10<response>\n\nResult=10<submit>\n\n"
    made = TextEnvironment(model, tokenizer, {"Calc": calculate}, exact_match, prompt, generation_kwargs=KWARGS)
    sampled = made._generate_batched
    before = [parameter.clone() for parameter in model.pretrained_model.parameters()]

    def helped(queries, **options):
        """Two rows call and submit; the others say what they sample."""
        turns = sampled(queries, **options)
        answered = ["10-3<call>7<response>" in tokenizer.decode(query) for query in queries]
        helped.calls += 1
        for row in range(min(2, len(turns))):
            turns[row] = ids("\nResult=7<submit>" if answered[row] else "<request><Calc>10-3<call>")
        return turns

    helped.calls, made._generate_batched = 0, helped
    for _ in range(2):
        queries, responses, masks, rewards, _ = made.run(["What is 10-3?"] * 4, answers=[7] * 4)
        assert [float(reward) for reward in rewards[:2]] == [1.0, 1.0]
        assert "7<response>" in tokenizer.decode(responses[0][masks[0] == 0])
        stats = trainer.step(queries, responses, rewards, masks)
        texts = {"query": tokenizer.batch_decode(queries), "response": tokenizer.batch_decode(responses)}
        trainer.log_stats(stats, texts, rewards, columns_to_log=["query", "response"])
        assert stats["tokens/counted"] == sum(int(mask.sum()) for mask in masks)
    # The environment samples from the weights that the trainer trains.
    after = list(model.pretrained_model.parameters())
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert helped.calls == 4


def test_it_is_found_where_scripts_look_for_it():
    from trl_apa.environment import TextHistory as in_folder
    from trl_apa.environment.base_environment import TextEnvironment as in_file

    from trl_apa.classic import TextEnvironment as in_classic

    assert in_classic is in_file is TextEnvironment and in_folder is TextHistory
