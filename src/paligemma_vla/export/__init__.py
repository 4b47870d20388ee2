"""A policy as a Hugging Face folder: written, read back, fetched from the hub and put there."""
