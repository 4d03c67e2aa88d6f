"""Several processes, and engines that shard weights."""
