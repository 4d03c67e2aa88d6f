"""What reward models read: texts and chat messages up to their end, the same in training and for a win rate."""

import json
import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

from tests.made_tokenizers import CHAT_TEMPLATES, KINDS, made_tokenizer
from tests.test_tokenizing import assistant, tiny_llama, user
from tests.tiny import CONFIGS, EOS, lora_config, tiny_config, tiny_model, tiny_tokenizer
from trl_apa import APATrainer
from trl_apa.commands import generate, winrate
from trl_apa.offline import OfflineAPATrainer, OfflineConfig, label_rows
from trl_apa.rollout.prompts import query_of
from trl_apa.rollout.scoring import AdapterReward, RewardModel
from trl_apa.rollout.texts import answer_text, prompts_and_completions, sampled_ids, scored_ids
from trl_apa.winrate import Pair, RewardModelJudge, VerdictCache, compare
from trl_apa.winrate.comparing import Question


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reward_network(tokenizer, **options):
    """A decoder whose score lies at the last token."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **sizes, **options)
    return AutoModelForSequenceClassification.from_config(config)


def tokens_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def as_sampled(tokenizer, text, ended):
    """Tokens that a policy could have sampled: those with which a text goes on."""
    ids = tokens_of(tokenizer, text)
    if type(tokenizer.backend_tokenizer.model).__name__ == "BPE":  # "7" is part of no longer token
        ids = tokens_of(tokenizer, f"7{text}")[len(tokens_of(tokenizer, "7")) :]
    return torch.tensor([*ids, *([tokenizer.eos_token_id] if ended else [])])


# ---- the sequences ----


@pytest.mark.parametrize("kind", [*KINDS, "byt5"])
def test_a_text_ends_with_one_eos_where_it_has_an_end_and_with_none_where_it_was_cut(kind):
    """As TRL's RewardTrainer trains it, unless the tokenizer puts EOS there by itself: then once."""
    for around in ("$A", "<s> $A", "$A </s>", "<s> $A </s>"):
        tokenizer = made_tokenizer(kind, around)
        eos, text = tokenizer.eos_token_id, "What is it? It is so."
        ended, cut = (scored_ids("What is it?", " It is so.", ended, tokenizer) for ended in (True, False))
        before = [tokenizer.bos_token_id] if around.startswith("<s>") and kind != "byt5" else []
        assert cut == [*before, *tokens_of(tokenizer, text)] and ended == [*cut, eos], around
        if "</s>" not in around and kind != "byt5":
            assert ended == tokenizer(f"{text}{tokenizer.eos_token}")["input_ids"]
        else:
            assert ended == tokenizer(text)["input_ids"]
        framed = scored_ids("What is it?", " It is so.", False, tokenizer, needs_frame=True)
        assert framed == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_chat_message_has_the_end_of_its_turn_or_stays_open(name):
    tokenizer = made_tokenizer("byte_level", "<s> $A </s>", CHAT_TEMPLATES[name])
    for messages, answer in (
        ([user("What is it?")], "It is so."),
        ([user("the cat"), assistant("ok"), user("is it")], "endless "),
        ([user("What is it?"), assistant("It")], " is so."),
        ([user("it")], ""),
    ):
        goes_on = messages[-1]["role"] == "assistant"
        begun = messages[-1]["content"] if goes_on else ""
        complete = [*messages[: len(messages) - goes_on], assistant(begun + answer)]
        rendered = tokenizer.apply_chat_template(complete, tokenize=False)
        assert scored_ids(messages, answer, True, tokenizer) == tokens_of(tokenizer, rendered)
        open_text = tokenizer.decode(scored_ids(messages, answer, False, tokenizer))
        assert rendered.startswith(open_text.rstrip()) and open_text.rstrip().endswith((begun + answer).strip())
        ends = "<|im_end|>" if name.startswith("chatml") else "</s>"
        assert open_text.count(ends) == max(rendered.count(ends) - 1, 0)


def test_a_template_that_drops_thoughts_still_leaves_a_cut_answer_open():
    template = CHAT_TEMPLATES["chatml"].replace("m.content", "m.content.split('</think>')[-1]")
    tokenizer = made_tokenizer("byte_level", "$A", template)
    answer = "so it is</think>It is"
    ended = tokenizer.decode(scored_ids([user("it")], answer, True, tokenizer))
    assert ended.endswith("<|im_start|>assistant\nIt is<|im_end|>\n")
    cut = tokenizer.decode(scored_ids([user("it")], answer, False, tokenizer))
    assert cut.endswith("<|im_start|>assistant\nso it is</think>It is")


def test_sampled_tokens_of_a_chat_are_followed_by_what_the_template_writes_after_the_end():
    tokenizer = made_tokenizer("byte_level", "<s> $A", CHAT_TEMPLATES["chatml"])
    end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    messages, said = [user("What is it?")], tokens_of(tokenizer, "It is so.")
    query = query_of({"prompt": messages}, tokenizer).tolist()

    def read(prompt, *ends):
        return sampled_ids(prompt, query, [*said, *ends], tokenizer, [end, eos])

    whole = tokenizer.apply_chat_template([*messages, assistant("It is so.")], return_dict=False)
    assert read(messages, end) == whole and whole[-1] != end
    assert read(messages) == [*query, *said]
    # Neither a text nor another end of a response has anything behind it.
    assert read("What is it?", end) == [*query, *said, end]
    assert read(messages, eos) == [*query, *said, eos]
    tokenizer.chat_template = None
    assert read(messages, end) == [*query, *said, end]


# ---- training and win rates ----


PROMPTS = [
    ("text", "What is it?", " It is so."),
    ("ends in a space", "the cat ", "END of it"),
    ("rendered", "<s><|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n", "endless"),
    ("chat", [user("What is it?")], "It is so."),
    ("begun", [user("What is it?"), assistant("It is")], " so."),
    ("begun with a space", [user("What is it?"), assistant("It ")], "is so."),
]


@pytest.mark.parametrize("policy_kind", KINDS)
def test_training_and_the_win_rate_give_a_reward_model_the_same_tokens(policy_kind):
    """From the same samples: those of training, and their text as `trl-apa generate` writes it."""
    policy_tokenizer = made_tokenizer(policy_kind, "<s> $A", CHAT_TEMPLATES["chatml, bos"])
    compared = 0
    for kind, around in (("byte_level", "$A"), ("sentencepiece", "<s> $A </s>"), ("words", "<s> $A")):
        tokenizer = made_tokenizer(kind, around, CHAT_TEMPLATES["roles, bos"])
        network = reward_network(tokenizer)
        in_training = RewardModel(network, policy_tokenizer, tokenizer)
        judge = RewardModelJudge(network, tokenizer, "r")
        for _, prompt, answer in PROMPTS:
            for ended in (True, False):
                query = query_of({"prompt": prompt}, policy_tokenizer)
                response = as_sampled(policy_tokenizer, answer, ended)
                row = {"prompt": prompt}
                prompts, completions = prompts_and_completions([row], [query], [response], policy_tokenizer)
                read = in_training._tokens(prompts[0], completions[0], query.tolist(), response.tolist())
                written = generate._answer(policy_tokenizer, prompt, query, response, [policy_tokenizer.eos_token_id])
                assert written.get("ended", True) == ended
                judged = judge.score.text_ids(prompt, written["completion"], ended)
                assert read == judged, (kind, around, prompt)
                compared += 1
                eos = tokenizer.eos_token_id
                assert (eos in read[-2:]) == ended and read.count(tokenizer.bos_token_id) <= 1
    assert compared == 36


def test_a_score_is_that_of_the_row_alone_in_training_and_for_a_win_rate(tmp_path):
    """Rows of different length, ended and cut, with another kind of tokenizer; the judge reads the command's file."""
    policy_tokenizer = made_tokenizer("sentencepiece", "<s> $A </s>")
    tokenizer = made_tokenizer("byte_level", "<s> $A")
    network = reward_network(tokenizer)
    config = tiny_config(tmp_path, batch_size=3, mini_batch_size=3, bf16=False)
    trainer = APATrainer(
        config,
        tiny_llama(policy_tokenizer),
        tokenizer=policy_tokenizer,
        reward_funcs=network,
        reward_processing_classes=tokenizer,
    )
    asked = [("What is it?", " It is so.", True), ("the cat", " END", False), ("the dog\n\nHuman:", " stop it", True)]
    queries = [trainer._query({"prompt": prompt}) for prompt, _, _ in asked]
    responses = [as_sampled(policy_tokenizer, answer, ended) for _, answer, ended in asked]
    scores = trainer.score(queries, responses, prompts=[prompt for prompt, _, _ in asked])
    ends = trainer.special_tokens.ends
    expected = []
    for (prompt, answer, ended), query, response in zip(asked, queries, responses, strict=True):
        assert answer_text(policy_tokenizer, query, response) == answer
        ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id] * ended
        with torch.no_grad():
            state = network.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            expected.append(network.score(state).item())
    assert [score.item() for score in scores] == pytest.approx(expected, abs=1e-5)

    judge = RewardModelJudge(network, tokenizer, "r")
    for number, (query, response) in enumerate(zip(queries, responses, strict=True)):
        prompt = asked[number][0]
        row = {"prompt": prompt, **generate._answer(policy_tokenizer, prompt, query, response, ends)}
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        (answer,) = winrate.read_answers(str(path))
        assert judge._scores([answer]) == pytest.approx([expected[number]], abs=1e-5)
    assert judge._scores([(p, a, e) for p, a, e in asked]) == pytest.approx(expected, abs=1e-5)


def test_a_classifier_that_reads_its_score_elsewhere_keeps_what_its_tokenizer_puts_around_a_text():
    """BERT's [CLS] and [SEP] frame every text, those that were cut too."""
    tokenizer = made_tokenizer("wordpiece", "<s> $A </s>", eos_token=None)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, **sizes)
    reward = RewardModel(AutoModelForSequenceClassification.from_config(config), tokenizer, tokenizer)
    whole = tokenizer("What is it? It is so.")["input_ids"]
    assert [reward.text_ids("What is it?", " It is so.", ended) for ended in (True, False)] == [whole, whole]


def test_a_prompt_that_was_shortened_is_read_as_the_policy_read_it():
    policy_tokenizer = made_tokenizer("byte_level", "<s> $A")
    tokenizer = made_tokenizer("words", "$A")
    reward = RewardModel(reward_network(tokenizer), policy_tokenizer, tokenizer)
    prompt = "What is it? the cat"
    short = query_of({"prompt": prompt}, policy_tokenizer, len(tokens_of(policy_tokenizer, " the cat")))
    response = as_sampled(policy_tokenizer, " stop it", ended=True)
    read = reward._tokens(prompt, " stop it", short.tolist(), response.tolist())
    assert tokenizer.decode(read) == "the cat stop it </s>"


def test_every_end_of_the_policy_is_an_end(tmp_path):
    """`stop_token_id`, and what its generation config ends with."""
    tokenizer = made_tokenizer("byte_level", "$A")
    own = made_tokenizer("words", "$A")
    model = tiny_llama(tokenizer)
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = [1, turn]
    said = tokens_of(tokenizer, " so")
    for stop, ended in ((None, [True, True, False]), (turn, [False, True, False])):
        config = tiny_config(tmp_path, stop_token_id=stop)
        options = {"reward_funcs": reward_network(own), "reward_processing_classes": own}
        trainer = APATrainer(config, model, tokenizer=tokenizer, **options)
        reward = trainer.scorer.functions[0]
        query = tokens_of(tokenizer, "it is")
        read = [reward._tokens("it is", " so", query, [*said, *end]) for end in ([1], [turn], [])]
        assert [ids[-1] == own.eos_token_id for ids in read] == ended


def test_a_reward_adapter_reads_a_chat_up_to_the_end_of_its_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w3 {{ m.content }} {{ eos_token }} w9 {% endfor %}"
        "{% if add_generation_prompt %}w3 {% endif %}"
    )
    torch.manual_seed(2)
    config = CONFIGS["llama"]()
    config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(config)
    get_peft_model(classifier, lora_config(task_type="SEQ_CLS", init_lora_weights=False)).save_pretrained(tmp_path)
    options = {"peft_config": lora_config(), "reward_funcs": f"adapter:{tmp_path}"}
    trainer = APATrainer(tiny_config(tmp_path), tiny_model(), tokenizer=tokenizer, **options)
    (reward,) = trainer.scorer.functions
    assert isinstance(reward, AdapterReward)
    messages, query = [user("w4")], [3, 4, EOS, 9, 3]
    for response, read in (([5, EOS], [5, EOS, 9]), ([5, 6], [5, 6])):
        (score,) = reward(prompts=[messages], prompt_ids=[query], completion_ids=[response])
        (as_text,) = reward(prompts=["w4"], prompt_ids=[query], completion_ids=[read])
        assert score == pytest.approx(as_text, abs=1e-6)


# ---- win rates ----


def test_whether_an_answer_ended_goes_from_the_file_to_the_judge(tmp_path):
    rows = [{"prompt": "p", "completion": "a b"}, {"prompt": "q", "completion": "a", "ended": False}]
    other = [{"prompt": "p", "completion": "c", "ended": False}, {"prompt": "q", "completion": "d", "ended": True}]
    for name, content in (("A.jsonl", rows), ("B.jsonl", other)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    answers = [winrate.read_answers(str(tmp_path / f"{name}.jsonl")) for name in "AB"]
    pairs = winrate.make_pairs(*answers, None, [])
    assert pairs == [Pair("p", "a b", "c", None, True, False), Pair("q", "a", "d", None, False, True)]
    # What is cut at a text ended there.
    assert winrate.make_pairs(*answers, None, ["b", "c"])[0] == Pair("p", "a ", "", None, True, True)

    class Notes:
        identity, sees_order = {"judge": "notes"}, True

        def __init__(self):
            self.asked = []

        def __call__(self, questions):
            self.asked += questions
            yield from ((number, "tie") for number in range(len(questions)))

    judge, cache = Notes(), VerdictCache(tmp_path / "cache.jsonl")
    compare(pairs, judge, cache)
    assert judge.asked[:2] == [
        Question("p", "a b", "c", None, True, False),
        Question("p", "c", "a b", None, False, True),
    ]
    compare([pair._replace(ours_ended=True, theirs_ended=True) for pair in pairs], judge, cache)
    assert len(judge.asked) == 8
    compare(pairs, judge, cache)
    assert len(judge.asked) == 8
    # Verdicts on answers that ended are filed as before there was a difference.
    assert cache.get(cache.key(judge.identity, ["p", "a b", "c", None])) == "tie"


# ---- offline ----


def test_offline_rows_that_end_in_an_assistant_turn_are_measured_as_online_ones(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    begun = [user("w4"), assistant("w5")]
    rows = [{"prompt": begun}, {"prompt": [user("w6")]}, {"prompt": "w7 w8"}, {"input_ids": [9, 10]}]
    seen = {}

    def note(name):
        def reward(prompts, completions, completion_ids, **columns):
            seen.setdefault(name, []).extend(zip(prompts, completions, completion_ids, strict=True))
            return [0.0] * len(completions)

        return reward

    def expected(prompt, ids):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if prompt == begun[:1]:
            return [assistant(f"w5 {text}".rstrip())]
        return [assistant(text)] if isinstance(prompt, list) else text

    online = APATrainer(
        tiny_config(tmp_path, max_completion_length=3, bf16=False),
        tiny_model(),
        tokenizer=tokenizer,
        eval_dataset=rows,
        reward_funcs=note("online"),
    )
    online.evaluate()
    fixed = [{"prompt": "w2", "completion": "w3", "reward": 1.0}]
    config = OfflineConfig(str(tmp_path), report_to="none", use_cpu=True, max_completion_length=3)
    options = {"eval_dataset": rows, "reward_funcs": note("offline")}
    OfflineAPATrainer(config, tiny_model(), None, tokenizer, fixed, **options).evaluate()
    assert [prompt for prompt, _, _ in seen["offline"]] == [begun[:1], [user("w6")], "w7 w8", "w9 w10"]
    for read in (seen["online"], seen["offline"]):
        for prompt, completion, ids in read:
            assert completion == expected(prompt, ids)
    assert [row[0] for row in seen["online"][:4]] == [row[0] for row in seen["offline"]]

    given = [
        {"prompt": begun, "completion": " w7"},
        {"prompt": [user("w6")], "completion": [assistant("w8")]},
        {"prompt": [user("w6")], "completion": "w8"},
        {"prompt": "w7", "completion": [assistant("w9")]},
        {"prompt": begun, "completion_ids": [7, EOS]},
    ]
    label_rows(given[:4], note("given"), tokenizer)
    label_rows(given[4:], note("given"), tokenizer)
    assert [(prompt, completion) for prompt, completion, _ in seen["given"]] == [
        (begun[:1], [assistant("w5 w7")]),
        ([user("w6")], [assistant("w8")]),
        ([user("w6")], [assistant("w8")]),
        ("w7", "w9"),
        (begun[:1], [assistant("w5 w7")]),
    ]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "words"])
def test_the_space_after_a_begun_answer_is_kept_and_not_doubled(kind):
    tokenizer = made_tokenizer(kind, "<s> $A", CHAT_TEMPLATES["chatml"])
    for begun, answer in (("What", " is it?"), ("What ", "is it?"), ("What is", " it?")):
        prompt = [user("the cat"), assistant(begun)]
        query, response = query_of({"prompt": prompt}, tokenizer), as_sampled(tokenizer, answer, ended=True)
        asked, completed = prompts_and_completions([{"prompt": prompt}], [query], [response], tokenizer)
        assert asked == [[user("the cat")]] and completed == [[assistant("What is it?")]]
