"""Loss, sharding, step, checkpoints and the loop."""
