"""Pretrained weights in and out: Hugging Face directories, PyTorch names, ONNX."""
