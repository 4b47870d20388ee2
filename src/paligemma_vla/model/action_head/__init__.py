"""Action heads: context and state to a chunk of actions."""
