"""The training loop."""

from __future__ import annotations

from train.engine import set_learning_rate
from train.run import Run


def train(run: Run) -> None:
    """Take optimizer steps until the last stage is over, from wherever ``run.step`` stands.

    The head's fate is the engine's: if the engine skipped the step (a gradient was not finite on some rank), no center and no expectation
    moves either.
    """
    phase = run.timer.phase
    while run.step < run.stages.total_steps:
        run.enter_stage()
        lr = run.learning_rate()
        set_learning_rate(run.engine, lr)
        losses = []
        for _ in range(run.cfg.batch.grad_accum_steps):
            with phase("data"):
                batch = next(run.batches)  # images [b, 3, 112, 112], labels [b] int64
            with phase("head"):
                run.head.prepare(batch.labels)  # before the backbone is queued: on a GPU this waits for the device, nothing after it does
            with phase("forward"):
                embeddings = run.engine(batch.images)  # [b, D]
            with phase("head"):
                loss = run.head(embeddings, batch.labels)  # scalar, equal on every rank
            with phase("backward"):
                run.engine.backward(loss)
            with phase("optimizer"):
                run.engine.step()  # acts on the last micro-batch only
            losses.append(loss.detach())
        applied = run.engine.was_step_applied()
        run.measure_head_gradient()
        with phase("optimizer"):
            if applied:
                run.head.step(lr, run.cfg.optimizer.weight_decay)
            else:
                run.head.discard()
        run.step += 1
        run.record(losses, lr, applied)
        if run.checkpoint_due():
            with phase("checkpoint"):
                run.save()
