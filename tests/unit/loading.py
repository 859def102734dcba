"""What the loader's tests share."""

import io
import re

import numpy as np
import torch
from PIL import Image

from data_pipeline.augment import Augment
from data_pipeline.pack import pack
from data_pipeline.recordio import RecordReader
from data_pipeline.shard_set import open_set
from tests.unit.record_sets import image_folder

PLAIN = Augment(flip=0.0)
ALL = Augment(downscale=0.2, blur=0.3, color=0.3, gray=0.2, brightness=0.3, shift_px=6, erase=0.3, flip=0.5)


def numbered_set(folder, shards, images):
    """A packed set whose identities have one image each: the label names the image."""
    image_folder(folder / "src", {f"{i:03d}": 1 for i in range(images)})
    pack([folder / "src"], folder / "set", shards)
    return folder / "set"


def take(loader, batches):
    return [next(loader) for _ in range(batches)]


def same(one, two):
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and (a.epoch, a.step) == (b.epoch, b.step)
        for a, b in zip(one, two, strict=True)
    )


def decoded(path):
    """Every image of a set by Pillow, [N, 3, 112, 112] in [-1, 1], and labels."""
    records = [record for shard in open_set(path).shards for record in RecordReader(shard) if record.is_image]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(record.image)).convert("RGB"), np.float32) for record in records])
    return (pixels.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.5, np.array([record.labels[0] for record in records])


def nearest(image, images):
    distances = np.abs(images - image).reshape(len(images), -1)
    best = distances.mean(1).argmin()
    return best, distances[best].max()


def record_named(folder, name):
    """The record that a name leads to, found as a user would."""
    shard, offset, key = re.fullmatch(r"(\S+) offset (\d+) \(key (\d+)\)", name).groups()
    return int(key), RecordReader(folder / shard).read_at(int(offset))
