"""Other paths of modules that scripts use: those of 0.1.0's first layout, and TRL 0.11's with `trl_apa` for `trl`."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType


# Folder -> modules that lay beside it.
MOVED = {
    "algorithms": "advantages kl losses masking rewards",
    "classic": "core ppo",
    "models": "fused_head logprobs packing",
    "rollout": "generation prompts scoring vllm_generation",
    "trainer": "assembly experience gradient_guard iteration optimization progress reporting resuming saving "
    "statistics update validation",
}
# Path below `trl_apa` -> the module that is there today.
NEW_PATHS = {name: f"{folder}.{name}" for folder, names in MOVED.items() for name in names.split()} | {
    "engines": "distributed.sharded",
    "models.modeling_value_head": "models.value_head",
    "rollouts": "rollout.batch",
    "second_generation": "config.trl_0_12",
    "trainer.ppo_config": "classic.ppo",
    "trainer.ppo_trainer": "classic.ppo",
    "training": "trainer.training_loop",
    "vllm_options": "config.vllm",
}


class OtherPaths(MetaPathFinder, Loader):
    """Gives the module itself where it is imported by another path, so that both paths lead to one object."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for the paths in `NEW_PATHS`, None for all others."""
        package, _, name = fullname.partition(".")
        return spec_from_loader(fullname, self) if package == "trl_apa" and name in NEW_PATHS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module of today's path."""
        module = import_module(f"trl_apa.{NEW_PATHS[spec.name.partition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: the module is loaded already. The import system has put the other path's spec on it."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Let the import system know the other paths, after all others have been tried."""
    if not any(isinstance(finder, OtherPaths) for finder in sys.meta_path):
        sys.meta_path.append(OtherPaths())


def lazy_names(package: str, module_of: Mapping[str, str]) -> Callable[[str], object]:
    """`__getattr__` of a package (PEP 562) that imports a name's module when the name is first used.

    Args:
        package: the package's `__name__`.
        module_of: each name's module, relative to the package.
    """

    def get(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(module_of[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
