"""Values of a setup's options. Imports nothing heavy, so that `--help` answers at once."""

SHARDINGS = ("ddp", "zero2", "zero3", "fsdp2")
REFERENCES = ("auto", "base", "adapter", "copy")
ATTENTIONS = ("eager", "sdpa", "flash")
# Of networks that are not given as a config.
NETWORKS: dict[str, tuple[str | None, ...]] = {
    "value": ("separate", "adapter", "head", None),
    "reward": (None, "adapter", "separate"),
}
