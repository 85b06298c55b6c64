"""Retrieval quality: metrics, baselines, evaluation sets under each kind of context."""
