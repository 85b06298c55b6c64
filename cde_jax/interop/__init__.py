"""Checkpoints of other people, and ours for them: PyTorch and Hugging Face, both ways."""
