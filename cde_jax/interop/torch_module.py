"""The PyTorch side of an export: written next."""
