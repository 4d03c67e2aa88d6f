"""Forward and backward passes that are only pretended: shapes flow, nothing is allocated, every byte is counted."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


ACTIVATIONS = "activations"
# Elements that share one scale in bitsandbytes' 4-bit weights.
BLOCK_4BIT = 64
# Backward passes do these in place; of pretended tensors autograd makes a new one instead.
IN_PLACE = (torch.ops.aten.add.Tensor, torch.ops.aten.scatter_add.default)


class LiveBytes(TorchDispatchMode):
    """Bytes of all live tensors by label, and what they were when their sum was largest.

    A storage counts once, however many tensors view it, from the operation that returns it until it is freed. What an
    operation needs inside and does not return is not seen. torch's own `MemTracker` does the same, but as of torch
    2.13 it refuses modules with frozen parameters, that is every model with adapters.

    Args:
        label_of: a new tensor to its label; None means `ACTIVATIONS`.
    """

    def __init__(self, label_of: Callable[[Tensor], str | None] = lambda tensor: None):
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations
        self._label_of = label_of
        self._entries: dict[int, tuple[str, int, weakref.ref[torch.UntypedStorage]]] = {}
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self._total = self._peak_total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in IN_PLACE and _in_backward() and args[0].shape == result.shape:
            self._give_up(args[0])
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, None)
        return result

    def count(self, label: str, tensors: Iterable[Tensor | None]) -> None:
        """Count what `tensors` hold under `label`, also if it was counted under another."""
        for tensor in tensors:
            if tensor is not None:
                self._note(tensor, label)

    def restart(self) -> None:
        """Reset the peak to the memory in use now."""
        self._peak_total, self.peak = self._total, dict(self.live)

    def _note(self, tensor: Tensor, label: str | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._entries.get(key)
        if known is not None:
            if label is not None and label != known[0]:
                self.live[known[0]] -= known[1]
                self.live[label] += known[1]
                self._entries[key] = (label, *known[1:])
            return
        label = label or self._label_of(tensor) or ACTIVATIONS
        size = storage.nbytes()
        self._entries[key] = (label, size, weakref.ref(storage, lambda _: self._freed(key)))
        self.live[label] += size
        self._total += size
        if self._total > self._peak_total:
            self.restart()

    def _give_up(self, tensor: Tensor) -> None:
        """Count `tensor` no more, though it lives on for a moment."""
        key = tensor.untyped_storage()._cdata
        if key in self._entries:
            label, size, reference = self._entries[key]
            self._entries[key] = (label, 0, reference)
            self.live[label] -= size
            self._total -= size

    def _freed(self, key: int) -> None:
        label, size, _ = self._entries.pop(key)
        self.live[label] -= size
        self._total -= size


def _in_backward() -> bool:
    """Whether autograd is at work, and not a checkpoint that computes its forward pass again."""
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


@contextmanager
def pretending(module: nn.Module) -> Iterator[None]:
    """Inside, tensors have shapes and no contents, and so have the weights of `module`, which was built on "meta".

    The pretended device is the CPU, for which every operation can say its shapes on every machine.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _Trust():
        _give_weights(module)
        yield


class _Trust(TorchFunctionMode):
    """Tensors without contents are close to each other, and 0: what the package tries out on a network holds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.allclose, Tensor.__bool__):
            return True
        return 0.0 if func is Tensor.__float__ else func(*args, **(kwargs or {}))


def _give_weights(module: nn.Module) -> None:
    given: dict[int, Tensor] = {}
    for child in module.modules():
        stores: tuple[dict[str, Any], ...] = (child._parameters, child._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = given.setdefault(id(tensor), _without_contents(tensor))
        _give_scales(child)


def _without_contents(tensor: Tensor) -> Tensor:
    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _give_scales(layer: nn.Module) -> None:
    """The extra tensors that bitsandbytes keeps with a quantized weight."""
    if find_spec("bitsandbytes") is None:
        return
    import bitsandbytes as bnb

    if isinstance(layer, bnb.nn.Linear8bitLt):
        layer.state.CB, layer.weight.CB = layer.weight.data, None
        layer.state.SCB = torch.empty(layer.out_features, dtype=torch.float32)
        layer.state.threshold = 0.0  # which inputs are outliers cannot be pretended
    elif isinstance(layer, bnb.nn.Linear4bit):
        blocks = -(-layer.in_features * layer.out_features // BLOCK_4BIT)
        layer.weight.quant_state = bnb.functional.QuantState(
            absmax=torch.empty(blocks, dtype=torch.float32),
            shape=torch.Size((layer.out_features, layer.in_features)),
            code=torch.empty(16, dtype=torch.float32),
            blocksize=BLOCK_4BIT,
            quant_type="nf4",
            dtype=layer.compute_dtype,
        )


def scales_of(module: nn.Module) -> list[Tensor]:
    """The scales of the quantised weights in `module`."""
    found = []
    for layer in module.modules():
        found.append(getattr(getattr(layer, "state", None), "SCB", None))
        found.append(getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "absmax", None))
    return [scale for scale in found if isinstance(scale, Tensor)]
