"""`generate`: order, padding, where a response ends, and that nothing leaks in from the model's own defaults."""

import math
import random
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from tests.made_tokenizers import KINDS, TEXTS, made_tokenizer
from tests.tiny import (
    EOS,
    FAMILIES,
    PAD,
    VOCABULARY,
    byte_tokenizer,
    lora_config,
    tiny_config,
    tiny_model,
    tiny_rollouts,
    tiny_trainer,
)
from trl_apa import APATrainer
from trl_apa.rollout.generation import end_token_ids, generation_options
from trl_apa.rollout.stopping import ResponseLengths, row_criteria


def ends_with_eos_only(response):
    return EOS not in response[:-1].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_greedy_equals_one_by_one_greedy_in_the_callers_order(tmp_path, family):
    trainer = tiny_trainer(tmp_path, tiny_model(family))
    queries = tiny_rollouts(7, max_query=20)[0]
    batched = trainer.generate(queries, batch_size=3, return_prompt=False, do_sample=False, max_new_tokens=9)
    for query, response in zip(queries, batched, strict=True):
        alone = trainer.generate(query, return_prompt=False, do_sample=False, max_new_tokens=9)
        assert alone.shape == (1, len(response))
        assert torch.equal(alone[0], response)
        assert ends_with_eos_only(response)


def test_the_prompt_comes_back_unless_told_otherwise_and_an_eos_in_it_cuts_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path)
    query = torch.tensor([4, EOS, PAD, 5])
    whole = trainer.generate([query], do_sample=False, max_new_tokens=5)[0]
    response = trainer.generate([query], return_prompt=False, do_sample=False, max_new_tokens=5)[0]
    assert torch.equal(whole, torch.cat([query, response]))
    assert len(response) >= 1


def test_length_sampler_is_drawn_once_a_batch(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.special_tokens = replace(trainer.special_tokens, ends=[])
    draws = iter([3, 5])
    queries = [torch.tensor([2, 3]), torch.tensor([4]), torch.tensor([5, 6, 7]), torch.tensor([8, 9, 2, 3])]
    responses = trainer.generate(queries, length_sampler=lambda: next(draws), batch_size=2, return_prompt=False)
    assert [len(r) for r in responses] == [3, 3, 5, 5]


def test_reference_responses_come_as_a_pair_and_differ_once_the_policy_has_moved(tmp_path):
    for trainer_kwargs in (None, {"peft_config": lora_config()}):
        trainer = tiny_trainer(tmp_path, trainer_kwargs=trainer_kwargs, learning_rate=0.1)
        queries, responses, scores = tiny_rollouts()
        options = {"return_prompt": False, "do_sample": False, "max_new_tokens": 8, "generate_ref_response": True}
        policy, reference = trainer.generate(queries, **options)
        assert [r.tolist() for r in policy] == [r.tolist() for r in reference]
        for _ in range(3):
            trainer.step(queries, responses, scores)
        moved, still = trainer.generate(queries, **options)
        assert [r.tolist() for r in still] == [r.tolist() for r in reference]
        assert [r.tolist() for r in moved] != [r.tolist() for r in reference]


def test_sampling_matches_the_logprobs_of_the_update(tmp_path):
    """First-token frequencies of 4,000 samples at temperature 0.7 against exp(log pi) at 0.7.

    The bound is six standard errors of a frequency, over at most 32 tokens: a false failure once in 10^7 seeds.
    """
    model = tiny_model()
    model.generation_config = GenerationConfig(top_k=2, temperature=0.1, repetition_penalty=3.0, eos_token_id=EOS)
    trainer = tiny_trainer(tmp_path, model, temperature=0.7, batch_size=4000, mini_batch_size=4000)
    samples = trainer.generate([torch.tensor([5, 6])] * 4000, return_prompt=False, batch_size=4000, max_new_tokens=1)
    frequencies = torch.bincount(torch.cat(samples), minlength=32) / 4000
    with torch.no_grad():
        logits = trainer.model.policy(input_ids=torch.tensor([[5, 6]])).logits[0, -1]
    probabilities = torch.softmax(logits / 0.7, dim=-1)
    bound = 6 * (probabilities * (1 - probabilities) / 4000).sqrt() + 1e-3
    assert (frequencies > 0).sum() > 2
    assert ((frequencies - probabilities).abs() < bound).all()
    assert model.generation_config.top_k == 2


def letter_tokenizer():
    """A token a letter: transformers' stop strings want to spell any text."""
    letters = "abcdefghijklmnopqrstuvwxyz0123"
    vocabulary = {"<pad>": PAD, "<eos>": EOS, **{letter: i + 2 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_a_stop_string_ends_the_response_with_the_tokens_that_spell_it(tmp_path, pad):
    """Also where pad equals EOS: the pads that fill a stopped row up are not part of the response."""
    trainer = APATrainer(tiny_config(tmp_path), tiny_model(), tokenizer=letter_tokenizer())
    trainer.special_tokens = replace(trainer.special_tokens, pad=pad)
    queries = [torch.tensor([2 + i, 3]) for i in range(12)]
    options = {"return_prompt": False, "do_sample": False, "max_new_tokens": 10, "batch_size": 12}
    free = trainer.generate(queries, **options)
    stop = trainer.tokenizer.decode(free[0][1:3])
    stopped = trainer.generate(queries, stop_strings=[stop], **options)
    assert any(len(a) < len(b) for a, b in zip(stopped, free, strict=True))
    for response, unstopped in zip(stopped, free, strict=True):
        text = trainer.tokenizer.decode(unstopped, skip_special_tokens=True)
        expected = text[: text.index(stop) + 2] if stop in text else text
        assert trainer.tokenizer.decode(response, skip_special_tokens=True) == expected
        assert stop in text or torch.equal(response, unstopped)


STOPS = [["END"], ["\n\n"], ["\n\nHuman:"], ["é"], [" END", "stop"], ["topp"], ["👍"], ["dEND"], ["<|im_end|>"]]


@pytest.mark.parametrize("kind", [*KINDS, "byt5"])
def test_a_response_ends_with_the_first_token_with_which_its_text_holds_a_stop_string(kind):
    """Whatever token it begins and ends in, in a batch, behind prompts that hold it or end in half of it."""
    tokenizer = made_tokenizer(kind)
    generator = random.Random(0)
    before = tokenizer("the", add_special_tokens=False)["input_ids"]
    found = 0
    for stop in STOPS:
        responses = []
        for _ in range(8):  # texts in which it occurs, then random tokens
            text, cut = generator.choice(TEXTS), generator.randrange(20)
            text = f"{text[cut : cut + 9]}{generator.choice(stop)}{text[cut + 9 : cut + 16]}"
            responses.append(tokenizer(text, add_special_tokens=False)["input_ids"])
            responses.append([generator.randrange(3, len(tokenizer)) for _ in range(10)])
        whole = tokenizer(generator.choice(stop), add_special_tokens=False)["input_ids"]
        prompts = [whole[: generator.randrange(len(whole) + 1)] for _ in responses]
        lengths = ResponseLengths(12, row_criteria(None, stop, tokenizer))
        rows = [
            torch.tensor([0] * (12 - len(prompt)) + prompt + response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        tokens = pad_sequence(rows, batch_first=True)
        for width in range(13, tokens.shape[1] + 1):
            lengths(tokens[:, :width], None)
        for response, length in zip(responses, lengths.lengths_B.tolist(), strict=True):
            texts = [tokenizer.decode(before + response[:n]) for n in range(len(response) + 1)]
            hold = [any(string in text[len(texts[0]) :] for string in stop) for text in texts]
            assert length == (hold.index(True) if True in hold else 0), (stop, texts[-1])
            found += True in hold
    assert found > 20


class Says(LogitsProcessor):
    """Makes each row say a text of its own: the rows are told apart by their prompts."""

    def __init__(self, width, prompts, texts):
        self.width, self.prompts, self.texts = width, prompts, texts

    def __call__(self, input_ids, scores):
        place = input_ids.shape[1] - self.width
        scores = torch.full_like(scores, -math.inf)
        for row, ids in enumerate(input_ids[:, : self.width].tolist()):
            both = zip(self.prompts, self.texts, strict=True)
            (text,) = (text for prompt, text in both if ids[-len(prompt) :] == prompt)
            scores[row, text[min(place, len(text) - 1)]] = 0.0
        return scores


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_prompt_completes_no_stop_string_and_stops_nothing(tmp_path, batch_size):
    tokenizer = byte_tokenizer()
    torch.manual_seed(1)
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **ids, **sizes))
    trainer = APATrainer(tiny_config(tmp_path), model, tokenizer=tokenizer)
    cases = [
        ("Question:\n", "\nanswer is 4 END more", "\nanswer is 4 END"),
        ("a EN", "D and more", "D and more"),
        ("all END", "END of it", "END"),
        ("it is END, caf\xc3", "é\n\nend", "é\n\n"),
        ("b", "x EN\n D", "x EN\n D"),
    ]
    prompts, texts, expected = zip(*cases, strict=True)
    prompts, said = ([tokenizer(text)["input_ids"] for text in part] for part in (prompts, texts))
    options = {"stop_strings": ["\n\n", "END", "Ã"], "return_prompt": False, "batch_size": batch_size}
    for start in range(0, 5, batch_size):
        rows = slice(start, start + batch_size)
        says = Says(max(map(len, prompts[rows])), prompts[rows], said[rows])
        responses = trainer.generate(
            [torch.tensor(prompt) for prompt in prompts[rows]],
            max_new_tokens=max(map(len, said[rows])),
            logits_processor=LogitsProcessorList([says]),
            length_sampler=None,
            **options,
        )
        for response, text in zip(responses, expected[rows], strict=True):
            # what a text says at its end it says again up to the limit
            assert tokenizer.decode(response).rstrip(text[-1]) == text.rstrip(text[-1])


def test_lengths_are_remembered_for_each_row():
    """Row 0 ends at its second generated token, row 1 never, row 2 at the first; tokens after that are filling."""

    def ends_on_nine(input_ids, scores):
        return input_ids[:, -1] == 9

    lengths = ResponseLengths(prompt_width=2, criteria=[ends_on_nine])
    tokens = torch.tensor([[1, 1, 3, 9, 0], [1, 1, 3, 4, 5], [1, 9, 9, 0, 9]])
    done = [lengths(tokens[:, :width], None).tolist() for width in (3, 4, 5)]
    assert done == [[False, False, True], [True, False, True], [True, False, True]]
    assert [row.tolist() for row in lengths.cut(tokens)] == [[3, 9], [3, 4, 5], [9]]


def test_options_of_the_call_win_over_the_config_and_the_rest_goes_to_the_model():
    defaults = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 7,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    # What StackLLaMA passes.
    classic = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "eos_token_id": 100_000}
    options = generation_options(defaults, {**classic, "streamer": "s", "stop_strings": "x", "pad_token_id": None})
    config = options["generation_config"]
    assert (config.eos_token_id, config.min_length, config.max_new_tokens, config.pad_token_id) == (100_000, -1, 7, 0)
    assert (options["stop_strings"], options["model_inputs"], options["max_length"]) == ("x", {"streamer": "s"}, None)
    options = generation_options(defaults, {"max_length": 30, "do_sample": False})
    assert (options["max_length"], options["generation_config"].do_sample) == (30, False)
    given = GenerationConfig(top_k=5, max_new_tokens=3)
    config = generation_options(defaults, {"generation_config": given})["generation_config"]
    assert (config.top_k, config.max_new_tokens, config.do_sample) == (5, 3, True)
    with pytest.warns(UserWarning, match=r"temperature=0\.5.*config\.temperature=1\.0"):
        generation_options(defaults, {"temperature": 0.5})


def test_every_id_that_may_end_a_response_is_known():
    class Model:
        generation_config = GenerationConfig(eos_token_id=[7, 3])

    class Tokenizer:
        eos_token_id = 5

    assert end_token_ids(Model(), Tokenizer()) == [3, 5, 7]
    Model.generation_config = GenerationConfig()
    assert end_token_ids(Model(), Tokenizer()) == [5]


def test_max_length_counts_the_query_and_not_its_padding(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.special_tokens = replace(trainer.special_tokens, ends=[])
    queries = [torch.tensor([2, 3]), torch.tensor([4, 5, 6, 7, 8, 9])]
    responses = trainer.generate(queries, return_prompt=False, batch_size=2, max_length=10)
    assert [len(response) for response in responses] == [8, 4]


def test_padding_stays_if_it_should_and_any_integer_dtype_will_do(tmp_path):
    trainer = tiny_trainer(tmp_path)
    queries = [torch.tensor([2 + i, 3], dtype=torch.int16) for i in range(12)]
    options = {"return_prompt": False, "do_sample": False, "max_new_tokens": 10, "batch_size": 12}
    end = int(trainer.generate(queries, **options)[0][2])
    cut = trainer.generate(queries, eos_token_id=end, **options)
    whole = trainer.generate(queries, eos_token_id=end, remove_padding=False, **options)
    assert len({len(response) for response in cut}) > 1 == len({len(response) for response in whole})
    for short, long in zip(cut, whole, strict=True):
        assert torch.equal(long[: len(short)], short) and (long[len(short) :] == PAD).all()


def test_classic_generation_kwargs_run(tmp_path):
    trainer = tiny_trainer(tmp_path)
    kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": PAD}
    responses = trainer.generate(
        tiny_rollouts()[0], return_prompt=False, length_sampler=lambda: 4, eos_token_id=100_000, **kwargs
    )
    assert [len(r) for r in responses] == [4] * 4


def test_generate_refuses_what_it_cannot_answer(tmp_path):
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"query_tensor\[0\] has shape \(1, 2\)"):
        trainer.generate(torch.tensor([[2, 3]]))
    with pytest.raises(ValueError, match=r"query_tensor\[1\] is empty"):
        trainer.generate([torch.tensor([2]), torch.tensor([], dtype=torch.long)])
    with pytest.raises(ValueError, match=r"query_tensor\[0\] is a list"):
        trainer.generate([[2, 3]])
    with pytest.raises(ValueError, match=r"query_tensor\[0\] holds.*the model knows 0 to 31"):
        trainer.generate([torch.tensor([32])])
    with pytest.raises(ValueError, match=r"row 0 has 65 tokens, but the model has 64 positions"):
        trainer.generate([torch.tensor([2])], length_sampler=lambda: 64)
    with pytest.raises(ValueError, match=r"row 0 has 70 tokens, but the model has 64 positions"):
        trainer.generate([torch.tensor([2])], max_length=70)
    with pytest.raises(ValueError, match="max_length=2 leaves no token for the response to a query of 2"):
        trainer.generate([torch.tensor([2, 3])], max_length=2)
    for name, value in {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}.items():
        with pytest.raises(ValueError, match=f"{name}={value}: generate returns one"):
            trainer.generate([torch.tensor([2, 3])], **{name: value})
    with pytest.raises(ValueError, match=r"row 0 has 66 tokens, but the model has 64 positions"):
        trainer.generate([torch.tensor([2, 3])], max_new_tokens=64)


def test_a_failing_generate_leaves_tokenizer_and_generation_config_as_they_were(tmp_path):
    model = tiny_model()
    model.generation_config = own = GenerationConfig(top_k=2)
    trainer = tiny_trainer(tmp_path, model)
    side = trainer.tokenizer.padding_side

    def fail():
        raise KeyError("length")

    with pytest.raises(KeyError, match="length"):
        trainer.generate([torch.tensor([2])], length_sampler=fail)

    def broken(*args, **kwargs):
        raise RuntimeError("device lost")

    model.forward = broken
    with pytest.raises(RuntimeError, match="device lost"):
        trainer.generate([torch.tensor([2])], max_new_tokens=2)
    assert trainer.tokenizer.padding_side == side
    assert model.generation_config is own


def test_entropy_and_logprobs_are_those_of_the_distribution(tmp_path):
    """A policy that is uniform over the vocabulary: log pi = -log 32 and entropy log 32 at every token."""
    trainer = tiny_trainer(tmp_path, tiny_model(scale=0.0))
    stats = trainer.step(*tiny_rollouts())
    assert stats["apa/policy/entropy"] == pytest.approx(math.log(32), rel=1e-5)
    assert stats["objective/entropy"] == pytest.approx(math.log(32) * stats["tokens/responses_len_mean"], rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_limit_for_each_query(tmp_path, family):
    """Also where a short limit is all that the positions of its row allow, beside a row with a long one."""
    trainer = tiny_trainer(tmp_path, model=tiny_model(family))
    generator = torch.Generator().manual_seed(0)
    queries = [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in (50, 10, 30)]
    limits, options = [14, 54, 20], {"return_prompt": False, "eos_token_id": VOCABULARY - 1, "do_sample": False}
    together = trainer.generate(queries, max_new_tokens=limits, **options)
    alone = [trainer.generate([q], max_new_tokens=most, **options)[0] for q, most in zip(queries, limits, strict=True)]
    assert [row.tolist() for row in together] == [row.tolist() for row in alone]
    assert [row.tolist() for row in trainer.generate(queries[:2], max_length=64, **options)] == [
        row.tolist() for row in alone[:2]
    ]
    for wrong in ([14, 54], [14, 54, 0], []):
        with pytest.raises(ValueError, match=r"max_new_tokens is \[.*one for each of 3 queries"):
            trainer.generate(queries, max_new_tokens=wrong, **options)
    with pytest.raises(ValueError, match="64"):
        trainer.generate(queries, max_new_tokens=[15, 1, 1], **options)
