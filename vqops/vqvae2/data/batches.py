"""From images of any size to batches of one size: what is held out, where crops are cut, in which order they come.

Everything is a function of the seed and the number of the draw, so a run does not depend on the number of workers.
"""

import os
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from multiprocessing import parent_process
from threading import Thread

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from vqops.vqvae2.data.images import Images
from vqops.vqvae2.errors import Field, InputError

HELD_OUT_SHARE = 0.05
SPREAD = 16  # images
ENDED_WORKER = re.compile(r"DataLoader worker \(pid.*\) (is killed|exited)")
# What ends a job. Terminals, torchrun and schedulers send them to whole process groups.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


def hold_out(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off the last 5 % of a seeded order, at least one: positions of the others, of the held-out ones."""
    order = np.random.default_rng(seed).permutation(count)
    kept = count - max(1, round(HELD_OUT_SHARE * count))
    return order[:kept], order[kept:]


def window_of(images: Images, image_size: int) -> tuple[int, int]:
    """Height and width of the crops: image_size, or less where no image is as large."""
    return min(image_size, images.largest[0]), min(image_size, images.largest[1])


class Batches:
    """Batches uint8 [B, C, *window] of crops, in an order of (image, draw) pairs; workers load them if there are any.

    Iterating raises InputError, in one line, for an image that cannot be read, in whichever process it is met.
    """

    def __init__(self, crops: "Crops", order: Iterable[list[tuple[int, int | None]]], num_workers: int):
        self.images, self.num_workers = crops.images, num_workers
        self.loader = DataLoader(
            crops,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=stack,
            worker_init_fn=leave_signals,
            generator=torch.Generator(),  # the loader draws a number when it starts: not from the run's generator
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tensor]:
        try:
            for batch in self.loader:
                if isinstance(batch, InputError):  # not raised there: the loader would add the worker's traceback
                    raise batch
                yield batch
        except RuntimeError as error:
            if not ENDED_WORKER.match(str(error)):
                raise
            reason = str(error).splitlines()[0]
            raise InputError("a process that loads images has ended: lower ", Field("num_workers"),
                             f" {self.num_workers} ({reason})") from error  # fmt: skip


def training_batches(
    images: Images,
    window: tuple[int, int],
    batch_size: int,
    steps: int,
    seed: int,
    num_workers: int,
    first_step: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Batches:  # of uint8 [batch_size // part[1], C, *window]
    """Random crops, one batch a step; each epoch visits the images in a new order.

    The batches are those of steps first_step to steps - 1; of each, this is part[0] of part[1] consecutive ones.
    """
    order = ShuffledBatches(len(images), batch_size, steps, seed, first_step, part)
    return Batches(Crops(images, window, seed), order, num_workers)


def validation_batches(
    images: Images, window: tuple[int, int], batch_size: int, num_workers: int, part: tuple[int, int] = (0, 1)
) -> Batches:  # of uint8 [<= batch_size, C, *window]
    """The middle of each image, in order; of the batches every part[1]-th, from part[0] on."""
    return Batches(Crops(images, window), OrderedBatches(len(images), batch_size, part), num_workers)


def middles(images: Images, window: tuple[int, int], positions: Sequence[int]) -> Tensor:  # uint8 [N, C, *window]
    """The middle of each of these images."""
    crops = Crops(images, window)
    return stack([crops.cut(int(position), None) for position in positions])


def spread(count: int) -> np.ndarray:  # int64 [<= 16]
    """Positions of some images that stand for all of them."""
    return np.unique(np.linspace(0, count - 1, SPREAD, dtype=int))


def fingerprints(images: Images, window: tuple[int, int]) -> dict[int, str]:
    """What tells these images from others, wherever they lie: SHA-256 of the middles of 16 of them, by position.

    One that cannot be read any more is left out.
    """
    crops = Crops(replace(images, replaces=False), window)
    found = {position: crops[position, None] for position in spread(len(images)).tolist()}
    return {at: sha256(pixels.tobytes()).hexdigest() for at, pixels in found.items() if isinstance(pixels, np.ndarray)}


class Crops(Dataset):
    """Items (index, draw): a window of image `index`, in the middle if draw is None, else where seed and draw say."""

    def __init__(self, images: Images, window: tuple[int, int], seed: int = 0):
        # Without what only labels need: where workers do not fork, this is copied to each.
        self.images, self.window, self.seed = replace(images, names=None, source=None), window, seed

    def __getitem__(self, item: tuple[int, int | None]) -> np.ndarray | InputError:
        try:
            return self.cut(*item)
        except InputError as error:
            return error

    def cut(self, index: int, draw: int | None) -> np.ndarray:  # uint8 [*window, C]
        image = extended(self.images[index], self.window)
        room = [size - window for size, window in zip(image.shape[:2], self.window, strict=True)]
        if draw is None:
            top, left = (space // 2 for space in room)
        elif room == [0, 0]:
            top, left = 0, 0
        else:
            top, left = np.random.default_rng((self.seed, draw)).integers(0, room, endpoint=True)
        return image[top : top + self.window[0], left : left + self.window[1]]


class OrderedBatches(Sampler):
    """Batches of (image index, None), in order; of these every part[1]-th, from part[0] on."""

    def __init__(self, num_images: int, batch_size: int, part: tuple[int, int]):
        self.num_images, self.batch_size = num_images, batch_size
        self.starts = range(part[0] * batch_size, num_images, part[1] * batch_size)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[tuple[int, None]]]:
        for start in self.starts:
            yield [(index, None) for index in range(start, min(start + self.batch_size, self.num_images))]


class ShuffledBatches(Sampler):
    """Batches of (image index, number of the draw): epoch after epoch, batches running across their boundaries."""

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        steps: int,
        seed: int,
        first_step: int = 0,
        part: tuple[int, int] = (0, 1),
    ):
        self.num_images, self.batch_size, self.steps, self.seed = num_images, batch_size, steps, seed
        self.first_step, self.part = first_step, part

    def __len__(self) -> int:
        return max(self.steps - self.first_step, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        draws = self.draws(self.first_step * self.batch_size)
        share = self.batch_size // self.part[1]
        for _ in range(self.first_step, self.steps):
            batch = [next(draws) for _ in range(self.batch_size)]
            yield batch[self.part[0] * share : (self.part[0] + 1) * share]

    def draws(self, first: int) -> Iterator[tuple[int, int]]:
        random, draw = np.random.default_rng(self.seed), 0
        while True:
            order = random.permutation(self.num_images)
            skipped = min(max(first - draw, 0), self.num_images)
            yield from ((int(index), place) for place, index in enumerate(order[skipped:], draw + skipped))
            draw += self.num_images


def extended(image: np.ndarray, window: tuple[int, int]) -> np.ndarray:  # [H, W, C]
    """The image, reflected at the right and bottom until it is as large as the window."""
    height, width = (max(w - size, 0) for size, w in zip(image.shape[:2], window, strict=True))
    return np.pad(image, ((0, height), (0, width), (0, 0)), mode="reflect") if height or width else image


def stack(images: Sequence[np.ndarray | InputError]) -> Tensor | InputError:
    """Images uint8 [H, W, C] as [B, C, H, W], channels last in memory; or the first error among them."""
    if error := next((image for image in images if isinstance(image, InputError)), None):
        return error
    batch = torch.from_numpy(np.stack(images))
    if get_worker_info() is not None:  # here, not when it is sent: an error of the sender's thread reaches nobody
        batch.share_memory_()
    return batch.permute(0, 3, 1, 2)


def leave_signals(worker: int) -> None:
    """Leave the signals that end a job to the run, which needs its workers until the step at hand is done.

    SIGTERM ends a worker only if the run sends it, as multiprocessing does at its exit and waits for the worker's end.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=end_when_told, args=(parent_process().pid,), daemon=True).start()


def end_when_told(run: int) -> None:  # the id of its process
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
        pass
    os._exit(0)
