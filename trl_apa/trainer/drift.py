"""One warning when the policy has moved so far from the initial model that its text is probably broken."""

import warnings
from collections.abc import Mapping


# On SmolLM2-135M sentences lost their grammar from about one nat a token on, and repeated one phrase at 40 a response.
MAX_KL_PER_TOKEN = 1.0
MAX_KL = 20.0
# Of the squared distance to APA's target; a policy that comes near the target has moved as far as kl_coef says.
MAX_UNEXPLAINED = 0.9


def drift_message(stats: Mapping[str, float], coefficient: str) -> str | None:
    """What to say of a policy that is too far from the initial model, or None.

    Args:
        stats: of an iteration: `objective/kl` (nats per response), `objective/kl_per_token` (nats), and with APA
            `apa/policy/unexplained`.
        coefficient: name and value of the option that holds the policy back.
    """
    kl, per_token = stats["objective/kl"], stats["objective/kl_per_token"]
    unexplained = stats.get("apa/policy/unexplained")
    is_far = kl > MAX_KL and per_token > MAX_KL_PER_TOKEN
    if not is_far or (unexplained is not None and unexplained < MAX_UNEXPLAINED):
        return None
    residual = "" if unexplained is None else f", and its loss is still {unexplained:.0%} of the initial model's"
    return (
        f"the policy is {kl:.0f} nats per response from the initial model, {per_token:.1f} per token{residual}: "
        "beyond this, higher rewards often come with broken or repetitive text. Read some responses; raise "
        f"{coefficient}, lower learning_rate, or stop earlier (see objective/kl in docs/statistics.md)"
    )


class DriftWatch:
    """Looks at the statistics of every iteration, and warns at most once."""

    def __init__(self, coefficient: str):
        self.coefficient = coefficient
        self.warned = False

    def look(self, stats: Mapping[str, float]) -> None:
        """Warn if this is the first iteration that `drift_message` has something to say of."""
        message = None if self.warned else drift_message(stats, self.coefficient)
        if message is not None:
            self.warned = True
            warnings.warn(message, UserWarning, stacklevel=3)
