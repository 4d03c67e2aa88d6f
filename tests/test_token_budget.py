"""`tokens_per_micro_batch`: passes of at most so many tokens, and the update that they make."""

import random
import warnings

import pytest
import torch
from transformers import TrainerCallback

from tests.test_training import StopAt, parameters, trainer_for
from tests.test_update import assert_same, learner, parameters_after_step
from tests.tiny import lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APATrainer
from trl_apa.rollout import shared_prompts
from trl_apa.rollout.batch import Layout, Rollouts, response_mask
from trl_apa.rollout.passes import Pass, RowLengths, balanced_passes, fewest_passes
from trl_apa.trainer.token_budget import TokenBudget


def lengths_of(rows, layout=Layout.PACKED, prompts=None, is_encoder_decoder=False):
    """Of rows (tokens of the query, tokens of the response)."""
    queries, responses = map(list, zip(*rows, strict=True))
    prompts = list(range(len(rows))) if prompts is None else prompts
    return RowLengths(queries, responses, prompts, lambda longest, share: layout, is_encoder_decoder)


def one_each(rows):
    return [[row] for row in range(len(rows))]


def share_all(monkeypatch, shared=True):
    monkeypatch.setattr(shared_prompts, "SHORTEST", 1 if shared else 10**9)
    monkeypatch.setattr(shared_prompts, "SMALLEST_SHARE", 0.0)


def test_packed_rows_worked_by_hand():
    """9 7 5 4 3 2 in passes of 12: three of them, which are most even as 9+2, 7+4, 5+3."""
    rows = [(1, 2), (3, 4), (1, 1), (5, 4), (2, 2), (2, 3)]
    lengths = lengths_of(rows)
    first_fit = [[9, 3], [7, 5], [4, 2]]
    passes = fewest_passes(lengths, one_each(rows), 12)
    assert [[sum(rows[row]) for row in one.rows] for one in passes] == first_fit
    balanced = balanced_passes(lengths, one_each(rows), 12, 3)
    assert [[sum(rows[row]) for row in one] for one in balanced] == [[9, 2], [7, 4], [5, 3]]
    # Another process needs four: the budget holds, and the passes are smaller.
    four = balanced_passes(lengths, one_each(rows), 12, 4)
    assert [[sum(rows[row]) for row in one] for one in four] == [[9], [7], [5, 2], [4, 3]]


def test_padded_rows_worked_by_hand():
    """Of queries of 6, 5, 2, 1 and responses of 4, 2, 2, 1: 2 x (6 + 4) and 2 x (2 + 2); 3 x (6 + 4) is too many."""
    rows = [(1, 1), (6, 4), (2, 2), (5, 2)]
    lengths = lengths_of(rows, Layout.PADDED)
    passes = fewest_passes(lengths, one_each(rows), 20)
    assert [(one.rows, one.tokens) for one in passes] == [([1, 3], 20), ([2, 0], 8)]
    # One more token each, of an encoder-decoder's start.
    lengths = lengths_of(rows, Layout.PADDED, is_encoder_decoder=True)
    assert [(one.rows, one.tokens) for one in fewest_passes(lengths, one_each(rows), 22)] == [
        ([1, 3], 22),
        ([2, 0], 10),
    ]


def test_shared_prompts_worked_by_hand(monkeypatch):
    """Two prompts of 20 tokens and three responses each: 20 + 12 and 20 + 9 fit 32, and each prompt is read once."""
    share_all(monkeypatch)
    rows, prompts = [(20, 5), (20, 3), (20, 4), (20, 3), (20, 3), (20, 3)], [0, 1, 0, 1, 0, 1]
    lengths = lengths_of(rows, Layout.SHARED, prompts)
    passes = fewest_passes(lengths, one_each(rows), 32)
    assert [(sorted(one.rows), one.tokens) for one in passes] == [([0, 2, 4], 32), ([1, 3, 5], 29)]
    # 30: the last response of the first prompt reads it again.
    passes = fewest_passes(lengths, one_each(rows), 30)
    assert [(sorted(one.rows), one.tokens) for one in passes] == [([0, 2], 29), ([4], 23), ([1, 3, 5], 29)]
    # Without sharing each response has its prompt beside it.
    packed = fewest_passes(lengths_of(rows, Layout.PACKED, prompts), one_each(rows), 32)
    assert [one.tokens for one in packed] == [25, 24, 23, 23, 23, 23]


@pytest.mark.parametrize("layout", [Layout.SHARED, Layout.PACKED, Layout.PADDED, Layout.SEPARATE])
@pytest.mark.parametrize("decoder_start", [None, 2])
def test_the_tokens_of_a_pass_are_those_that_a_network_gets(layout, decoder_start):
    """Counted in what `lay_out` makes, with prompts that are shared and others that are too short for it."""
    if decoder_start is not None and layout in (Layout.SHARED, Layout.PACKED):
        return  # an encoder-decoder is not packed
    draw = random.Random(0)
    for _ in range(60):
        prompts = [draw.randint(0, 3) for _ in range(draw.randint(1, 9))]
        of_prompt = [draw.choice([3, 15, 16, 40]) for _ in range(4)]
        rows = [(of_prompt[prompt], draw.choice([1, 2, 9, 70, 300])) for prompt in prompts]
        queries, responses = ([torch.ones(row[side], dtype=torch.long) for row in rows] for side in (0, 1))
        rollouts = Rollouts(queries, responses, response_mask(responses), torch.zeros(len(rows)))
        rollouts.prompts, rollouts.decoder_start_token_id = prompts, decoder_start
        made = Pass.of(RowLengths.of(rollouts, lambda longest, share: layout), one_each(rows))
        batch = rollouts.micro_batch(range(len(rows)), 0, layout)
        read = [batch[name].numel() for name in ("input_ids", "encoder_input_ids") if name in batch]
        assert made.tokens == sum(read)


@pytest.mark.parametrize("layout", [Layout.SHARED, Layout.PACKED, Layout.PADDED])
@pytest.mark.parametrize("size", [1, 3])
def test_each_row_is_in_one_pass_that_keeps_the_budget(layout, size):
    """Over many draws, for one row at a time and for rows that stay together; an atom with more has its own pass."""
    draw = random.Random(1)
    for _ in range(30):
        number = size * draw.randint(1, 12)
        prompts = [row // draw.choice([size, 2 * size]) for row in range(number)]
        of_prompt = [draw.randint(1, 40) for _ in range(number + 1)]
        rows = [(of_prompt[prompt], draw.randint(1, 60)) for prompt in prompts]
        lengths, budget = lengths_of(rows, layout, prompts), draw.randint(1, 400)
        atoms = [list(range(start, start + size)) for start in range(0, number, size)]
        passes = fewest_passes(lengths, atoms, budget)
        for count in {len(passes), draw.randint(len(passes), len(atoms))}:
            balanced = balanced_passes(lengths, atoms, budget, count)
            assert len(balanced) == count and sorted(row for one in balanced for row in one) == list(range(number))
            for one in balanced:
                of_one = [atom for atom in atoms if atom[0] in one]
                tokens = Pass.of(lengths, of_one).tokens
                assert sorted(one) == [row for atom in of_one for row in atom]
                assert tokens <= budget or len(of_one) == 1
        # Where a process needs more passes than another can make, they are as even as they get.
        for count in range(1, len(passes)):
            fewer = balanced_passes(lengths, atoms, budget, count)
            assert len(fewer) == count and sorted(row for one in fewer for row in one) == list(range(number))


def test_passes_are_even():
    """64 rows of up to 500 tokens: the largest pass has at most a twentieth more than the mean."""
    draw = random.Random(2)
    rows = [(draw.randint(1, 100), draw.randint(1, 400)) for _ in range(64)]
    passes = balanced_passes(lengths_of(rows), one_each(rows), 2048, 9)
    tokens = [sum(sum(rows[row]) for row in one) for one in passes]
    assert max(tokens) < 1.05 * sum(tokens) / 9 and tokens == sorted(tokens, reverse=True)


LOSSES = {
    "apa": {},
    "awr": {},
    "ppo": {"cliprange": 0.1},
    "ppo with an exact KL": {"loss_type": "ppo", "kl_penalty": "full"},
    "grpo": {"loss_aggregation": "grpo", "kl_coef": 0.3},
    "dr_grpo": {"loss_type": "grpo", "loss_aggregation": "dr_grpo"},
    "cispo": {"kl_coef": 0.1},
    "rloo": {},
    "response_apa": {},
    "mirror_descent": {},
    "rebel": {"shuffle": "groups"},
}
GROUPED = ("grpo", "dr_grpo", "cispo", "rloo", "response_apa", "mirror_descent", "rebel")


def rollouts_of_groups(num_rows=8):
    """Rows of two prompts, four or more each, with responses of 1 to 8 tokens."""
    queries, _, scores = tiny_rollouts(num_rows)
    lengths = [1, 8, 3, 5, 2, 7, 4, 6]
    responses = [torch.arange(2, 2 + lengths[row % 8]) + row for row in range(num_rows)]
    return [queries[row % 2] for row in range(num_rows)], responses, scores


def counted_passes(monkeypatch):
    seen = []

    def micro_batch(self, rows, pad_token_id, layout, original=Rollouts.micro_batch):
        batch = original(self, rows, pad_token_id, layout)
        seen.append((len(rows), batch["input_ids"].numel()))
        return batch

    monkeypatch.setattr(Rollouts, "micro_batch", micro_batch)
    return seen


@pytest.mark.parametrize("name", LOSSES)
def test_the_update_is_the_one_of_equally_many_rows(tmp_path, monkeypatch, name):
    """Two optimizer steps of eight rows of two prompts, whether each prompt is read once or with each response."""
    share_all(monkeypatch)
    options = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, "gamma": 0.9, "temperature": 0.7}
    options |= {"loss_type": name, **LOSSES[name]}
    rollouts = rollouts_of_groups()
    results, numbers = [], []
    for tokens, shared in ((None, True), (13, True), (22, False), (10**6, True)):
        share_all(monkeypatch, shared)
        if name in GROUPED:
            config = tiny_config(tmp_path, optim="sgd", learning_rate=0.1, tokens_per_micro_batch=tokens, **options)
            trainer = APATrainer(config, tiny_model(), tokenizer=tiny_tokenizer())
        else:
            trainer = learner(tmp_path, tokens_per_micro_batch=tokens, **options)
        stats = trainer.step(*rollouts)
        results.append(parameters(trainer))
        numbers.append([stats["apa/policy/entropy"], stats["apa/loss/total"], stats["objective/kl"]])
    for result, number in zip(results[1:], numbers[1:], strict=True):
        assert_same(result, results[0])
        assert number == pytest.approx(numbers[0], abs=1e-5)


@pytest.mark.parametrize("value_model", ["separate", "adapter", "head"])
def test_passes_of_both_networks_on_one_base_too(tmp_path, monkeypatch, value_model):
    """Accumulated over the Trainer's micro-batches, with adapters and gradient checkpointing."""
    share_all(monkeypatch)
    options = {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "sgd"}
    results = []
    for tokens in (None, 18):
        kwargs = {"peft_config": lora_config(), "value_model": value_model}
        trainer = tiny_trainer(
            tmp_path, None, kwargs, gradient_checkpointing=True, tokens_per_micro_batch=tokens, **options
        )
        torch.manual_seed(1)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        results.append(parameters_after_step(trainer, *rollouts_of_groups()))
    assert_same(*results)


@pytest.mark.parametrize("padding_free", [True, False])
def test_no_pass_has_more_tokens_and_a_long_row_is_alone(tmp_path, monkeypatch, padding_free):
    """In the passes before the update and in it: less than every row, more than some, more than all together."""
    share_all(monkeypatch, False)
    rollouts = rollouts_of_groups()
    longest = max(len(q) + len(r) for q, r in zip(*rollouts[:2], strict=True))
    total = sum(len(q) + len(r) for q, r in zip(*rollouts[:2], strict=True))
    for tokens in (1, longest, total, 10**9):
        seen = counted_passes(monkeypatch)
        trainer = tiny_trainer(
            tmp_path, batch_size=8, mini_batch_size=8, tokens_per_micro_batch=tokens, padding_free=padding_free
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                trainer.step(*rollouts)
        told = [str(warning.message) for warning in caught if "tokens_per_micro_batch" in str(warning.message)]
        assert len(told) == (tokens == 1)
        if tokens == 1:
            assert told[0].startswith(f"tokens_per_micro_batch=1, but a row has {longest} tokens")
        assert all(read <= tokens or rows == 1 for rows, read in seen)
        passes = len(seen) / (2 * (1 + trainer.config.num_epochs_per_batch))
        if tokens == 1:
            assert passes == 8
        elif (padding_free and tokens == total) or tokens == 10**9:
            assert passes == 1


def test_passes_before_the_update_keep_a_number_of_rows_that_is_given_for_them(tmp_path, monkeypatch):
    seen = counted_passes(monkeypatch)
    options = {"tokens_per_micro_batch": 10**6, "local_rollout_forward_batch_size": 2, "num_epochs_per_batch": 1}
    trainer = tiny_trainer(tmp_path, batch_size=8, mini_batch_size=8, **options)
    trainer.step(*rollouts_of_groups())
    assert [rows for rows, _ in seen] == [2, 2, 2, 2, 8]


def test_the_option_is_a_positive_number(tmp_path):
    for tokens in (0, -5):
        with pytest.raises(ValueError, match=f"tokens_per_micro_batch={tokens}: it should be greater than 0"):
            tiny_config(tmp_path, tokens_per_micro_batch=tokens)


def test_it_counts_from_the_next_step_on_where_it_is_set_later(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, batch_size=8, mini_batch_size=8, num_epochs_per_batch=1)
    trainer.step(*rollouts_of_groups())
    seen = counted_passes(monkeypatch)
    for tokens, passes in ((1, 8), (None, 1), (10**6, 1)):
        seen.clear()
        trainer.config.tokens_per_micro_batch = tokens
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.step(*rollouts_of_groups())
        assert len(seen) == 2 * passes


class SetWithinStep(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        args.tokens_per_micro_batch = 10


def test_set_within_an_optimizer_step_it_reads_no_row_twice(tmp_path):
    options = {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    options |= {"max_completion_length": 6, "optim": "sgd"}
    plain = trainer_for(tmp_path / "plain", **options)
    plain.train()
    later = trainer_for(tmp_path / "later", callbacks=[SetWithinStep()], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        later.train()
    assert later.args.tokens_per_micro_batch == 10
    assert_same(parameters(later), parameters(plain))


@pytest.mark.parametrize("stop", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_train_makes_the_same_updates_and_resumes_with_another_number(tmp_path, stop):
    """In the middle of an iteration: to the bit with the same number, and with another one but for rounding."""
    options = {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    options |= {"max_completion_length": 6, "optim": "sgd"}
    plain = trainer_for(tmp_path / "plain", **options)
    plain.train()
    straight = trainer_for(tmp_path / "straight", tokens_per_micro_batch=16, **options)
    straight.train()
    assert_same(parameters(straight), parameters(plain))
    stopped = trainer_for(
        tmp_path / "stopped", callbacks=[StopAt(stop)], tokens_per_micro_batch=16, save_steps=1, **options
    )
    stopped.train()
    for tokens in (16, 40, None):
        resumed = trainer_for(tmp_path / "stopped", tokens_per_micro_batch=tokens, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / f"checkpoint-{stop}"))
        assert resumed.state.global_step == 6
        if tokens == 16:
            same = parameters(straight)
            assert all(torch.equal(same[name], p) for name, p in parameters(resumed).items())
        else:
            assert_same(parameters(resumed), parameters(straight))


class Elsewhere:
    """What another process needs and can make."""

    def __init__(self, needed, possible):
        self.accelerator, self.others = self, torch.tensor([[needed, possible]])
        self.device = torch.device("cpu")

    def gather(self, table):
        return torch.cat([table, self.others])


def test_every_process_makes_as_many_passes_as_the_one_that_needs_most():
    queries, responses, _ = rollouts_of_groups()
    rollouts = Rollouts(queries, responses, response_mask(responses), torch.zeros(8))
    rollouts.prompts = [0, 1] * 4
    steps, groups = [[0, 1, 2, 3], [4, 5, 6, 7]], [0, 1, 0, 1, 2, 3, 2, 3]

    def counts(needed, possible, groups=None):
        budget = TokenBudget(Elsewhere(needed, possible))
        passes = budget.passes(rollouts, steps, 10**6, lambda longest, share: Layout.PACKED, groups)
        return [len(of_step) for of_step in passes]

    assert counts([1, 3], [4, 4]) == [1, 3]
    assert counts([4, 1], [4, 4]) == [4, 1]
    # Rows that stay together: two passes can be made here, whatever another process needs.
    assert counts([4, 1], [4, 4], groups) == [2, 1]


UNEVEN = {"batch_size": 4, "mini_batch_size": 2, "gradient_accumulation_steps": 2, "ppo_epochs": 2, "gamma": 0.9}


def uneven_rollouts():
    """Eight rows; those of the second rank are several times as long as those of the first."""
    queries, _, scores = tiny_rollouts(8)
    lengths = [1, 2, 1, 2, 9, 14, 12, 16]
    return queries, [(torch.arange(length) + row) % 30 + 2 for row, length in enumerate(lengths)], scores


def step_on_uneven_rows(rank, folder, loss_type):
    """Weights, loss, and how many passes were made, on one of two ranks."""
    trainer = learner(folder, loss_type=loss_type, tokens_per_micro_batch=24, **UNEVEN)
    half = [column[4 * rank : 4 * rank + 4] for column in uneven_rollouts()]
    with pytest.MonkeyPatch.context() as patch:
        seen = counted_passes(patch)
        for _ in range(2):
            stats = trainer.step(*half)
    return parameters(trainer), stats["apa/loss/total"], len(seen)
