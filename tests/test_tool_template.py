"""Chat templates with tools: what follows the policy's turn, in every family that TRL has a template of."""

import pytest

from tests.tool_dialogues import SPECIAL, TEMPLATES, tool_tokenizer
from trl_apa.tools.messages import asked_calls, with_dicts_of_arguments
from trl_apa.tools.template import ToolTemplate


# A family's template, and the token that ends its turns with a tool call.
FAMILIES = {
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "qwen3_6": "<|im_end|>",
    "nemotron_3_nano": "<|im_end|>",
    "lfm2_2_5": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "gptoss": "<|call|>",
    "glm4moe": "<|observation|>",
    "gemma4_v5": "<|tool_response>",
    "deepseekv3": "<\uff5cend\u2581of\u2581sentence\uff5c>",
}
PLAIN = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content | trim }}"
    "{% for c in m.tool_calls %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}\n\n"
    "{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
ANSWERS = [{"role": "tool", "name": "add", "content": " 42 "}, {"role": "tool", "name": "add", "content": "30"}]


def of_family(family):
    tokenizer = tool_tokenizer(family)
    end = FAMILIES[family]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", end]})
    if family == "deepseekv3":
        tokenizer.response_template = {"fields": {"content": {"content": "text"}}}
    return tokenizer, tokenizer.convert_tokens_to_ids(end)


def rendered(tokenizer, *answers):
    """A conversation with a call, as the template writes it; DeepSeek's wants the arguments as a text."""
    for arguments in ({"a": 12}, '{"a": 12}'):
        turn = {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": arguments}}]}  # fmt: skip
        try:
            messages = [{"role": "user", "content": "?"}, turn, *answers]
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TypeError:
            continue
    raise AssertionError("the template takes neither")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tool_s_answer_follows_as_the_template_writes_it(family):
    tokenizer, end = of_family(family)
    template = ToolTemplate(tokenizer, [end])
    told = tokenizer.decode(template.told_ids(ANSWERS, end))
    whole = rendered(tokenizer, *ANSWERS)
    assert whole.endswith(FAMILIES[family] + told)
    assert "42" in told and "30" in told and "12" not in told  # the answers, and nothing of the call
    # A turn that a stop string ended gets its end too.
    cut = tokenizer.decode(template.told_ids(ANSWERS, tokenizer.convert_tokens_to_ids("a")))
    assert cut == FAMILIES[family] + told


SCHEMA = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "required": ["a"], "properties": {
    "a": {"type": "integer", "description": "a number"}}}}  # fmt: skip


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deepseekv3"])
def test_a_call_as_the_template_writes_it_is_read_with_its_arguments(family):
    tokenizer, end = of_family(family)
    template = ToolTemplate(tokenizer, [end])
    question = [{"role": "user", "content": "?"}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 12}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*question, turn], tokenize=False)
    # A template may open thoughts that a turn without them lacks.
    same = [one == other for one, other in zip(prompt, whole, strict=False)]
    common = whole[: same.index(False)] if False in same else prompt
    sampled = whole[len(common) :]
    ids, context = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (sampled, common))
    message = template.read(ids, context, [{"type": "function", "function": SCHEMA}])
    [asked] = message["tool_calls"]
    assert asked["function"] == {"name": "add", "arguments": {"a": 12}}


def test_any_other_end_of_the_policy_s_is_one_too():
    tokenizer = tool_tokenizer()
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    template = ToolTemplate(tokenizer, ends)
    assert template.told_ids(ANSWERS, ends[0]) == template.told_ids(ANSWERS, ends[1])


def test_an_end_token_in_an_answer_does_not_move_where_the_answer_begins():
    tokenizer, end = of_family("qwen3")
    template = ToolTemplate(tokenizer, [end])
    spelled = [{**ANSWERS[0], "content": "x<|im_end|>y<|im_end|>"}]
    assert tokenizer.decode(template.told_ids(spelled, end)).startswith("\n<|im_start|>user\n<tool_response>\nx")


@pytest.mark.parametrize("end", [None, "<|im_end|>"])
def test_a_template_in_plain_words_that_trims_what_it_writes(end):
    tokenizer = tool_tokenizer()
    tokenizer.chat_template, tokenizer.response_template = PLAIN, {"fields": {"content": {"content": "text"}}}
    ends = [] if end is None else [tokenizer.convert_tokens_to_ids(end)]
    template = ToolTemplate(tokenizer, ends)
    told = tokenizer.decode(template.told_ids(ANSWERS[:1], ends[0] if ends else 60))
    whole = rendered(tokenizer, *ANSWERS[:1])
    assert told and whole.endswith(told) and told.lstrip().startswith("### tool:\n42\n") and "CALL" not in told


def test_a_turn_is_read_with_the_types_of_the_schema_and_bad_calls_are_text():
    tokenizer, end = of_family("qwen3")
    template = ToolTemplate(tokenizer, [end])

    def read(text):
        context = tokenizer("<|im_start|>assistant\n")["input_ids"]
        return template.read(tokenizer(text)["input_ids"], context, [])

    called = read('Let me.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>')
    assert called["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert called["role"] == "assistant" and called["content"].strip() == "Let me."
    for text in ("plain<|im_end|>", "<tool_call>\nno json\n</tool_call><|im_end|>", "<tool_call>", "", "<|im_end|>",
                 '<tool_call>\n{"arguments": {}}\n</tool_call>', '<tool_call>\n[1, 2]\n</tool_call>'):  # fmt: skip
        message = read(text)
        assert message["role"] == "assistant" and "tool_calls" not in message and isinstance(message["content"], str)


ARGUMENTS = {
    '"x"': {},
    "[1]": {},
    "3": {},
    "true": {},
    '{"a": "half \\ud83d"}': {"a": "half \\ud83d"},
    '{"\\udc00": [{"b": "\\ud800"}]}': {"\\udc00": [{"b": "\\ud800"}]},
    '{"a": "\\ud83d\\ude00"}': {"a": "\U0001f600"},
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_whatever_the_policy_calls_with_its_message_can_be_rendered_and_written(arguments):
    tokenizer, end = of_family("qwen3")
    text = f'<tool_call>\n{{"name": "add", "arguments": {arguments}}}\n</tool_call><|im_end|>'
    read = ToolTemplate(tokenizer, [end]).read(tokenizer(text)["input_ids"], [], [])
    [(name, asked)], message = asked_calls(read), with_dicts_of_arguments(read)
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": ARGUMENTS[arguments]}
    assert name == "add" and isinstance(asked, dict) == arguments.startswith("{")
    assert len(tokenizer.apply_chat_template([{"role": "user", "content": "?"}, message])) and repr(message).encode()


@pytest.mark.parametrize("depth", [100, 5000])
def test_a_call_that_is_nested_too_deep_for_templates_and_copies_is_text(depth):
    tokenizer, end = of_family("qwen3")
    text = f'<tool_call>\n{{"name": "add", "arguments": {{"a": {"[" * depth + "]" * depth}}}}}\n</tool_call><|im_end|>'
    message = ToolTemplate(tokenizer, [end]).read(tokenizer(text)["input_ids"], [], [])
    assert "tool_calls" not in message and "[" * depth in message["content"]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "does not"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not"),
        (PLAIN, "response_template"),
    ],
)
def test_a_tokenizer_that_cannot_have_tools_is_refused(template, problem):
    tokenizer = tool_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=problem):
        ToolTemplate(tokenizer, [2])


def test_a_template_that_puts_nothing_between_two_turns_is_refused():
    """Where a turn ends is read off the mask, which has a gap there only if the answer has a token."""
    tokenizer = tool_tokenizer()
    tokenizer.chat_template = PLAIN.replace("### {{ m.role }}:\n", "").replace("\n\n", "").replace(
        "### assistant:\n", ""
    )  # fmt: skip
    tokenizer.response_template = {"fields": {"content": {"content": "text"}}}
    with pytest.raises(ValueError, match="puts no token between two turns if a tool answers nothing"):
        ToolTemplate(tokenizer, [2])


def test_the_families_are_those_of_trl():
    assert all((TEMPLATES / f"{family}.jinja").exists() for family in FAMILIES) and SPECIAL[2] == "<|im_end|>"
