"""Made-up sets in the layout of the field's IJB release."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.synthetic import draw_face
from eval.align import TEMPLATE
from eval.ijb_meta import GALLERIES

PEOPLE, STILLS, FRAMES = 12, 2, 3  # of each person: templates of STILLS stills and one video of FRAMES frames
TEMPLATES_EACH = 3


def write_ijb(root: Path, target: str = "IJBC") -> dict[str, np.ndarray]:
    """Faces turned and placed in larger pictures, with landmarks. Person p has the templates 10 p + 1, + 2 and + 3.

    The first of each is enrolled: people 0 to 3 in one gallery, 4 to 7 in the other, 8 to 11 in none; the other two are probes. Pairs are
    all of two templates. Returns: name of an image -> the face in it, as it was drawn.
    """
    rng = np.random.default_rng(0)
    (root / "meta").mkdir(parents=True)
    (root / "loose_crop").mkdir()
    faces: dict[str, np.ndarray] = {}
    members, points = [], []
    templates = [(person, 10 * person + number) for person in range(PEOPLE) for number in range(1, TEMPLATES_EACH + 1)]
    for person, template in templates:
        for place in range(STILLS + FRAMES):
            name = f"{len(faces) + 1}.png"
            faces[name] = draw_face(0, person, len(faces))
            members.append(f"{name} {template} {template * 100 + min(place, STILLS)}")
            points.append(f"{name} {_placed(faces[name], root / 'loose_crop' / name, rng)} {rng.uniform(0.5, 1):.4f}")
    write(root, target, "face_tid_mid.txt", members)
    write(root, target, "name_5pts_score.txt", points)
    pairs = [f"{t} {u} {int(p == q)}" for i, (p, t) in enumerate(templates) for q, u in templates[:i]]
    write(root, target, "template_pair_label.txt", pairs)
    for gallery, people in zip(GALLERIES[target], (range(4), range(4, 8)), strict=True):
        write_subjects(root, target, f"gallery_{gallery}", [(10 * person + 1, person) for person in people])
    write_subjects(root, target, "probe_mixed", [(template, person) for person, template in templates if person >= 8 or template % 10 > 1])
    return faces


def write(root: Path, target: str, name: str, lines: list[str]) -> Path:
    path = root / "meta" / f"{target.lower()}_{name}"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_subjects(root: Path, target: str, name: str, rows: list[tuple[int, int]]) -> None:
    with (root / "meta" / f"{target.lower()}_1N_{name}.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["TEMPLATE_ID", "SUBJECT_ID", "FILENAME", "FACE_X", "FACE_Y", "FACE_WIDTH", "FACE_HEIGHT"])
        lines.writerows([*row, "img/1, a.jpg", 1, 2, 3, 4] for row in rows for _ in range(2))  # a line for each image


def _placed(face: np.ndarray, path: Path, rng: np.random.Generator) -> str:
    """Write a picture of the face, a quarter turned or not, somewhere in it. Returns: its landmarks, as in the file."""
    left, top, turns = (int(rng.integers(0, high)) for high in (90, 40, 4))
    scene = rng.integers(0, 256, (160, 210, 3), dtype=np.uint8)
    scene[top : top + 112, left : left + 112] = np.rot90(face, turns)
    Image.fromarray(scene).save(path)
    points = TEMPLATE
    for _ in range(turns):  # x along, y down: a turn to the left brings (x, y) to (y, 111 - x)
        points = np.stack([points[:, 1], 111 - points[:, 0]], axis=1)
    return " ".join(f"{value:.4f}" for value in (points + np.array([left, top])).ravel())
