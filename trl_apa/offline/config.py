"""Options of `OfflineAPATrainer`: defaults and their validation."""

from dataclasses import dataclass
from typing import ClassVar

from trl_apa._trl import _BaseConfig
from trl_apa.config.checks import check_finite_options, check_optimizer_options, check_reward_weights
from trl_apa.config.fields import Json, option, switch
from trl_apa.config.precision import default_bf16
from trl_apa.config.rates import learning_rate_option, note_default_rate
from trl_apa.redaction import RedactedOptions


LOSS_TYPES = ("apa", "awr", "ilql", "qrpo", "dro")
# What a checkpoint's run must agree in with the run that resumes it.
DEFINES_RUN = (
    *("loss_type", "kl_coef", "gamma", "gae_lambda", "whiten_advantages", "value_epochs", "value_learning_rate"),
    *("freeze_value", "vf_coef", "learn_state_normaliser", "expectile", "cql_coef", "polyak", "bc_coef", "ilql_beta"),
    *("max_prompt_length", "max_completion_length", "add_eos", "temperature", "num_unfrozen_layers", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "chat_template_kwargs"),
)


@dataclass
class OfflineConfig(RedactedOptions, _BaseConfig):
    """
    Configuration of [`OfflineAPATrainer`]. Everything of [`~transformers.TrainingArguments`] works too; only the
    options that are new or have another default are listed here.

    Parameters:
        loss_type (`str`, *optional*, defaults to `"awr"`):
            `"apa"`, equation (9) of the paper; `"awr"`, equation (6); `"ilql"`, implicit language Q-learning;
            `"qrpo"`, quantile rewards, without a value model; `"dro"`, policy and value fitted together.
        kl_coef (`float`, *optional*):
            lambda of objective (2) for APA and AWR, in units of the advantage; beta of QRPO; tau of DRO, in reward
            units per nat. Defaults to `0.3` for APA and DRO, `0.25` for AWR, `0.1` for QRPO. ILQL reads `ilql_beta`
            instead.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount a token.
        gae_lambda (`float`, *optional*, defaults to `0.95`):
            APA and AWR: of generalised advantage estimation.
        whiten_advantages (`bool`, *optional*, defaults to `True`):
            APA and AWR: give the advantages of the complete data set mean 0 and variance 1.
        value_epochs (`int`, *optional*, defaults to `3`):
            APA and AWR: passes over the data in which the value model is fitted to the returns before the policy is
            trained.
        value_learning_rate (`float`, *optional*):
            Learning rate of these passes. Defaults to `learning_rate`; if that is not given either, to its default
            for what the value model trains.
        freeze_value (`bool`, *optional*, defaults to `True`):
            APA and AWR: leave the value model as it is after them. Otherwise it goes on learning beside the policy,
            with the weight `vf_coef`, and the advantages are estimated again before every epoch.
        vf_coef (`float`, *optional*, defaults to `1.0`):
            With `freeze_value=False`, and for DRO, the weight of the value loss.
        learn_state_normaliser (`bool`, *optional*, defaults to `False`):
            APA only: learn the log Z(s) that equation (9) leaves out, by a third network; see
            [`~trl_apa.offline.losses.state_normaliser_loss`].
        expectile (`float`, *optional*, defaults to `0.7`), cql_coef (`float`, *optional*, defaults to `0.1`):
            ILQL only: tau of the value loss, and weight of the CQL term.
        polyak (`float`, *optional*, defaults to `0.005`):
            ILQL only: how far the target heads move towards the Q heads after each optimizer step.
        bc_coef (`float`, *optional*, defaults to `1.0`):
            ILQL only: weight of the policy's negative log-likelihood of the data. With 0 the policy stays as it is.
        ilql_beta (`float`, *optional*, defaults to `1.0`):
            ILQL only: nats by which a reward unit of advantage moves a token's log-prob in decoding.
        max_prompt_length (`int`, *optional*):
            Only the last tokens of a longer prompt are kept; of chat messages the last complete turns, and the system
            message. Defaults to all.
        max_completion_length (`int`, *optional*, defaults to `128`):
            Only the first tokens of a longer response are learned from; also the limit of sampled responses.
        add_eos (`bool`, *optional*, defaults to `True`):
            Let a response that is given as text end with EOS.
        early_stopping_patience (`int`, *optional*):
            Stop when the held-out reward has not risen for so many evaluations, and go back to the best checkpoint.
            Needs `eval_dataset`, reward functions, and an `eval_strategy`, with which checkpoints are saved too.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of sampling in `evaluate`; the log-probs in the update are taken at it too.
        top_p (`float`, *optional*, defaults to `1.0`):
            Of sampling in `evaluate`.
        top_k (`int`, *optional*, defaults to `0`):
            Of sampling in `evaluate`.
        stop_strings (`list[str]`, *optional*):
            Of sampling in `evaluate`, texts that end a response.
        reward_weights (`list[float]`, *optional*):
            Of the reward functions, whose weighted sum is the reward. Defaults to 1 each.
        num_unfrozen_layers (`int`, *optional*):
            As in [`APAConfig`].
        model_adapter_name (`str`, *optional*):
            As in [`APAConfig`].
        ref_adapter_name (`str`, *optional*):
            As in [`APAConfig`].
        chat_template_kwargs (`dict`, *optional*):
            As in [`APAConfig`].
        resume_anyway (`list[str]`, *optional*):
            As in [`APAConfig`].
        learning_rate (`float`, *optional*):
            By default 1.41e-5, and 3e-4 for a policy whose adapters alone are trained: the trainer chooses, and sets
            it here.
        lr_scheduler_type (*optional*, defaults to `"constant"`):
            As in `TrainingArguments`, with another default.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            As in `TrainingArguments`; TRL's configs have another default. `bf16` is on by default where a GPU supports
            it and off elsewhere.

    Raises:
        ValueError: naming the option, when one is out of range or not finite, or does not fit another.
    """

    defines_run: ClassVar[tuple[str, ...]] = DEFINES_RUN
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*_BaseConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]
    _default_kl_coef: ClassVar[dict[str, float]] = {"apa": 0.3, "awr": 0.25, "qrpo": 0.1, "dro": 0.3}

    loss_type: str = option("awr", "'apa', 'awr', 'ilql', 'qrpo' or 'dro'.")
    kl_coef: float | None = option(
        None, "lambda of the paper's objective (2): apa and dro 0.3, awr 0.25, qrpo 0.1; ilql has none."
    )
    gamma: float = option(1.0, "Discount from one token to the next.")
    gae_lambda: float = option(0.95, "lambda of generalised advantage estimation.")
    whiten_advantages: bool = option(True, "Give the advantages of the data mean 0 and variance 1.")
    value_epochs: int = option(3, "APA and AWR: passes that fit the value model before the policy is trained.")
    value_learning_rate: float | None = option(None, "Learning rate of these passes; learning_rate by default.")
    freeze_value: bool = option(True, "APA and AWR: leave the value model as it is after them.")
    vf_coef: float = option(1.0, "Weight of the value loss, without freeze_value, and for DRO.")
    learn_state_normaliser: bool = option(False, "APA only: learn log Z(s) by a third network.")
    expectile: float = option(0.7, "ILQL only: tau of the value loss.")
    cql_coef: float = option(0.1, "ILQL only: weight of the CQL term.")
    polyak: float = option(0.005, "ILQL only: rate of the target heads.")
    bc_coef: float = option(1.0, "ILQL only: weight of the policy's negative log-likelihood.")
    ilql_beta: float = option(1.0, "ILQL only: nats per reward unit of advantage in decoding.")
    max_prompt_length: int | None = option(None, "Keep the last so many tokens of a prompt; all by default.")
    max_completion_length: int = option(
        128, "Keep the first so many tokens of a response; also the most of one that is sampled."
    )
    add_eos: bool = option(True, "Let a response that is given as text end with EOS.")
    early_stopping_patience: int | None = option(
        None, "Stop after so many evaluations without a better held-out reward; never by default."
    )
    temperature: float = option(1.0, "Of sampling and of the log-probs in the update.")
    top_p: float = option(1.0, "Sample from the likeliest tokens with this share of the probability; 1 is off.")
    top_k: int = option(0, "Sample from so many likeliest tokens; 0 is off.")
    stop_strings: list[str] | None = option(None, "Texts that end a sampled response.")
    reward_weights: list[float] | None = option(
        None, "A weight for each reward, models before functions; 1 each by default."
    )
    num_unfrozen_layers: int | None = option(None, "Train only so many of the highest layers; all by default.")
    model_adapter_name: str | None = option(None, "PEFT adapter that is trained; the active one by default.")
    ref_adapter_name: str | None = option(None, "PEFT adapter that is pi_init.")
    chat_template_kwargs: Json = option(None, "JSON; more arguments of the chat template.")
    resume_anyway: list[str] | None = option(
        None, "Options in which a resumed checkpoint may differ although they define its run."
    )

    learning_rate: float = learning_rate_option()
    lr_scheduler_type: str = option("constant", "Schedule of the learning rate.")
    gradient_checkpointing: bool | None = switch("Trade compute for memory; off by default.")

    def __post_init__(self) -> None:
        note_default_rate(self)
        check_finite_options(self)
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type={self.loss_type!r}: it should be one of {', '.join(LOSS_TYPES)}")
        if self.kl_coef is None:
            self.kl_coef = self._default_kl_coef.get(self.loss_type)
        elif self.loss_type == "ilql":
            raise ValueError(f"kl_coef={self.kl_coef}: ILQL has none; ilql_beta sets how far it moves the policy")
        if self.learn_state_normaliser and self.loss_type != "apa":
            raise ValueError(f"learn_state_normaliser=True with loss_type={self.loss_type!r}: only APA omits log Z")
        self._check_ranges()
        if self.bf16 is None:
            self.bf16: bool | None = default_bf16(self.fp16, self.use_cpu)
        if self.early_stopping_patience is not None:
            self._stop_on_the_held_out_reward()
        super().__post_init__()

    @property
    def needs_values(self) -> bool:
        """Whether there is a value model."""
        return self.loss_type != "qrpo"

    @property
    def fits_value_first(self) -> bool:
        """Whether advantages come from a value model that is fitted before the policy is trained."""
        return self.loss_type in ("apa", "awr")

    @property
    def goes_on_fitting(self) -> bool:
        """Whether that value model goes on learning beside the policy."""
        return self.fits_value_first and not self.freeze_value

    @property
    def of_responses(self) -> bool:
        """Whether the loss is a mean over responses, not over tokens."""
        return self.loss_type in ("qrpo", "dro")

    def _check_ranges(self) -> None:
        positive = ("kl_coef", "value_learning_rate", "max_prompt_length", "max_completion_length", "temperature")
        for name in (*positive, "early_stopping_patience", "num_unfrozen_layers"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: it should be greater than 0")
        check_optimizer_options(self)
        check_reward_weights(self.reward_weights)
        for name in ("value_epochs", "vf_coef", "cql_coef", "bc_coef", "ilql_beta", "top_k"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: it should not be negative")
        for name in ("gamma", "gae_lambda", "top_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: it should be between 0 and 1")
        if not 0 < self.expectile < 1:
            raise ValueError(f"expectile={self.expectile}: it should be between 0 and 1, and neither")
        if not 0 < self.polyak <= 1:
            raise ValueError(f"polyak={self.polyak}: it should be greater than 0 and at most 1")

    def _stop_on_the_held_out_reward(self) -> None:
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no":
            raise ValueError("early_stopping_patience needs eval_strategy 'steps' or 'epoch': the held-out reward")
        self.metric_for_best_model, self.greater_is_better = "eval_reward", True
        self.load_best_model_at_end = True
        self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps or self.logging_steps
