"""The stages of `step` as TRL <= 0.11 named them, for scripts that call or override them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding, PreTrainedTokenizerBase

from trl_apa._trl import _BaseTrainer
from trl_apa.algorithms import PolicyTokens
from trl_apa.algorithms.estimators import RewardedRows
from trl_apa.algorithms.kl import kl_estimate, kl_full
from trl_apa.algorithms.losses import value_loss
from trl_apa.algorithms.masking import keep_counted
from trl_apa.algorithms.rewards import RunningMoments, token_rewards
from trl_apa.classic.forward import ForwardOutputs, classic_inputs, forward_pass, joined
from trl_apa.classic.hooks import INSTEAD, Overrides, check_class, methods_of
from trl_apa.classic.statistics import loss_statistics, step_statistics
from trl_apa.config.apa import APAConfig
from trl_apa.models import reference_policy
from trl_apa.rollout.batch import without_start_tokens
from trl_apa.rollout.prompts import prompt_dataloader, without_unused_columns
from trl_apa.trainer.estimation import advantages_and_returns
from trl_apa.trainer.options_in_use import OptionsInUse
from trl_apa.trainer.validation import check_step_inputs, check_type


class ClassicMethods(_BaseTrainer):
    """The part of `APATrainer` that scripts for TRL <= 0.11 reach into.

    `step` and `train` call those of `classic.hooks.CALLED` if they are overridden; otherwise they compute the same
    numbers without them. Tensors are `(B, R)`, response tokens alone, when `step` calls; a script that calls may give
    `(B, T - 1)`, as `batched_forward_pass` returns them. Masks are 1 at the response tokens that count.
    """

    args: Any
    # What `loss` reads beside its arguments while `step` calls it: log pi_init of the same tokens.
    _ref_logprobs_of_loss: Tensor | None = None
    _num_responses_of_loss: Tensor | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_class(cls, OWN_METHODS)

    if not TYPE_CHECKING:  # for which every name would be there

        def __getattr__(self, name: str) -> Any:
            """Say what to use instead of a method that classic's `step` called and this one does not have."""
            if name in INSTEAD:
                raise AttributeError(f"{type(self).__name__} has no {name}. Instead, {INSTEAD[name]}")
            return object.__getattribute__(self, name)

    @property
    def overrides(self) -> Overrides:
        """Which of these methods a subclass or a script has replaced, so that `step` has to call them."""
        return Overrides(self, OWN_METHODS)

    # ---- rewards, advantages, loss, statistics ----

    def compute_rewards(
        self, scores: Tensor | Sequence[Tensor], logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards of tokens: the score on the last token that counts, and with PPO minus `kl_ctl.value` times the KL.

        Args:
            scores: `(B,)`, reward units, scaled and clipped already.
            logprobs, ref_logprobs: of policy and reference, nats; with `kl_penalty="full"` of the whole vocabulary,
                `(B, R, V)`.
            masks: `(B, R)`.

        Returns:
            Rewards, the part of them that is not score, and the KL (nats), each `(B, R)`. Overrides may leave the KL
            out, as before TRL 0.7.
        """
        scores_B = torch.stack([torch.as_tensor(score, device=masks.device).reshape(()) for score in scores])
        if self.overrides.include("_kl_penalty"):
            rows = zip(logprobs, ref_logprobs, strict=True)
            kls = torch.stack([self._kl_penalty(*row) for row in rows])
        else:
            kls = self._kl_penalty(logprobs, ref_logprobs)
        kl_coef = self.kl_ctl.value if self.args.kl_in_reward else 0.0
        non_score_rewards = -kl_coef * kls
        return non_score_rewards + token_rewards(scores_B, masks.bool()), non_score_rewards, kls

    def _kl_penalty(self, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        """The KL of each token, nats, as `args.kl_penalty` says; `step` calls an override row by row, `(R,)`."""
        kind = self.args.kl_penalty or "kl"
        return kl_full(logprob, ref_logprob) if kind == "full" else kl_estimate(logprob, ref_logprob, kind)

    def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, advantages (GAE, whitened over all processes if the options say so) and returns, 0 behind the mask.

        Args:
            values, rewards: reward units, `(B, R)`.
            mask: `(B, R)`.

        Raises:
            ValueError: if the estimator of the options reads no values, or reads which rows have the same prompt.
        """
        counted, estimator = mask.bool(), self.args.estimator
        if not estimator.needs_values or estimator.needs_groups:
            raise ValueError(
                f"compute_advantages gets values and no prompts, but advantage_estimator="
                f"{self.args.advantage_estimator!r} reads others; call its function in trl_apa.algorithms.advantages"
            )
        advantages, returns = advantages_and_returns(RewardedRows(rewards, counted, values), self.args, self.processes)
        assert returns is not None  # needs_values
        return keep_counted(values, counted), advantages, returns

    def loss(
        self,
        old_logprobs: Tensor,
        values: Tensor | None,
        logits: Tensor | None,
        vpreds: Tensor | None,
        logprobs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        returns: Tensor | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The policy's loss of `args.loss_type` and `vf_coef` times the value loss, means over the counted tokens.

        Args:
            old_logprobs, values: when the rollouts were evaluated, nats and reward units, `(B, R)`.
            logits: over the temperature, `(B, R, V)`; for the entropy alone.
            vpreds, logprobs: the same as they are now, with gradient.
            mask, advantages, returns: `(B, R)`. Without a value model `values`, `vpreds` and `returns` are None, and
                the value loss is 0.

        Returns:
            Both losses, 0-D, and statistics under classic's names (`policy/...`, `val/...`).

        Raises:
            ValueError: if the algorithm reads log pi_init, which classic's arguments do not have, and `step` is not
                running.
        """
        args, counted = self.args, mask.bool()
        charged = args.kl_in == "loss" and args.kl_coef != 0
        if self._ref_logprobs_of_loss is None and (args.algorithm.needs_ref_logprobs or charged):
            raise ValueError(
                f"loss() with loss_type={args.loss_type!r} reads the reference's log-probs, which are not among its "
                "arguments: only an override can call it, while step runs"
            )
        ref_logprobs: Any = self._ref_logprobs_of_loss  # None where the algorithm does not read it
        num_tokens = counted.sum().clamp(min=1)
        read = (logprobs, ref_logprobs, advantages, counted, num_tokens, old_logprobs, self._num_responses_of_loss)
        tokens = PolicyTokens(*read)
        policy_term, policy_stats = args.algorithm.loss(tokens, args)
        value_term = torch.zeros_like(policy_term)
        value_stats: dict[str, Tensor] = {}
        if vpreds is not None and returns is not None:
            value_term, value_stats = value_loss(vpreds, returns, counted, values, args.cliprange_value)
        stats = {
            "loss/policy": policy_term.detach(),
            "loss/value": value_term.detach(),
            "loss/total": (policy_term + args.vf_coef * value_term).detach(),
            **{f"policy/{name}": value for name, value in policy_stats.items()},
            **{f"val/{name}": value for name, value in value_stats.items()},
            **loss_statistics(counted, old_logprobs, logprobs, logits, values, vpreds, advantages, returns),
        }
        return policy_term, args.vf_coef * value_term, stats

    def record_step_stats(self, kl_coef: float, **data: Any) -> dict[str, Any]:
        """Statistics of a step under classic's names: see `classic.statistics.step_statistics`.

        An override's results replace those of the same names in what `step` returns; its `objective/kl` is what the
        controller gets.
        """
        return step_statistics(kl_coef, data)

    def gather_stats(self, stats: dict[str, Any]) -> dict[str, Any]:
        """The same dict with tensors, which have the same shape on all processes, averaged over them."""
        count = self.accelerator.num_processes
        if count == 1:
            return stats
        device = self.accelerator.device
        return {
            name: self.processes.sum(value.to(device).float()) / count if isinstance(value, Tensor) else value
            for name, value in stats.items()
        }

    # ---- forward passes ----

    def _step_safety_checker(
        self, batch_size: int, queries: Any, responses: Any, scores: Any, masks: Any = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
        """What `step` gets, on the device, each score 0-D.

        Raises:
            ValueError: on input that cannot be trained on.
        """
        policy = self.accelerator.unwrap_model(self.model).policy
        check_step_inputs(queries, responses, scores, masks, batch_size, policy, self.processing_class)
        device = self.accelerator.device
        moved = [[tensor.to(device) for tensor in tensors] for tensors in (queries, responses, scores, masks or [])]
        return moved[0], moved[1], [score.reshape(()) for score in moved[2]], moved[3] or None

    def prepare_model_inputs(self, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> BatchEncoding:
        """Queries and responses as `model` reads them, padded on the tokenizer's side: see `classic_inputs`."""
        start = self.special_tokens.decoder_start
        queries, responses = list(queries), list(responses)
        if start is not None:
            responses, _ = without_start_tokens(responses, None, start)
        side = self.processing_class.padding_side
        device = self.accelerator.device
        return classic_inputs(queries, responses, self.special_tokens.pad, side, start).to(device)

    def batched_forward_pass(
        self,
        model: nn.Module,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        model_inputs: Mapping[str, Tensor],
        return_logits: bool = False,
        response_masks: Sequence[Tensor] | None = None,
    ) -> ForwardOutputs:
        """Log-probs, logits, values and mask of every position, `mini_batch_size` rows at a time.

        At the temperature of the options, like all log-probs of the trainer. `step` has forward passes of its own,
        which compute less.

        Args:
            model: the trainer's `model` or `ref_model`, or any language model. The reference of a PEFT policy is
                `model` inside `with trainer.optional_peft_ctx():`.
            queries, responses: `B` 1-D tensors each.
            model_inputs: of `prepare_model_inputs`.
            return_logits: whether logits are wanted too.
            response_masks: for each response which of its tokens count.

        Returns:
            `(logprobs, logits or None, values, masks)`, `(B, T - 1)`: see `ForwardOutputs`. Values are None if `model`
            has none. With gradient unless the caller switches it off.
        """
        start = self.special_tokens.decoder_start
        responses = list(responses)
        masks = None if response_masks is None else list(response_masks)
        if start is not None:
            responses, masks = without_start_tokens(responses, masks, start)
        prefix_lengths = [len(query) if start is None else 1 for query in queries]
        module: Any = self.accelerator.unwrap_model(model)
        network = getattr(module, "pretrained_model", module)
        size, was_training = self.args.per_device_train_batch_size, model.training
        parts = []
        model.eval()
        try:
            for first in range(0, len(responses), size):
                rows = slice(first, first + size)
                inputs = {name: tensor[rows] for name, tensor in model_inputs.items()}
                part = (prefix_lengths[rows], responses[rows], inputs, None if masks is None else masks[rows])
                with self.accelerator.autocast():
                    parts.append(forward_pass(model, network, *part, self.args.temperature, return_logits))
        finally:
            model.train(was_training)
        return joined(parts)

    @contextmanager
    def optional_peft_ctx(self) -> Iterator[None]:
        """Inside, a PEFT policy without a separate reference computes what the reference does."""
        if self.ref_model is not None:
            yield
            return
        with reference_policy(self.accelerator.unwrap_model(self.model).policy, None):
            yield

    # ---- data ----

    def prepare_dataloader(self, dataset: Any, data_collator: Callable[..., Any] | None = None) -> DataLoader[Any]:
        """What `dataloader` is made of: see `prompt_dataloader`. `train` reads `train_dataset` by itself."""
        args, collator = self.args, data_collator or self.data_collator
        return prompt_dataloader(dataset, args.batch_size, collator, not args.remove_unused_columns, args.seed)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        return without_unused_columns(dataset) if self.args.remove_unused_columns else dataset

    # ---- attributes ----

    @property
    def model_params(self) -> list[nn.Parameter]:
        """What is trained, of policy and value model."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def running(self) -> RunningMoments:
        """Mean and standard deviation of all scores so far."""
        moments: RunningMoments = self.running_scores
        return moments

    @property
    def config(self) -> APAConfig:
        args: APAConfig = self.args
        return args

    @config.setter
    def config(self, config: APAConfig) -> None:
        check_type("config", config, APAConfig)
        for name in ("loss_type", "advantage_estimator", "kl_in"):
            given, own = getattr(config, name), getattr(self.args, name)
            if given != own:
                raise ValueError(f"config has {name}={given!r}, this trainer {own!r}: make a new trainer")
        self.args = config
        self._note_what_scripts_read()
        self._follow_options(self._options_in_use.counts_episodes)

    def _follow_options(self, counts_episodes: bool) -> None:
        """Let `args` know this trainer: see `OptionsInUse`."""
        self._options_in_use = OptionsInUse(self, counts_episodes)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processing_class

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        check_type("tokenizer", tokenizer, PreTrainedTokenizerBase)
        if self.scorer is not None or self.sampler is not None:
            raise ValueError(
                "tokenizer: reward functions and engines keep the one they were given: make a new trainer"
            )
        self.processing_class = tokenizer
        module = self.accelerator.unwrap_model(self.model)
        self._choose_special_tokens(tokenizer, module, self.args.stop_token_id)

    @property
    def dataset(self) -> Any:
        return self.train_dataset

    @dataset.setter
    def dataset(self, dataset: Any) -> None:
        """`dataloader` stays as it is, as in classic: `prepare_dataloader` makes another."""
        self.train_dataset = dataset

    @property
    def is_distributed(self) -> bool:
        return bool(self.accelerator.num_processes > 1)

    @is_distributed.setter
    def is_distributed(self, value: bool) -> None:
        _same("is_distributed", bool(value), self.is_distributed)

    @property
    def current_device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @current_device.setter
    def current_device(self, device: torch.device | str) -> None:
        _same(
            "current_device", torch.empty(0, device=device).device, torch.empty(0, device=self.current_device).device
        )


# As they are defined here and in the Trainer.
OWN_METHODS = methods_of(ClassicMethods)


def _same(name: str, given: Any, current: Any) -> None:
    if given != current:
        raise ValueError(f"{name}={given}, but it is {current}: how the script is launched decides that")
