"""Between a policy and a robot: limits on what may be sent."""
