"""Other paths of modules that scripts use: those of 0.1.0's first layout, and TRL's own with `trl_apa` for `trl`.

One table for each: `NEW_PATHS` has modules under another path, `NAMES` has paths that are no module here, with the
place of each of their names.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType


PPO, NAMES_OF_CLASSIC = "trl_apa.classic.ppo", "trl_apa.classic.names"
PPO_NAMES = {
    "PPOConfig": PPO,
    "PPOTrainer": PPO,
    "PPOv2Config": f"{PPO}:PPOConfig",
    "PPOv2Trainer": f"{PPO}:PPOTrainer",
}
ENVIRONMENT = dict.fromkeys(("TextEnvironment", "TextHistory"), "trl_apa.classic.environment")
BEST_OF_N = {"BestOfNSampler": "trl_apa.classic.best_of_n"}
CONTROLLERS = dict.fromkeys(("AdaptiveKLController", "FixedKLController"), "trl_apa.algorithms.kl")
WRAPPER = {"PreTrainedModelWrapper": "trl_apa.models.value_head:ValueHeadWrapper"}
WRAPPERS = dict.fromkeys(
    ("AutoModelForCausalLMWithValueHead", "AutoModelForSeq2SeqLMWithValueHead"), "trl_apa.models.value_head"
)
VALUE_HEAD = {"ValueHead": "trl_apa.models.classic_value_head:SummaryHead"}
MASKED = dict.fromkeys(("masked_mean", "masked_var", "masked_whiten"), "trl_apa.classic.core")
ARCHITECTURES = {"SUPPORTED_ARCHITECTURES": "trl_apa.models.value_head"}
DEVICE_MAP = {"get_kbit_device_map": NAMES_OF_CLASSIC}
OF_TRL = dict.fromkeys(("ModelConfig", "get_peft_config", "get_quantization_config"), "trl")
# What TRL 0.11 had at the top, beside the names that `trl_apa` lists.
CLASSIC_NAMES = {**PPO_NAMES, **ENVIRONMENT, **BEST_OF_N, **WRAPPER, **ARCHITECTURES, **DEVICE_MAP, **OF_TRL} | {
    "is_liger_kernel_available": "trl.import_utils"
}

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
    "experimental.ppo.ppo_config": "classic.ppo",
    "extras.best_of_n_sampler": "classic.best_of_n",
    "rollouts": "rollout.batch",
    "second_generation": "config.trl_0_12",
    "trainer.ppo_config": "classic.ppo",
    "trainer.ppo_trainer": "classic.ppo",
    "training": "trainer.training_loop",
    "vllm_options": "config.vllm",
}
# Path below `trl_apa` -> its names, each with its module, and with `:name` where it is called otherwise there.
NAMES: dict[str, dict[str, str]] = {
    "environment": ENVIRONMENT,
    "environment.base_environment": ENVIRONMENT,
    "experimental": {},
    "experimental.ppo": {**PPO_NAMES, **WRAPPERS, **WRAPPER},
    "experimental.ppo.modeling_value_head": {**WRAPPERS, **WRAPPER, **VALUE_HEAD},
    "experimental.ppo.ppo_trainer": {**PPO_NAMES, **MASKED},
    "extras": BEST_OF_N,
    "import_utils": {
        **dict.fromkeys(("is_liger_kernel_available", "is_unsloth_available"), "trl.import_utils"),
        **dict.fromkeys(("is_npu_available", "is_xpu_available"), "accelerate.utils"),
        **dict.fromkeys(("is_peft_available", "is_rich_available"), "transformers.utils"),
    },
    "models.modeling_base": {**WRAPPER, "create_reference_model": "trl_apa.models.reference"},
    "models.modeling_value_head": {**WRAPPERS, **VALUE_HEAD},
    "models.utils": {
        **ARCHITECTURES,
        **dict.fromkeys(
            ("add_hooks", "get_all_parameters", "iter_params", "remove_hooks", "unwrap_model_for_generation"),
            "trl.models.utils",
        ),
    },
    "trainer.ppov2_config": PPO_NAMES,
    "trainer.ppov2_trainer": PPO_NAMES,
    "trainer.utils": {
        **CONTROLLERS,
        **DEVICE_MAP,
        **OF_TRL,
        **dict.fromkeys(("disable_dropout_in_model", "pad"), "trl.trainer.utils"),
    },
}
PACKAGES = {path.rpartition(".")[0] for path in (*NEW_PATHS, *NAMES)}


class OtherPaths(MetaPathFinder, Loader):
    """Gives the module itself where it is imported by another path, so that both paths lead to one object.

    Args:
        root: the package below which the paths are: `trl_apa`, or `trl` for scripts whose imports stay as they are.
    """

    def __init__(self, root: str):
        self.root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for the paths in the two tables, None for all others.

        Raises:
            ModuleNotFoundError: for `trl_apa.paper`, with where its modules are.
        """
        root, _, name = fullname.partition(".")
        if root == "trl_apa" and name.partition(".")[0] == "paper":
            text = "the paper's figures are in `reproduction`, beside `trl_apa` in the repository"
            raise ModuleNotFoundError(f"no module {fullname}: {text}", name=fullname)
        if root != self.root or (name not in NEW_PATHS and name not in NAMES):
            return None
        return spec_from_loader(fullname, self, is_package=name in NAMES and name in PACKAGES)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module of today's path, or a new one that finds its names where they are."""
        name = spec.name.partition(".")[2]
        if name in NEW_PATHS:
            module = import_module(f"trl_apa.{NEW_PATHS[name]}")
            spec.loader_state = module.__spec__
            return module
        module = ModuleType(spec.name, f"Names that TRL has at `{spec.name}`; see `trl_apa.module_paths`.")
        vars(module).update(__all__=sorted(NAMES[name]), __getattr__=lazy_names(spec.name, NAMES[name]))
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: the module is loaded already, and gets back the spec that the import system took from it."""
        assert module.__spec__ is not None
        if module.__spec__.loader_state is not None:
            module.__spec__ = module.__spec__.loader_state


def install(root: str = "trl_apa") -> None:
    """Let the import system know the other paths below `root`; it tries them after all others."""
    if not any(isinstance(finder, OtherPaths) and finder.root == root for finder in sys.meta_path):
        sys.meta_path.append(OtherPaths(root))


def lazy_names(package: str, module_of: Mapping[str, str]) -> Callable[[str], object]:
    """`__getattr__` of a module (PEP 562) that imports a name's module when the name is first used.

    Args:
        package: the module's `__name__`.
        module_of: each name's module, which may be relative to the package; `module:name` if it has another name
            there.
    """

    def get(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, there = module_of[name].partition(":")
        value = getattr(import_module(module, package), there or name)
        setattr(sys.modules[package], name, value)
        return value

    return get
