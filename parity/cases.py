"""The cases: between them every option that classic's update reads, stepping around classic's own bugs.

The numbers of the bugs are those of the table in `parity/README.md`.
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
GPT2 = {
    "model_type": "gpt2",
    **IDS,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "initializer_range": 0.3,
    # Bug 14: after its first `step` classic samples with dropout.
    **{name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
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
# The epsilon is wide, because some gradients are 0 but for rounding (GPT-2's key biases), and Adam makes steps of these.
ADAM = {"optimizer": {"name": "adam", "lr": 3e-3, "eps": 1e-4}}


@dataclass
class Recipe:
    """How to make a case: its fields, and the shape of the rollouts.

    Args:
        steps: consecutive calls of `step`.
        response: `"ragged"`; `"equal"`, all of one length; or `"filling"`, so that query and response together are.
        reference: whether the reference is another model than the policy at the start.
        dropped: response tokens that do not count, at the start and at the end of each response.
    """

    about: str
    options: dict[str, Any]
    model: dict[str, Any] = field(default_factory=lambda: GPT2)
    steps: int = 2
    response: str = "ragged"
    reference: bool = True
    dropped: tuple[int, int] = (0, 0)
    seed: int = 0
    fields: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "one_update": Recipe(
        "one epoch, one mini-batch, SGD, ragged rows padded on the right (bug 3: left padding shifts GPT-2's positions)",
        ONE_UPDATE,
        fields={"optimizer": {"name": "sgd", "lr": 0.1}},
    ),
    "max_grad_norm": Recipe(
        "gradient clipping in a single update (bug 1: classic clips only the first)",
        {**ONE_UPDATE, "max_grad_norm": 0.5},
        steps=1,
        fields={"optimizer": {"name": "sgd", "lr": 1.0}},
    ),
    "accumulation": Recipe(
        "4 epochs of 2 updates, each of 2 micro-batches of equal responses (bug 10: means of ragged micro-batches); "
        "each trainer's own optimizer and its own copy of the policy as reference",
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
        "LoRA on Llama; the reference is the base with the adapter switched off",
        MANY_UPDATES,
        model=LLAMA,
        reference=False,
        fields={"lora": LORA},
    ),
    "llama": Recipe(
        "Llama, pad is EOS, classic pads on the left",
        MANY_UPDATES,
        model=LLAMA,
        fields={"pad_is_eos": True, "padding_side": "left"},
    ),
    "t5": Recipe(
        "encoder-decoder (bug 9: classic never trains the first generated token; masked on our side)",
        MANY_UPDATES,
        model=T5,
        dropped=(2, 0),
        fields=ADAM,
    ),
    "response_masks": Recipe(
        "the caller drops the first and the last token of every response (bug 17: a gap inside it is to classic a "
        "token of value 0)",
        MANY_UPDATES,
        dropped=(1, 1),
        fields=ADAM,
    ),
    "score_clip": Recipe("scores clipped at 0.5", {**MANY_UPDATES, "score_clip": 0.5}, fields=ADAM),
    "whiten_rewards": Recipe(
        "whitened token rewards, no padding (bug 16: classic gives whitened rewards to the padding, and GAE carries "
        "them into the response)",
        {**MANY_UPDATES, "whiten_rewards": True},
        response="filling",
        fields=ADAM,
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
        "the remaining epochs are left out once the policy has moved (towards lower log-probs: classic never stops for "
        "the other direction, ours does)",
        {**MANY_UPDATES, "early_stopping": True, "target_kl": 0.1},
        seed=28000,
        fields=ADAM,
    ),
}


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
    if recipe.dropped != (0, 0):
        first, last = recipe.dropped
        masks = [[0] * first + [1] * (len(r) - first - last) + [0] * last for r in responses]
    return Rollouts(queries, responses, scores, orders, masks)


def sample(policy: nn.Module, query: list[int], shape: str, generator: torch.Generator) -> list[int]:
    """A response of three to eight tokens that the policy might give."""
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
    tokens = policy.eval().generate(torch.tensor([query]), generation_config=GenerationConfig(**options))[0]
    return tokens[0 if two_stacks else len(query) :].tolist()  # a decoder's start token belongs to the response
