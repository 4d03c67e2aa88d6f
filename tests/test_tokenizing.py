"""Prompts as texts: one beginning, no end before the answer, the same ids as their chat messages have."""

import json
import warnings
from importlib import import_module

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, T5Config

from tests.made_tokenizers import CHAT_TEMPLATES, KINDS, made_tokenizer
from tests.tiny import tiny_config
from trl_apa import APATrainer
from trl_apa.commands import generate, generate_options
from trl_apa.offline import OfflineAPATrainer, OfflineConfig
from trl_apa.rollout.prompts import query_of
from trl_apa.rollout.tokenizing import prompt_ids, warn_again
from trl_apa.winrate import LanguageModelJudge
from trl_apa.winrate.comparing import Question


AROUND = ["$A", "<s> $A", "$A </s>", "<s> $A </s>", "<|im_start|> <s> $A </s>"]
ALL_KINDS = [*KINDS, "byt5"]


def arounds(kind):
    return AROUND[:1] if kind == "byt5" else AROUND  # which has one of its own


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CONVERSATIONS = [
    [user("the cat")],
    [{"role": "system", "content": "stop it"}, user("What is it?")],
    [user("the cat"), assistant("ok so"), user("endless")],
    [user("it"), assistant("It is")],
]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_text_gets_its_beginning_and_for_an_encoder_its_end(kind):
    """With and without a template whose rendering it is not, and with nothing in it."""
    for around in arounds(kind):
        for template in (None, *CHAT_TEMPLATES.values()):
            tokenizer = made_tokenizer(kind, around, template)
            before, after = ([tokenizer.convert_tokens_to_ids(t) for t in p.split()] for p in around.split("$A"))
            if kind == "byt5":
                before, after = [], [tokenizer.eos_token_id]
            for text in ("the cat", " the dog\n", "", "user: is it <|im_end|> so?"):
                own = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert prompt_ids(text, tokenizer) == [*before, *own], (around, text)
                assert prompt_ids(text, tokenizer, for_encoder=True) == [*before, *own, *after]
                assert prompt_ids(text, tokenizer, for_encoder=True) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_rendered_text_has_the_ids_of_its_messages(kind):
    rendered = 0
    for around in arounds(kind):
        for name, template in CHAT_TEMPLATES.items():
            tokenizer = made_tokenizer(kind, around, template)
            for messages in CONVERSATIONS:
                if name.startswith("brackets") and messages[0]["role"] == "system":
                    continue
                goes_on = messages[-1]["role"] == "assistant"
                options = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
                text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
                ids = query_of({"prompt": messages}, tokenizer).tolist()
                assert query_of({"prompt": text}, tokenizer).tolist() == ids, (around, name, text)
                assert query_of({"query": text}, tokenizer, 3).tolist() == ids[-3:]
                for_encoder = prompt_ids(text, tokenizer, for_encoder=True)
                assert for_encoder[: len(ids)] == ids and len(for_encoder) - len(ids) in (0, 1)
                rendered += 1
    assert rendered >= 32 * len(arounds(kind))


def test_a_text_whose_bos_was_cut_off_after_rendering_gets_it_back_once():
    for name in ("chatml, bos", "roles, bos", "brackets, bos"):
        tokenizer = made_tokenizer("byte_level", "<s> $A", CHAT_TEMPLATES[name])
        text = tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False, add_generation_prompt=True)
        ids = query_of({"prompt": CONVERSATIONS[0]}, tokenizer).tolist()
        assert ids[0] == tokenizer.bos_token_id
        assert query_of({"prompt": text.removeprefix("<s>")}, tokenizer).tolist() == ids
        assert query_of({"prompt": f" {text}"}, tokenizer).tolist().count(tokenizer.bos_token_id) == 1


def test_the_template_of_the_call_counts():
    tokenizer = made_tokenizer("byte_level", "<s> $A", CHAT_TEMPLATES["chatml, bos"])
    text = "### user:\nthe cat\n\n### assistant:\n"
    bos, own = tokenizer.bos_token_id, tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt_ids(text, tokenizer) == [bos, *own]
    assert prompt_ids(text, tokenizer, {"chat_template": CHAT_TEMPLATES["headings"]}) == own


def test_what_is_left_out_is_said_once():
    tokenizer = made_tokenizer("words", "<s> $A </s>", CHAT_TEMPLATES["chatml, bos"])
    rendered = tokenizer.apply_chat_template([user("the cat")], tokenize=False, add_generation_prompt=True)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for text in ("the cat", rendered, rendered, "it is"):
                prompt_ids(text, tokenizer)
        assert [("EOS" in str(w.message), "BOS" in str(w.message)) for w in said] == [(True, False), (False, True)]
        warn_again(tokenizer)
    silent = made_tokenizer("words", "$A", CHAT_TEMPLATES["chatml, bos"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prompt_ids(rendered, silent)[0] == silent.bos_token_id
        prompt_ids("the cat", silent, for_encoder=True)


# ---- everything that asks a policy ----


def tiny_llama(tokenizer):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **ids, **sizes))


def ones(completions, **kwargs):
    return [1.0] * len(completions)


def remember(monkeypatch, module):
    """The queries that `module` has answered."""
    asked, sample = [], module.generate_responses

    def generate_responses(model, queries, *args, **kwargs):
        asked.extend(query.tolist() for query in queries)
        return sample(model, queries, *args, **kwargs)

    monkeypatch.setattr(module, "generate_responses", generate_responses)
    return asked


@pytest.mark.parametrize("form", ["text", "rendered"])
def test_training_evaluation_the_commands_and_offline_learning_ask_in_one_way(tmp_path, monkeypatch, form):
    tokenizer = made_tokenizer("words", "<s> $A </s>", CHAT_TEMPLATES["chatml, bos"])
    model = tiny_llama(tokenizer)
    messages = [user("the cat")]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = rendered if form == "rendered" else "the cat"
    own = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    ids = query_of({"prompt": messages}, tokenizer).tolist() if form == "rendered" else [tokenizer.bos_token_id, *own]
    rows = [{"prompt": text}] * 4

    asked = remember(monkeypatch, import_module("trl_apa.trainer.apa"))
    config = tiny_config(tmp_path, max_steps=1, max_completion_length=2, save_strategy="no", disable_tqdm=True)
    trainer = APATrainer(config, model, tokenizer=tokenizer, train_dataset=rows, eval_dataset=rows, reward_funcs=ones)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
        trainer.evaluate()
    assert [ids] * 12 == asked  # of the policy to train, of it and of pi_init to evaluate
    assert sum("EOS" in str(w.message) for w in said) == 1
    assert sum("begin with BOS" in str(w.message) for w in said) == (form == "rendered")

    asked = remember(monkeypatch, import_module("trl_apa.offline.trainer"))
    fixed = [{**row, "completion": "stop it", "reward": 1.0} for row in rows]
    options = OfflineConfig(str(tmp_path), report_to="none", use_cpu=True, max_completion_length=4)
    offline = OfflineAPATrainer(
        options, tiny_llama(tokenizer), None, tokenizer, fixed, eval_dataset=rows, reward_funcs=ones
    )
    offline.evaluate()
    assert [ids] * 4 == [query.tolist() for query in offline.rollouts.queries] == asked
    stop_it = tokenizer("stop it", add_special_tokens=False)["input_ids"]
    assert offline.rollouts.responses[0].tolist() == [*stop_it, tokenizer.eos_token_id]

    asked = remember(monkeypatch, generate)
    model.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    options = ["--model_name_or_path", tmp_path / "policy", "--output", tmp_path / "answers.jsonl", "--use_cpu"]
    generate_options.main([str(option) for option in ["--prompt", text, *options, "--max_completion_length", "2"]])
    assert asked == [ids]
    assert json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0])["prompt"] == text


def test_a_judge_that_reads_gives_its_verdict_before_the_end():
    tokenizer = made_tokenizer("byte_level", "<s> $A </s>")
    judge = LanguageModelJudge(tiny_llama(tokenizer), tokenizer, "l")
    query = judge._query(Question("What is it?", "a", "b")).tolist()
    assert query[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in query
    assert tokenizer.decode(query).endswith("\n\nVerdict:")


def test_an_encoder_reads_the_end_and_a_decoder_alone_does_not(tmp_path):
    tokenizer = made_tokenizer("unigram", "$A </s>")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    ids = tokenizer("the cat")["input_ids"]
    for model, expected in (
        (AutoModelForSeq2SeqLM.from_config(config), ids),
        (tiny_llama(tokenizer), ids[:-1]),
    ):
        trainer = APATrainer(tiny_config(tmp_path), model, tokenizer=tokenizer)
        assert trainer._query({"prompt": "the cat"}).tolist() == expected
