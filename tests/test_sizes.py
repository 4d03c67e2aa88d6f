"""Sizes that differ: tokenizers longer than the embedding, networks that know fewer ids or positions than others."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.fake_vllm import install
from tests.test_models import reward_model
from tests.test_training import PROMPTS
from tests.tiny import CONFIGS, EOS, VOCABULARY, tiny_config, tiny_model, tiny_rollouts, tiny_tokenizer
from trl_apa import APATrainer
from trl_apa.models import ValueModel
from trl_apa.offline import OfflineAPATrainer, OfflineConfig
from trl_apa.rollout.scoring import RewardModel


def longer_tokenizer(pad="[PAD]", others=()):
    """One more token than the tiny models have rows: the pad as scripts add it, or another one."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": pad} if pad else {"additional_special_tokens": list(others)})
    assert len(tokenizer) == VOCABULARY + 1
    return tokenizer


def resized(model, rows):
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def classifier(rows=VOCABULARY, positions=64):
    config = CONFIGS["llama"]()
    config.vocab_size, config.max_position_embeddings, config.num_labels = rows, positions, 1
    torch.manual_seed(2)
    return AutoModelForSequenceClassification.from_config(config)


def trainer_of(tmp_path, model=None, tokenizer=None, config=None, **arguments):
    options = {"padding_free": False, "mini_batch_size": 2, "max_completion_length": 5, **(config or {})}
    return APATrainer(
        tiny_config(tmp_path, **options),
        tiny_model() if model is None else model,
        tokenizer=tokenizer or longer_tokenizer(),
        **arguments,
    )


def parameters(trainer):
    return list(trainer.model.parameters())


@pytest.mark.parametrize(
    ("family", "value_model"),
    [("llama", "separate"), ("gpt2", "head"), ("opt", "separate"), ("t5", "separate"), ("bart", "head")],
)
def test_a_pad_beyond_the_embedding_trains_as_one_inside(tmp_path, family, value_model):
    """Every network would raise an IndexError if it saw that id."""
    trainers = [
        trainer_of(tmp_path, tiny_model(family), tokenizer, value_model=value_model)
        for tokenizer in (tiny_tokenizer(), longer_tokenizer())
    ]
    queries, responses, scores = tiny_rollouts()
    for trainer in trainers:
        trainer.step(queries, responses, scores)
    for expected, parameter in zip(*map(parameters, trainers), strict=True):
        assert torch.equal(parameter, expected)
    greedy = {"do_sample": False, "max_new_tokens": 6, "return_prompt": False}
    inside, outside = (trainer.generate(queries, **greedy) for trainer in trainers)
    pad = trainers[1].tokenizer.pad_token_id
    # As classic scripts name it in every call.
    named = trainers[1].generate(queries, pad_token_id=pad, generate_ref_response=True, **greedy)[0]
    assert [row.tolist() for row in inside] == [row.tolist() for row in outside] == [row.tolist() for row in named]


def test_padded_responses_hold_the_tokenizers_pad_and_a_mask_makes_them_learnable(tmp_path):
    def often_ending():
        model = tiny_model(scale=1.0)
        with torch.no_grad():
            model.get_output_embeddings().weight[EOS] *= 6
        return model

    queries, _, scores = tiny_rollouts()
    trainer = trainer_of(tmp_path, often_ending())
    pad = trainer.tokenizer.pad_token_id
    torch.manual_seed(0)
    cut = trainer.generate(queries, return_prompt=False, max_new_tokens=8)
    torch.manual_seed(0)
    padded = trainer.generate(queries, return_prompt=False, max_new_tokens=8, remove_padding=False)
    assert len({len(row) for row in padded}) == 1 and any(len(row) < len(padded[0]) for row in cut)
    for row, full in zip(cut, padded, strict=True):
        assert full.tolist() == row.tolist() + [pad] * (len(full) - len(row))
    masks = [(row != pad).long() for row in padded]
    kept = [row.clone() for row in padded]
    stats = trainer.step(queries, padded, scores, masks)
    assert all(row.equal(given) for row, given in zip(kept, padded, strict=True))
    expected = trainer_of(tmp_path, often_ending()).step(queries, cut, scores)["objective/ref_logprobs"]
    for one, two, row in zip(stats["objective/ref_logprobs"], expected, cut, strict=True):
        torch.testing.assert_close(torch.tensor(one[: len(row)]), torch.tensor(two[: len(row)]))
    with pytest.raises(
        ValueError, match=r"responses\[\d\] holds token ids from \d+ to 32 \('\[PAD\]'\); the model knows"
    ):
        trainer.step(queries, padded, scores)  # without a mask the pads would be learned


def test_a_run_with_a_reward_and_a_value_model_that_are_told_the_same_pad(tmp_path):
    tokenizer = longer_tokenizer()
    networks = {"reward_funcs": reward_model(), "value_model": reward_model(), "ref_model": tiny_model(seed=3)}
    policy = tiny_model()
    for network in (policy, *networks.values()):
        network.config.pad_token_id = tokenizer.pad_token_id
    trainer = trainer_of(
        tmp_path,
        policy,
        tokenizer,
        {"max_steps": 4, "save_strategy": "no"},
        train_dataset=[{"prompt": prompt} for prompt in PROMPTS],
        eval_dataset=[{"prompt": "w5 w6 w7"}, {"prompt": "w8"}],
        **networks,
    )
    assert trainer.train().global_step == 4
    assert trainer.evaluate()["eval_response_length"] > 0
    trainer.save_pretrained(tmp_path / "saved")  # with a config under which transformers can make the embeddings
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(map(torch.equal, saved.parameters(), trainer.model.policy.parameters()))
    assert saved.config.pad_token_id is None and saved.generation_config.pad_token_id is None
    assert trainer.model.config.pad_token_id == tokenizer.pad_token_id
    ValueModel.from_pretrained(tmp_path / "saved" / "value_model")
    scores = trainer.score(*tiny_rollouts()[:2])
    plain = trainer_of(tmp_path, tokenizer=tiny_tokenizer(), reward_funcs=reward_model())
    torch.testing.assert_close(torch.stack(scores), torch.stack(plain.score(*tiny_rollouts()[:2])))


@pytest.mark.parametrize("loss_type", ["apa", "ilql"])
def test_offline_learning_with_a_pad_beyond_the_embedding(tmp_path, loss_type):
    rows = [{"prompt": p, "completion": c, "reward": 1.0} for p, c in (("w2 w3", "w4"), ("w5", "w6 w7 w8"))]

    def learned(tokenizer):
        config = OfflineConfig(str(tmp_path), loss_type=loss_type, max_steps=2, use_cpu=True, report_to="none", seed=1)
        trainer = OfflineAPATrainer(config, tiny_model(), processing_class=tokenizer, train_dataset=rows)
        trainer.train()
        return parameters(trainer)

    for expected, parameter in zip(learned(tiny_tokenizer()), learned(longer_tokenizer()), strict=True):
        assert torch.equal(parameter, expected)


def test_other_tokens_beyond_the_embedding_are_refused_by_name_when_they_occur(tmp_path):
    """Gemma 3's tokenizer has one token more, for images, than the embedding has rows: text is trained on."""
    tokenizer = longer_tokenizer(pad=None, others=["<image_soft_token>"])
    data = [{"prompt": "w2 <image_soft_token> w3"}] * 4
    arguments = {"reward_funcs": reward_model(), "value_model": reward_model(), "train_dataset": data}
    trainer = trainer_of(tmp_path, tokenizer=tokenizer, config={"max_steps": 1, "save_strategy": "no"}, **arguments)
    queries, responses, scores = tiny_rollouts()
    trainer.step(queries, responses, scores)
    problem = r"to 32 \('<image_soft_token>'\); the model knows 0 to 31"
    image = torch.tensor([5, 32])
    with pytest.raises(ValueError, match=r"queries\[1\] holds token ids from 5 " + problem):
        trainer.step([queries[0], image, *queries[2:]], responses, scores)
    with pytest.raises(ValueError, match=r"responses\[2\] holds token ids from 5 " + problem):
        trainer.step(queries, [*responses[:2], image, responses[3]], scores)
    with pytest.raises(ValueError, match=r"query_tensor\[0\] holds token ids from 5 " + problem):
        trainer.generate([image])
    with pytest.raises(ValueError, match=r"query_tensor\[0\] holds token ids from 2 " + problem):
        trainer.train()
    with pytest.raises(ValueError, match=r"queries\[1\] holds token ids from 5 " + problem):
        trainer.score([queries[0], image], responses[:2])
    trainer.step(queries, responses, scores)


@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_rows_with_a_token_beyond_the_embedding_are_refused_by_offline_learning(tmp_path, column):
    tokenizer = longer_tokenizer(pad=None, others=["<image_soft_token>"])
    config = OfflineConfig(str(tmp_path), use_cpu=True, report_to="none", max_completion_length=4)
    row = {"prompt": "w2 w3", "completion": "w3 w4", "reward": 1.0}
    bad = row | {column: "w2 <image_soft_token>"}
    problem = r" holds token ids from \d to 32 \('<image_soft_token>'\); the model knows 0 to 31"
    with pytest.raises(ValueError, match=f"the (prompt|response){problem}"):
        OfflineAPATrainer(config, tiny_model(), processing_class=tokenizer, train_dataset=[bad])
    trainer = OfflineAPATrainer(
        config,
        tiny_model(),
        processing_class=tokenizer,
        train_dataset=[row],
        eval_dataset=[{"prompt": bad["prompt"]}],
        reward_funcs=reward_model(),
    )
    if column == "completion":
        assert trainer.evaluate()["eval_response_length"] > 0
        return
    with pytest.raises(ValueError, match=f"a prompt of eval_dataset{problem}"):
        trainer.evaluate()


def test_a_reward_model_names_the_token_of_its_own_tokenizer_that_it_has_no_row_for(tmp_path):
    own = longer_tokenizer(pad=None, others=["<own>"])
    score = RewardModel(classifier(VOCABULARY), tiny_tokenizer(), own)
    assert len(score(["w3"], ["w4"], [[3]], [[4]])) == 1
    with pytest.raises(ValueError, match=r"row 1 has the token id 32 \('<own>'\); the reward model knows 0 to 31"):
        score.score_ids([[3, 4], [3, 32]])


def test_vllm_is_asked_about_known_tokens_only_and_a_pad_beyond_the_embedding_trains(tmp_path, monkeypatch):
    install(monkeypatch)
    tiny_model().save_pretrained(tmp_path / "policy")

    def trainer(tokenizer):
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
        config = {"use_vllm": True, "top_k": 1, "max_steps": 2, "save_strategy": "no"}
        data = [{"prompt": prompt} for prompt in PROMPTS]
        return trainer_of(
            tmp_path, policy, tokenizer, config, train_dataset=data, eval_dataset=data[:2], reward_funcs=reward_model()
        )

    inside, outside = trainer(tiny_tokenizer()), trainer(longer_tokenizer())
    for one in (inside, outside):
        one.train()
    assert all(map(torch.equal, parameters(outside), parameters(inside)))
    assert outside.evaluate()["eval_reward"] == pytest.approx(inside.evaluate()["eval_reward"], abs=1e-6)
    queries = [torch.tensor([5, 6]), torch.tensor([7])]
    padded = outside.generate(queries, return_prompt=False, remove_padding=False, length_sampler=lambda: 3)
    assert {len(row) for row in padded} == {3}
    with pytest.raises(ValueError, match=r"query_tensor\[0\] holds token ids from 5 to 32 \('\[PAD\]'\)"):
        outside.generate([torch.tensor([5, 32])])


def test_a_run_with_a_pad_beyond_the_embedding_resumes(tmp_path):
    """The checkpoint's config names no pad, and that of the model which loads it may."""

    def trainer_in(folder):
        model = tiny_model()
        model.config.pad_token_id = VOCABULARY
        config = {"max_steps": 4, "save_steps": 2}
        data = [{"prompt": prompt} for prompt in PROMPTS]
        return trainer_of(tmp_path / folder, model, config=config, train_dataset=data, reward_funcs=reward_model())

    complete, resumed = trainer_in("complete"), trainer_in("resumed")
    complete.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "complete" / "checkpoint-2"))
    assert all(map(torch.equal, parameters(resumed), parameters(complete)))


@pytest.mark.parametrize(
    ("policy_rows", "other_rows", "fits"),
    [(32, 32, True), (32, 31, False), (40, 40, True), (40, 48, True), (40, 32, False)],
)
@pytest.mark.parametrize("argument", ["reward_funcs", "value_model", "ref_model"])
def test_a_network_knows_every_id_that_can_occur(tmp_path, argument, policy_rows, other_rows, fits):
    """A policy with more rows than its tokenizer has ids (Pythia) can sample all of them."""
    make = classifier if argument != "ref_model" else lambda rows: resized(tiny_model(), rows)
    arguments = {argument: make(other_rows)}
    if fits:
        trainer_of(tmp_path, resized(tiny_model(), policy_rows), tiny_tokenizer(), **arguments)
        return
    known = f"knows {other_rows} token ids; the policy's tokenizer has 32 and the policy knows {policy_rows}"
    with pytest.raises(ValueError, match=known):
        trainer_of(tmp_path, resized(tiny_model(), policy_rows), tiny_tokenizer(), **arguments)


@pytest.mark.parametrize("argument", ["reward_funcs", "value_model"])
def test_a_network_has_positions_for_the_longest_prompt_and_response(tmp_path, argument):
    lengths = {"max_prompt_length": 20, "max_completion_length": 10}
    trainer_of(tmp_path, config=lengths, **{argument: classifier(positions=30)})
    problem = "has 29 positions; with max_prompt_length=20 and max_completion_length=10 .* up to 30 tokens"
    with pytest.raises(ValueError, match=problem):
        trainer_of(tmp_path, config=lengths, **{argument: classifier(positions=29)})
    with pytest.raises(ValueError, match=r"has 9 positions; with max_prompt_length=None and max_completion_length=10"):
        trainer_of(tmp_path, config={"max_completion_length": 10}, **{argument: classifier(positions=9)})
    # No prompt and response are longer than the policy's own positions.
    trainer_of(tmp_path, config={"max_completion_length": 100}, **{argument: classifier(positions=64)})


def test_what_is_too_long_for_another_network_is_refused_before_a_forward_pass(tmp_path):
    networks = {"value_model": classifier(positions=12), "reward_funcs": classifier(positions=14)}
    trainer = trainer_of(tmp_path, **networks)
    queries, responses, scores = tiny_rollouts()
    queries, responses = [query[:3] for query in queries], [response[:3] for response in responses]
    queries[2], responses[2] = torch.full((10,), 5), torch.full((5,), 6)
    with pytest.raises(ValueError, match="row 2 has 15 tokens, but value_model has 12 positions"):
        trainer.step(queries, responses, scores)
    with pytest.raises(RuntimeError, match="row 2 has 15 tokens; the reward model has 14 positions"):
        trainer.score(queries, responses)
    responses[2] = torch.full((2,), 6)
    trainer.step(queries, responses, trainer.score(queries, responses))


def test_a_loaded_model_of_more_rows_than_the_tokenizer_has_ids_may_sample_all(tmp_path):
    resized(tiny_model(), 40).save_pretrained(tmp_path / "policy")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    trainer = trainer_of(tmp_path, policy, tiny_tokenizer(), {"mini_batch_size": 4})
    queries, responses, scores = tiny_rollouts()
    responses[0] = torch.tensor([39, 3])
    assert trainer.step(queries, responses, scores)["objective/kl"] == 0
