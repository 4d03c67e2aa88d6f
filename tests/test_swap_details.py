"""Details that classic scripts rely on: statistics, `generate`, batches, optimizers."""

import math
import pickle
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch.utils.data import default_collate
from transformers import StoppingCriteria, StoppingCriteriaList

from tests.tiny import EOS, lora_config, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer, tiny_trainer
from trl_apa import APATrainer
from trl_apa.algorithms import ALGORITHMS, Algorithm
from trl_apa.rollout.collating import collate


# A user's loss that reports nothing.
BARE = Algorithm(lambda tokens, args: (ALGORITHMS["awr"].loss(tokens, args)[0], {}), kl_coef=1.0)

# What TRL 0.11.4's `step` returned.
CLASSIC = {
    *("objective/kl", "objective/kl_dist", "objective/logprobs", "objective/ref_logprobs", "objective/kl_coef"),
    *("objective/entropy", "ppo/mean_non_score_reward", "ppo/mean_scores", "ppo/std_scores", "ppo/learning_rate"),
    *("tokens/queries_len_mean", "tokens/queries_len_std", "tokens/queries_dist"),
    *("tokens/responses_len_mean", "tokens/responses_len_std", "tokens/responses_dist"),
    *(f"ppo/loss/{name}" for name in ("policy", "value", "total")),
    *(f"ppo/policy/{name}" for name in ("entropy", "approxkl", "policykl", "clipfrac")),
    *(f"ppo/policy/{name}" for name in ("advantages", "advantages_mean", "ratio")),
    *(f"ppo/returns/{name}" for name in ("mean", "var")),
    *(f"ppo/val/{name}" for name in ("vpred", "error", "clipfrac", "mean", "var", "var_explained")),
    *(f"time/ppo/{name}" for name in ("forward_pass", "compute_rewards", "compute_advantages")),
    *(f"time/ppo/{name}" for name in ("optimize_step", "calc_stats", "total")),
}


@pytest.mark.parametrize("loss_type", ["apa", "awr", "ppo", "tests.test_swap_details:BARE"])
def test_step_returns_classics_statistics_whatever_the_loss(tmp_path, loss_type):
    stats = tiny_trainer(tmp_path, loss_type=loss_type, ppo_epochs=2, mini_batch_size=2).step(*tiny_rollouts())
    assert stats.keys() >= CLASSIC
    differing = {"ppo/mean_scores", "ppo/std_scores", "ppo/policy/clipfrac"}
    for name in CLASSIC - differing:
        np.testing.assert_equal(stats[name], stats[name.replace("ppo/", "apa/")])
    numbers = {name: value for name, value in stats.items() if not isinstance(value, np.ndarray)}
    assert all(type(value) is float and math.isfinite(value) for value in numbers.values())
    assert 0.5 < stats["ppo/policy/ratio"] < 2.0 and stats["ppo/policy/ratio"] != 1.0
    assert stats["ppo/policy/clipfrac"] == 0.0 or loss_type == "ppo"


@pytest.mark.parametrize("loss_type", ["apa", "ppo"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3.0, -1.0, 0.5, 2.5]),
        ({"score_clip": 1.0}, [1.0, -1.0, 0.5, 1.0]),
        ({"missing_eos_penalty": 1.0}, [2.0, -1.0, -0.5, 2.5]),
        ({"use_score_scaling": True}, "scaled"),
        ({"use_score_scaling": True, "use_score_norm": True, "score_clip": 0.6}, "normed"),
    ],
)
def test_the_mean_of_the_scores_is_after_scaling_and_clipping_under_classics_name(
    tmp_path, loss_type, options, expected
):
    given = torch.tensor([3.0, -1.0, 0.5, 2.5])
    if expected == "scaled":
        expected = (given / given.std()).tolist()
    elif expected == "normed":
        expected = ((given - given.mean()) / given.std()).clamp(-0.6, 0.6).tolist()
    queries, responses, _ = tiny_rollouts()
    assert [int(response[-1]) == EOS for response in responses] == [False, True, False, True]
    trainer = tiny_trainer(tmp_path, loss_type=loss_type, **options)
    stats = trainer.step(queries, responses, list(given))
    assert stats["ppo/mean_scores"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert stats["ppo/std_scores"] == pytest.approx(np.std(expected, ddof=1), rel=1e-6)
    assert (stats["apa/mean_scores"], stats["apa/std_scores"]) == (1.25, pytest.approx(float(given.std())))


@pytest.mark.parametrize("loss_type", ["apa", "ppo"])
def test_log_stats_sends_both_names_and_train_one(tmp_path, loss_type):
    options = {"loss_type": loss_type, "max_completion_length": 3, "save_strategy": "no", "logging_steps": 1}
    trainer = APATrainer(
        tiny_config(tmp_path, max_steps=1, **options),
        tiny_model(),
        tokenizer=tiny_tokenizer(),
        dataset=Dataset.from_dict({"input_ids": [[2 + i, 3, 4] for i in range(4)]}),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
    )
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    assert "apa/mean_scores" in logged and not any("ppo/" in name for name in logged)
    queries, responses, scores = tiny_rollouts()
    stats = trainer.step(queries, responses, scores)
    trainer.log_stats(stats, {"query": ["q"] * 4, "response": ["r"] * 4}, scores)
    assert {"apa/mean_scores", "ppo/mean_scores", "time/ppo/total"} <= trainer.state.log_history[-1].keys()


GREEDY = {"do_sample": False, "max_new_tokens": 6, "return_prompt": False, "eos_token_id": -1}


class AfterTokens(StoppingCriteria):
    """Ends each row after so many tokens, those of the prompt and its padding included."""

    def __init__(self, width, shape="row"):
        self.width, self.shape, self.seen = width, shape, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids)
        done = input_ids.shape[1] >= self.width
        return done if self.shape == "bool" else torch.full((len(input_ids),), done)


class Engine:
    """Answers as the policy does, without an end."""

    def sample(self, policy, prompts, request):
        rows = [torch.tensor([prompt]) for prompt in prompts]
        made = [policy.generate(row, do_sample=False, max_new_tokens=6, eos_token_id=None)[0] for row in rows]
        return [tokens[len(prompt) :].tolist() for tokens, prompt in zip(made, prompts, strict=True)]


@pytest.mark.parametrize("sampler", [None, Engine()], ids=["generate", "engine"])
@pytest.mark.parametrize("shape", ["row", "bool"])
def test_stopping_criteria_end_responses_beside_our_own(tmp_path, sampler, shape):
    """They see prompt and response; what ends a response is in it; the length limit still holds."""
    trainer = tiny_trainer(tmp_path, trainer_kwargs={"sampler": sampler})
    query = torch.tensor([2, 3, 4])
    free = trainer.generate(query, **GREEDY)[0]
    assert len(free) == 6
    criterion = AfterTokens(len(query) + 2, shape)
    for given in (criterion, [criterion], StoppingCriteriaList([criterion])):
        assert trainer.generate(query, stopping_criteria=given, **GREEDY)[0].tolist() == free[:2].tolist()
    assert all(tokens[0, :3].tolist() == [2, 3, 4] for tokens in criterion.seen)
    never = AfterTokens(100)
    assert trainer.generate(query, stopping_criteria=[never], **GREEDY)[0].equal(free)
    ends_first = {**GREEDY, "eos_token_id": int(free[0])}
    assert len(trainer.generate(query, stopping_criteria=[criterion], **ends_first)[0]) == 1
    several = trainer.generate([query, query], stopping_criteria=[AfterTokens(4)], **GREEDY)
    assert [row.tolist() for row in several] == [free[:1].tolist()] * 2


def test_stopping_criteria_that_cannot_be_called_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"stopping_criteria\[0\] is a str; it should be a StoppingCriteria"):
        tiny_trainer(tmp_path).generate(torch.tensor([2, 3]), stopping_criteria="stop", **GREEDY)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("mask", [[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], ids=str)
def test_masked_tokens_of_a_query_are_not_read(tmp_path, family, mask):
    """As transformers' own `generate` reads them; the prompt comes back as it was given."""
    model = tiny_model(family)
    trainer = tiny_trainer(tmp_path, model)
    query, mask = torch.tensor([5, 6, 7, 8, 9]), torch.tensor(mask)
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    theirs = model.generate(query[None], attention_mask=mask[None], **options)
    if not mask[-1]:  # transformers answers behind the masked token: it has a warning against it
        theirs = torch.cat([query[None], model.generate(query[None, :-1], **options)[:, 4:]], dim=1)
    for given in (mask, mask[None], mask.bool(), [mask]):
        tokens = trainer.generate(query, attention_mask=given, **{**GREEDY, "return_prompt": True})
        assert tokens.equal(theirs) and tokens.shape == (1, 11)
    both = trainer.generate([query, query[:2]], attention_mask=[mask, torch.ones(2)], **GREEDY)
    assert both[0].equal(theirs[0, 5:])
    assert both[1].equal(trainer.generate(query[:2], **GREEDY)[0])


def test_an_encoders_query_can_be_masked_at_its_end(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model("bart"))
    query = torch.tensor([5, 6, 7, 8])
    masked = trainer.generate(query, attention_mask=torch.tensor([1, 1, 1, 0]), **GREEDY)
    assert masked.equal(trainer.generate(query[:3], **GREEDY))
    with pytest.raises(ValueError, match=r"attention_mask\[0\] masks tokens before others"):
        trainer.generate(query, attention_mask=torch.tensor([0, 1, 1, 1]), **GREEDY)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(2)}, r"attention_mask\[0\] has shape \(2,\); its query has \(3,\)"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask\[0\] has shape \(2, 3\)"),
        ({"attention_mask": torch.zeros(3)}, r"attention_mask\[0\] is \[0.0, 0.0, 0.0\]; it should hold 0 and 1"),
        ({"attention_mask": torch.tensor([1, 2, 1])}, r"attention_mask\[0\] is \[1, 2, 1\]"),
        ({"attention_mask": "all"}, r"attention_mask is a str; it should be a list of 1 1-D tensors"),
        ({"input_ids": torch.ones(1, 3)}, "input_ids was given to generate: give token ids as query_tensor"),
        ({"inputs": torch.ones(1, 3)}, "inputs was given to generate"),
        ({"inputs_embeds": torch.ones(1, 3, 4)}, "inputs_embeds was given to generate"),
    ],
    ids=str,
)
def test_inputs_of_generate_that_do_not_fit_are_refused_by_name(trainer, inputs, message):
    with pytest.raises(ValueError, match=message):
        trainer.generate(torch.tensor([2, 3, 4]), **inputs, **GREEDY)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return tiny_trainer(tmp_path_factory.mktemp("trainer"))


def test_rows_are_collated_as_torchs_default_does_where_it_can():
    point = namedtuple("point", ["x", "y"])
    rows = [
        *([torch.tensor([1, 2]), torch.tensor([3, 4])], [torch.tensor(1.5), torch.tensor(2.0)], [1, 2], [0.5, 1]),
        *([True, False], ["a", "b"], [np.array([1, 2]), np.array([3, 4])], [np.int64(1), np.int64(2)]),
        [(torch.tensor([1]), "a"), (torch.tensor([2]), "b")],
        [{"a": torch.tensor([1]), "b": "x"}, {"a": torch.tensor([2]), "b": "y"}],
        [point(torch.tensor([1]), 2), point(torch.tensor([3]), 4)],
        [{"a": {"b": torch.ones(2, 2)}}, {"a": {"b": torch.zeros(2, 2)}}],
    ]
    for column in rows:
        ours, theirs = collate(column), default_collate(column)
        assert tree_equal(ours, theirs), column
    assert type(collate(rows[8])) is tuple and type(collate(rows[10])) is point


def tree_equal(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(tree_equal(ours[name], theirs[name]) for name in theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(tree_equal, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


@pytest.mark.parametrize(
    "rows",
    [
        [torch.tensor([1, 2]), torch.tensor([3])],
        [None, "a"],
        [1, None],
        [{"a": 1}, {"b": 2}],
        [(1, 2), (3,)],
        [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]],
        [["a", "b"], ["c", "d"]],
        [np.array(["a"]), np.array(["b"])],
        [object(), object()],
    ],
)
def test_rows_are_a_list_where_it_cannot(rows):
    batch = collate(rows)
    assert type(batch) is list and all(ours is theirs for ours, theirs in zip(batch, rows, strict=True))


def test_lists_of_token_ids_and_arrays_become_tensors():
    """Lists also where they are equally long, so that a loop does not depend on it."""
    for rows in ([[1, 2], [3, 4]], [[1, 2], [3]]):
        batch = collate(rows)
        assert type(batch) is list and [ids.tolist() for ids in batch] == rows
        assert all(ids.dtype == torch.int64 for ids in batch)
    for dtype in (np.int64, np.int32, np.uint16):
        batch = collate([np.array([1, 2], dtype), np.array([3], dtype)])
        assert [ids.tolist() for ids in batch] == [[1, 2], [3]]
        assert all(ids.dtype == (torch.int32 if dtype is np.int32 else torch.int64) for ids in batch)


def data(format, lengths, labels=True):
    rows = {"input_ids": [list(range(2, 2 + length)) for length in lengths], "query": [f"q{n}" for n in lengths]}
    made = Dataset.from_dict(rows | ({"label": list(range(len(lengths)))} if labels else {}))
    return made.with_format(format)


@pytest.mark.parametrize("format", [None, "torch", "numpy"])
@pytest.mark.parametrize("lengths", [[3] * 8, [1, 2, 3, 4, 5, 6, 7, 8], [3, 3, 3, 3, 4, 4, 4, 4]], ids=str)
def test_the_classic_loop_and_train_read_data_of_every_format(tmp_path, format, lengths):
    """The batch goes to `generate`, `step` and `log_stats` as it is, whether its rows were stacked or not."""
    trainer = APATrainer(
        tiny_config(tmp_path, max_completion_length=3, save_strategy="no", max_steps=1),
        tiny_model(),
        tokenizer=tiny_tokenizer(),
        dataset=data(format, lengths),
        reward_funcs=lambda completions, label, **_: [float(number) for number in label],
    )
    for batch in trainer.dataloader:
        stacked = isinstance(batch["input_ids"], torch.Tensor)
        equal = len({len(ids) for ids in batch["input_ids"]}) == 1
        assert stacked == (equal and format is not None)
        assert isinstance(batch["label"], torch.Tensor) and type(batch["query"]) is list
        responses = trainer.generate(batch["input_ids"], return_prompt=False)
        batch["response"] = trainer.tokenizer.batch_decode(responses)
        scores = [label.float() for label in batch["label"]]
        stats = trainer.step(batch["input_ids"], responses, scores)
        trainer.log_stats(stats, batch, scores, columns_to_log=("query", "response", "label"))
    assert trainer.num_iterations_done == 2
    trainer.train()


class Pairs(torch.utils.data.Dataset):
    """Queries and responses, as TRL's own tests of PPO had them."""

    def __len__(self):
        return 4

    def __getitem__(self, row):
        return torch.arange(2, 5), torch.arange(3 + row, 6 + row)


def test_tuples_of_tensors_stay_tuples(tmp_path):
    trainer = APATrainer(tiny_config(tmp_path), tiny_model(), tokenizer=tiny_tokenizer(), dataset=Pairs())
    scores = list(torch.randn(4).unbind())
    for queries, responses in trainer.dataloader:
        assert queries.shape == responses.shape == (4, 3)
        trainer.step(list(queries), list(responses), scores)
        trainer.step(queries, responses, scores)
    assert trainer.num_iterations_done == 2


def test_what_is_computed_of_a_stacked_batch_is_a_plain_tensor_that_is_refused_as_before(tmp_path, trainer):
    batch = collate([torch.tensor([2, 3]), torch.tensor([4, 5])])
    for moved in (batch.to("cpu"), batch.to(torch.int32), batch.detach(), batch.cpu()):
        assert len(trainer.generate(moved, max_new_tokens=2)) == 2
    for plain in (batch + 0, batch[:1], batch.clone(), *batch.split(1), torch.cat([batch, batch])):
        assert type(plain) is torch.Tensor
        with pytest.raises(ValueError, match=r"has shape \(\d, 2\); it should be 1-D"):
            trainer.generate(plain, max_new_tokens=2)
    assert [type(row) for row in (*batch, batch[0])] == [torch.Tensor] * 3
    assert pickle.loads(pickle.dumps(batch)).equal(batch)


PARTS = {
    "last layer": lambda name: ".1." in name,
    "head": lambda name: "lm_head" in name,
    "norms": lambda name: "norm" in name,
    "adapters, of which one is left out": lambda name: "lora_A" in name,
}


@pytest.mark.parametrize("value_model", ["separate", "head"])
@pytest.mark.parametrize("part", PARTS)
def test_an_optimizer_over_a_part_trains_that_part(tmp_path, part, value_model):
    """And the value model; the rest stays as it was, and one warning counts it."""
    model, chosen = tiny_model(), PARTS[part]
    model = get_peft_model(model, lora_config(init_lora_weights=False)) if "adapters" in part else model
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    held = {name: p for name, p in trainable.items() if chosen(name)}
    assert 0 < len(held) < len(trainable)
    optimizer = torch.optim.SGD(held.values(), lr=0.1)
    with pytest.warns(UserWarning) as caught:
        trainer = tiny_trainer(tmp_path, model, {"optimizer": optimizer, "value_model": value_model}, ppo_epochs=2)
    told = [str(warning.message) for warning in caught if "optimizer" in str(warning.message)]
    number = sum(p.numel() for name, p in trainable.items() if name not in held)
    assert len(told) == 1
    assert f"leaves out {len(trainable) - len(held)} of the {len(trainable)} trainable tensors" in told[0]
    assert f"({number:,} of {sum(p.numel() for p in trainable.values()):,} parameters; " in told[0]
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.step(*tiny_rollouts())
    trainer.step(*tiny_rollouts())
    moved = {name for name, p in trainer.model.named_parameters() if not p.equal(before[name])}
    assert {name.removeprefix("policy.") for name in moved if name.startswith("policy.")} == held.keys()
    assert any(name.startswith("value_model.") for name in moved)


def test_an_optimizer_over_all_of_the_policy_warns_of_nothing(tmp_path):
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="optimizer")
        tiny_trainer(tmp_path, model, {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)})
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("peft_config", [None, lora_config()], ids=["full", "adapters made later"])
def test_an_optimizer_over_none_of_it_is_refused(tmp_path, peft_config):
    model = tiny_model()
    optimizer = torch.optim.SGD((tiny_model() if peft_config is None else model).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer lacks (\d+) of the \1 trainable tensors of model"):
        tiny_trainer(tmp_path, model, {"optimizer": optimizer, "peft_config": peft_config})
