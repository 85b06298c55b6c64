"""Adapters of frozen vectors: arrays and texts in, arrays out; they know no model."""
