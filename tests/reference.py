"""The head in plain float64, sample by sample, on one process with every class. Imports nothing from the project.

Losses are written as in the papers, with autograd for the gradients of the exact rule; nothing is chunked, shifted or sharded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class HeadReference:
    loss: float
    embeddings_grad: torch.Tensor  # [B, D] of the mean loss
    centers_grad: torch.Tensor  # [C, D]
    target_cosine: float


def head_reference(
    embeddings, weight, labels, *, margin, scale, margin_gradient, scored=None, centers="learned", expectation=None, seen=None, t=None
):
    """Loss and gradients of one global micro-batch.

    embeddings [B, D], weight [C, D], labels [B]; scored: classes in the softmax (None: all); centers: the mode; expectation [C, D] and
    seen [C]: what every mode but ``learned`` needs; t: CurricularFace's state before this batch (None: negatives as they are).
    """
    f = embeddings.double().clone().requires_grad_()
    w = weight.double().clone().requires_grad_()
    in_softmax = torch.zeros(len(w), dtype=torch.bool)
    in_softmax[torch.arange(len(w)) if scored is None else torch.as_tensor(scored)] = True
    direction = f / f.norm(dim=1, keepdim=True)
    cos_w = direction @ (w / w.norm(dim=1, keepdim=True)).T
    cos_e = None if expectation is None else direction @ expectation.double().T
    own_cosines = cos_w[torch.arange(len(labels)), labels].detach()
    if centers == "replace":
        own_cosines = cos_e[torch.arange(len(labels)), labels].detach()[seen[labels]]
    if t is not None and len(own_cosines):
        t = 0.01 * float(own_cosines.mean()) + 0.99 * t
    losses = []
    for i, y in enumerate(labels.tolist()):
        assert in_softmax[y], "a positive is missing from the scored classes"
        negatives = in_softmax.clone()
        negatives[y] = False

        def ratio(negative_cosines, present, target):  # sum of exp(negative) / exp(target), as a logarithm
            others = negative_cosines[present]
            if t is not None:
                hard = others > target.detach()
                others = torch.where(hard, others * (t + others), others)
            return torch.logsumexp(scale * others, 0) - scale * target

        def with_margin(cosine):
            return margin_reference(cosine, margin, margin_gradient)

        zero = torch.zeros((), dtype=torch.float64)
        a = ratio(cos_w[i], negatives, with_margin(cos_w[i, y]))
        if centers == "learned" or (centers != "replace" and not seen[y]):
            losses.append(torch.logaddexp(zero, a))
        elif centers == "pco":
            b = ratio(cos_e[i], negatives & seen, with_margin(cos_e[i, y]))
            losses.append(torch.logaddexp(zero, torch.logaddexp(a, b)))
        elif centers == "pco_shared":  # one set of hard negatives, against the target of w
            b = a + scale * (with_margin(cos_w[i, y]) - with_margin(cos_e[i, y]))
            losses.append(torch.logaddexp(zero, torch.logaddexp(a, b)))
        elif centers == "epl":
            target = cos_e[i, y] - 0.7 * cos_e[i, y].detach()
            if t is None:
                b = ratio(cos_e[i], negatives & seen, target)
            else:  # what is hard is judged with the margin, in every mode
                hard_at = with_margin(cos_e[i, y])
                b = ratio(cos_e[i], negatives & seen, hard_at) + scale * (hard_at - target)
            losses.append((torch.logaddexp(zero, a) + torch.logaddexp(zero, b)) / 2)
        elif centers == "replace":
            b = ratio(cos_e[i], negatives & seen, with_margin(cos_e[i, y]))
            losses.append(torch.logaddexp(zero, b) if seen[y] else zero * direction[i].sum())
    loss = torch.stack(losses).mean()
    loss.backward()
    none = torch.zeros_like(w)
    return HeadReference(loss.item(), f.grad, none if w.grad is None else w.grad, float(own_cosines.mean()))


def margin_reference(cosine, margin, margin_gradient):
    """cos(m1 theta + m2) - m3; past pi it goes on with slope 1 in the cosine."""
    m1, m2, m3 = margin
    angle = m1 * math.acos(cosine.item()) + m2
    if angle > math.pi:
        value = cosine - math.cos((math.pi - m2) / m1) - 1
    else:
        value = torch.cos(m1 * torch.acos(cosine) + m2)
    if margin_gradient == "straight_through":
        value = cosine + (value - cosine).detach()
    return value - m3


def expectation_reference(expectation, seen, embeddings, labels):
    """One update of e from all samples of a step: (new e [C, D], new seen [C]) in float64."""
    expectation, seen = expectation.double().clone(), seen.clone()
    for y in set(labels.tolist()):
        members = [embeddings[i].double() / embeddings[i].double().norm() for i in range(len(labels)) if int(labels[i]) == y]
        mean = sum(members) / len(members)
        mean = mean / mean.norm()
        if seen[y]:
            a = 1 / (1 + math.exp(-float(expectation[y] @ mean)))
            mixed = a * expectation[y] + (1 - a) * mean
        else:
            mixed = mean
        expectation[y] = mixed / mixed.norm()
        seen[y] = True
    return expectation, seen


def adamw_reference(weight, grads, *, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8):
    """Row-sparse AdamW, row by row: ``grads`` is a list (one per step) of {row: gradient}. Returns the new weight in float64."""
    weight = weight.double().clone()
    mean, square, steps = torch.zeros_like(weight), torch.zeros_like(weight), [0] * len(weight)
    for step in grads:
        for row, grad in step.items():
            grad = grad.double()
            steps[row] += 1
            mean[row] = betas[0] * mean[row] + (1 - betas[0]) * grad
            square[row] = betas[1] * square[row] + (1 - betas[1]) * grad * grad
            corrected = mean[row] / (1 - betas[0] ** steps[row])
            denominator = (square[row] / (1 - betas[1] ** steps[row])).sqrt() + eps
            weight[row] = weight[row] * (1 - lr * weight_decay) - lr * corrected / denominator
    return weight


def relative_error(actual, expected):
    """||actual - expected|| / ||expected||; the absolute norm where expected is zero."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    norm = float(expected.norm())
    return float((actual - expected).norm()) / (norm if norm else 1.0)
