"""What users hold: the embedder, the index, the evaluation."""
