"""Tools and environments: rollouts in which something answers the policy between its turns."""
