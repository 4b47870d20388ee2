"""A policy as a Hugging Face folder, with its model card and `torch.export` programs."""
