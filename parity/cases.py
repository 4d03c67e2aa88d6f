"""The cases: between them every option that classic's update reads, stepping around classic's own bugs.

And cases that run into those bugs, to show that nothing else separates the two libraries.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GenerationConfig

from parity.case import EOS, PAD, Case, Rollouts, random_language_model, snapshot


VOCABULARY = 32
IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
GPT2 = {
    "model_type": "gpt2",
    **IDS,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "initializer_range": 0.3,
    **dict.fromkeys(DROPOUT, 0.0),
}
LLAMA = {
    "model_type": "llama",
    **IDS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
T5 = {
    "model_type": "t5",
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "initializer_factor": 1.5,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
ONE_UPDATE = {"batch_size": 8, "mini_batch_size": 8, "ppo_epochs": 1}
MANY_UPDATES = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 4}
# The epsilon is wide: some gradients are 0 but for rounding (GPT-2's key biases), and Adam makes whole steps of these.
ADAM = {"optimizer": {"name": "adam", "lr": 3e-3, "eps": 1e-4}}


@dataclass
class Recipe:
    """How to make a case: its fields, and the shape of the rollouts.

    Args:
        steps: consecutive calls of `step`.
        response: `"ragged"`; `"equal"`, all of one length; or `"filling"`, so that query and response together are.
        reference: whether the reference is another model than the policy at the start.
        dropped: response tokens that do not count, at the start and at the end of each response.
        gap: one more that does not, in the middle.
        seed: of weights and rollouts.
        fields: of the case.
    """

    about: str
    options: dict[str, Any]
    model: dict[str, Any] = field(default_factory=lambda: GPT2)
    steps: int = 2
    response: str = "ragged"
    reference: bool = True
    dropped: tuple[int, int] = (0, 0)
    gap: bool = False
    seed: int = 0
    fields: dict[str, Any] = field(default_factory=dict)


AGREEING = {
    "one_update": Recipe(
        "one epoch, one mini-batch, SGD, ragged rows",
        ONE_UPDATE,
        fields={"optimizer": {"name": "sgd", "lr": 0.1}},
    ),
    "max_grad_norm": Recipe(
        "gradient clipping in a single update",
        {**ONE_UPDATE, "max_grad_norm": 0.5},
        steps=1,
        fields={"optimizer": {"name": "sgd", "lr": 1.0}},
    ),
    "accumulation": Recipe(
        "4 epochs of 2 updates of 2 micro-batches of equal responses; own optimizers, own copies as reference",
        {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2, "ppo_epochs": 4},
        model=LLAMA,
        response="equal",
        reference=False,
    ),
    "adaptive_kl": Recipe(
        "KL controller and learning-rate schedule over 3 steps of 8 updates, ragged rows",
        {**MANY_UPDATES, "init_kl_coef": 0.3, "target": 1.0, "horizon": 40.0},
        steps=3,
        fields={**ADAM, "decay": 0.5},
    ),
    "lora": Recipe(
        "LoRA on Llama; the reference is the base with the adapter switched off; own optimizers",
        MANY_UPDATES,
        model=LLAMA,
        reference=False,
        fields={"lora": LORA},
    ),
    "llama": Recipe(
        "Llama, pad is EOS, classic pads on the left; own optimizers",
        MANY_UPDATES,
        model=LLAMA,
        fields={"pad_is_eos": True, "padding_side": "left"},
    ),
    "t5": Recipe(
        "encoder-decoder, its first generated token masked on our side",
        MANY_UPDATES,
        model=T5,
        dropped=(2, 0),
        fields=ADAM,
    ),
    "response_masks": Recipe(
        "the first and the last token of every response dropped", MANY_UPDATES, dropped=(1, 1), fields=ADAM
    ),
    "score_clip": Recipe("scores clipped at 0.5", {**MANY_UPDATES, "score_clip": 0.5}, fields=ADAM),
    "whiten_rewards": Recipe(
        "whitened token rewards, no padding", {**MANY_UPDATES, "whiten_rewards": True}, response="filling", fields=ADAM
    ),
    **{
        f"kl_{penalty}": Recipe(
            f"kl_penalty={penalty!r}", {**MANY_UPDATES, "kl_penalty": penalty, "adap_kl_ctrl": False}, fields=ADAM
        )
        for penalty in ("abs", "mse", "full")
    },
    "value_clipping": Recipe(
        "narrow clip ranges, discounting, a heavy value loss",
        {**MANY_UPDATES, "cliprange": 0.02, "cliprange_value": 0.05, "gamma": 0.9, "lam": 0.8, "vf_coef": 1.0},
        fields=ADAM,
    ),
    "early_stopping": Recipe(
        "the remaining epochs left out once the log-probs have fallen",
        {**MANY_UPDATES, "early_stopping": True, "target_kl": 0.1},
        seed=28000,
        fields=ADAM,
    ),
    "kl_control": Recipe(
        "the adaptive coefficient follows the estimate that kl_penalty names",
        {**MANY_UPDATES, "kl_penalty": "mse", "init_kl_coef": 0.5, "target": 1.0, "horizon": 20.0},
        fields=ADAM,
    ),
    "rising_logprobs": Recipe(
        "early_stopping with log-probs that rise, which do not stop it",
        {**MANY_UPDATES, "early_stopping": True, "target_kl": 0.1},
        fields=ADAM,
    ),
}
PARTING = {
    "clips_once": Recipe(
        "classic applies max_grad_norm to its first update only",
        {**MANY_UPDATES, "max_grad_norm": 0.5},
        fields={"optimizer": {"name": "sgd", "lr": 1.0}},
    ),
    "left_padding": Recipe(
        "classic gives GPT-2 wrong positions when it pads on the left",
        MANY_UPDATES,
        fields={**ADAM, "padding_side": "left"},
    ),
    "first_token": Recipe(
        "classic never trains the first token that an encoder-decoder generates", MANY_UPDATES, model=T5, fields=ADAM
    ),
    "ragged_accumulation": Recipe(
        "classic averages the means of micro-batches whatever the number of their tokens",
        {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 2, "ppo_epochs": 4},
        fields=ADAM,
    ),
    "dropout": Recipe(
        "classic generates with dropout after every `step`: it leaves the model in train mode",
        MANY_UPDATES,
        model={**GPT2, **dict.fromkeys(DROPOUT, 0.5)},
        fields=ADAM,
    ),
    "high_ratio": Recipe(
        "where the ratio is above ratio_threshold classic multiplies the loss by 0, and Adam's momentum still moves "
        "the weights",
        {**MANY_UPDATES, "ratio_threshold": 1.0},
        fields=ADAM,
    ),
    "whitened_padding": Recipe(
        "whiten_rewards gives classic's padding a reward, and GAE carries it into the response",
        {**MANY_UPDATES, "whiten_rewards": True},
        fields=ADAM,
    ),
    "masked_gap": Recipe(
        "to classic a masked token inside a response is one of value 0 and reward 0; ours skips it",
        MANY_UPDATES,
        gap=True,
        fields=ADAM,
    ),
}
RECIPES = AGREEING | PARTING


def make_case(name: str) -> Case:
    """The case of that name, with the same numbers at every call."""
    recipe = RECIPES[name]
    generator = torch.Generator().manual_seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    options = {"learning_rate": 3e-3, **recipe.options}
    case = Case(name, recipe.about, recipe.model, options, [], [], **recipe.fields)
    case.weights = make_weights(case, recipe, generator)
    case.prompts = [make_tokens(generator, length) for length in (3, 7, 5, 2)]
    policy = case.language_model("policy")
    case.rollouts = [make_rollouts(case, recipe, policy, generator) for _ in range(recipe.steps)]
    return case


def make_weights(case: Case, recipe: Recipe, generator: torch.Generator) -> dict[str, Tensor]:
    """A policy with opinions, a reference near it, a value head that has learned something."""
    model = random_language_model(case.model)
    weights = snapshot(model, "reference") if recipe.reference else {}
    if recipe.reference:
        perturb(model, 0.2, generator)
    if case.lora is not None:
        model = get_peft_model(model, LoraConfig(**case.lora))
    weights |= snapshot(model, "policy")
    width = case.model.get("n_embd") or case.model.get("hidden_size") or case.model["d_model"]
    weights["v_head.summary.weight"] = 0.2 * torch.randn(1, width, generator=generator)
    weights["v_head.summary.bias"] = torch.zeros(1)
    return weights


@torch.no_grad()
def perturb(model: nn.Module, share: float, generator: torch.Generator) -> None:
    """Noise of this share of each matrix's own spread."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.add_(share * parameter.std() * torch.randn(parameter.shape, generator=generator))


def make_tokens(generator: torch.Generator, length: int) -> list[int]:
    return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()


def make_rollouts(case: Case, recipe: Recipe, policy: nn.Module, generator: torch.Generator) -> Rollouts:
    rows = case.options["batch_size"]
    queries = [make_tokens(generator, int(torch.randint(2, 9, (), generator=generator))) for _ in range(rows)]
    responses = [sample(policy, query, recipe.response, generator) for query in queries]
    scores = torch.randn(rows, generator=generator).tolist()
    orders = [torch.randperm(rows, generator=generator).tolist() for _ in range(case.options["ppo_epochs"])]
    masks = None
    if recipe.dropped != (0, 0) or recipe.gap:
        masks = [make_mask(len(response), *recipe.dropped, recipe.gap) for response in responses]
    return Rollouts(queries, responses, scores, orders, masks)


def make_mask(length: int, first: int, last: int, gap: bool) -> list[int]:
    mask = [0] * first + [1] * (length - first - last) + [0] * last
    if gap:
        mask[length // 2] = 0
    return mask


def sample(policy: nn.Module, query: list[int], shape: str, generator: torch.Generator) -> list[int]:
    """A response of at least three tokens that the policy might give."""
    if shape == "ragged":
        shortest, longest = 3, int(torch.randint(3, 9, (), generator=generator))
    else:
        shortest = longest = 6 if shape == "equal" else 12 - len(query)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": EOS}
    options |= {"pad_token_id": PAD, "min_new_tokens": shortest, "max_new_tokens": longest}
    two_stacks = policy.config.is_encoder_decoder
    if two_stacks:
        options["decoder_start_token_id"] = PAD
    torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
    ids = torch.tensor([query])
    with torch.no_grad():
        tokens = policy.eval().generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=GenerationConfig(**options)
        )[0]
    return tokens[0 if two_stacks else len(query) :].tolist()  # a decoder's start token belongs to the response
