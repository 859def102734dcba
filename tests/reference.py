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


def head_reference(embeddings, weight, labels, *, margin, scale, margin_gradient, scored=None, expectation=None, seen=None):
    """Loss and gradients of one global micro-batch.

    embeddings [B, D], weight [C, D], labels [B]; scored: set of classes in the softmax (None: all); expectation [C, D] and seen [C]
    switch the second anchor on.
    """
    f = embeddings.double().clone().requires_grad_()
    w = weight.double().clone().requires_grad_()
    scored = sorted(set(range(len(w))) if scored is None else set(int(j) for j in scored))
    total, cosines = 0.0, []
    for i, y in enumerate(labels.tolist()):
        assert y in scored, "a positive is missing from the scored classes"
        direction = f[i] / f[i].norm()
        terms = []
        anchors = [(w, [True] * len(w))]
        if expectation is not None:
            anchors.append((expectation.double(), seen.tolist()))
        for rows, present in anchors:
            if not present[y]:
                continue
            cos_y = (direction * rows[y]).sum() / rows[y].norm()
            if rows is w:
                cosines.append(cos_y.item())
            z = scale * margin_reference(cos_y, margin, margin_gradient)
            others = [scale * (direction * rows[j]).sum() / rows[j].norm() for j in scored if j != y and present[j]]
            terms += [other - z for other in others]
        total = total + torch.logsumexp(torch.stack([torch.zeros((), dtype=torch.float64), *terms]), 0)
    loss = total / len(labels)
    loss.backward()
    return HeadReference(loss.item(), f.grad, w.grad, sum(cosines) / len(cosines))


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
