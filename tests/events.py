"""TensorBoard's event files, read with its own code."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> {step: value}, as both of TensorBoard's readers find them; a step that stands twice is an error."""
    events, shown = event_accumulator.EventAccumulator(str(folder)), plugin_event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    shown.Reload()
    curves = {}
    for tag in events.Tags()["scalars"]:
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        assert points == [(event.step, event.tensor_proto.float_val[0]) for event in shown.Tensors(tag)], tag
        assert len(dict(points)) == len(points), tag
        curves[tag] = dict(points)
    return curves
