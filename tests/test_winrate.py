"""Win rates: both orders, ties, the interval, verdicts on disk, judges on this machine, and the command."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
)

from tests import _cli
from tests.endpoint import KEY, Endpoint, completion, prefers_longer, section, servers
from tests.tiny import byte_tokenizer
from trl_apa.commands import winrate as command
from trl_apa.data.sources import Row
from trl_apa.winrate import (
    JudgeError,
    LanguageModelJudge,
    Pair,
    RewardModelJudge,
    VerdictCache,
    compare,
    win_rate,
)
from trl_apa.winrate.comparing import Judgement, Question
from trl_apa.winrate.prompting import judging_text


class TableJudge:
    """Verdicts by what stands in the answers: `verdicts[(first, second)]`."""

    sees_order = True

    def __init__(self, verdicts, fail_after=None):
        self.identity = {"judge": "table"}
        self.verdicts, self.fail_after, self.asked = verdicts, fail_after, []

    def __call__(self, questions):
        for number, question in enumerate(questions):
            if self.fail_after is not None and len(self.asked) == self.fail_after:
                raise JudgeError("cut")
            self.asked.append(question)
            yield number, self.verdicts[question.first, question.second]


def pairs_of(*answers):
    return [Pair(f"prompt {number}", ours, theirs) for number, (ours, theirs) in enumerate(answers)]


# ---- verdicts to a rate ----


def test_a_win_rate_hand_worked():
    verdicts = {
        **{("a1", "b1"): "first", ("b1", "a1"): "second"},  # ours in both orders: 1
        **{("a2", "b2"): "first", ("b2", "a2"): "tie"},  # (1 + 0.5) / 2 = 0.75
        **{("a3", "b3"): "first", ("b3", "a3"): "first"},  # whoever is first: 0.5
        **{("a4", "b4"): "second", ("b4", "a4"): "first"},  # theirs in both orders: 0
        **{("a5", "b5"): None, ("b5", "a5"): "first"},  # no verdict in one order: left out
    }
    pairs = pairs_of(*((f"a{n}", f"b{n}") for n in range(1, 6)))
    judgements = compare(pairs, TableJudge(verdicts))
    assert [judgement.score for judgement in judgements] == [1.0, 0.75, 0.5, 0.0, None]
    result = win_rate(judgements)
    # (1 + 0.75 + 0.5 + 0) / 4; of seven decided verdicts first won 5: a1, a2, a3, b3, b4
    assert result["win_rate"] == pytest.approx(2.25 / 4)
    assert result["agreement"] == pytest.approx(2 / 4)
    assert result["first_place"] == pytest.approx(5 / 7)
    counts = {name: result[name] for name in ("wins", "ties", "losses", "pairs", "unreadable")}
    assert counts == {"wins": 2, "ties": 1, "losses": 1, "pairs": 4, "unreadable": 1}


def test_a_judge_that_loves_the_first_place_says_nothing():
    pairs = pairs_of(("good", "bad"), ("fine", "poor"))
    verdicts = {(a, b): "first" for pair in pairs for a, b in ((pair.ours, pair.theirs), (pair.theirs, pair.ours))}
    result = win_rate(compare(pairs, TableJudge(verdicts)))
    assert (result["win_rate"], result["agreement"], result["first_place"]) == (0.5, 0.0, 1.0)


def test_swapping_the_models_gives_the_rest():
    verdicts = {("x", "y"): "first", ("y", "x"): "tie", ("u", "v"): "second", ("v", "u"): "first"}
    pairs = pairs_of(("x", "y"), ("u", "v"))
    swapped = [pair._replace(ours=pair.theirs, theirs=pair.ours) for pair in pairs]
    ours, theirs = (win_rate(compare(which, TableJudge(verdicts))) for which in (pairs, swapped))
    assert ours["win_rate"] + theirs["win_rate"] == pytest.approx(1.0)
    assert ours["agreement"] == theirs["agreement"] and ours["first_place"] == theirs["first_place"]


def judged(scores, prompts=None):
    prompts = range(len(scores)) if prompts is None else prompts
    verdict = {1: "first", 0.5: "tie", 0: "second"}
    return [Judgement(Pair(p, "a", "b"), (verdict[score],)) for score, p in zip(scores, prompts, strict=True)]


def test_the_interval_of_two_pairs_can_be_counted():
    # Resamples of {1, 0} have the means 0, 1/2 and 1 with the odds 1 : 2 : 1.
    result = win_rate(judged([1, 0]))
    assert (result["low"], result["high"]) == (0.0, 1.0)
    narrow = win_rate(judged([1, 0]), confidence=0.4)
    assert (narrow["low"], narrow["high"]) == (0.5, 0.5)


def test_the_interval_is_that_of_the_normal_law_for_many_pairs():
    result = win_rate(judged([1] * 240 + [0] * 160))
    # 0.6 -+ 1.96 sqrt(0.6 * 0.4 / 400) = 0.552, 0.648
    assert result["low"] == pytest.approx(0.552, abs=0.006) and result["high"] == pytest.approx(0.648, abs=0.006)
    assert win_rate(judged([1] * 240 + [0] * 160)) == result
    assert "agreement" not in result


def test_four_answers_to_each_prompt_are_no_more_evidence_than_one_if_they_agree():
    scores = [1] * 30 + [0] * 20
    repeated = judged([s for s in scores for _ in range(4)], [p for p in range(50) for _ in range(4)])
    one, four = win_rate(judged(scores)), win_rate(repeated)
    assert (four["low"], four["high"], four["win_rate"]) == pytest.approx((one["low"], one["high"], one["win_rate"]))


def test_what_cannot_be_summed_up_is_refused():
    with pytest.raises(ValueError, match="no verdict on any of the 1 pairs"):
        win_rate([Judgement(Pair("p", "a", "b"), (None, "first"))])
    with pytest.raises(ValueError, match="confidence=1"):
        win_rate(judged([1]), confidence=1)
    with pytest.raises(ValueError, match="num_resamples=0"):
        win_rate(judged([1]), num_resamples=0)


# ---- verdicts on disk ----


def test_an_interrupted_comparison_continues_where_it_stopped(tmp_path):
    pairs = pairs_of(("a", "b"), ("c", "d"))
    verdicts = {("a", "b"): "first", ("b", "a"): "second", ("c", "d"): "tie", ("d", "c"): None}
    first = TableJudge(verdicts, fail_after=2)
    with pytest.raises(JudgeError):
        compare(pairs, first, VerdictCache(tmp_path / "cache.jsonl"))
    # a process that was killed while it wrote
    with open(tmp_path / "cache.jsonl", "a") as file:
        file.write('{"key": "0123')
    second = TableJudge(verdicts)
    compare(pairs, second, VerdictCache(tmp_path / "cache.jsonl"))
    assert [(question.first, question.second) for question in second.asked] == [("c", "d"), ("d", "c")]
    third = TableJudge(verdicts)
    judgements = compare(pairs, third, VerdictCache(tmp_path / "cache.jsonl"))
    # what had no verdict is asked again, and nothing else
    assert [question.first for question in third.asked] == ["d"]
    assert [judgement.verdicts for judgement in judgements] == [("first", "second"), ("tie", None)]
    other = TableJudge(verdicts)
    other.identity = {"judge": "another"}
    compare(pairs, other, VerdictCache(tmp_path / "cache.jsonl"))
    assert len(other.asked) == 4
    text = (tmp_path / "cache.jsonl").read_text()
    assert "prompt" not in text and len(text.splitlines()) == 3 + 1 + 3


def test_questions_that_are_the_same_are_asked_once():
    pairs = [*pairs_of(("a", "b"), ("a", "a")), Pair("prompt 0", "a", "b"), Pair("prompt 0", "b", "a")]
    judge = TableJudge({("a", "b"): "first", ("b", "a"): "tie", ("a", "a"): "second"})
    judgements = compare(pairs, judge)
    assert [(question.first, question.second) for question in judge.asked] == [("a", "b"), ("b", "a"), ("a", "a")]
    # (1 + 0.5) / 2; (0 + 1) / 2; as the first; 1 less it
    assert [judgement.score for judgement in judgements] == [0.75, 0.5, 0.75, 0.25]


def test_a_verdict_that_there_is_not_is_neither_counted_nor_kept(tmp_path):
    cache = VerdictCache(tmp_path / "cache.jsonl")
    with pytest.raises(ValueError, match="verdict 'A'; it should be one of first, tie, second"):
        compare(pairs_of(("a", "b")), TableJudge({("a", "b"): "A"}), cache)
    with pytest.raises(ValueError, match="verdict='A'"):
        cache.put("key", "A")
    assert not cache.path.exists() and cache.get("key") is None


class BatchJudge(TableJudge):
    sees_order, batch_size = False, 3


def test_a_batch_that_was_interrupted_is_judged_again_as_it_was(tmp_path):
    pairs = pairs_of(*((f"a{number}", "b") for number in range(8)))
    verdicts = {(pair.ours, "b"): "first" for pair in pairs}
    with pytest.raises(JudgeError):
        compare(pairs, BatchJudge(verdicts, fail_after=4), VerdictCache(tmp_path / "cache.jsonl"))
    changed = BatchJudge(dict.fromkeys(verdicts, "tie"))
    judgements = compare(pairs, changed, VerdictCache(tmp_path / "cache.jsonl"))
    assert [question.first for question in changed.asked] == ["a3", "a4", "a5", "a6", "a7"]
    # what was known stays
    assert [judgement.verdicts for judgement in judgements] == [("first",)] * 4 + [("tie",)] * 4
    assert len(VerdictCache(tmp_path / "cache.jsonl")) == 8


NO_ENTRIES = {
    "half a line": b'{"key": "k", "verd',
    "nothing": b"",
    "no JSON": b"key verdict",
    "an unknown verdict": b'{"key": "k", "verdict": "third"}',
    "a verdict of another case": b'{"key": "k", "verdict": "First"}',
    "no verdict": b'{"key": "k"}',
    "null": b'{"key": "k", "verdict": null}',
    "a verdict that is a list": b'{"key": "k", "verdict": ["first"]}',
    "a verdict that is true": b'{"key": "k", "verdict": true}',
    "a key that is a number": b'{"key": 1, "verdict": "first"}',
    "a key that is a list": b'{"key": ["k"], "verdict": "first"}',
    "a key that is an object": b'{"key": {}, "verdict": "first"}',
    "a key that is null": b'{"key": null, "verdict": "first"}',
    "a list": b'["key", "verdict"]',
    "a string": b'"key verdict"',
    "a number": b"7",
    "a number with too many digits": b"1" * 5000,
    "deep nesting": b"[" * 100_000,
    "deep nesting that is closed": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "no text": b"\xff\xfe\xfa\x80",
    "UTF-16": '{"key": "k", "verdict": "first"}'.encode("utf-16"),
    "zeros": b"\0" * 40,
}


@pytest.mark.parametrize("line", NO_ENTRIES.values(), ids=NO_ENTRIES)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""], ids=["newline", "CRLF", "no newline"])
def test_a_line_that_is_no_entry_counts_for_nothing_and_the_run_goes_on(line, end, tmp_path):
    pairs = pairs_of(("a", "b"))
    verdicts = {("a", "b"): "first", ("b", "a"): "second"}
    path = tmp_path / "cache.jsonl"
    compare(pairs, TableJudge(verdicts), VerdictCache(path))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(line + b"\n" + first + line + end)
    assert len(VerdictCache(path)) == 1
    judge = TableJudge(verdicts)
    (judgement,) = compare(pairs, judge, VerdictCache(path))
    # the verdict of the other order is asked again, and stands on a line of its own
    assert len(judge.asked) == 1 and judgement.verdicts == ("first", "second")
    assert path.read_bytes().splitlines(keepends=True)[-1] == second
    assert len(VerdictCache(path)) == 2


def test_what_another_writer_left_within_a_line_joins_no_verdict(tmp_path):
    cache = VerdictCache(tmp_path / "cache.jsonl")
    cache.put("a", "tie")
    with open(cache.path, "ab") as other:
        other.write(b'{"key": "b", "ver')
    cache.put("c", "first")
    cache.put("d", "second")
    found = VerdictCache(cache.path)
    assert len(found) == 3 and [found.get(key) for key in "abcd"] == ["tie", None, "first", "second"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        VerdictCache(tmp_path / "file" / "cache.jsonl").put("a", "tie")
    with pytest.raises(OSError, match="/dev/full"):
        VerdictCache("/dev/full").put("a", "tie")
    with pytest.raises(OSError, match=str(tmp_path)):
        VerdictCache(tmp_path).put("a", "tie")


def test_texts_that_are_no_unicode_have_a_key():
    assert VerdictCache.key({}, Question("\ud83d", "a", "b")) != VerdictCache.key({}, Question("\ud83e", "a", "b"))


def test_chat_messages_are_shown_with_their_roles():
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    text = judging_text(Question(prompt, "a", "b"), "End.")
    assert section(text, "request") == "system: Be brief.\n\nuser: Why?" and text.endswith("\n\nEnd.")


# ---- judges on this machine ----


def save_judge(folder, kind, positions=2048):
    tokenizer = byte_tokenizer()
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(1)
    if kind == "reward":
        config = GPTNeoXConfig(**ids, **sizes, max_position_embeddings=positions, num_labels=1)
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**ids, **sizes, max_position_embeddings=positions, initializer_range=1.0)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return save_judge(tmp_path_factory.mktemp("judges") / "reward", "reward")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return save_judge(tmp_path_factory.mktemp("judges") / "language", "language")


QUESTIONS = [Question(f"What is {n}?", f"it is {n}", "no idea" * n, "it is" if n % 2 else None) for n in range(1, 6)]


def test_the_answer_that_the_reward_model_scores_higher_wins(reward_model):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model)

    def score(prompt, answer):
        with torch.no_grad():
            return model(**tokenizer(f"{prompt}{answer}<eos>", return_tensors="pt")).logits.item()

    differences = [score(q.prompt, q.first) - score(q.prompt, q.second) for q in QUESTIONS]
    expected = ["first" if difference > 0 else "second" for difference in differences]
    for size in (2, 8):
        judge = RewardModelJudge(model, tokenizer, "r", batch_size=size)
        assert list(judge(QUESTIONS)) == list(enumerate(expected))
    # beside longer ones, too
    same = [Question("p", "a", "a"), Question("p", "a" * 60, "b"), Question("p", "b", "a" * 90)]
    assert next(iter(judge(same))) == (0, "tie")
    wide = RewardModelJudge(model, tokenizer, "r", tie_margin=max(map(abs, differences)) + 1e-4)
    assert {verdict for _, verdict in wide(QUESTIONS)} == {"tie"}
    assert len(compare([Pair("p", "a", "b")], judge)[0].verdicts) == 1


def test_a_language_model_says_the_letter_that_it_holds_most_probable(language_model):
    model = AutoModelForCausalLM.from_pretrained(language_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    judge = LanguageModelJudge(model, tokenizer, "l", batch_size=3)
    expected = []
    for question in QUESTIONS:
        logprobs = []
        for letter in (" A", " B", " C"):
            prompt = tokenizer(judging_text(question, judge_ending()) + "\n\nVerdict:")["input_ids"]
            ids = torch.tensor([prompt + tokenizer(letter)["input_ids"]])
            with torch.no_grad():
                by_position = model(ids).logits[0].log_softmax(-1)
            logprobs.append(sum(by_position[t - 1, ids[0, t]].item() for t in range(len(prompt), ids.shape[1])))
        expected.append(("first", "second", "tie")[max(range(3), key=logprobs.__getitem__)])
    assert list(judge(QUESTIONS)) == list(enumerate(expected))
    assert len(set(expected)) > 1


def test_a_score_that_is_not_a_number_is_no_verdict(reward_model, language_model):
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    kinds = [(AutoModelForSequenceClassification, RewardModelJudge, reward_model)]
    kinds += [(AutoModelForCausalLM, LanguageModelJudge, language_model)]
    for auto_class, judge, path in kinds:
        model = auto_class.from_pretrained(path)
        model.get_input_embeddings().weight.data.fill_(float("nan"))
        assert list(judge(model, tokenizer, "n")(QUESTIONS)) == [(number, None) for number in range(len(QUESTIONS))]


def judge_ending():
    from trl_apa.winrate.prompting import IN_ONE_LETTER

    return IN_ONE_LETTER


def test_a_question_longer_than_the_judge_can_read_is_refused(language_model):
    model = AutoModelForCausalLM.from_pretrained(language_model)
    judge = LanguageModelJudge(model, AutoTokenizer.from_pretrained(language_model), "l")
    with pytest.raises(ValueError, match=r"judge's questions: row 1 has \d+ tokens, but the model has 2048 positions"):
        list(judge([Question("p", "a", "b"), Question("p", "a" * 2000, "b")]))


# ---- the command ----


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def answers(tmp_path):
    """Files of two models, of which the first answers at more length, and people's choices."""
    prompts = [f"\n\nHuman: {number}?\n\nAssistant:" for number in range(4)]
    ours = [{"prompt": p, "completion": " a long answer\n\nHuman: and a question"} for p in prompts]
    theirs = [{"prompt": p, "completion": " short"} for p in prompts[::-1]]
    chosen = [{"chosen": f"{p} best", "rejected": f"{p} worst"} for p in prompts[:3]]
    files = {"A": ours, "B": [*theirs, {"prompt": "other", "completion": "x"}], "chosen": chosen}
    return [jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()]


@pytest.fixture
def endpoint(monkeypatch):
    with servers(monkeypatch) as keep:
        yield lambda reply: keep(Endpoint(reply))


def run(capsys, *argv):
    status = _cli.run("winrate", *argv)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_command_pairs_by_prompt_and_continues_after_the_endpoint_failed(endpoint, answers, tmp_path, capsys):
    ours, theirs, chosen = answers
    broken = iter([False] * 3 + [True])
    server = endpoint(lambda text: 403 if next(broken, False) else prefers_longer(text))
    options = ["--judge", "openai", "--judge_model", "m", "--base_url", server.url, "--references", chosen]
    options += ["--cut_at", "\n\nHuman:", "--workers", 1, "--output", tmp_path / "result.json"]
    status, _, said = run(capsys, ours, theirs, *options)
    assert status == 1 and "PermissionDeniedError" in said and "winrate_cache.jsonl: run it again" in said
    assert KEY not in said and not (tmp_path / "result.json").exists()
    given, before = len(VerdictCache(tmp_path / "winrate_cache.jsonl")), len(server.requests)
    status, said, _ = run(capsys, ours, theirs, *options)
    assert status == 0 and given >= 3 and len(server.requests) - before == 8 - given
    assert "1 answers are dropped" in said and "1 of 4 prompts have no reference answer" in said
    assert "win rate 1.000, 95% interval 1.000 to 1.000" in said and "4 wins, 0 ties, 0 losses in 4 pairs" in said
    assert "both orders agree on 100% of the pairs; the answer that came first got 50% of the decided" in said
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["win_rate"] == 1.0 and result["pairs"] == 4
    assert result["judgements"][0]["ours"] == " a long answer" and result["judgements"][0]["reference"] == " best"
    # everything is known now, and nobody is asked
    before = len(server.requests)
    assert run(capsys, ours, theirs, *options)[0] == 0 and len(server.requests) == before
    for path in tmp_path.iterdir():
        assert KEY not in path.read_text()


def test_why_replies_had_no_verdict_is_said(endpoint, answers, tmp_path, capsys):
    ours, theirs, _ = answers
    replies = iter([completion("[[A]]", "length"), "[[A]] or [[B]]", *(["[[A]]", "[[B]]"] * 3)])
    server = endpoint(lambda text: next(replies))
    options = ["--judge", "openai", "--judge_model", "m", "--base_url", server.url, "--workers", 1]
    status, said, _ = run(capsys, ours, theirs, *options)
    assert status == 0 and "in 3 pairs; 1 without a verdict" in said
    assert "1 replies without a verdict: cut by length" in said
    assert "1 replies without a verdict: several verdicts: [[A]], [[B]]" in said
    server = endpoint(lambda text: completion("[[A]]", "length"))
    options[5] = server.url
    status, said, problem = run(capsys, ours, theirs, *options)
    assert status == 2 and "8 replies without a verdict: cut by length" in said
    assert "no verdict on any of the 4 pairs" in problem


def test_what_cannot_be_written_is_found_out_before_anybody_is_asked(endpoint, answers, tmp_path, capsys):
    ours, theirs, _ = answers
    server = endpoint(prefers_longer)
    (tmp_path / "file").write_text("")
    options = ["--judge", "openai", "--judge_model", "m", "--base_url", server.url]
    for name, problem in [("--output", "is a folder"), ("--cache", "Is a directory")]:
        status, _, said = run(capsys, ours, theirs, *options, name, tmp_path)
        assert status == 2 and problem in said
        status, _, said = run(capsys, ours, theirs, *options, name, tmp_path / "file" / "x")
        assert status == 2 and "file" in said
    assert server.requests == []


@pytest.mark.parametrize("kind", ["reward_model", "language_model"])
def test_the_command_finds_out_what_kind_of_judge_a_folder_holds(kind, request, answers, capsys):
    ours, theirs, _ = answers
    judge = request.getfixturevalue(kind)
    status, said, _ = run(capsys, ours, theirs, "--judge", "local", "--judge_model", judge, "--use_cpu")
    assert status == 0 and "in 4 pairs" in said
    assert ("both orders agree" in said) == (kind == "language_model")


def test_verdicts_of_a_judge_that_was_trained_again_are_not_taken_from_the_cache(reward_model, tmp_path):
    folder = tmp_path / "judge"
    save_judge(folder, "reward")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    before = command._fingerprint(str(folder), model)
    assert before == command._fingerprint(str(folder), model)
    save_judge(folder, "reward")
    assert before != command._fingerprint(str(folder), model)


def test_what_the_command_cannot_use_is_said_in_one_line(answers, tmp_path, capsys):
    ours, theirs, _ = answers
    local = ["--judge", "local", "--judge_model", tmp_path / "nowhere"]
    for argv, problem in [
        ([tmp_path / "no.jsonl", theirs], "no such file"),
        (
            [jsonl(tmp_path / "x.jsonl", [{"prompt": "p", "completion": "c"}, {"prompt": "p"}]), theirs],
            "row 2: it should",
        ),
        ([jsonl(tmp_path / "y.jsonl", [{"prompt": "p", "completion": "c"}]), theirs], "no prompt in common"),
        ([jsonl(tmp_path / "z.jsonl", []), theirs], "has no row"),
        ([ours, theirs, "--references", jsonl(tmp_path / "w.jsonl", [{"text": "a"}])], "no row with a prompt and a"),
        ([ours, theirs, "--request", "[1]"], "invalid JSON object value: '[1]'"),
        ([ours, theirs, "--xyzzy"], "unrecognized arguments: --xyzzy"),
    ]:
        status, _, said = run(capsys, *argv, *local)
        assert status == 2 and problem in said


def test_references_come_in_every_layout(tmp_path):
    rows = [{"question": "How?", "response_j": "So.", "response_k": "Not so."}]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    options = ["A", "B", "--judge", "local", "--judge_model", "m", "--references", path]
    parse = command.make_parser().parse_args
    asked, greeting = json.dumps("Question: How?\n\nAnswer:"), json.dumps([{"role": "user", "content": "hi"}])
    found = command.read_references(parse([*options, "--references_layout", "stack_exchange"]), {asked})
    assert found == {asked: " So."}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    jsonl(tmp_path / "rows.jsonl", [{"chosen": messages, "rejected": messages}])
    assert command.read_references(parse(options), {greeting}) == {greeting: "ho"}
    assert command.read_references(parse(options), {asked}) == {}
    assert command.read_references(parse(options[:6]), {greeting}) is None


def test_references_lie_in_a_folder_of_a_data_set_and_reading_ends_with_the_last_that_is_wanted(monkeypatch):
    read = []

    def endless(source, data_dir, split):
        for number in range(1, 10**9):
            read.append((source, data_dir, split, number))
            yield Row(number, {"prompt": f"p{number % 4}", "completion": f"c{number}"})

    monkeypatch.setattr(command, "iter_rows", endless)
    argv = "A B --judge local --judge_model m --references hub/rows --references_data_dir data/evaluation".split()
    found = command.read_references(command.make_parser().parse_args(argv), {'"p1"', '"p3"'})
    assert found == {'"p1"': "c1", '"p3"': "c3"}
    assert read == [("hub/rows", "data/evaluation", "train", number) for number in (1, 2, 3)]
