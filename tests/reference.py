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
    target_cosine_square: float  # mean of the squares
    bias_grad: float | None  # of UniFace


def head_reference(
    embeddings,
    weight,
    labels,
    *,
    margin,
    scale,
    margin_gradient,
    scored=None,
    centers="learned",
    expectation=None,
    seen=None,
    t=None,
    bias=None,
    interclass_filter=None,
    memory=None,
    share=None,
):
    """Loss and gradients of one global micro-batch.

    embeddings [B, D], weight [C, D], labels [B]; margin: (m1, m2, m3), or what gives it for (norm of one embedding, norms of all);
    scored: classes in the softmax (None: all); centers: the mode; expectation [C, D] and seen [C]: what the modes with expectations need;
    t: CurricularFace's state before this batch (None: negatives as they are); bias: UniFace's b (None: softmax); interclass_filter: cosine
    above which a negative is left out; memory [C, D] and share [C]: VPL's M_j and how much of it is mixed in.
    """
    f = embeddings.double().clone().requires_grad_()
    w = weight.double().clone().requires_grad_()
    in_softmax = torch.zeros(len(w), dtype=torch.bool)
    in_softmax[torch.arange(len(w)) if scored is None else torch.as_tensor(scored)] = True
    direction = f / f.norm(dim=1, keepdim=True)
    unit_w = w / w.norm(dim=1, keepdim=True)
    if centers == "vpl":
        mixed = (1 - share.double())[:, None] * unit_w + share.double()[:, None] * memory.double()
        unit_w = mixed / mixed.norm(dim=1, keepdim=True)
    cos_w = direction @ unit_w.T
    cos_e = None if expectation is None else direction @ expectation.double().T
    own_cosines = cos_w[torch.arange(len(labels)), labels].detach()
    if centers == "replace":
        own_cosines = cos_e[torch.arange(len(labels)), labels].detach()[seen[labels]]
    if t is not None and len(own_cosines):
        t = 0.01 * float(own_cosines.mean()) + 0.99 * t
    b_learned = torch.tensor(0.0 if bias is None else bias, dtype=torch.float64, requires_grad=True)
    norms = f.norm(dim=1)
    losses = []
    for i, y in enumerate(labels.tolist()):
        assert in_softmax[y], "a positive is missing from the scored classes"
        negatives = in_softmax.clone()
        negatives[y] = False
        m, penalty = (margin, 0.0) if isinstance(margin, tuple) else margin(norms[i], norms.detach())

        def ratio(negative_cosines, present, target):  # sum of exp(negative) / exp(target), as a logarithm
            others = negative_cosines[present]
            if interclass_filter is not None:
                others = others[others <= interclass_filter]
            if t is not None:
                hard = others > target.detach()
                others = torch.where(hard, others * (t + others), others)
            if bias is not None:  # one sigmoid a class
                below = torch.log1p(torch.exp(b_learned - scale * target))
                return torch.log(torch.expm1(below + torch.log1p(torch.exp(scale * others - b_learned)).sum()))
            return torch.logsumexp(scale * others, 0) - scale * target

        def with_margin(cosine, m=m):
            return margin_reference(cosine, m, margin_gradient)

        zero = torch.zeros((), dtype=torch.float64)
        a = ratio(cos_w[i], negatives, with_margin(cos_w[i, y]))
        if centers in ("learned", "vpl") or (centers != "replace" and not seen[y]):
            loss = torch.logaddexp(zero, a)
        elif centers == "pco":
            b = ratio(cos_e[i], negatives & seen, with_margin(cos_e[i, y]))
            loss = torch.log1p(a.exp() + b.exp())
        elif centers == "pco_shared":  # one set of hard negatives, against the target of w
            b = a + scale * (with_margin(cos_w[i, y]) - with_margin(cos_e[i, y]))
            loss = torch.log1p(a.exp() + b.exp())
        elif centers == "epl":
            target = cos_e[i, y] - 0.7 * cos_e[i, y].detach()
            if t is None:
                b = ratio(cos_e[i], negatives & seen, target)
            else:  # what is hard is judged with the margin, in every mode
                hard_at = with_margin(cos_e[i, y])
                b = ratio(cos_e[i], negatives & seen, hard_at) + scale * (hard_at - target)
            loss = (torch.logaddexp(zero, a) + torch.logaddexp(zero, b)) / 2
        elif centers == "replace":
            b = ratio(cos_e[i], negatives & seen, with_margin(cos_e[i, y]))
            loss = torch.logaddexp(zero, b) if seen[y] else zero * direction[i].sum()
        losses.append(loss + penalty)
    loss = torch.stack(losses).mean()
    loss.backward()
    centers_grad = torch.zeros_like(w) if w.grad is None else w.grad
    cosines = (float(own_cosines.mean()), float((own_cosines**2).mean()))
    return HeadReference(loss.item(), f.grad, centers_grad, *cosines, None if bias is None else float(b_learned.grad))


def margin_reference(cosine, margin, margin_gradient):
    """cos(m1 theta + m2) - m3; past pi it goes on with slope 1 in the cosine, below 0 it stays at 1."""
    m1, m2, m3 = margin
    variable = cosine.detach() if margin_gradient == "straight_through" else cosine
    angle = m1 * math.acos(cosine.item()) + float(torch.as_tensor(m2).detach())
    if angle > math.pi:
        value = variable - torch.cos(torch.as_tensor((math.pi - m2) / m1, dtype=torch.float64)) - 1
    elif angle < 0:
        value = torch.ones_like(cosine)
    else:
        value = torch.cos(m1 * torch.acos(variable) + m2)
    if margin_gradient == "straight_through":
        value = value + cosine - cosine.detach()
    return value - m3


def adaface_reference(m, h, mean=20.0, std=100.0):
    """AdaFace's margin of one sample, for head_reference; mean and std: before this batch."""

    def margin(norm, norms):
        clipped = [min(max(float(n), 0.001), 100.0) for n in norms]
        average = sum(clipped) / len(clipped)
        deviation = math.sqrt(sum((n - average) ** 2 for n in clipped) / (len(clipped) - 1))
        quality = (
            (min(max(float(norm.detach()), 0.001), 100.0) - (0.99 * mean + 0.01 * average)) / (0.99 * std + 0.01 * deviation + 1e-3) * h
        )
        quality = min(max(quality, -1.0), 1.0)
        return (1.0, -m * quality, m * quality + m), 0.0

    return margin


def magface_reference(l_a, u_a, l_m, u_m, lambda_g):
    """MagFace's margin of one sample and its penalty, differentiable in the norm, for head_reference."""

    def margin(norm, norms):
        a = torch.clamp(norm, l_a, u_a)
        return (1.0, l_m + (a - l_a) * (u_m - l_m) / (u_a - l_a), 0.0), lambda_g * (1 / a + a / u_a**2)

    return margin


def expectation_reference(expectation, seen, embeddings, labels):
    """One update of e from all samples of a step: (new e [C, D], new seen [C]) in float64."""
    expectation, seen = expectation.double().clone(), seen.clone()
    for y, mean in class_means_reference(embeddings, labels).items():
        if seen[y]:
            a = 1 / (1 + math.exp(-float(expectation[y] @ mean)))
            mixed = a * expectation[y] + (1 - a) * mean
        else:
            mixed = mean
        expectation[y] = mixed / mixed.norm()
        seen[y] = True
    return expectation, seen


def last_embedding_reference(memory, written, embeddings, labels, step):
    """VPL's M and the step that wrote it, after optimizer step ``step`` on these samples: (new M [C, D], new written [C])."""
    memory, written = memory.double().clone(), written.clone()
    for y, mean in class_means_reference(embeddings, labels).items():
        memory[y], written[y] = mean, step
    return memory, written


def class_means_reference(embeddings, labels):
    """{class: mean of its unit embeddings, normalised}"""
    means = {}
    for y in set(labels.tolist()):
        members = [embeddings[i].double() / embeddings[i].double().norm() for i in range(len(labels)) if int(labels[i]) == y]
        mean = sum(members) / len(members)
        means[y] = mean / mean.norm()
    return means


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
