"""Chat messages that are longer than `max_prompt_length`: complete turns are dropped, the template stays complete."""

import warnings

import pytest

from tests.tiny import byte_tokenizer
from trl_apa.rollout.prompts import query_of


CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] if m['content'] is string else m['content'] | "
    "map(attribute='text') | join }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Gemma's and Mistral's: no system message, and turns that alternate.
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer_with(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
TALK = [user("one"), assistant("two"), user("three"), assistant("four"), user("five")]


def prompt(messages, max_length, template=CHATML, tokenizer=None):
    """The text of the prompt, and what was warned of."""
    tokenizer = tokenizer or tokenizer_with(template)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = query_of({"prompt": messages}, tokenizer, max_length)
    assert max_length is None or len(ids) <= max_length
    return tokenizer.decode(ids), [str(w.message) for w in caught if "max_prompt_length" in str(w.message)]


def lengths_of(messages, template=CHATML):
    return len(prompt(messages, None, template)[0])


@pytest.mark.parametrize(
    ("messages", "template"),
    [
        (TALK, CHATML),
        (TALK, STRICT),
        ([SYSTEM, *TALK], CHATML),
        ([SYSTEM, {"role": "developer", "content": "Short."}, *TALK], CHATML),
        ([*TALK, assistant("si")], CHATML),
        ([user("one"), assistant("two"), {"role": "tool", "content": "2"}, assistant("so 2"), *TALK], CHATML),
        ([assistant("hello"), *TALK], CHATML),
    ],
)
def test_at_every_length_the_prompt_is_a_whole_conversation_of_the_last_turns(messages, template):
    first = next(i for i, message in enumerate(messages) if message["role"] not in ("system", "developer"))
    starts = [i for i in range(first, len(messages)) if i == first or messages[i]["role"] == "user"]
    allowed = {prompt([*messages[:first], *messages[i:]], None, template)[0] for i in starts}
    shortest = min(map(len, allowed))
    whole = lengths_of(messages, template)
    for max_length in range(shortest, whole + 2):
        text, said = prompt(messages, max_length, template)
        assert text == max((t for t in allowed if len(t) <= max_length), key=len)
        assert bool(said) == (max_length < whole)


def test_a_turn_that_is_too_long_by_itself_loses_the_beginning_of_its_text():
    long = user("abcdefghijklmnopqrstuvwxyz")
    text, said = prompt([SYSTEM, *TALK, assistant("six"), long], 60)
    assert text.startswith("<system>Be kind.</><user>") and text.endswith("xyz</><assistant>") and len(text) == 60
    assert len(said) == 2 and "complete turns" in said[0] and "too long by itself" in said[1]
    parts = {"role": "user", "content": [{"type": "text", "text": "abcdefghijklm"}, {"type": "text", "text": "nopq"}]}
    assert prompt([parts], 30)[0] == "<user>hijklmnopq</><assistant>"


def test_what_cannot_be_left_out_is_refused_by_name():
    for messages in ([SYSTEM, *TALK], [SYSTEM], [*TALK, assistant("a long beginning of an answer")]):
        with pytest.raises(
            ValueError, match=r"max_prompt_length=20, but a prompt has \d+ tokens that cannot be dropped"
        ):
            prompt(messages, 20)


def test_it_is_said_once_and_texts_and_ids_are_cut_as_before():
    tokenizer = tokenizer_with(CHATML)
    assert prompt(TALK, 40, tokenizer=tokenizer)[1]
    assert not prompt([user("other"), *TALK[1:]], 40, tokenizer=tokenizer)[1]
    assert prompt("a text that is longer", 6) == ("longer", [])
    assert query_of({"input_ids": [1, 2, 3]}, tokenizer, 2).tolist() == [2, 3]
