"""Pairs of text, their tokens, and where they are kept; nothing here needs a device."""
