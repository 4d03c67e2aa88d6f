"""A judge with a rubric as a reward function: what it is asked, what its replies are worth, what it remembers."""

import pytest
import yaml

from tests.endpoint import KEY, Endpoint, section, servers
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer
from trl_apa import APATrainer
from trl_apa.winrate import JudgeError
from trl_apa.winrate.replies import read_score
from trl_apa.winrate.rubric import JudgeReward, Rubric, transcript


@pytest.fixture
def endpoint(monkeypatch):
    with servers(monkeypatch) as keep:
        yield lambda reply: keep(Endpoint(reply))


def rubric_file(folder, server=None, **options):
    value = {"model": "judge-1", "rubric": "Is it short?", **options}
    if server is not None:
        value["base_url"] = server.url
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def length(text):
    return f"It has some words.\n[[{len(section(text, 'answer'))}]]"


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Good.\n[[7]]", 7.0),
        (r"\[\[ 3.5 \]\]", 3.5),
        ("**[[0]]**", 0.0),
        ("<think>[[1]]</think> so [[9]], [[9]]", 9.0),
        ("[[-2]]", None),
        ("[[11]]", None),
        ("[[3]] or [[4]]", None),
        ("seven", None),
        ("[7]", None),
        ("<think>[[7]]", None),
    ],
)
def test_a_score_is_read_out_of_a_reply(reply, score):
    verdict = read_score(reply, 0, 10).verdict
    assert (None if verdict is None else float(verdict)) == score


def test_it_is_shown_rubric_request_columns_and_answer_and_its_scores_come_back_in_order(tmp_path, endpoint):
    server = endpoint(length)
    reward = JudgeReward(rubric_file(tmp_path, server, columns=["answer_key"], request={"seed": 3}))
    messages = [{"role": "user", "content": "How long?"}]
    completions = [[{"role": "assistant", "content": "abc"}], "abcde", "abc"]
    assert reward([messages, "Why?", "Why?"], completions, answer_key=["x", 5, 5], other=[1, 2, 3]) == [3.0, 5.0, 3.0]
    assert len(server.requests) == 3 and {request["seed"] for request in server.requests} == {3}
    asked = next(r for r in server.requests if "How long?" in r["messages"][0]["content"])["messages"][0]["content"]
    assert section(asked, "rubric") == "Is it short?" and section(asked, "answer_key") == "x"
    assert section(asked, "request") == "user: How long?" and "from 0 to 10" in asked
    assert reward.__name__ == "judge:short"


@pytest.mark.parametrize(
    ("names", "tags"),
    [
        (["answer"], ["column_answer"]),
        (["request", "rubric"], ["column_request", "column_rubric"]),
        (["answer", "column_answer"], ["column_column_answer", "column_answer"]),
        (["column_answer", "question", "answer"], ["column_answer", "question", "column_column_answer"]),
    ],
)
def test_a_column_of_any_name_is_shown_beside_rubric_request_and_answer(tmp_path, endpoint, names, tags):
    server = endpoint(length)
    columns = {name: [f"value of {name}"] for name in names}
    assert JudgeReward(rubric_file(tmp_path, server, columns=names))(["Why?"], ["Because."], **columns) == [8.0]
    asked = server.requests[0]["messages"][0]["content"]
    assert [section(asked, tag) for tag in tags] == [f"value of {name}" for name in names]
    assert [section(asked, tag) for tag in ("rubric", "request", "answer")] == ["Is it short?", "Why?", "Because."]
    assert all(asked.count(f"<{tag}>") == 1 for tag in (*tags, "rubric", "request", "answer"))


def test_equal_answers_are_asked_once_and_scores_are_remembered_on_disk(tmp_path, endpoint):
    server = endpoint(length)
    path = rubric_file(tmp_path, server, cache="scores.jsonl")
    assert JudgeReward(path)(["p"] * 3, ["a", "a", "ab"]) == [1.0, 1.0, 2.0]
    assert len(server.requests) == 2 and (tmp_path / "scores.jsonl").exists()
    assert JudgeReward(path)(["p"] * 2, ["ab", "abc"]) == [2.0, 3.0] and len(server.requests) == 3
    other = rubric_file(tmp_path, server, cache="scores.jsonl", rubric="Is it long?")
    JudgeReward(other)(["p"], ["a"])
    assert len(server.requests) == 4  # another rubric


@pytest.mark.parametrize(("options", "expected"), [({}, None), ({"unscored": 0.5}, 0.5)])
def test_a_reply_without_a_score_is_none_or_what_the_rubric_says_and_is_not_remembered(
    tmp_path, endpoint, options, expected
):
    server = endpoint(lambda text: "I would not say.")
    reward = JudgeReward(rubric_file(tmp_path, server, cache="scores.jsonl", **options))
    assert reward(["p"], ["a"]) == [expected] == reward(["p"], ["a"])
    assert len(server.requests) == 2 and dict(reward.without_score) == {"no score in double brackets": 2}


def test_an_endpoint_that_fails_is_one_error_without_the_key(tmp_path, endpoint):
    server = endpoint(lambda text: 401)
    with pytest.raises(JudgeError, match=r"judge-1 gave no answer: .*HTTP 401") as raised:
        JudgeReward(rubric_file(tmp_path, server))(["p"], ["a"])
    assert KEY not in repr(raised.value) + repr(raised.value.__cause__) + repr(raised.value.__context__)


def test_several_messages_are_shown_with_their_calls():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "So 3."},
    ]
    assert transcript(messages) == (
        'assistant:\n\ncalls {"name": "add", "arguments": {"a": 1}}\n\ntool: 3\n\nassistant: So 3.'
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: m", "at least model and rubric"),
        ("- 1", "at least model and rubric"),
        ("model: m\nrubric: r\nhighst: 3", "has highst; it can have .*highest"),
        ("model: m\nrubric: ''", "rubric is ''"),
        ("model: m\nrubric: r\nlowest: 5\nhighest: 5", "highest above lowest"),
        ("model: m\nrubric: r\nlowest: low", "they should be numbers"),
        ("model: m\nrubric: r\ncolumns: answer", "columns is 'answer'"),
        ("model: [", "cannot be read as YAML"),
    ],
)
def test_a_file_that_is_no_rubric_says_why(tmp_path, text, problem):
    path = tmp_path / "rubric.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem) as raised:
        Rubric.load(path)
    assert "rubric.yaml" in str(raised.value)


def test_train_learns_from_a_judge_and_a_missing_file_or_column_is_named(tmp_path, endpoint):
    server = endpoint(length)
    config = {"max_steps": 1, "max_completion_length": 3, "logging_steps": 1}
    rows = [{"prompt": "w3 w4"}] * 4

    def made(path):
        return APATrainer(tiny_config(tmp_path, **config), tiny_model(), processing_class=tiny_tokenizer(),
                          train_dataset=rows, reward_funcs=f"judge:{path}")  # fmt: skip

    trainer = made(rubric_file(tmp_path, server, highest=100))
    trainer.train()
    [log] = [log for log in trainer.state.log_history if "apa/mean_scores" in log]
    assert log["apa/mean_scores"] > 0 and trainer.scorer.names == ["judge:short"]
    with pytest.raises(OSError, match="absent"):
        made(tmp_path / "absent.yaml")
    trainer = made(rubric_file(tmp_path, server, columns=["gold"]))
    with pytest.raises(RuntimeError, match=r"judge:short failed: .*no column 'gold', which the rubric names"):
        trainer.train()
