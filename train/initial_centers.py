"""``head.init_centers: class_means``: class centers from one pass of the initial backbone over the training images."""

from __future__ import annotations

import time
from collections.abc import Callable

from data_pipeline.graph import Decode
from data_pipeline.one_pass import OnePass
from model.class_means import ClassMeans
from model.collectives import Collectives
from model.partial_fc import PartialFC
from train.backbone import FrozenBackbone
from train.config import RunConfig
from train.dist import RankError, Ranks
from train.table import format_seconds

_SAY_EVERY_S = 10.0


def set_class_means(cfg: RunConfig, ranks: Ranks, engine, head: PartialFC, alive: Callable[[], None]) -> None:
    """Give the head the mean embeddings of its classes as centers; a class without an image keeps its random one.

    The backbone is in evaluation mode and in the precision of the run, images are not augmented, and every one counts once. No random
    number is drawn, and no statistic moves. The engine is left in evaluation mode. It costs about a third of an epoch's computation;
    ``Run.begin`` keeps the result as the checkpoint of step 0.

    Args:
        alive: called at every batch: the pass may take hours where a single batch must not.
    Raises: RankError on every rank if the data cannot be opened, or an embedding is not finite; DataError, on a rank, see OnePass.
    Collectives: a gather, and for every batch those of the engine's forward (all ranks have as many) and of ClassMeans.
    """
    batch_size = cfg.stage_batch(0).micro_batch_size
    images = ranks.together(
        lambda: OnePass(
            cfg.data.path,
            batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device_id=ranks.device_id,
            decode=Decode(**cfg.data.decode.model_dump()),
            num_threads=cfg.data.num_threads,
            min_images_per_identity=cfg.data.min_images_per_identity,
            max_bad_records=cfg.data.max_bad_records,
        )
    )
    collectives = Collectives(ranks.group)
    backbone, means = FrozenBackbone(engine, collectives), ClassMeans(head.shard, head.weight.shape[1], collectives, ranks.device)
    begin = said = time.monotonic()
    for done, (batch, labels) in enumerate(images, 1):
        alive()
        means.add(backbone.embed(batch), labels)
        if time.monotonic() - said >= _SAY_EVERY_S:
            said = time.monotonic()
            ranks.say(_progress(done, len(images), batch_size * ranks.world_size, said - begin))
    counted, classes, not_finite = means.counts()
    if not_finite:
        raise RankError(f"head.init_centers: the embeddings of {not_finite:,} images are not finite; check the weights of model.init_from")
    head.weight = means.centers(head.weight)
    left_out = images.num_images - counted
    ranks.say(
        f"class centers of {classes:,} of {head.num_classes:,} identities are the means of {counted:,} images"
        + (f", without {left_out:,} damaged ones" if left_out else "")
        + f" ({format_seconds(time.monotonic() - begin)})"
    )


def _progress(done: int, batches: int, images: int, seconds: float) -> str:
    """``done`` of ``batches`` batches, of ``images`` each over all ranks."""
    rate = done * images / seconds
    left = format_seconds((batches - done) * seconds / done)
    return f"class means: {done * images:,} of {batches * images:,} images  {rate:,.0f} images/s  ETA {left}"
