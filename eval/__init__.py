"""Embeddings to numbers: opens models, embeds aligned faces, scores protocols.

``import eval`` hides the builtin: write ``from eval.x import y``.
"""
