"""The training loop."""

from __future__ import annotations

import torch

from train.run import Run


def train(run: Run) -> None:
    """Take optimizer steps until the last stage is over, from wherever ``run.step`` stands, and see all that was written on the disk.

    The head's fate is the backbone's: if the engine skipped the step (a gradient was not finite on some rank), no center and no expectation
    moves either. Where the backbone is frozen, the gradients of its embeddings decide.
    """
    phase = run.phase
    run.begin()
    while run.step < run.stages.total_steps:
        lr = run.begin_step()
        measured = []  # of each micro-batch, on the device
        for _ in range(run.stages.stage.grad_accum_steps):
            with phase("data"):
                batch = next(run.batches)  # images [b, 3, 112, 112], labels [b] int64
            with phase("head"):
                run.head.prepare(batch.labels)  # before the backbone is queued: on a GPU this waits for the device, nothing after it does
            with phase("forward"):
                embeddings = run.backbone(batch.images)  # [b, D]
            with phase("head"):
                loss = run.head(embeddings, batch.labels)  # scalar, equal on every rank
            with phase("backward"):
                run.backbone.backward(run.guard.watch(loss, batch.records))
            with phase("optimizer"):
                run.check_replicas()  # before the weights are gathered anew
                run.backbone.step()  # acts on the last micro-batch only
            measured.append(torch.stack([loss.detach(), run.head.target_cosine, run.head.target_cosine_square]))
        applied, measured = run.backbone.was_step_applied(), torch.stack(measured).mean(0)
        run.measure_head_gradient()
        outcome = run.guard.after_step(run.step + 1, measured[0], applied, run.head.not_finite_ranks)
        with phase("optimizer"):
            if applied:
                run.head.step(lr, run.cfg.optimizer.weight_decay)
                run.backbone.update_mean()
            else:
                run.head.discard()
        run.step += 1
        run.record(measured, lr, outcome)
        over = run.stage_is_over()
        if run.evaluation_due():
            with phase("evaluate"):
                run.evaluate()
        if run.checkpoint_due():
            with phase("checkpoint"):
                run.save()  # with head and data as the stage left them: what comes next may be changed (resume=branch)
        run.heed()
        if run.guard.rollback_before:
            run.roll_back(run.guard.rollback_before)
            continue
        if over:
            run.enter_stage()
    with phase("checkpoint"):
        run.require_written()
