"""Files to batches. Nothing here imports the model."""
