"""Decides what runs and when: recipe, engine, stages, checkpoints, metrics."""
