"""The IJB protocol in plain Python, number by number, in double precision; imports nothing of the project."""

import math
from bisect import bisect_left


def pooled(images, members, norm, detector, flip):
    """Template id -> unit vector.

    images: name -> (embedding, embedding of the mirror, detector score); members: lists of (name, template, media).
    """
    by_template = {}
    for name, template, media in members:
        by_template.setdefault(template, {}).setdefault(media, []).append(name)
    result = {}
    for template, by_media in by_template.items():
        total = None
        for names in by_media.values():
            vectors = [_image(*images[name], norm, detector, flip) for name in names]
            mean = [sum(values) / len(vectors) for values in zip(*vectors, strict=True)]
            total = mean if total is None else [a + b for a, b in zip(total, mean, strict=True)]
        length = math.sqrt(sum(value * value for value in total))
        result[template] = [value / length for value in total]
    return result


def _image(embedding, mirror, score, norm, detector, flip):
    vector = [float(value) for value in embedding]
    if flip:
        vector = [a + float(b) for a, b in zip(vector, mirror, strict=True)]
    if not norm:
        length = math.sqrt(sum(value * value for value in vector))
        vector = [value / length for value in vector]
    return [value * score for value in vector] if detector else vector


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def strict_tar(genuine, impostor, far):
    """(TAR, threshold, FAR there): of all thresholds whose FAR is at most ``far``, the lowest score that occurs; None if none does."""
    best = None
    for threshold, false, true in _points(genuine, impostor):
        if false / len(impostor) <= far:
            best = (true / len(genuine), threshold, false / len(impostor))
    return best


def _points(genuine, impostor):
    """(threshold, false accepts, true accepts) for every score that occurs, falling."""
    genuine, impostor = sorted(genuine), sorted(impostor)
    for threshold in sorted({*genuine, *impostor}, reverse=True):
        yield threshold, *(len(scores) - bisect_left(scores, threshold) for scores in (impostor, genuine))


def nearest_tar(genuine, impostor, far):
    """(TAR, FAR) where the FAR of the ROC curve is nearest to ``far``; the curve is thinned as scikit-learn does by default."""
    points = [(false, true) for _, false, true in _points(genuine, impostor)]
    kept = []
    for i, point in enumerate(points):
        ends = i in (0, len(points) - 1)
        if ends or [b - a for a, b in zip(points[i - 1], point, strict=True)] != [b - a for a, b in zip(point, points[i + 1], strict=True)]:
            kept.append(point)
    best = None
    for false, true in [*reversed(kept), (0, 0)]:
        distance = abs(false / len(impostor) - far)
        if best is None or distance < best[0]:
            best = (distance, true / len(genuine), false / len(impostor))
    return best[1:]


def searched(vectors, gallery, probes, ks, fpirs):
    """({k: rank-k}, {fpir: TPIR}); gallery and probes: template id -> subject."""
    enrolled = {subject: template for template, subject in gallery.items()}
    ranks, found, impostors = [], [], []
    for probe, subject in probes.items():
        scores = {template: dot(vectors[probe], vectors[template]) for template in gallery}
        if subject not in enrolled:
            impostors.append(max(scores.values()))
            continue
        mate = scores.pop(enrolled[subject])
        ranks.append(1 + sum(score >= mate for score in scores.values()))
        found.append(mate if ranks[-1] == 1 else None)
    tpir = {}
    for fpir in fpirs:
        shares = [0.0]
        for threshold in {*impostors, *(score for score in found if score is not None)}:
            if sum(score >= threshold for score in impostors) / len(impostors) <= fpir:
                shares.append(sum(score is not None and score >= threshold for score in found) / len(found))
        tpir[fpir] = max(shares)
    return {k: sum(rank <= k for rank in ranks) / len(ranks) for k in ks}, tpir
