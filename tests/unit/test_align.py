"""Alignment by landmarks: the similarity against other ways to it, the warp against pixels that are known."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline.synthetic import draw_face
from eval.align import TEMPLATE, align, aligns, similarities
from eval.errors import EvalError
from eval.images import MAX_PIXELS, MAX_SIDE, FaceImages


def similarity(scale: float, angle: float, shift: tuple[float, float]) -> np.ndarray:
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[cos, -sin, shift[0]], [sin, cos, shift[1]]])


def placed(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:, :2].T + matrix[:, 2]


def umeyama(points: np.ndarray) -> np.ndarray:
    """Umeyama's equations 40 to 43, by singular value decomposition."""
    centre, to = points.mean(axis=0), TEMPLATE.mean(axis=0)
    u, d, vt = np.linalg.svd((TEMPLATE - to).T @ (points - centre) / 5)
    sign = np.diag([1, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ sign @ vt
    scale = np.trace(np.diag(d) @ sign) / ((points - centre) ** 2).sum(axis=1).mean()
    return np.column_stack([scale * rotation, to - scale * rotation @ centre])


def least_squares(points: np.ndarray) -> np.ndarray:
    """The best (a, b, s, t) of x' = a x - b y + s, y' = b x + a y + t, as ten equations in four unknowns."""
    equations = [row for x, y in points for row in ([x, -y, 1, 0], [y, x, 0, 1])]
    a, b, s, t = np.linalg.lstsq(np.array(equations), TEMPLATE.ravel(), rcond=None)[0]
    return np.array([[a, -b, s], [b, a, t]])


def test_similarities_equal_umeyama_and_least_squares():
    rng = np.random.default_rng(0)
    landmarks = [
        placed(similarity(rng.uniform(0.2, 5), rng.uniform(-3, 3), tuple(rng.uniform(-300, 300, 2))), TEMPLATE) + rng.normal(0, 6, (5, 2))
        for _ in range(200)
    ]
    for points, found in zip(landmarks, similarities(landmarks), strict=True):
        np.testing.assert_allclose(found, umeyama(points), rtol=0, atol=1e-9)
        np.testing.assert_allclose(found, least_squares(points), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("scale", "angle", "shift"), [(1, 0, (0, 0)), (1, 0, (7, -3)), (0.5, 0.4, (20, 50)), (3, -2.5, (-400, 90))])
def test_a_known_transform_is_inverted(scale, angle, shift):
    landmarks = placed(similarity(scale, angle, shift), TEMPLATE)
    found = similarities(landmarks)
    np.testing.assert_allclose(placed(found, landmarks), TEMPLATE, atol=1e-9)
    assert np.hypot(found[0, 0], found[1, 0]) == pytest.approx(1 / scale)


def test_a_mirrored_face_is_not_mirrored_back():
    mirrored = TEMPLATE * (-1, 1) + np.array([112, 0])
    np.testing.assert_allclose(similarities(mirrored), umeyama(mirrored), atol=1e-9)
    assert np.linalg.det(similarities(mirrored)[:, :2]) > 0


def test_landmarks_that_place_no_face_are_told_apart():
    good = placed(similarity(2, 0.3, (5, 6)), TEMPLATE)
    nan, infinite = good.copy(), good.copy()
    nan[2, 1], infinite[4, 0] = np.nan, np.inf
    equal = np.full((5, 2), 33.3)
    off_centre = TEMPLATE - TEMPLATE.mean(axis=0)
    w = off_centre[:, 0] + 1j * off_centre[:, 1]
    z = np.array([1, 1j, -1, -1j, 0], dtype=complex)
    z = 40 * (z - z.mean() - w * (w.conj() @ (z - z.mean())) / (w.conj() @ w))  # as unlike the template as can be
    unlike = np.column_stack([z.real, z.imag])
    assert aligns([good, nan, infinite, equal, unlike]).tolist() == [True, False, False, False, False]
    assert bool(aligns(good))


def test_landmarks_of_the_template_leave_every_pixel():
    face = draw_face(0, 1, 0)
    np.testing.assert_array_equal(align(face, TEMPLATE), face)


def test_a_shift_moves_pixels_and_leaves_black_where_the_picture_ends():
    face = draw_face(0, 2, 0)
    found = align(face, TEMPLATE - (5, 3))  # the face lies 5 to the left and 3 above of where it belongs
    np.testing.assert_array_equal(found[3:, 5:], face[:-3, :-5])
    assert not found[:3].any()
    assert not found[:, :5].any()


def test_the_warp_is_bilinear_at_the_field_s_32nds_of_a_pixel():
    """OpenCV 4 reads at multiples of 1/32 pixel. One that does not, such as OpenCV 5, changes published numbers."""
    rng = np.random.default_rng(3)
    picture = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
    matrix = similarity(1.37, 0.21, (12.3, 30.7))  # from the aligned face to the picture
    v, u = np.mgrid[:112, :112]
    at = []  # 32nds of a pixel: products are rounded to 1/1024, their sum to 1/32
    for row in matrix:
        along, across = (np.rint(1024 * part).astype(int) for part in (row[0] * u, row[1] * v + row[2]))
        at.append((along + across + 16) >> 5)
    bordered = np.pad(picture, ((300, 300), (300, 300), (0, 0))).astype(int)
    left, top, x, y = at[0] // 32 + 300, at[1] // 32 + 300, at[0] % 32, at[1] % 32
    wanted = sum(
        bordered[top + j, left + i] * ((x if i else 32 - x) * (y if j else 32 - y))[..., None] for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))
    )
    np.testing.assert_array_equal(align(picture, placed(matrix, TEMPLATE)), (wanted + 512) >> 10)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_images_with_landmarks_are_cut_out_in_rgb():
    face = draw_face(0, 3, 0)
    scene = np.zeros((200, 300, 3), np.uint8)
    scene[40:152, 100:212] = face
    images = FaceImages(["scene"], lambda image: png(scene), np.array([TEMPLATE + np.array([100, 40])]))
    np.testing.assert_array_equal(images.decode(0), face)


def test_without_landmarks_an_image_of_another_size_is_refused():
    images = FaceImages(["a.png"], lambda image: png(np.zeros((200, 112, 3), np.uint8)))
    with pytest.raises(EvalError, match=r"^a\.png: expected an aligned 112 x 112 face, found 112 x 200 pixels$"):
        images.decode(0)


def test_a_picture_that_claims_to_be_gigapixels_is_refused_before_it_is_decoded():
    data = bytearray(png(np.zeros((8, 8, 3), np.uint8)))
    data[16:24] = (9000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    images = FaceImages(["a.png"], lambda image: bytes(data), TEMPLATE[None])
    with pytest.raises(EvalError, match=rf"^a\.png: expected at most {MAX_PIXELS} pixels, .* found 9000 x 9000$"):
        images.decode(0)


@pytest.mark.parametrize("shape", [(2, MAX_SIDE, 3), (MAX_SIDE, 2, 3)])
def test_a_picture_of_the_longest_side_is_warped_and_one_that_opencv_refuses_is_named(shape):
    assert FaceImages(["a.png"], lambda image: png(np.zeros(shape, np.uint8)), TEMPLATE[None]).decode(0).shape == (112, 112, 3)
    longer = [size + (size == MAX_SIDE) for size in shape]
    with pytest.raises(EvalError, match=rf"^a\.png: expected at most .*, found {longer[1]} x {longer[0]}$"):
        FaceImages(["a.png"], lambda image: png(np.zeros(longer, np.uint8)), TEMPLATE[None]).decode(0)


@pytest.mark.parametrize("data", [b"", b"no picture", png(np.zeros((64, 64), np.uint16))])
def test_a_file_that_is_no_picture_of_8_bits_is_refused_by_name(data):
    images = FaceImages(["a.png"], lambda image: data, TEMPLATE[None])
    with pytest.raises(EvalError, match=r"^a\.png: (not a readable image|more than 8 bits)"):
        images.decode(0)
