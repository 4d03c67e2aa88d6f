"""Prompts to responses to scores: everything that happens before the first forward pass of `step`."""
