"""Options of rollouts with tools, under the names that GRPO's config in TRL has for them where it has them."""

from dataclasses import dataclass

from trl_apa.config.fields import option


@dataclass
class ToolOptions:
    """
    How tools and environments are used (`docs/tools.md`); without `tools` or `environment_factory` nothing reads them.

    Parameters:
        max_tool_calling_iterations (`int`, *optional*):
            Most times that a rollout's tool calls are answered. By default a rollout goes on until the policy calls no
            tool, or its response has `max_completion_length` tokens.
        tool_timeout (`float`, *optional*, defaults to `60.0`):
            Seconds that one call of a tool may take; then it is abandoned, and the policy is told so. None waits for
            ever.
    """

    max_tool_calling_iterations: int | None = option(
        None, "Most times that tool calls of a rollout are answered; no limit by default."
    )
    tool_timeout: float | None = option(60.0, "Seconds that one call of a tool may take before it is abandoned.")

    def _check_tool_options(self) -> None:
        """
        Raises:
            ValueError: naming an option that is out of range.
        """
        if self.max_tool_calling_iterations is not None and self.max_tool_calling_iterations < 0:
            raise ValueError(
                f"max_tool_calling_iterations={self.max_tool_calling_iterations}: it should be at least 0"
            )
        if self.tool_timeout is not None and not self.tool_timeout > 0:
            raise ValueError(f"tool_timeout={self.tool_timeout}: it should be greater than 0")
