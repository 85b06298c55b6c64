"""The encoder and the two-stage contextual model (paper, section 4)."""
