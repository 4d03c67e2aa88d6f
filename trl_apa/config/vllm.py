"""Options of sampling with vLLM, under the names that GRPO's config in TRL has for them."""

from dataclasses import dataclass

from trl_apa._trl import is_vllm_available
from trl_apa.config.fields import option


MODES = ("colocate", "server")


@dataclass
class VLLMOptions:
    """
    Where and how vLLM samples.

    Parameters:
        use_vllm (`bool`, *optional*, defaults to `False`):
            Sample the policy's responses with vLLM, in `train`, `evaluate` and `generate`. Those of pi_init, which
            only evaluation needs, come from transformers' `generate`.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`):
            `"colocate"`: in each training process, on its device. `"server"`: one server for all of them.
        vllm_model_impl (`str`, *optional*, defaults to `"vllm"`):
            Colocate: `"vllm"`, `"transformers"` or `"auto"`, the implementation of the model.
        vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            Colocate: give the memory of weights and cache back during the update.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Colocate: share of the device's memory that vLLM takes.
        vllm_tensor_parallel_size (`int`, *optional*, defaults to `1`):
            Colocate: processes that hold one copy of the policy together.
        vllm_max_model_length (`int`, *optional*):
            Colocate: most tokens of a prompt and its response. Defaults to what the model's config says.
        vllm_server_base_url (`str`, *optional*):
            Server: its address, in place of `vllm_server_host` and `vllm_server_port`.
        vllm_server_host (`str`, *optional*, defaults to `"0.0.0.0"`), vllm_server_port (`int`, *optional*, defaults to
            `8000`): Server: its address.
        vllm_server_timeout (`float`, *optional*, defaults to `240.0`):
            Server: seconds to wait for it at the start.
        vllm_group_port (`int`, *optional*, defaults to `51216`):
            Server: port over which weights are sent.
        rollouts_ahead (`int`, *optional*, defaults to `0`):
            Server, in `train`: with 1 it samples the next iteration while this one is learned, from the policy as it
            was before this one's update. PPO, GRPO, CISPO and RLOO need `importance_correction` then.
    """

    use_vllm: bool = option(False, "Sample with vLLM.")
    vllm_mode: str = option("colocate", "'colocate': in the training processes; 'server': in a server.")
    vllm_model_impl: str = option("vllm", "Colocate: 'vllm', 'transformers' or 'auto', the model's implementation.")
    vllm_enable_sleep_mode: bool = option(False, "Colocate: give memory back during the update.")
    vllm_gpu_memory_utilization: float = option(0.3, "Colocate: share of the device's memory that vLLM takes.")
    vllm_tensor_parallel_size: int = option(1, "Colocate: processes that hold one copy of the policy together.")
    vllm_max_model_length: int | None = option(
        None, "Colocate: most tokens of a prompt and its response; what the model's config says by default."
    )
    vllm_server_base_url: str | None = option(None, "Server: its address, in place of host and port.")
    vllm_server_host: str = option("0.0.0.0", "Server: its host.")
    vllm_server_port: int = option(8000, "Server: its port.")
    vllm_server_timeout: float = option(240.0, "Server: seconds to wait for it at the start.")
    vllm_group_port: int = option(51216, "Server: port over which weights are sent.")
    rollouts_ahead: int = option(0, "Server: 1 samples the next iteration while this one is learned.")

    def _check_vllm(self) -> None:
        """
        Raises:
            ValueError: naming an option that is out of range, or that needs `use_vllm` to mean anything.
            ImportError: if vLLM is requested but not installed.
        """
        if self.vllm_mode not in MODES:
            raise ValueError(f"vllm_mode={self.vllm_mode!r}: it should be one of {', '.join(MODES)}")
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ValueError(
                f"vllm_gpu_memory_utilization={self.vllm_gpu_memory_utilization}: it should be above 0 and at most 1"
            )
        for name in ("vllm_tensor_parallel_size", "vllm_max_model_length", "vllm_server_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: it should be greater than 0")
        if self.rollouts_ahead not in (0, 1):
            raise ValueError(f"rollouts_ahead={self.rollouts_ahead}: it should be 0 or 1")
        if self.rollouts_ahead and not (self.use_vllm and self.vllm_mode == "server"):
            raise ValueError(
                f"rollouts_ahead=1 with use_vllm={self.use_vllm} and vllm_mode={self.vllm_mode!r}: only a vLLM server "
                "samples while the trainer learns; set use_vllm=True and vllm_mode='server'"
            )
        if not self.use_vllm:
            return
        if self.vllm_mode == "server" and self.vllm_enable_sleep_mode:
            raise ValueError("vllm_enable_sleep_mode needs vllm_mode='colocate': a server keeps its memory")
        if not is_vllm_available():
            raise ImportError("use_vllm=True, but vLLM is not installed: pip install 'trl[vllm]'")
