"""The images of a training: what it learns from and is validated on, and what must stay the same where it goes on."""

from dataclasses import replace
from typing import NamedTuple

from vqops.vqvae2.data.batches import fingerprints, hold_out
from vqops.vqvae2.data.images import Images
from vqops.vqvae2.data.photographs import held_out_photographs, training_photographs
from vqops.vqvae2.data.sources import load_images
from vqops.vqvae2.data.survey import Reading
from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.files.run_folder import NOT_LISTED, Listed
from vqops.vqvae2.progress import Progress
from vqops.vqvae2.training.options import ImageOptions


class Data(NamedTuple):
    whole: Images  # all that --data names
    training: Images
    held_out: Images
    apart: bool  # whether what is held out has a source of its own

    @property
    def listed(self) -> Listed:
        return Listed(self.whole.used_names, self.held_out.used_names if self.apart else None)


def identity(data: Data, window: tuple[int, int]) -> dict[str, object]:
    """What must be the same of the data where a run goes on."""
    return {
        "images": len(data.training),
        "image size": list(window),
        "pixels": fingerprints(data.training, window),
        "validation images": len(data.held_out),
        "validation pixels": fingerprints(data.held_out, window),
    }


def load_data(options: ImageOptions, progress: Progress, listed: Listed = NOT_LISTED) -> Data:
    """Training and validation images; says on screen what they are, and which are held out.

    `listed` are the images of the run that goes on.
    """
    if options.data is None:
        if options.data_key or options.val_data or options.val_key:
            keys = Field("data_key"), ", ", Field("val_data"), " and ", Field("val_key")
            raise InputError(*keys, " need ", Field("data"))
        progress.say("no --data: photographs of scikit-image, chelsea (a cat) held out")
        photographs = training_photographs()
        return Data(photographs, photographs, held_out_photographs(options.image_size), True)
    reading = Reading(None, options.background, options.skip_bad_images, listed.images, progress.console.quiet)
    images = load_images(options.data, options.data_key, reading=reading)
    images = replace(images, replaces=options.skip_bad_images)
    for line in images.lines:
        progress.say(line)
    if options.val_data is not None or options.val_key is not None:
        reading = replace(reading, channels=images.channels, listed=listed.validation)
        source = options.data if options.val_data is None else options.val_data
        held_out = load_images(source, options.val_key, ("validation", "test"), reading)
        held_out = replace(held_out, replaces=options.skip_bad_images)
        progress.say(f"validation on {held_out.lines[0]}")
        for line in held_out.lines[1:]:
            progress.say(line)
        return Data(images, images, held_out, True)
    if len(images) == 1:
        raise InputError(f"{options.data} holds one image: nothing can be held out, give ", Field("val_data"))
    training, held_out = (images.take(part) for part in hold_out(len(images), options.seed))
    progress.say(f"held out {len(held_out)} of {len(images)} images (5 %, seed {options.seed}) for validation")
    return Data(images, training, held_out, False)


def data_flags(options: ImageOptions) -> str:
    """What another command needs to read the same images."""
    key = f" --data-key {options.data_key}" if options.data_key else ""
    skip = " --skip-bad-images" if options.skip_bad_images else ""
    return f"--data {options.data or 'PATH'}{key}{skip}"
