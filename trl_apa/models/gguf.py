"""Language models from GGUF files: dense like any other once transformers has unpacked them, and saved as such."""

import functools
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
import xxhash
from peft import PeftModel
from torch import Tensor, nn, uint8
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_gguf_available
from transformers.utils.peft_utils import find_adapter_config_file

from trl_apa._trl import is_peft_model
from trl_apa.models.network_parts import M, Network, without_unknown_pad


SUFFIX = ".gguf"


def gguf_source(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` wants for a name that may be a GGUF file's: a folder or repository, and `gguf_file`.

    Args:
        path: a folder or hub name, which is returned as it is, with `gguf_file` if it is a folder with one such file
            and no checkpoint; or either with a file's name behind it: `models/smollm2.gguf`.
    """
    path = os.fspath(path)
    if not path.endswith(SUFFIX):
        files = _only_gguf(path)
        return path, {"gguf_file": files[0].name} if len(files) == 1 else {}
    folder, file = os.path.split(path)
    return folder or os.curdir, {"gguf_file": file}


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Within it transformers parses a GGUF file once, and not again for each of config, tokenizer and weights.

    Parsing takes seconds, most of them for the vocabulary; so does the map of tensor names, which transformers asks
    for once a module.
    """
    gguf = import_module("gguf") if is_gguf_available() else None
    if gguf is None or hasattr(gguf.GGUFReader, "cache_info"):  # not installed, or within another such block
        yield
        return
    functions = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in functions.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(gguf, name, function)


def load_config(path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedConfig:
    """`AutoConfig.from_pretrained` of a folder, a hub name or a GGUF file."""
    folder, options = gguf_source(path)
    return AutoConfig.from_pretrained(folder, **{**options, **kwargs})


def load_tokenizer(path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained` of a folder, a hub name or a GGUF file."""
    folder, options = gguf_source(path)
    return AutoTokenizer.from_pretrained(folder, **{**options, **kwargs})


def adapter_config_file(path: str | os.PathLike[str], **hub: Any) -> str | None:
    """The path of an adapter's config; None if the folder, hub name or GGUF file is not an adapter.

    Args:
        path: folder, hub name or GGUF file.
        hub: `token`, `revision`, ... of `path`.
    """
    path, file = gguf_source(path)
    return None if file else find_adapter_config_file(path, **hub)


def dense_options(kwargs: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that unpack a GGUF file, if they name one, also where it could stay packed.

    Args:
        kwargs: arguments of `from_pretrained`.
        config: the model's, which takes seconds to read from such a file and is not read again.
    """
    if "gguf_file" not in kwargs:
        return kwargs
    quantization = getattr(transformers, "GgufConfig", None)
    unpacked = {} if quantization is None else {"quantization_config": quantization(dequantize=True)}
    return {"config": config, **unpacked, **kwargs}


def without_gguf_marks(model: M) -> M:
    """Take the marks of a quantised model off one that transformers has unpacked from a GGUF file.

    transformers leaves them on most families, and then refuses to train and to save what is dense. The model's name
    becomes that of the file, because nothing can be loaded from the name of its folder alone.

    Args:
        model: any network, changed in place. One whose weights are still packed stays as it is, and so does every
            other kind of quantised network.

    Returns:
        `model` itself.
    """
    for network in model.modules():
        if not isinstance(network, PreTrainedModel) or getattr(network, "quantization_method", None) != "gguf":
            continue
        if not all(parameter.is_floating_point() for parameter in network.parameters()):
            continue
        name_after_file(network, network.hf_quantizer.quantization_config.gguf_file, model)
        network.hf_quantizer.remove_quantization_config(network)
        for part in network.modules():
            if isinstance(part, PreTrainedModel):
                vars(part.config).pop("_is_quantized", None)
    return model


def name_after_file(network: PreTrainedModel, file: str | None, model: nn.Module | None = None) -> None:
    """Name the network, and the adapters of `model` that lie on it, after the GGUF file that it was loaded from."""
    folder = network.name_or_path
    if not file or folder.endswith(SUFFIX):
        return
    network.name_or_path = file if os.path.isfile(file) else os.path.join(folder, file)
    for config in getattr(model, "peft_config", {}).values():
        if config.base_model_name_or_path == folder:
            config.base_model_name_or_path = network.name_or_path


def save_dense_base(network: Network, folder: str | os.PathLike[str], state_dict: Mapping[str, Tensor]) -> None:
    """Write the base of adapters on a GGUF file as a plain checkpoint, once, and name it as their base.

    peft loads a base by its name alone, which does not work for a GGUF file. The checkpoint is `base-HASH` in
    `folder`, named by its weights, so that every later save finds it there.

    Args:
        network: one that does not have such adapters stays as it is.
        folder: made if it is not there.
        state_dict: the network's weights, as gathered from a sharded one.
    """
    if not is_peft_model(network):
        return
    adapters = [config for config in network.peft_config.values() if _is_gguf(config.base_model_name_or_path)]
    if not adapters:
        return
    base = network.get_base_model()
    weights = _base_weights(network, state_dict)
    if any(tensor.is_meta or not tensor.numel() for tensor in weights.values()) or not weights:
        warnings.warn(
            f"the adapters name {adapters[0].base_model_name_or_path} as their base, which peft cannot load by "
            "itself, and the base's weights are sharded, so they cannot be saved with the adapters",
            UserWarning,
            stacklevel=2,
        )
        return
    path = Path(folder).resolve() / f"base-{_fingerprint(weights)}"
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="base-") as part:
            with without_unknown_pad(base):
                base.save_pretrained(Path(part) / path.name, state_dict=weights)
            os.replace(Path(part) / path.name, path)
    for config in adapters:
        config.base_model_name_or_path = str(path)


def _is_gguf(name: str | None) -> bool:
    """Whether it is a GGUF file, or a folder that has such files and no checkpoint."""
    return name is not None and (name.endswith(SUFFIX) or bool(_only_gguf(name)))


def _only_gguf(name: str) -> list[Path]:
    """The GGUF files in a folder without another checkpoint."""
    folder = Path(name)
    if not folder.is_dir() or any((folder / other).exists() for other in ("config.json", "adapter_config.json")):
        return []
    return sorted(folder.glob(f"*{SUFFIX}"))


def _base_weights(network: PeftModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the base under the names that it has without adapters."""
    own = (network.base_model.prefix, ".modules_to_save.")
    weights = {name: tensor for name, tensor in state_dict.items() if not any(part in name for part in own)}
    inserted = ("base_layer", "original_module")
    return {
        ".".join(part for part in name.removeprefix("base_model.model.").split(".") if part not in inserted): tensor
        for name, tensor in weights.items()
    }


def _fingerprint(weights: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_64()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()
