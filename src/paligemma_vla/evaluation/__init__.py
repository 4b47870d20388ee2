"""How good a policy is: on recorded episodes (`open_loop`) and acting in a simulator (`collect`, `rollout`, `envs`)."""
