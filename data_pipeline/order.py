"""Which image is read when, and what is drawn for it: pure functions of (seed, epoch), the same whatever the number of ranks.

An epoch is a permutation of all images that is computed, never stored: position -> image by a Feistel network, whose rounds are bijections
of Z_a x Z_b (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Reading may begin anywhere at no cost, and 42 million
images need no more memory than ten.
"""

import math
from dataclasses import dataclass

import numpy as np

_ROUNDS = 16  # with 8 and 12 not every order of five or six images is as frequent as the others
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # the step of SplitMix64 (Steele, Lea and Flood, 2014)


@dataclass(frozen=True)
class EpochOrder:
    """The order of the images in every epoch of a run, and how ranks share it.

    The first ``images_per_epoch`` positions of an epoch are read, in global batches; the other images, fewer than a global batch, are
    others in every epoch. A global batch depends on ``num_images``, ``global_batch_size`` and ``seed`` alone. Where a global batch takes
    several micro-batches, they are its parts in order; of a micro-batch, rank r reads every ``world_size``-th image from the r-th on.
    """

    num_images: int  # N
    global_batch_size: int  # images per optimizer step, all ranks and micro-batches together
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return self.num_images // self.global_batch_size

    @property
    def images_per_epoch(self) -> int:
        return self.steps_per_epoch * self.global_batch_size

    def images(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The images at ``positions`` ([n] integers in [0, N)) of an epoch: [n] int64 in [0, N). A bijection of [0, N) in each epoch."""
        rows = 2 * math.ceil(math.sqrt(self.num_images) / 2)  # even: else odd permutations would not be as frequent as even ones
        columns = -(-self.num_images // rows)  # rows x columns is N or little more
        keys = np.random.SeedSequence([self.seed, epoch]).generate_state(_ROUNDS, np.uint64)
        images = _feistel(np.asarray(positions, np.uint64), rows, columns, keys)
        while len(outside := np.flatnonzero(images >= self.num_images)):  # walk on until the value is an image
            images[outside] = _feistel(images[outside], rows, columns, keys)
        return images.astype(np.int64)

    def positions(self, read: int, batch_size: int, rank: int, world_size: int) -> tuple[int, np.ndarray]:
        """Epoch, and the positions in it ([batch_size] int64), of a rank's micro-batch after ``read`` images of the run over all ranks."""
        epoch, start = divmod(read, self.images_per_epoch)
        return epoch, np.arange(start + rank, start + batch_size * world_size, world_size)

    def substitutes(self, epoch: int, position: int, count: int) -> np.ndarray:
        """Images ([count] int64) to take, one after the other, where the one at ``position`` cannot be read.

        The first half are of those that the epoch leaves out, when it leaves out any; the others of all. Positions draw independently of
        each other: an image may stand in for two, and one of the second half is read twice in the epoch.
        """
        left_out = self.images_per_epoch if self.images_per_epoch < self.num_images else 0
        first = np.where(np.arange(count) < count / 2, left_out, 0)
        draws = uniforms(self.seed, epoch, np.array([position]), count, stream=1)[0]
        return self.images(epoch, first + (draws * (self.num_images - first)).astype(np.int64))


def uniforms(seed: int, epoch: int, positions: np.ndarray, count: int, stream: int = 0) -> np.ndarray:
    """[n, count] float64 in [0, 1): the random numbers of the images at ``positions`` ([n]), independent of who asks and in which batch.

    ``stream``: numbers of different streams are independent of each other.
    """
    key = np.random.SeedSequence([seed, epoch, stream, 0x64726177]).generate_state(1, np.uint64)  # a word that EpochOrder's keys lack
    row = _mixed(np.asarray(positions, np.uint64) + key)
    numbers = _mixed(row[:, None] + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64))
    return (numbers >> np.uint64(11)) * 2.0**-53


def _feistel(values: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    left, right = np.divmod(values, np.uint64(columns))
    for i, key in enumerate(keys):
        if i % 2:
            _add(right, _mixed(left + key), np.uint64(columns))
        else:
            _add(left, _mixed(right + key), np.uint64(rows))
    return left * np.uint64(columns) + right


def _add(values: np.ndarray, random: np.ndarray, size: np.uint64) -> None:
    """Add a random number of [0, size), made of 64 random bits, to values in [0, size), modulo size and in place. size is below 2^32."""
    random >>= np.uint64(32)
    random *= size
    random >>= np.uint64(32)
    values += random
    np.subtract(values, size, out=values, where=values >= size)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64: [n] uint64 -> [n] uint64, a bijection whose every output bit depends on all input bits."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
