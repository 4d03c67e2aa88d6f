"""Prompts to responses with vLLM, through TRL's own class: the policy's weights over, token ids back."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from trl_apa._trl import is_peft_model, vllm_generation_class
from trl_apa.models import merged_parameters
from trl_apa.models.adapters import adapts_tied_weights, parts_tied_weights
from trl_apa.models.dense import as_in_checkpoints
from trl_apa.models.network_parts import Network, inner_model
from trl_apa.redaction import errors_without_secrets, without_secrets_in_error
from trl_apa.rollout.generation import response_limits, responses_of_completions
from trl_apa.rollout.sampled_logprobs import SampledLogprobs
from trl_apa.rollout.sampling import note_logprobs
from trl_apa.rollout.vllm_reload import reload_weights
from trl_apa.rollout.vllm_requests import ServerRequests
from trl_apa.trainer.validation import check_positions


# Options of transformers' GenerationConfig that need no translation, or change nothing of what is sampled.
NEUTRAL = {"do_sample", "use_cache", "max_new_tokens", "pad_token_id", "bos_token_id", "eos_token_id", "min_length"}
NEUTRAL |= {"decoder_start_token_id", "num_beams", "num_return_sequences", "return_dict_in_generate"}
# Log-probs after all of the sampling options; and the values of these with which they are the model's own.
PROCESSED = "processed_logprobs"
UNCHANGED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_new_tokens"}


def check_vllm_can_hold(policy: Network, mode: str) -> None:
    """Refuse a policy that vLLM cannot sample from.

    Raises:
        ValueError: for an encoder-decoder; an 8-bit base; adapters whose weights are not simply added to the base's;
            and, where vLLM loads the model itself, one that has no folder or hub name.
    """
    if policy.config.is_encoder_decoder:
        raise ValueError("use_vllm=True, but model is an encoder-decoder, which vLLM does not sample from")
    if any(type(module).__name__ == "Linear8bitLt" for module in policy.modules()):
        raise ValueError("use_vllm=True, but model is 8-bit, which vLLM cannot load; use 4-bit or bfloat16")
    if is_peft_model(policy) and getattr(policy.active_peft_config, "trainable_token_indices", None):
        raise ValueError("use_vllm=True, but the adapter has trainable_token_indices, which cannot be sent to vLLM")
    if is_peft_model(policy) and (kind := policy.active_peft_config.peft_type.value) != "LORA":
        if any(type(parameter).__name__ == "Params4bit" for parameter in policy.parameters()):
            raise ValueError(
                f"use_vllm=True, but model is 4-bit under {kind} adapters, which cannot be merged; use LoRA"
            )
    if is_peft_model(policy) and (adapts_tied_weights(policy) or parts_tied_weights(policy)):
        raise ValueError(
            "use_vllm=True, but the adapter changes the embeddings or the vocabulary head, which are tied in the "
            "base and in vLLM; remove them from target_modules and modules_to_save"
        )
    if mode == "colocate" and not policy.name_or_path:
        raise ValueError("vllm_mode='colocate' loads the model by its folder or hub name, and model has none")


def check_vllm_can_follow(accelerator: Accelerator, policy: Network) -> None:
    """Refuse sharded weights that cannot be gathered for vLLM.

    Raises:
        ValueError: under FSDP 1; under FSDP and ZeRO-3 for a policy with adapters.
    """
    state, adapted = accelerator.state, is_peft_model(policy)
    fsdp, deepspeed = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    if fsdp is not None and (adapted or fsdp.fsdp_version != 2):
        raise ValueError("use_vllm=True under FSDP needs fsdp_version 2 and a policy without adapters")
    if deepspeed is not None and deepspeed.zero_stage == 3 and adapted:
        raise ValueError("use_vllm=True under ZeRO-3 needs a policy without adapters")


def vllm_engine(policy: Network, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase, args: Any) -> Any:
    """TRL's `VLLMGeneration` over a policy that may have adapters and 4-bit layers: vLLM holds it merged and dense.

    Args:
        policy: a language model.
        accelerator: knows the processes.
        tokenizer: the policy's.
        args: the options of `VLLMOptions` and the batch sizes.

    Raises:
        ImportError: if vLLM is not installed.
        ConnectionError: if the server does not answer.
    """

    class PolicyOnVLLM(vllm_generation_class()):  # type: ignore[misc]  # TRL has it under a private name
        model: Any

        def _init_vllm(self) -> None:
            # vLLM would otherwise make 4-bit layers too, whose scales are not sent with the weights.
            given, self.model = self.model, SimpleNamespace(name_or_path=policy.name_or_path, named_modules=tuple)
            try:
                super()._init_vllm()
            finally:
                self.model = given

        def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
            named = merged_parameters(policy) if is_peft_model(policy) else super()._iter_named_params()
            yield from as_in_checkpoints(policy, named)

        def sync_weights(self) -> None:
            # In one process TRL's own would load over what vLLM has laid out for its kernels.
            if self.mode == "server":
                super().sync_weights()
                return
            if self.enable_sleep_mode:
                clear_device_cache()
                self.llm.wake_up(tags=["weights"])
                self._llm_weights_sleeping = False
            reload_weights(self.llm, self._iter_named_params(), on_cpu=self.accelerator.device.type == "cpu")
            self.llm.reset_prefix_cache()

    size = (args.generation_batch_size or args.batch_size) * args.vllm_tensor_parallel_size
    base = inner_model(policy)
    return PolicyOnVLLM(
        policy,
        accelerator,
        tokenizer,
        mode=args.vllm_mode,
        server_base_url=args.vllm_server_base_url,
        server_host=args.vllm_server_host,
        server_port=args.vllm_server_port,
        server_timeout=args.vllm_server_timeout,
        group_port=args.vllm_group_port,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_length=args.vllm_max_model_length,
        max_num_seqs=size,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        model_impl=args.vllm_model_impl,
        logprobs=None,
        # A user who loaded a model with custom code has allowed that code.
        trust_remote_code=type(base).__module__.startswith("transformers_modules"),
    )


class VLLMRequest(NamedTuple):
    """Prompts to be answered by vLLM, and how.

    Args:
        queries: 1-D tensors of token ids.
        generation_config, stop_strings, remove_padding: see `VLLMSampler.responses`.
        limits: most tokens of each response.
        sampling: attributes of TRL's `VLLMGeneration`, see `vllm_sampling`.
        noted: whether vLLM is asked for the log-probs of what it samples.
    """

    queries: Sequence[Tensor]
    generation_config: GenerationConfig
    stop_strings: list[str] | str | None
    remove_padding: bool
    limits: list[int]
    sampling: dict[str, Any]
    noted: bool


class VLLMSampler:
    """Samples from the policy with vLLM, whose copy is brought up to date when the policy has moved.

    Args:
        policy: the network that is trained, out of its distributed wrapper.
        accelerator: knows the processes.
        tokenizer: the policy's.
        args: options, see `VLLMOptions`.
        on_all_processes: does work and raises on all processes if it fails in one; what talks to the others meanwhile
            must have talked to all before it fails.

    Raises:
        ValueError: for a policy that vLLM cannot hold, or a way of sharding it that has not been made to work.
        ImportError: if vLLM is not installed.
    """

    def __init__(
        self,
        policy: Network,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        args: Any,
        on_all_processes: Callable[[Callable[[], Any]], Any],
    ):
        check_vllm_can_hold(policy, args.vllm_mode)
        check_vllm_can_follow(accelerator, policy)
        self.policy, self.accelerator, self.tokenizer, self.args = policy, accelerator, tokenizer, args
        self.on_all_processes = on_all_processes
        with errors_without_secrets(vars(args)):
            self.engine = vllm_engine(policy, accelerator, tokenizer, args)
        client = getattr(self.engine, "vllm_client", None)
        # Of the process that talks to the server.
        self.requests = None if client is None else ServerRequests(client)
        self._synced_at: tuple[int, int] | None = None
        self._is_processed: bool | None = None

    def responses(
        self,
        queries: Sequence[Tensor],
        generation_config: GenerationConfig,
        step: int,
        stop_strings: list[str] | str | None = None,
        max_length: int | None = None,
        length_sampler: Callable[[], int] | None = None,
        remove_padding: bool = True,
        model_inputs: dict[str, Any] | None = None,
        notes: SampledLogprobs | None = None,
        row_limits: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Sample one response to each query, cut where `generation.generate_responses` would cut it.

        Every process calls this; with a server each with as many queries.

        Args:
            queries: 1-D tensors of token ids, at least one token each.
            generation_config: sampling options, `max_new_tokens`, `pad_token_id`, `eos_token_id`.
            step: optimizer steps made so far; with the weights' own counters it shows whether the policy has changed.
            stop_strings: texts that end a response; the tokens that spell them belong to it.
            max_length: most tokens of a query and its response together, in place of `max_new_tokens`.
            length_sampler: if given, draws `max_new_tokens`, once for all queries.
            remove_padding: cut each response; otherwise all are as long as the longest.
            model_inputs: inputs that vLLM does not support; there should be none.
            notes: keep vLLM's own log-probs of the responses.
            row_limits: most tokens of each response, in place of `max_new_tokens`.

        Returns:
            1-D int64 tensors on the queries' devices.

        Raises:
            ValueError: for an option that vLLM cannot honour, or a query that is too long.
        """
        given = (queries, generation_config, stop_strings, max_length, length_sampler, remove_padding, model_inputs)
        request = self.request(*given, row_limits=row_limits, noted=notes is not None)
        self._bring_up_to_date(step)
        return self._cut(request, *self._sample(request), notes)

    def request(
        self,
        queries: Sequence[Tensor],
        generation_config: GenerationConfig,
        stop_strings: list[str] | str | None = None,
        max_length: int | None = None,
        length_sampler: Callable[[], int] | None = None,
        remove_padding: bool = True,
        model_inputs: dict[str, Any] | None = None,
        row_limits: Sequence[int] | None = None,
        noted: bool = True,
    ) -> VLLMRequest:
        """What will be asked of vLLM, checked; every process calls this.

        Args:
            queries, generation_config, stop_strings, max_length, length_sampler, remove_padding, model_inputs,
            row_limits: see `responses`.
            noted: whether the log-probs of what is sampled are wanted.

        Raises:
            ValueError: for an option that vLLM cannot honour, or a query that is too long.
        """
        counts = gather_object([len(queries)]) if self.args.vllm_mode == "server" else [len(queries)]
        vocabulary = self.policy.config.get_text_config().vocab_size
        limits, sampling = self.on_all_processes(
            lambda: (
                self._limits(queries, counts, generation_config, max_length, length_sampler, row_limits),
                vllm_sampling(generation_config, stop_strings, model_inputs or {}, vocabulary),
            )
        )
        noted = noted and generation_config.do_sample and self._logprobs_are_of_samples(sampling)
        return VLLMRequest(queries, generation_config, stop_strings, remove_padding, limits, sampling, noted)

    def send_ahead(self, request: VLLMRequest, step: int) -> None:
        """Send a request to the server, with the policy's weights as they are now, and do not wait for the answer.

        `answer_ahead` reads it. Whatever else is asked of the server waits until the server has answered this.

        Args:
            request: what to ask.
            step: see `responses`.
        """
        self._bring_up_to_date(step)
        with nullcontext() if self.requests is None else self.requests.sending_ahead():
            self._ask(request)  # the process that talks to the server gives the others empty rows, which nobody reads

    def answer_ahead(self, request: VLLMRequest, notes: SampledLogprobs | None) -> list[Tensor]:
        """The responses to the request that `send_ahead` has sent, as `responses` gives them.

        Raises:
            RuntimeError: if the server failed.
        """
        with nullcontext() if self.requests is None else self.requests.reading_ahead():
            completions, logprobs = self._sample(request)
        return self._cut(request, completions, logprobs, notes)

    def _cut(
        self,
        request: VLLMRequest,
        completions: list[list[int]],
        logprobs: list[list[list[float | None]]] | None,
        notes: SampledLogprobs | None,
    ) -> list[Tensor]:
        """The responses in what vLLM gave; their log-probs go to `notes`."""
        queries, config = request.queries, request.generation_config
        cutting = (config, request.stop_strings, self.tokenizer, request.remove_padding)
        responses = responses_of_completions(queries, completions, request.limits, *cutting)
        if request.noted and logprobs is not None:
            of_tokens = [[token[0] for token in row] for row in logprobs]
            note_logprobs(notes, queries, responses, completions, of_tokens, config)
        return responses

    def _logprobs_are_of_samples(self, sampling: dict[str, Any]) -> bool:
        """Whether vLLM's log-probs are of the distribution that these options of `vllm_sampling` sample from.

        A server says how it was started. One that does not say is taken for one that was started as usual: its
        log-probs are of the model's logits, before temperature, top-p and penalties.
        """
        if self.args.vllm_mode != "server" or all(sampling[name] == value for name, value in UNCHANGED.items()):
            return True
        if self._is_processed is None:
            client = getattr(self.engine, "vllm_client", None)
            told = [client is not None and logprobs_mode_of(client) == PROCESSED]
            self._is_processed = bool(broadcast_object_list(told)[0])
            if not self._is_processed and self.args.importance_correction is not None:
                warnings.warn(
                    "the vLLM server reports log-probs before temperature, top_p and penalties, which do not say how "
                    f"it sampled; restart it with --logprobs-mode {PROCESSED} for importance_correction",
                    UserWarning,
                    stacklevel=2,
                )
        return self._is_processed

    def samples_and_logprobs(
        self, queries: Sequence[Tensor], max_new_tokens: int, step: int
    ) -> list[tuple[Tensor, Tensor]]:
        """One answer to each query at temperature 1, and vLLM's own log-probs of its tokens.

        Args:
            queries: 1-D tensors of token ids.
            max_new_tokens: of each answer, tokens.
            step: see `responses`.

        Returns:
            For each query token ids, int64, and log-probs, nats, float32, both 1-D and on the CPU.

        Raises:
            ValueError: if vLLM gives no log-probs.
        """
        config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens)
        sampling = vllm_sampling(config, None, {}, self.policy.config.get_text_config().vocab_size)
        self._bring_up_to_date(step)
        logprobs_before = self.engine.logprobs
        vars(self.engine).update(sampling, max_completion_length=max_new_tokens, logprobs=0)
        try:
            _, completions, logprobs, _ = self.engine.generate([query.tolist() for query in queries], None, 1)
        finally:
            self.engine.logprobs = logprobs_before
        if logprobs is None:
            raise ValueError("vLLM gave no log-probs")
        rows = zip(completions, logprobs, strict=True)
        return [(torch.tensor(ids), torch.tensor([token[0] for token in of_row])) for ids, of_row in rows]

    def _limits(
        self,
        queries: Sequence[Tensor],
        counts: list[int],
        generation_config: GenerationConfig,
        max_length: int | None,
        length_sampler: Callable[[], int] | None,
        given: Sequence[int] | None,
    ) -> list[int]:
        """Most tokens of each response."""
        if len(set(counts)) > 1:
            raise ValueError(
                f"with a vLLM server every process must pass the same number of queries; they pass {counts}"
            )
        lengths = [len(query) for query in queries]
        limits = response_limits(lengths, generation_config, max_length, length_sampler, given)
        check_positions(queries, limits, self.policy, "query + max_new_tokens")
        most = self.args.vllm_max_model_length
        if most is not None and max(map(sum, zip(lengths, limits, strict=True))) > most:
            raise ValueError(
                f"vllm_max_model_length={most}: a query of {max(lengths)} tokens and its response of up to "
                f"{max(limits)} need more"
            )
        return limits

    def _bring_up_to_date(self, step: int) -> None:
        # In-place changes raise a tensor's version; weights that an engine swaps in change with the optimizer step.
        now = (step, sum(parameter._version for parameter in self.policy.parameters()))
        if now != self._synced_at:
            if self.requests is not None:
                self.requests.wait()  # what was sent ahead is of one policy
            with torch.no_grad():
                self.on_all_processes(self._send_weights)
            self._synced_at = now

    def _send_weights(self) -> None:
        with errors_without_secrets(vars(self.args)):
            self.engine.sync_weights()

    def _sample(self, request: VLLMRequest) -> tuple[list[list[int]], list[list[list[float | None]]] | None]:
        """Token ids, and of each the log-prob in a list of its own if vLLM gives them."""
        # With a server, or one vLLM over several processes, the asking itself is done together.
        together = self.args.vllm_mode == "server" or self.args.vllm_tensor_parallel_size > 1
        answer = self._ask(request) if together else self.on_all_processes(lambda: self._ask(request))
        self.on_all_processes(self._raise_failure)
        return answer

    def _ask(self, request: VLLMRequest) -> tuple[list[list[int]], list[list[list[float | None]]] | None]:
        wanted = 0 if request.noted else None  # 0: of the sampled token alone
        vars(self.engine).update(request.sampling, max_completion_length=max(request.limits), logprobs=wanted)
        _, completions, logprobs, _ = self.engine.generate([query.tolist() for query in request.queries], None, 1)
        return completions, logprobs

    def _raise_failure(self) -> None:
        failure = None if self.requests is None else self.requests.failure
        if failure is not None:
            said = without_secrets_in_error(str(failure), vars(self.args))
            raise RuntimeError(f"the vLLM server failed: {type(failure).__name__}: {said}")


def logprobs_mode_of(client: Any) -> str | None:
    """Which log-probs a server reports, `"processed_logprobs"` or another; None if it does not say."""
    try:
        mode: str = client.get_server_info()["model_config"]["logprobs_mode"]
        return mode
    except Exception:  # TRL's client raises nothing narrower for a server that refuses
        return None


def vllm_sampling(
    generation_config: GenerationConfig,
    stop_strings: list[str] | str | None,
    model_inputs: dict[str, Any],
    vocabulary: int,
) -> dict[str, Any]:
    """transformers' sampling options as attributes of TRL's `VLLMGeneration`.

    Args:
        generation_config, stop_strings, model_inputs: see `VLLMSampler.responses`.
        vocabulary: ids that the model knows. An end that is none of them (scripts set one to never end) is left out.

    Raises:
        ValueError: naming what vLLM cannot honour.
    """
    given = {name: value for name, value in generation_config.to_diff_dict().items() if value is not None}
    foreign = sorted({*(given.keys() - NEUTRAL - SAMPLING - {"transformers_version"}), *model_inputs})
    if (given.get("min_length") or 0) > 0:
        foreign.append("min_length")
    if foreign:
        raise ValueError(f"use_vllm=True, but vLLM cannot honour {', '.join(foreign)} of generate")
    ends = generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    stop = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
    sampled = generation_config.do_sample
    return {
        "temperature": given.get("temperature", 1.0) if sampled else 0.0,
        "top_p": given.get("top_p", 1.0) if sampled else 1.0,
        "top_k": int(given.get("top_k", 0)) if sampled else 0,
        "min_p": given.get("min_p", 0.0) if sampled else 0.0,
        "repetition_penalty": given.get("repetition_penalty", 1.0),
        "generation_kwargs": {
            # The ends are ours, not those that vLLM finds in the model's folder.
            "ignore_eos": True,
            "stop_token_ids": [token for token in ends if token < vocabulary],
            "stop": stop,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "min_tokens": given.get("min_new_tokens", 0),
        },
    }
