"""Plain references: whole matrices in one process, a loop over parameters, nothing shared with optim's engine."""

import math

import torch

AWKWARD = [(1, 7), (7, 1), (2, 9), (3, 5), (10, 4), (16, 16), (33, 12), (12, 40)]  # no two may share a stack
STACKED = [(8, 24), (24, 8), (8, 24), (16, 16), (16, 16), (16, 16), (5, 3), (3, 5)]
SCALES = {
    "keller": lambda m, n: max(1, m / n) ** 0.5,
    "match_rms": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "rms_to_rms": lambda m, n: (m / n) ** 0.5,
}


def seeded(shape, *key, dtype=torch.float32):
    """The same random tensor on every rank, for every key."""
    generator = torch.Generator().manual_seed(_mix(key))
    return torch.randn(shape, generator=generator, dtype=dtype)


def _mix(key):
    seed = 17
    for part in key:
        seed = (seed * 1_000_003 + int(part) + 1) % 2**31
    return seed


def svd_polar(x):
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def plain_muon(weights, gradients, polar, lr=0.02, mu=0.95, nesterov=True, wd=0.0, cautious=False, scale="keller"):
    """``gradients[t][i]`` of weight i at step t (None: skipped); ``polar`` maps one matrix to its factor."""
    weights = [w.clone() for w in weights]
    momenta = [torch.zeros_like(w) for w in weights]
    for step in gradients:
        for i, g in enumerate(step):
            if g is None:
                continue
            momenta[i] = momenta[i].lerp(g, 1 - mu)
            update = polar(momenta[i].lerp(g, 1 - mu) if nesterov else momenta[i])
            if cautious:
                weights[i] = weights[i] - lr * wd * weights[i] * (update * weights[i] >= 0)
            else:
                weights[i] = weights[i] * (1 - lr * wd)
            weights[i] = weights[i].add(update, alpha=-lr * SCALES[scale](*weights[i].shape))
    return weights


def relative(a, b):
    return (a - b).norm().item() / max(b.norm().item(), math.ulp(1.0))
