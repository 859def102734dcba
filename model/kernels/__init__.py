"""Fused operations of the head, each beside a plain-torch twin of the same signature. Importing them needs neither Triton nor a GPU."""
