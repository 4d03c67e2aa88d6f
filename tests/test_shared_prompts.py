"""A prompt that several rows have in common is read once: the numbers are those of each row alone."""

import copy
import random

import pytest
import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.families import family_model
from tests.test_layouts import EXPECTED, expected_of
from tests.test_training import StopAt, parameters, trainer_for
from tests.test_update import assert_same, learner, parameters_after_step, row_logprobs, row_values
from tests.tiny import FAMILIES, lora_config, tiny_config, tiny_model, tiny_tokenizer, tiny_trainer
from trl_apa import APATrainer
from trl_apa.models import ValueModel, packing
from trl_apa.models.layouts import Layouts, layout_trial, shares_prompts
from trl_apa.models.logprobs import response_logprobs, response_tokens
from trl_apa.models.packed_rows import PackedRow, causal_mask
from trl_apa.models.packing import PER_SEQUENCE, attend_per_sequence
from trl_apa.models.trials import LONG
from trl_apa.rollout import shared_prompts
from trl_apa.rollout.batch import Layout, pack_tokens
from trl_apa.rollout.shared_prompts import equal_queries, meeting, prompts_worth_sharing
from trl_apa.trainer.preparation import mini_batches


# Three prompts; the second has one response; responses of one token too.
QUERIES = [
    torch.tensor(ids) for ids in ([5, 6, 7, 8], [9, 3], [5, 6, 7, 8], [4, 4, 2, 3, 11], [5, 6, 7, 8], [4, 4, 2, 3, 11])
]
RESPONSES = [
    torch.tensor(ids) for ids in ([12, 13, 14], [15, 1], [16], [17, 18, 19, 20, 1], [21, 22, 23, 24], [25, 26])
]
PROMPTS = [0, 1, 0, 2, 0, 2]
SCORES = list(torch.linspace(-1, 1, 6).unbind())
TOKENS = (4 + 3 + 1 + 4) + (2 + 2) + (5 + 5 + 2)


def allow(monkeypatch, shared):
    """Share the short prompts of these tests, or none."""
    monkeypatch.setattr(shared_prompts, "SHORTEST", 1 if shared else 10**9)
    monkeypatch.setattr(shared_prompts, "SMALLEST_SHARE", 0.0)


def counting_tokens(monkeypatch):
    """Tokens of each packed row that a layer attends in, and whether a prompt is shared there."""
    seen = []

    def counted(module, query, *args, packed_row=None, **kwargs):
        if packed_row is not None:
            seen.append((sum(packed_row.sequence_lengths), packed_row.is_shared))
        return attend_per_sequence(module, query, *args, packed_row=packed_row, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, PER_SEQUENCE, counted)
    return seen


def test_rows_of_a_prompt_lie_behind_it():
    """[5 6 7 | 8 9 | 10] for the first and last row, [2 | 3 4] for the other; worked by hand."""
    queries = [torch.tensor([5, 6, 7]), torch.tensor([2]), torch.tensor([5, 6, 7])]
    responses = [torch.tensor([8, 9]), torch.tensor([3, 4]), torch.tensor([10])]
    tokens = pack_tokens(queries, responses, [0, 1, 0])
    assert tokens["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 2, 3, 4]]
    assert tokens["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert tokens["sequence_lengths"] == (5, 1, 3)
    assert tokens["prompt_lengths"] == (0, 3, 0)
    assert tokens["token_index"].tolist() == [3, 4, 5, 7, 8]
    assert tokens["predicting_index"].tolist() == [2, 3, 2, 6, 7]
    assert tokens["response_index"].tolist() == [0, 1, 4, 2, 3]
    assert response_tokens(tokens).tolist() == [8, 9, 10, 3, 4]


def test_without_a_common_prompt_it_is_the_packed_layout():
    own, plain = pack_tokens(QUERIES, RESPONSES, range(6)), pack_tokens(QUERIES, RESPONSES)
    assert own.keys() == plain.keys() and "prompt_lengths" not in plain
    assert all(torch.equal(torch.as_tensor(own[name]), torch.as_tensor(plain[name])) for name in plain)


def test_each_response_sees_its_prompt_and_itself():
    """A prompt of 2 tokens with responses of 2, 1 and 3, then a row of its own: against one mask written down."""
    seen = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 1, 1, 0, 0, 0],
            [1, 1, 0, 0, 0, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
        ],
        dtype=torch.bool,
    )
    torch.manual_seed(0)
    states = torch.randn(3, 1, 2, 10, 4, dtype=torch.float64)
    row = PackedRow((4, 1, 3, 2), (0, 2, 2, 0))
    actual, _ = attend_per_sequence(torch.nn.Module(), *states, None, packed_row=row)
    expected = scaled_dot_product_attention(*states, attn_mask=seen)
    torch.testing.assert_close(actual, expected.transpose(1, 2))


def test_the_mask_behind_a_prompt():
    """Three tokens behind two: all that lies before each, or a window of three tokens or of one."""
    like = torch.zeros(1, dtype=torch.bfloat16)
    mask = causal_mask(2, 3, None, like)
    assert mask.dtype == torch.bfloat16 and mask.shape == (1, 1, 3, 5)
    assert (mask[0, 0] == 0).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    windowed = causal_mask(2, 3, 3, like)[0, 0]
    assert (windowed == 0).int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert (causal_mask(2, 3, 1, like)[0, 0] == 0).int().tolist() == [
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert not windowed.isnan().any()


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_gradients_are_those_of_each_row_alone(family):
    """The plain forward of each row against one packed row; gradients relative to the largest of each weight."""
    model, plain = tiny_model(family, scale=2.0).eval(), tiny_model(family, scale=2.0).eval()
    model.set_attn_implementation(PER_SEQUENCE)
    tokens = pack_tokens(QUERIES, RESPONSES, PROMPTS)
    assert tokens["input_ids"].shape == (1, TOKENS)
    logprobs_BR, _ = response_logprobs(model, tokens, 5, temperature=0.7)
    logprobs_BR.square().sum().backward()
    alone = [row_logprobs(plain, *row, 0.7) for row in zip(QUERIES, RESPONSES, strict=True)]
    sum(row.square().sum() for row in alone).backward()
    for actual, expected in zip(logprobs_BR, alone, strict=True):
        torch.testing.assert_close(actual[: len(expected)], expected, rtol=1e-5, atol=1e-5)
        assert not actual[len(expected) :].any()
    assert_gradients_close(model, plain)


def test_values_and_their_gradients_too():
    model = ValueModel.from_policy(tiny_model(scale=2.0))
    torch.nn.init.normal_(model.head.out.weight)
    plain = copy.deepcopy(model)
    model.network.set_attn_implementation(PER_SEQUENCE)
    values_BR = model(pack_tokens(QUERIES, RESPONSES, PROMPTS), 5)
    values_BR.square().sum().backward()
    alone = [row_values(plain, *row) for row in zip(QUERIES, RESPONSES, strict=True)]
    sum(row.square().sum() for row in alone).backward()
    for actual, expected in zip(values_BR, alone, strict=True):
        torch.testing.assert_close(actual[: len(expected)], expected, rtol=1e-5, atol=1e-5)
    assert_gradients_close(model, plain)


def assert_gradients_close(model, plain):
    compared = 0
    for (name, actual), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None and expected.grad.any():
            difference = float((actual.grad - expected.grad).abs().max() / expected.grad.abs().max())
            # The bias of keys has no gradient but rounding: it adds the same to all scores.
            assert difference < 1e-5 or float(expected.grad.abs().max()) < 1e-5, (name, difference)
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [2, 3, 0, 5, 1, 4]])
def test_neither_the_order_of_rows_nor_their_split_matters(order):
    model = tiny_model().eval()
    model.set_attn_implementation(PER_SEQUENCE)

    def read(rows):
        queries, responses, prompts = ([column[row] for row in rows] for column in (QUERIES, RESPONSES, PROMPTS))
        width = max(len(response) for response in responses)
        with torch.no_grad():
            logprobs_BR, _ = response_logprobs(model, pack_tokens(queries, responses, prompts), width)
        return pad(logprobs_BR, (0, 5 - width))

    expected = read(range(6))
    torch.testing.assert_close(read(order), expected[order])
    split = torch.cat([read(order[:2]), read(order[2:])])
    torch.testing.assert_close(split, expected[order])


@pytest.mark.parametrize(
    ("loss_type", "value_model", "checkpointing"),
    [("ppo", "separate", False), ("apa", "separate", True), ("ppo", "adapter", True), ("apa", "head", True)],
)
def test_a_step_is_the_one_without_sharing(tmp_path, monkeypatch, loss_type, value_model, checkpointing):
    """With adapters, a temperature and masked tokens; PPO reads old log-probs too. Fewer tokens are read."""
    results, tokens = [], []
    for shared in (True, False):
        allow(monkeypatch, shared)
        seen = counting_tokens(monkeypatch)
        kwargs = {"peft_config": lora_config(), "value_model": value_model}
        options = {"batch_size": 6, "mini_batch_size": 6, "temperature": 0.7, "optim": "sgd", "ppo_epochs": 2}
        trainer = tiny_trainer(
            tmp_path, None, kwargs, loss_type=loss_type, gradient_checkpointing=checkpointing, **options
        )
        torch.manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name or "value_model.head.out" in name or "v_head" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        seen.clear()
        masks = [torch.ones(len(response)) for response in RESPONSES]
        masks[3][1:3] = 0
        results.append(parameters_after_step(trainer, QUERIES, RESPONSES, SCORES, masks))
        assert {is_shared for _, is_shared in seen} == {shared}
        tokens.append({number for number, _ in seen})
    assert tokens == [{TOKENS}, {sum(map(len, QUERIES + RESPONSES))}]
    assert_same(*results)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_each_family_is_the_one_without_sharing(tmp_path, monkeypatch, family):
    """All weights trained, in micro-batches of two in which rows of a prompt meet, in steps of four rows."""
    results = []
    for shared in (True, False):
        allow(monkeypatch, shared)
        model = tiny_model(family, dtype=torch.float64)
        options = {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2, "ppo_epochs": 2}
        trainer = learner(tmp_path, model, **options)
        trainer.model.value_model.head.double()
        rows = [[*column, *column[:2]] for column in (QUERIES, RESPONSES, SCORES)]
        results.append(parameters_after_step(trainer, *rows))
    assert_same(*results, tolerance=1e-8)


class WithOwnLoss(APATrainer):
    def loss(self, *args):
        return super().loss(*args)


@pytest.mark.parametrize(("trainer_class", "kl_penalty"), [(APATrainer, "full"), (WithOwnLoss, "kl")])
def test_passes_that_need_padding_have_it_and_the_others_share(tmp_path, monkeypatch, trainer_class, kl_penalty):
    """An exact KL before the update, or an override of `loss` in it, reads logits: a packed row does not have them."""
    results, seen = [], counting_tokens(monkeypatch)
    for shared in (True, False):
        allow(monkeypatch, shared)
        options = {"batch_size": 6, "mini_batch_size": 3, "gradient_accumulation_steps": 2, "optim": "sgd"}
        config = tiny_config(tmp_path, loss_type="ppo", kl_penalty=kl_penalty, **options)
        trainer = trainer_class(config, tiny_model(), tokenizer=tiny_tokenizer())
        seen.clear()
        results.append(parameters_after_step(trainer, QUERIES, RESPONSES, SCORES))
        assert {is_shared for _, is_shared in seen} == {shared}
    assert_same(*results)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_reads_a_common_prompt_once(tmp_path, monkeypatch, bits):
    pytest.importorskip("bitsandbytes")
    tiny_model().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    results = []
    for shared in (True, False):
        allow(monkeypatch, shared)
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
        kwargs = {"peft_config": lora_config(), "value_model": "adapter"}
        trainer = tiny_trainer(tmp_path, policy, kwargs, batch_size=6, mini_batch_size=6, learning_rate=0.0)
        assert trainer.layouts(9, share=True) is Layout.SHARED
        results.append(trainer.step(QUERIES, RESPONSES, SCORES))
    for name in ("objective/logprobs", "objective/ref_logprobs"):
        pairs = zip(*(stats[name] for stats in results), strict=True)
        assert all(abs(a - b).max() < 1e-2 for a, b in ((torch.tensor(x), torch.tensor(y)) for x, y in pairs))


@pytest.mark.parametrize("family", EXPECTED)
@pytest.mark.filterwarnings("ignore:.*rows are processed one by one")
def test_prompts_are_shared_where_a_trial_finds_them_exact(family):
    """Of these families in those that are packed, and nowhere else."""
    model = family_model(family)
    layouts = Layouts([model])
    for longest, expected in zip((6, 8, 16), expected_of(family, model), strict=True):
        shares = layouts(longest, share=True) is Layout.SHARED
        assert shares is (expected is Layout.PACKED)
        assert layouts(longest) is expected


@pytest.mark.parametrize("fault", ["the prompt without its end", "a token too many", "no prompt", "places in the row"])
def test_a_network_that_reads_a_shared_prompt_otherwise_is_packed(monkeypatch, fault):
    def other(module, query, key, value, mask, packed_row=None, **kwargs):
        shared = packed_row is not None and packed_row.is_shared
        if fault == "places in the row" and shared:
            key = key + 0.1 * torch.arange(key.shape[2])[:, None]
        elif shared and fault == "no prompt":
            packed_row = PackedRow(packed_row.sequence_lengths)
        elif shared:
            change = 1 if fault == "a token too many" else -1
            prompts = tuple(length and length + change for length in packed_row.prompt_lengths)
            packed_row = PackedRow(packed_row.sequence_lengths, prompts)
        return attend_per_sequence(module, query, key, value, mask, packed_row=packed_row, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, PER_SEQUENCE, other)
    model = tiny_model(seed=1)
    trial = layout_trial(model, LONG)
    assert trial.is_exact_packed and not trial.is_exact_shared and not shares_prompts(model)
    assert Layouts([model], padding_free=True)(LONG, share=True) is Layout.PACKED


def test_flash_attention_that_wants_as_many_keys_as_queries_is_packed(monkeypatch):
    def flash(module, query, key, value, mask, cu_seq_lens_q=None, **kwargs):
        if cu_seq_lens_q is None:
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        for name in ("max_length_q", "max_length_k", "cu_seq_lens_k", "position_ids"):
            kwargs.pop(name, None)
        row = PackedRow(cu_seq_lens_q.diff().tolist())
        return attend_per_sequence(module, query, key, value, None, packed_row=row, **kwargs)

    name = "flash_attention_of_this_test"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, flash)
    model = tiny_model()
    model.config._attn_implementation_internal = name
    assert Layouts([model])(LONG, share=True) is Layout.PACKED


def test_attention_that_fails_behind_a_prompt_is_packed(monkeypatch):
    def failing(module, *args, packed_row=None, **kwargs):
        if packed_row is not None and packed_row.is_shared:
            raise RuntimeError("no kernel for this mask")
        return attend_per_sequence(module, *args, packed_row=packed_row, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, PER_SEQUENCE, failing)
    assert Layouts([tiny_model(seed=2)])(LONG, share=True) is Layout.PACKED


def test_padding_free_says_whether_anything_is_packed(tmp_path):
    assert tiny_trainer(tmp_path, padding_free=False).layouts(LONG, share=True) is Layout.PADDED
    assert tiny_trainer(tmp_path).layouts(LONG, packable=False, share=True) is Layout.PADDED
    assert tiny_trainer(tmp_path, padding_free=True).layouts(LONG, share=True) is Layout.SHARED


def test_equal_queries_have_one_number():
    queries = [torch.tensor(ids) for ids in ([1, 2], [1], [2, 1], [1, 2], [1, 2, 3], [1])]
    queries[3] = queries[3].int()
    assert equal_queries(queries) == [0, 1, 2, 0, 3, 1]


def test_only_prompts_that_pay_are_shared():
    """Of 16 tokens or more, and a quarter of their responses or more, on average."""
    short, long = torch.arange(15), torch.arange(16)
    queries = [short, short, long, long, long + 1, long + 1]
    responses = [torch.zeros(length) for length in (3, 3, 1, 127, 2, 127)]
    equal = equal_queries(queries)
    numbers = prompts_worth_sharing(equal, queries, responses)
    assert numbers[2] == numbers[3] and len(set(numbers)) == 5


def test_rows_of_one_prompt_meet_in_a_micro_batch():
    prompts = [0, 1, 2, 0, 1, 2, 3, 4]
    assert meeting([0, 1, 2, 3, 4, 5, 6, 7], prompts, 4) == [0, 3, 1, 4, 2, 5, 6, 7]
    assert meeting([7, 6, 0], prompts, 2) == [7, 6, 0]  # none in common
    # Three rows of one prompt, and micro-batches of two.
    assert meeting([0, 1, 2, 3], [5, 6, 5, 5], 2) == [0, 2, 3, 1]


def test_micro_batches_are_full_and_no_prompt_is_in_more_of_them_than_it_has_to():
    """Over many draws: the same rows, and where sizes divide each other no group is split."""
    draw = random.Random(0)
    for _ in range(200):
        size, prompts = draw.randint(1, 6), [draw.randint(0, 5) for _ in range(draw.randint(1, 24))]
        rows = draw.sample(range(len(prompts)), draw.randint(1, len(prompts)))
        ordered = meeting(rows, prompts, size)
        assert sorted(ordered) == sorted(rows)
    for size, group in ((4, 2), (8, 4), (4, 4), (2, 8)):
        prompts = [number for number in range(8) for _ in range(group)]
        rows = draw.sample(range(len(prompts)), len(prompts))
        ordered = meeting(rows, prompts, size)
        cuts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        together = [len({prompts[row] for row in cut}) for cut in cuts]
        assert max(together) == max(1, size // group)


def test_a_common_prompt_is_shared_in_every_pass(tmp_path, monkeypatch):
    """Two prompts with four rows each, drawn into steps of four rows and read two at a time: before the update rows of
    one prompt meet always, in it where both are in a step."""
    allow(monkeypatch, True)
    seen = counting_tokens(monkeypatch)
    prompt, other = torch.arange(2, 12), torch.arange(12, 22)
    queries = [prompt, other] * 4
    responses = [torch.arange(2, 2 + length) for length in (1, 2, 3, 4, 5, 4, 3, 2)]
    options = {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = tiny_trainer(tmp_path, None, {"value_model": "head"}, **options)
    passes = []
    monkeypatch.setattr(
        type(trainer), "_finish_iteration", lambda self, *args: passes.append(self.run_state.iteration.plan) or {}
    )
    seen.clear()
    trainer.step(queries, responses, list(torch.zeros(8).unbind()))
    layers = 2
    before, update = seen[: 4 * 2 * layers], seen[4 * 2 * layers :]
    assert sum(tokens for tokens, _ in before) == 2 * layers * (24 + 4 * 10)
    assert all(is_shared for _, is_shared in before)
    ((first, second),) = passes
    pairs = [step[start : start + 2] for step in (first, second) for start in (0, 2)]
    assert len(update) == len(pairs) * layers
    for number, pair in enumerate(pairs):
        expected = len({row % 2 for row in pair}) == 1
        assert {is_shared for _, is_shared in update[number * layers : (number + 1) * layers]} == {expected}
    for step in (first, second):  # of four rows of two prompts at least one pair meets
        assert any(step[start] % 2 == step[start + 1] % 2 for start in (0, 2))
    assert packing.PER_SEQUENCE == trainer.model.policy.config._attn_implementation


def test_groups_are_drawn_together():
    """Four prompts of three rows into steps of six: two complete groups each, in an order that the stream decides."""
    groups = [0, 1, 2, 3] * 3
    drawn = {epoch: mini_batches(12, 6, (1, 0, epoch), groups) for epoch in range(20)}
    for steps in drawn.values():
        assert sorted(row for step in steps for row in step) == list(range(12))
        assert all(len({groups[row] for row in step}) == 2 for step in steps)
    assert len({str(steps) for steps in drawn.values()}) > 10
    assert drawn[3] == mini_batches(12, 6, (1, 0, 3), groups) != mini_batches(12, 6, (1, 0, 3))
    # Groups that do not fit a step are split where it is full.
    steps = mini_batches(10, 4, (1, 0, 0), [0] * 3 + [1] * 7)
    assert [len(step) for step in steps] == [4, 4, 2] and sorted(row for step in steps for row in step) == list(
        range(10)
    )


def test_what_is_drawn_is_an_option(tmp_path):
    assert not tiny_config(tmp_path).shuffles_groups
    assert tiny_config(tmp_path, num_generations=2).shuffles_groups
    assert tiny_config(tmp_path, shuffle="groups").shuffles_groups
    assert not tiny_config(tmp_path, num_generations=2, shuffle="rows").shuffles_groups
    with pytest.raises(ValueError, match="shuffle='prompts': it should be 'rows' or 'groups'"):
        tiny_config(tmp_path, shuffle="prompts")
    config = tiny_config(tmp_path)
    config.shuffle = "groups"
    assert config.shuffles_groups
    with pytest.raises(ValueError, match="shuffle=True: it should be"):
        config.shuffle = True


class Plans(TrainerCallback):
    """The prompts of each optimizer step's rows."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, **kwargs):
        if (iteration := self.trainer.run_state.iteration) is not None and not iteration.finished:
            rows = iteration.plan[iteration.steps_done]
            self.seen.append({tuple(iteration.rollouts.queries[row].tolist()) for row in rows})


@pytest.mark.parametrize("shuffle", [None, "rows"])
def test_train_draws_groups_of_its_generations(tmp_path, monkeypatch, shuffle):
    """Four prompts asked twice, in steps of two rows; by default both rows of a prompt."""
    allow(monkeypatch, True)
    plans = Plans()
    options = {"batch_size": 8, "mini_batch_size": 2, "num_generations": 2, "max_steps": 8, "shuffle": shuffle}
    plans.trainer = trainer = trainer_for(tmp_path, callbacks=[plans], **options)
    seen = counting_tokens(monkeypatch)
    trainer.train()
    assert len(plans.seen) == 7  # of the first step there is no plan yet
    if shuffle is None:
        assert all(len(prompts) == 1 for prompts in plans.seen) and all(is_shared for _, is_shared in seen)
    else:
        assert any(len(prompts) == 2 for prompts in plans.seen)


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_of_groups_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch, stop):
    """In the middle of an iteration, and in the second: the same bits."""
    allow(monkeypatch, True)
    options = {"num_generations": 2, "max_steps": 8, "mini_batch_size": 2}
    whole = trainer_for(tmp_path / "whole", **options)
    whole.train()
    trainer_for(tmp_path / "cut", callbacks=[StopAt(stop)], **options).train()
    again = trainer_for(tmp_path / "cut", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert_same(parameters(again), parameters(whole), tolerance=1e-30)
