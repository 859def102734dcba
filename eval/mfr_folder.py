"""Sets of one's own in the form of MFR-Ongoing: folders of aligned 112 x 112 JPEG or PNG images.

    DIR/mask/plain/<identity>/<image>         the same people without a mask
    DIR/mask/masked/<identity>/<image>        and with one
    DIR/children/<identity>/<image>
    DIR/african/<identity>/<image>            likewise caucasian, south_asian, east_asian

Any of the six may be absent. Everything else is refused rather than skipped, except names that begin with a dot: a folder that is none of
these, a file where a folder of images belongs, one of another kind than an image, an identity without an image. In mask/ a person has one
name on both sides. An identity must not lie in two races, where its images would count as impostors of each other in MR-All: people of
two races who share a name, such as a running number, must be told apart by it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.errors import EvalError
from eval.images import IMAGE_SUFFIXES, FaceImages, read_image
from eval.mfr_pairs import Images

RACES = ("african", "caucasian", "south_asian", "east_asian")
FOLDERS = ("mask", "children", *RACES)
MASK_SIDES = ("plain", "masked")


@dataclass(frozen=True)
class Section:
    """The images of one folder of identities."""

    folder: Path
    identities: tuple[str, ...]  # ascending
    paths: tuple[str, ...]  # [n], identity after identity
    owners: np.ndarray  # [n] int64, number of each image's identity


@dataclass(frozen=True)
class MfrFolder:
    """What a folder holds; at least one of the three."""

    mask: tuple[Section, Section] | None  # plain, masked
    children: Section | None
    races: dict[str, Section]  # those there are, in the order of RACES


def read_folder(folder: str | Path) -> MfrFolder:
    """List every image, see the module; none is opened.

    Raises: EvalError that names the file or folder that does not belong, or the identity that lies in two races.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EvalError(f"{folder}: no such folder")
    names = _folders_in(folder)
    strangers = [name for name in names if name not in FOLDERS]
    if strangers or not names:
        found = f"found {strangers[0]}" if strangers else "found none of them"
        raise EvalError(f"{folder}: expected folders named {', '.join(FOLDERS)}, or some of them, {found}")
    mask = None
    if "mask" in names:
        sides = _folders_in(folder / "mask")
        if sorted(sides) != sorted(MASK_SIDES):
            raise EvalError(f"{folder / 'mask'}: expected the folders {' and '.join(MASK_SIDES)}, found {', '.join(sides) or 'nothing'}")
        plain, masked = (_read_section(folder / "mask" / side) for side in MASK_SIDES)
        mask = (plain, masked)
    races = {race: _read_section(folder / race) for race in RACES if race in names}
    _refuse_common_identities(races)
    return MfrFolder(mask, _read_section(folder / "children") if "children" in names else None, races)


def face_images(sections: tuple[Section, ...]) -> FaceImages:
    """All images, section after section."""
    paths = [path for section in sections for path in section.paths]
    return FaceImages(paths, lambda image: read_image(paths[image]))


def labelled(sections: tuple[Section, ...]) -> Images:
    """The people on those images: one name, one person."""
    numbers = {name: number for number, name in enumerate(sorted({name for each in sections for name in each.identities}))}
    labels = [np.array([numbers[name] for name in section.identities])[section.owners] for section in sections]
    return Images(np.concatenate(labels), tuple(len(section.paths) for section in sections))


def _read_section(folder: Path) -> Section:
    identities = _folders_in(folder)
    if not identities:
        raise EvalError(f"{folder}: expected a folder for each identity, found nothing")
    paths, owners = [], []
    for number, identity in enumerate(identities):
        images = _entries(folder / identity)
        for entry in images:
            if not entry.name.lower().endswith(IMAGE_SUFFIXES) or not entry.is_file():
                raise EvalError(f"{entry.path}: expected an image, {', '.join(IMAGE_SUFFIXES)}; move it away")
            paths.append(entry.path)
            owners.append(number)
        if not images:
            raise EvalError(f"{folder / identity}: an identity without an image; remove the folder")
    return Section(folder, tuple(identities), tuple(paths), np.array(owners))


def _refuse_common_identities(races: dict[str, Section]) -> None:
    owner: dict[str, Section] = {}
    for section in races.values():
        for identity in section.identities:
            if identity in owner:
                first = owner[identity].folder / identity
                raise EvalError(f"{first} and {section.folder / identity}: one identity in two races; rename one if they are two people")
            owner[identity] = section


def _folders_in(folder: Path) -> list[str]:
    entries = _entries(folder)
    for entry in entries:
        if not entry.is_dir():
            raise EvalError(f"{entry.path}: expected folders alone here, found a file; move it away")
    return [entry.name for entry in entries]


def _entries(folder: Path) -> list[os.DirEntry]:
    """What lies in a folder, by name; hidden files are no part of it."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
