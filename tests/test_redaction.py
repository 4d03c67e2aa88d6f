"""Nothing that is shown of a run's options holds a key, a token or a password; what needs them has them."""

import dataclasses
import json
import pickle
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from tests._secrets import (
    CARRIERS,
    HARMLESS_NAMES,
    MANY,
    OBJECTS,
    PLANTED,
    SECRET_NAMES,
    TEXTS,
    UNDER_NAMES,
    everything,
    leaks,
    options_with_a_secret,
    planted_options,
)
from tests.tiny import tiny_config
from trl_apa import APAConfig, PPOConfig
from trl_apa.commands.reward import RewardOptions
from trl_apa.commands.sft import SFTOptions
from trl_apa.offline import OfflineConfig
from trl_apa.redaction import without_secrets
from trl_apa.redaction.patterns import HIDDEN, is_secret_name, mask_text


pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect")


# ---- names ----


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_text_under_a_secret_name_is_hidden_and_a_number_is_not(name):
    assert is_secret_name(name)
    for value in ("abc", b"abc", "12345", ("user", "abc"), {"a": ["abc"]}, SimpleNamespace(x="abc")):
        assert without_secrets({"x": [{name: value}]}) == {"x": [{name: HIDDEN}]}
    for value in (0, 5, 1.5, True, False, None, "", [1, 2], {"a": 1}, range(3)):
        assert without_secrets({name: value}) == {name: value}


@pytest.mark.parametrize("name", HARMLESS_NAMES)
def test_a_text_under_another_name_is_shown(name):
    assert not is_secret_name(name)
    for given_value in ("abc", ["abc"], {"a": "abc"}):
        value = {name: given_value}
        assert without_secrets(value) is value


def test_special_tokens_are_shown_whatever_their_name_and_secrets_that_look_like_one_are_not():
    tokens = {"image_token": "<image>", "begin_token": "<|im_start|>", "tokens": ["<s>", "</s>"], "pad_token": "!"}
    assert without_secrets(tokens) is tokens
    assert without_secrets({"password": "<hunter2>", "api_key": "<abc>"}) == {"password": HIDDEN, "api_key": HIDDEN}


def test_of_all_options_of_the_trainers_only_those_for_the_hub_are_texts_with_a_secret_name():
    """A new option of transformers or TRL with such a name fails here, and gets looked at."""
    for config in (APAConfig, PPOConfig, OfflineConfig, SFTOptions, RewardOptions):
        named = {field.name: str(field.type) for field in dataclasses.fields(config) if is_secret_name(field.name)}
        texts = {name for name, kind in named.items() if "str" in kind}
        assert "hub_token" in texts and texts <= {"hub_token", "push_to_hub_token"}
    options = {**GenerationConfig(eos_token_id=[1], suppress_tokens=[3]).to_dict(), **trl.ModelConfig().__dict__}
    assert without_secrets(options) is options


# ---- a secret anywhere in nested options ----


@settings(deadline=None, max_examples=MANY, suppress_health_check=[HealthCheck.too_slow])
@given(options_with_a_secret())
def test_no_nested_option_shows_a_secret_and_the_option_itself_keeps_it(drawn):
    secret, value = drawn
    before = everything(value)
    shown = without_secrets(value)
    assert secret not in everything(shown)
    assert everything(value) == before and secret in before
    # What is shown twice may lose more of a line whose quotes do not close, but gains nothing.
    assert secret not in everything(without_secrets(shown))


@pytest.mark.parametrize("number", range(len(CARRIERS)))
def test_each_way_of_giving_a_secret_is_known(number):
    value = CARRIERS[number]("q7Z0pLm4TtR2")
    assert "q7Z0pLm4TtR2" in everything(value)
    shown = everything(without_secrets([{"a": value}]))
    assert "q7Z0pLm4TtR2" not in shown and HIDDEN in shown
    if number >= len(UNDER_NAMES) + len(OBJECTS):
        return
    # a secret that is given by name is hidden elsewhere, too
    assert "q7Z0pLm4TtR2" not in everything(without_secrets({"a": value, "notes": "with q7Z0pLm4TtR2x"}))


def test_passwords_are_hidden_whatever_their_characters():
    for secret in (
        "pa ss word",
        "pa/ss#1?x",
        "p@ss@w",
        'qu"ote',
        "ap'os",
        "a&b=c;d",
        "<angle>",
        "пароль",
        "a,b)c]",
        "$%^",
    ):
        for value in ({"password": secret}, json.dumps({"password": secret}), str({"x": 1, "password": secret})):
            assert secret not in str(without_secrets(value)), value
        assert secret not in without_secrets({"password": f"{secret}-123", "notes": f"it is {secret}-123"})["notes"]
        if not set(secret) & set(" #?\"'<"):
            address = f"https://me:{secret}@host:1/v1"
            assert without_secrets(address) == "https://<secret>@host:1/v1"


@settings(deadline=None, max_examples=MANY)
@given(st.text(max_size=40), st.sampled_from(TEXTS), st.text(max_size=40))
def test_masking_twice_is_masking_once_and_never_fails(before, text, after):
    masked = mask_text(before + text.replace("§", "q7Z0pLm4TtR2") + after)
    assert mask_text(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "basic training of a run with sk-learn and hf_transfer",
        "https://host:8000/v1?page=2&q=key#top",
        "max_new_tokens=5, eos_token_id=None, num_tokens: 7, pad_token='<pad>'",
        "KeyError: 'step'",
        "stop_token_id=3 names two tokens: set one of them, not a key: that",
        "a mean of 3 tokens; the key idea is simple, at 12:30",
        "Qwen/Qwen2-0.5B at 2306.02231v3, commit 0a1b2c3d4e5f60718293a4b5c6d7e8f901234567",
        "mailto:me@host.org and me@host.org, git+ssh",
        "{% for message in messages %}{{ bos_token + message['content'] + eos_token }}{% endfor %}",
        '{"learning_rate": 1e-05, "tags": ["a", "b"]}',
        "**bold** and *** and a * b ** c",
        "secretary: Ann, author: Bob, monkey=1, turkey='x'",
    ],
)
def test_a_text_without_a_secret_stays_as_it_is(text):
    assert mask_text(text) == text and without_secrets([text])[0] is text


@pytest.mark.parametrize(
    "text", ["a", "a-", "x:", "//a:", "?a=", "token ", "key: (", "https://", "a.b@", '"', "\\", "*"]
)
def test_the_time_to_mask_a_text_grows_as_its_length(text):
    started = time.process_time()
    mask_text(text * (50_000 // len(text)))
    assert time.process_time() - started < 4.0, "seconds; it takes about 0.1"


def test_cycles_depth_and_objects_that_cannot_be_copied_end():
    cycle = {"api_key": "q7Z0pLm4TtR2"}
    cycle["self"] = cycle
    assert "q7Z0pLm4TtR2" not in str(without_secrets(cycle))
    deep = "q7Z0pLm4TtR2"
    for _ in range(900):
        deep = {"token": deep}
    assert "q7Z0pLm4TtR2" not in str(without_secrets([deep, "[" * 100_000]))

    class Single:
        def __copy__(self):
            return self

    single = Single()
    single.token = "q7Z0pLm4TtR2"
    assert without_secrets([single]) == [HIDDEN] and single.token == "q7Z0pLm4TtR2"


def test_names_of_options_stay_when_a_secret_is_called_like_one():
    options = {
        "sort": {"key": "target", "value": "api_key"},
        "target": {"target": 6, "api_key": 1},
        "tensor": torch.ones(2),
    }
    shown = without_secrets(options)
    assert shown["target"] == {"target": 6, "api_key": 1} and shown["tensor"] is options["tensor"]
    assert list(shown) == list(options) and list(shown["sort"]) == ["key", "value"]


# ---- what configs show ----


def test_no_secret_is_shown_by_a_config_and_its_attributes_keep_all(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = APAConfig(str(tmp_path), use_cpu=True, report_to="wandb", **planted_options())
    config.my_api_key = PLANTED["added"]
    warned = [str(warning.message) for warning in caught if "has no effect" in str(warning.message)]
    assert sum("accelerator_kwargs" in text for text in warned) == 1
    shown = [str(config), repr(config), f"{config}", json.dumps(config.to_dict()), config.to_json_string()]
    shown += [str(config.to_sanitized_dict()), repr(vars(pickle.loads(pickle.dumps(config)))), str(warned)]
    shown += [repr(vars(config.shown())), repr(pickle.dumps(config)), repr([config])]
    assert [leaks(text) for text in shown] == [[]] * len(shown)
    for text in shown[:5]:
        assert all(
            f"Shown0{marker}" in text for marker in ("Run", "Config", "Notes", "Tag", "Dir", "Template", "Server")
        )
    # what logs in has it all
    assert leaks(str(vars(config))) == list(PLANTED)
    assert dict(config.tracker_kwargs) == planted_options()["tracker_kwargs"]


@settings(deadline=None, max_examples=25)
@given(options_with_a_secret())
def test_no_config_shows_a_secret_wherever_it_is_among_the_options(drawn):
    secret, value = drawn
    options = {"chat_template_kwargs": {"a": value}, "tracker_kwargs": {"wandb": {"config": {"a": [value]}}}}
    config = APAConfig("x", use_cpu=True, report_to="wandb", run_name=f"a {value}", **options)
    for text in (str(config), repr(config.to_dict()), repr(vars(pickle.loads(pickle.dumps(config.shown()))))):
        assert secret not in text
    assert config.tracker_kwargs["wandb"]["config"]["a"][0] is value


@dataclasses.dataclass
class ScriptsOwn(PPOConfig):
    judge_password: str = "Q7addedZ0pLm"


@pytest.mark.parametrize("config", [ScriptsOwn, OfflineConfig, SFTOptions, RewardOptions])
def test_other_configs_and_those_that_scripts_derive_show_none_either(tmp_path, config):
    made = config(str(tmp_path), use_cpu=True, hub_token=PLANTED["hub_token"], run_name=f"key={PLANTED['run_name']}")
    shown = f"{made} {made!r} {made.to_dict()} {vars(pickle.loads(pickle.dumps(made)))}"
    assert leaks(shown) == [] and "learning_rate" in shown
    assert made.hub_token == PLANTED["hub_token"]


@pytest.mark.parametrize("given", [["Q7bestZ0pLm4"], '["Q7bestZ0pLm4"]', '"Q7bestZ0pLm4"', {"Bearer Q7bestZ0pLm4": 1}])
def test_an_error_about_hub_options_of_the_wrong_kind_does_not_show_them(tmp_path, given):
    with pytest.raises(ValueError, match=r"push_to_hub_if_best_kwargs (is a|has)") as error:
        tiny_config(tmp_path, push_to_hub_if_best_kwargs=given)
    assert leaks(str(error.value)) == []
