"""The laboratory: variants of one run trained on the same arrays, and what each gains. See README.md."""
