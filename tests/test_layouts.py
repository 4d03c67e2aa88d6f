"""A batch gives what its rows give alone, in families in which padding, packing or a longer row would change it."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.families import BART, DECODER, T5, alone_logprobs, family_model, wrong_behind_its_cache
from tests.test_offline import trainer_of
from tests.test_update import assert_same, learner, parameters_after_step
from tests.tiny import SHARED, VOCABULARY, tiny_model, tiny_tokenizer, tiny_trainer
from trl_apa.models import layouts
from trl_apa.models.layouts import Layouts, layout_trial, readable_batches, sampling_trial, why_not_packed
from trl_apa.models.logprobs import trunk_and_head
from trl_apa.models.trials import boundaries, difference, rope_limit, trial_lengths, try_layouts
from trl_apa.rollout.batch import Layout
from trl_apa.rollout.sampling_trial import try_sampling
from trl_apa.rollout.scoring import RewardModel
from trl_apa.winrate.local import LanguageModelJudge


PACKED, PADDED, SEPARATE = Layout.PACKED, Layout.PADDED, Layout.SEPARATE
# The layouts of rows of 6, 8 and 16 tokens: windows are 8 tokens, RoPE's first positions 12.
EXPECTED = {
    "llama": (PACKED, PACKED, PACKED),
    "dynamic RoPE": (PACKED, PACKED, SEPARATE),
    "longrope": (PACKED, PACKED, SEPARATE),
    "window": (PACKED, PACKED, PACKED),
    "capped logits": (PACKED, PACKED, PACKED),
    "capped attention": (PADDED, PADDED, PADDED),
    "bias in the mask": (PADDED, PADDED, PADDED),
    "rwkv": (SEPARATE, SEPARATE, SEPARATE),
    "griffin": (SEPARATE, SEPARATE, SEPARATE),
    "mamba": (PADDED, PADDED, PADDED),
    "xlstm": (SEPARATE, SEPARATE, SEPARATE),
    "roberta": (SEPARATE, SEPARATE, SEPARATE),
    "alibi": (PADDED, PADDED, PADDED),
    "switch": (PADDED, PADDED, PADDED),
    "bart": (PADDED, PADDED, PADDED),
}


def expected_of(family, model):
    """Older versions of transformers read capped attention with SDPA, which caps nothing and can be packed."""
    ignores_cap = family == "capped attention" and model.config._attn_implementation != "eager"
    return EXPECTED["window" if ignores_cap else family]


LENGTHS = ((3, 4), (9, 6), (5, 2), (7, 9), (1, 1), (2, 7), (6, 3), (3, 8))


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(layouts, "_SAID", set())


def rows_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)

    def tokens(count):
        return torch.randint(2, VOCABULARY, (count,), generator=generator)

    queries, responses = [tokens(query) for query, _ in lengths], [tokens(response) for _, response in lengths]
    return queries, responses, list(torch.randn(len(lengths), generator=generator).unbind())


@pytest.mark.parametrize("family", EXPECTED)
@pytest.mark.filterwarnings("ignore:.*rows are processed one by one")
def test_logprobs_are_those_of_each_row_alone(tmp_path, family):
    """Of the policy in micro-batches of three, and of pi_init, at a learning rate of 0; rows are read by a model each,
    which has seen no other."""
    model = family_model(family)
    queries, responses, scores = rows_of()
    each = zip(queries, responses, strict=True)
    expected = [alone_logprobs(copy.deepcopy(model), [query], [response])[0] for query, response in each]
    trainer = tiny_trainer(tmp_path, model, batch_size=8, mini_batch_size=4, learning_rate=0.0)
    stats = trainer.step(queries, responses, scores)
    for name in ("objective/logprobs", "objective/ref_logprobs"):
        for row, alone in zip(stats[name], expected, strict=True):
            torch.testing.assert_close(torch.tensor(row)[: len(alone)].float(), alone, rtol=1e-5, atol=5e-5)
    assert abs(stats["objective/kl"]) < 1e-5
    assert tuple(trainer.layouts(longest) for longest in (6, 8, 16)) == expected_of(family, model)


@pytest.mark.parametrize("family", ["griffin", "longrope", "xlstm", "bart"])
@pytest.mark.filterwarnings("ignore:.*rows are processed one by one")
def test_a_step_does_not_depend_on_the_micro_batches(tmp_path, family):
    """Rows of equal length in one call, and several calls in one backward pass, with values and checkpointing too."""
    results = []
    for size, checkpointing in ((8, False), (4, True), (1, False)):
        options = {"batch_size": 8, "mini_batch_size": size, "gradient_accumulation_steps": 8 // size}
        model = family_model(family, scale=1.0)
        trainer = learner(tmp_path, model, gradient_checkpointing=checkpointing, max_grad_norm=None, **options)
        results.append(parameters_after_step(trainer, *rows_of((*LENGTHS[:4], (7, 9), (2, 5), (3, 4), (6, 1)))))
    for result in results[1:]:
        assert_same(result, results[0], tolerance=2e-6)


@pytest.mark.parametrize("family", ["rwkv", "griffin", "mamba", "xlstm", "longrope", "dynamic RoPE", "window", "bart"])
@pytest.mark.filterwarnings("ignore:.*rows are processed one by one")
def test_greedy_answers_are_those_of_each_prompt_alone(tmp_path, family):
    """Also of several prompts of one length, and where the caller wants widths that are multiples of eight."""
    model = family_model(family)
    queries = rows_of((*LENGTHS, (3, 1), (9, 1)))[0]
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": 1}
    trainer = tiny_trainer(tmp_path, copy.deepcopy(model))
    multiples = {"pad_to_multiple_of": None if family == "bart" else 8}
    answers = trainer.generate(queries, batch_size=10, return_prompt=True, **multiples, **options)
    for query, answer in zip(queries, answers, strict=True):
        alone = copy.deepcopy(model).generate(query[None], attention_mask=torch.ones_like(query)[None], **options)[0]
        assert answer.tolist() == alone.tolist()


def test_one_warning_says_that_rows_go_one_by_one(tmp_path):
    """For policy, value model and pi_init, for the update and for sampling."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = tiny_trainer(tmp_path, family_model("griffin"), batch_size=8, mini_batch_size=4)
        trainer.step(*rows_of())
        trainer.generate(rows_of()[0], batch_size=8, max_new_tokens=2, generate_ref_response=True)
    said = [str(warning.message) for warning in caught if "one by one" in str(warning.message)]
    assert len(said) == 1
    assert said[0].startswith("RecurrentGemmaForCausalLM gives other results for a padded batch than for each row")
    assert said[0].endswith("nats a token: rows are processed one by one, or batched by equal length")


@pytest.mark.parametrize("window", [16, 4])
def test_a_window_is_packed(tmp_path, window):
    """As long as the longest row, and shorter than most."""
    model = family_model("window", sliding_window=window)
    queries, responses, scores = rows_of(((9, 7), (5, 3), (2, 2), (1, 7)))
    expected = alone_logprobs(model, queries, responses)
    trainer = tiny_trainer(tmp_path, copy.deepcopy(model), learning_rate=0.0, padding_free=True)
    logprobs = trainer.step(queries, responses, scores)["objective/logprobs"]
    for row, alone in zip(logprobs, expected, strict=True):
        torch.testing.assert_close(torch.tensor(row)[: len(alone)].float(), alone, rtol=1e-5, atol=1e-5)


def test_a_bias_in_the_mask_is_never_lost():
    """It is zero in a new model, where a packed row gives the same without it."""
    model = family_model("bias in the mask")
    assert all(not parameter.any() for name, parameter in model.named_parameters() if name.endswith(".A"))
    assert "uses the mask for more than padding" in why_not_packed(model)


@pytest.mark.parametrize("family", ["capped logits", "griffin"])
def test_a_cap_on_the_logits_of_a_new_model_is_seen(family):
    model = family_model(family, scale=1.0)
    logits = model(torch.arange(2, 9)[None]).logits
    assert logits.abs().max() < 1  # of 15 and of 30
    assert trunk_and_head(model) is None


@pytest.mark.filterwarnings("ignore:.*rows are processed one by one")
def test_scores_are_those_of_each_row_alone():
    config = family_model("longrope").config
    config.num_labels = 1
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.mul_(4.0)
    queries, responses, _ = rows_of()
    ids = [[part.tolist() for part in column] for column in (queries, responses)]
    scores = RewardModel(classifier, tiny_tokenizer())([""] * 8, [""] * 8, *ids)
    rows = [torch.cat(pair)[None] for pair in zip(queries, responses, strict=True)]
    trunk = copy.deepcopy(classifier.base_model)
    expected = [classifier.score(trunk(row).last_hidden_state[0, -1]).item() for row in rows]
    assert scores == pytest.approx(expected, abs=1e-4)
    padded = RewardModel(classifier, tiny_tokenizer())._read([row[0] for row in rows])
    assert (classifier.score(padded)[:, 0] - torch.tensor(expected)).abs().max() > 0.01


BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
CLASSIFIERS = {"bert": BERT, "roberta": BERT, "bart": BART, "t5": T5, "llama": DECODER, "gpt2": GPT2}


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.filterwarnings("error")
def test_classifiers_of_all_kinds_are_tried_out_and_score_each_row_as_alone(kind):
    """Those that read their score from EOS, or from the first token, too; padding is exact for all of them."""
    config = AutoConfig.for_model(kind, **{**SHARED, **CLASSIFIERS[kind], "num_labels": 1})
    config.decoder_start_token_id = 1
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.mul_(4.0)
    rows = [torch.cat([*pair, torch.tensor([1])]) for pair in zip(*rows_of()[:2], strict=True)]
    with torch.no_grad():
        expected = [classifier(input_ids=row[None]).logits.item() for row in rows]
    reward = RewardModel(classifier, tiny_tokenizer())
    assert reward.score_ids([row.tolist() for row in rows]) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert readable_batches(reward._read, classifier, rows) == [list(range(8))]


@pytest.mark.filterwarnings("ignore:.*rows are processed one by one")
def test_a_judge_and_the_log_probs_of_fixed_data_read_rows_alone_too(tmp_path):
    model = family_model("griffin")
    queries, responses, _ = rows_of()
    judge = LanguageModelJudge(copy.deepcopy(model), tiny_tokenizer(), "judge")
    judge._letters = [torch.tensor(letter) for letter in ([5], [6, 7], [8])]
    logprobs_B3 = judge._logprobs(queries)
    for number, letter in enumerate(judge._letters):
        expected = alone_logprobs(model, queries, [letter] * 8)
        torch.testing.assert_close(logprobs_B3[:, number], torch.stack([row.sum() for row in expected]))
    columns = zip(queries, responses, strict=True)
    rows = [{"input_ids": q.tolist(), "completion_ids": r.tolist(), "reward": 0.5} for q, r in columns]
    trainer = trainer_of(tmp_path, rows, copy.deepcopy(model), loss_type="apa")
    logprobs_BR = trainer._over_the_data(trainer._ref_logprobs)
    for row, alone in zip(logprobs_BR, alone_logprobs(model, queries, responses), strict=True):
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-5, atol=1e-5)
    trainer.train()


def test_the_trial_measures_nats():
    """Of two recurrences: one reads pads, and its cache is wrong for two rows; the other does not."""
    tried = {family: try_layouts(family_model(family)) for family in ("rwkv", "mamba")}
    assert tried["rwkv"].padded.max_nats > tried["rwkv"].padded.mean_nats > 0.1
    for small in (tried["mamba"].padded, tried["rwkv"].together, tried["rwkv"].repeated):
        assert small.max_nats < 1e-4
    sampled = {family: try_sampling(family_model(family)) for family in ("rwkv", "mamba")}
    assert sampled["rwkv"].together.max_nats > 0.1 > 1e-4 > sampled["rwkv"].cached.max_nats
    assert not sampled["rwkv"].is_exact_together and sampled["mamba"].is_exact_batched
    packed = try_layouts(tiny_model())
    assert packed.is_exact_packed and packed.leak == 0.0 and packed.packed.max_nats < 1e-5


@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float32).min])
def test_tokens_that_a_model_never_chooses_do_not_hide_the_others(least):
    expected = torch.tensor([[1.0, 2.0, least], [3.0, 1.0, least]])
    assert difference([expected], [expected.clone()], None, exact=True).relative == 0.0
    changed = expected + torch.tensor([0.3, 0.0, 0.0])
    assert difference([expected], [changed], None, exact=True).relative == pytest.approx(0.1)


def test_outputs_that_are_not_numbers_say_nothing_of_a_layout():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.warns(
        UserWarning, match=r"could not be tried out \(its outputs are not numbers\): batches are padded"
    ):
        assert Layouts([model])(9) is PADDED


def test_a_trial_crosses_what_the_config_says_matters_and_no_more_than_the_rows_do():
    window, rope = family_model("window").config, family_model("longrope").config
    assert boundaries(window) == (8,) and boundaries(rope) == (12,) == (rope_limit(rope),)
    assert trial_lengths(window, longest=5) == (6, 8) and trial_lengths(window, longest=9) == (6, 9, 14)
    assert boundaries(tiny_model().config) == () and trial_lengths(tiny_model().config, 60) == (6, 13)
    window.sliding_window, window.max_position_embeddings = 4096, 8192
    assert trial_lengths(window, 4096) == (6, 13) and trial_lengths(window, 4097) == (6, 4097, 4102)


def test_each_trial_is_made_once_and_one_that_crosses_a_window_when_rows_do(monkeypatch):
    made = []

    def noted(network, longest, **kwargs):
        made.append(longest)
        return try_layouts(network, longest, **kwargs)

    monkeypatch.setattr(layouts, "try_layouts", noted)
    model = family_model("capped attention", sliding_window=20)
    inside, _, beyond = expected_of("capped attention", model)
    chosen = Layouts([model, copy.deepcopy(model)])  # pi_init, a copy
    assert [chosen(longest) for longest in (6, 20, 13)] == [inside] * 3 and len(made) == 1
    assert [chosen(longest) for longest in (21, 30)] == [beyond] * 2 and len(made) == 2
    assert layout_trial(model, 25).lengths == (6, 21, 26)
    assert sampling_trial(model, 5).is_exact_batched


def test_a_network_that_cannot_be_tried_out_is_padded_and_a_warning_says_so():
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel")

    model = tiny_model()
    model.model.layers[0].forward = broken
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM could not be tried out \(no kernel\): batches are padded"):
        assert Layouts([model])(9) is PADDED
    assert why_not_packed(model) == "could not be tried out: no kernel"
    rows = [torch.tensor([3, 4]), torch.tensor([5])]
    assert readable_batches(broken, tiny_model(), rows) == [[0, 1]]


def test_a_cache_that_answers_otherwise_is_not_used_and_a_warning_says_so_once(tmp_path):
    queries = [query for query in rows_of()[0] if len(query) > 1]
    options = {"do_sample": False, "return_prompt": False, "max_new_tokens": 6}
    expected = tiny_trainer(tmp_path, tiny_model()).generate(queries, **options, use_cache=False)
    model = tiny_model()
    wrong_behind_its_cache(model)
    trainer = tiny_trainer(tmp_path, model)
    with pytest.warns(
        UserWarning, match=r"LlamaForCausalLM gives other results with its cache than without, .*: no cache is used"
    ):
        responses = trainer.generate(queries, **options)
    assert all(torch.equal(one, other) for one, other in zip(responses, expected, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (alone,) = trainer.generate(queries[:1], **options)
    assert torch.equal(alone, expected[0])


def test_a_prompt_of_one_token_does_not_go_on_from_the_row_before(tmp_path):
    trainer = tiny_trainer(tmp_path, family_model("griffin"))
    options = {"do_sample": False, "return_prompt": False, "max_new_tokens": 4}
    first, other = torch.tensor([5]), torch.tensor([7, 8, 9, 10])
    expected = trainer.generate(first, **options)
    trainer.generate(other, **options)
    assert torch.equal(trainer.generate(first, **options), expected)


class NoDerivativeOfZero(torch.autograd.Function):
    """The identity, with the infinite derivative that a norm has at zero, where the embedding of a pad is."""

    @staticmethod
    def forward(ctx, hidden):
        ctx.save_for_backward((hidden == 0).all(dim=-1, keepdim=True))
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        (nothing,) = ctx.saved_tensors
        return torch.where(nothing, gradient * torch.inf, gradient)


def test_a_family_without_a_gradient_at_pads_is_not_padded(tmp_path, monkeypatch):
    """As Gemma 3n: its padded log-probs are right, and their gradient is not a number."""
    rollouts, norm = rows_of(), LlamaRMSNorm
    own = norm.forward
    # Weights of its own: trials are made once for equal networks.
    with monkeypatch.context() as patched:
        patched.setattr(norm, "forward", lambda self, hidden: NoDerivativeOfZero.apply(own(self, hidden)))
        with pytest.warns(
            UserWarning, match="has no finite gradient of a padded batch: rows are processed one by one"
        ):
            trainer = tiny_trainer(tmp_path, tiny_model(seed=77), batch_size=8, padding_free=False)
        assert trainer.layouts(16) is SEPARATE
        stepped = parameters_after_step(trainer, *rollouts)
    assert_same(stepped, parameters_after_step(tiny_trainer(tmp_path, tiny_model(seed=77), batch_size=8), *rollouts))


def test_numbers_of_layers_are_no_boundaries_nor_are_positions_after_which_rope_stays_as_it_is():
    qwen = AutoConfig.for_model("qwen2", max_window_layers=28, **SHARED)
    gemma = AutoConfig.for_model("gemma3_text", sliding_window=512, sliding_window_pattern=6, **SHARED)
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 8192
    llama = AutoConfig.for_model("llama", rope_parameters=llama3, **SHARED)
    assert [boundaries(config) for config in (qwen, gemma, llama)] == [(), (512,), ()]


def test_a_cache_is_used_where_rope_reads_the_finished_row_otherwise_in_any_case():
    model = family_model("longrope")
    assert not sampling_trial(model, 40).is_exact_cached and layouts.cache_is_exact(model, 40)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_trial_while_checkpointing_is_on_is_that_without(reentrant):
    """Its gradient is of short rows: long ones would take the memory of an update without checkpointing."""
    model = family_model("window", sliding_window=20).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    seen = []
    model.model.layers[0].register_forward_hook(
        lambda layer, args, output: seen.append((torch.is_grad_enabled(), args[0].shape[1]))
    )
    trial = layout_trial(model, 30)
    assert trial.has_padded_gradient and trial.is_exact_padded and model.model.layers[0].training
    assert max(length for grad, length in seen if grad) < 20 < max(length for grad, length in seen if not grad)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_trial_is_made_anew_in_another_precision():
    model = tiny_model(seed=78)
    exact = layout_trial(model, 13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = layout_trial(model, 13)
    assert exact.allowed == 1e-4 and rounded.allowed >= 6e-2 and layout_trial(model, 13) is exact


def test_a_failed_trial_keeps_nothing_alive(monkeypatch):
    def fails(network, *args, **kwargs):
        try:
            raise KeyError("in a frame that holds the network")
        except KeyError as error:
            raise RuntimeError("no kernel") from error

    monkeypatch.setattr(layouts, "try_layouts", fails)
    model = tiny_model(seed=79)
    kept = weakref.ref(model)
    with pytest.warns(UserWarning, match="no kernel"):
        assert isinstance(layout_trial(model, 13), RuntimeError)
    del model
    gc.collect()
    assert kept() is None
