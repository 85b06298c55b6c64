"""Weights of other people and ours for them: Hugging Face directories, PyTorch names, ONNX."""
