import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.pack import pack
from data_pipeline.synthetic import draw_face
from tests.unit.record_sets import image_folder, write_records


@pytest.fixture(scope="session")
def packed_people(tmp_path_factory):
    """29 images of 6 identities in 3 shards; the colour of an image tells its label. Its source lies beside it, as ``src``."""
    root = tmp_path_factory.mktemp("people")
    image_folder(root / "src", {"a": 7, "b": 1, "c": 9, "d": 2, "e": 6, "f": 4})
    pack([root / "src"], root / "set", 3)
    return root / "set"


@pytest.fixture(scope="session")
def face_set(tmp_path_factory):
    """24 synthetic faces as PNG records of a field set, the label is the number: (its folder, the pixels [24, 112, 112, 3] uint8)."""
    folder = tmp_path_factory.mktemp("faces")
    faces = np.stack([draw_face(0, identity, 0) for identity in range(24)])
    records = []
    for number, face in enumerate(faces):
        file = io.BytesIO()
        Image.fromarray(face).save(file, "PNG")
        records.append((number, float(number), file.getvalue()))
    write_records(folder / "train.rec", records)
    return folder, faces
