"""Track 3's records in plain float64, each whole and unsharded, as their own code has them: what the presets are held
against.  A rule is called as ``rule(weight, grad, t)`` and changes the weight."""

import math

import torch


def wsd(lr, fall, horizon):
    return lambda t: lr if t / horizon < 1 - fall else lr * (1 - t / horizon) / fall


def power(lr, length, horizon):
    c = lr / length**1.2
    return lambda t: min(lr, c * (horizon - t) ** 1.2)


def ns12(x):
    x = x.mT if x.shape[0] > x.shape[1] else x
    for _ in range(12):
        a = x @ x.mT
        x = 2 * x + (-1.5 * a + 0.5 * a @ a) @ x
    return x


def orthogonalized(x, norm):
    out = ns12(x / norm)
    return math.sqrt(max(1.0, x.shape[0] / x.shape[1])) * (out.mT if x.shape[0] > x.shape[1] else out)


def muon_direction(u):
    return orthogonalized(u, u.norm() + 1e-7)


class AdamW:
    def __init__(self, lr, betas, decay=0.0, corrected=True):
        self.lr, self.betas, self.decay, self.corrected, self.m, self.v = lr, betas, decay, corrected, 0.0, 0.0

    def __call__(self, w, g, t):
        (b1, b2), lr = self.betas, self.lr(t)
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g**2
        c1, c2 = (1 - b1 ** (t + 1), 1 - b2 ** (t + 1)) if self.corrected else (1, 1)
        w.mul_(1 - lr * self.decay).sub_(lr * (self.m / c1) / ((self.v / c2).sqrt() + 1e-10))


class MuonH:
    def __init__(self, lr):
        self.lr, self.m = lr, 0.0

    def __call__(self, w, g, t):
        self.m = 0.95 * self.m + 0.05 * g
        o, r = muon_direction(0.05 * g + 0.95 * self.m), w.norm()
        n = w - self.lr(t) * r * o / o.norm().clamp_min(1e-10)
        w.copy_(n * r / n.norm().clamp_min(1e-10))


def s4(x):
    x = x if x.shape[0] <= x.shape[1] else x.mT
    return (x @ x.mT).norm().sqrt()


def cosine(x, y):
    return (x * y).sum() / (x.norm() * y.norm()).clamp_min(1e-30)


class SOAPMuon:
    """#44, or #46 where ``rows``."""

    def __init__(self, name, lr, mu, gate, rows):
        self.name, self.lr, self.mu, self.gate, self.rows = name, lr, mu, gate, rows
        self.m = self.v = 0.0
        self.grams, self.bases = [0.0, 0.0], []

    def __call__(self, w, g, t):
        mu, lr = self.mu(t), self.lr(t)
        self.m = mu * self.m + (1 - mu) * g
        u = (1 - mu) * g + mu * self.m
        x = self.rotated(u) if self.bases else u
        if "attn" in self.name:
            z = u + self.blend(x, u, g, t) * (x - u) if ".o." in self.name else x
            x = z * s4(u) / s4(z).clamp_min(1e-30)
        o, before = orthogonalized(x, s4(x).clamp_min(1e-7)), w.clone()
        c = (o * w).sum() / w.square().sum().clamp_min(1e-12)
        o = o - 0.5 * c * w if c < 0 else o
        dims = dict(dim=1, keepdim=True) if self.rows else {}
        sizes, steps = w.norm(**dims).clamp_min(1e-8), o.norm(**dims).clamp_min(1e-8)
        o = o * (0.3825 * sizes / steps).clamp_min(1)
        r = w.norm().clamp_min(1e-8)
        to = (r - lr * (o * w).sum() / r).clamp_min(1e-8)
        w.sub_(lr * o)
        w.mul_(to / w.norm().clamp_min(1e-8))
        if self.rows:
            w.mul_(1 - 0.025 * lr * (o * before > 0))
        self.turn(g)

    def rotated(self, u):
        left, right = self.bases
        p = left.mT @ u @ right
        self.v = 0.9 * self.v + 0.1 * p**2
        s = left @ (p / self.v.clamp_min(1e-16).sqrt()) @ right.mT
        return s * s4(u) / s4(s).clamp_min(1e-8)

    def blend(self, s, u, g, t):
        trust = ((cosine(s, u) - 0.2) / 0.8).clamp(0, 1)
        ratio = (cosine(s, g) / cosine(u, g).clamp_min(1e-8)).clamp(0, 1)
        return (trust * ratio).clamp(*self.gate(t))

    def turn(self, g):
        first = not self.bases
        for side, factor in enumerate((g, g.mT)):
            gram = self.grams[side] = 0.9 * self.grams[side] + 0.1 * factor @ factor.mT
            if first:
                eye = torch.eye(len(gram), dtype=gram.dtype)
                self.bases.append(torch.linalg.eigh(gram + 1e-30 * eye)[1].flip(1))
                continue
            q = self.bases[side]
            order = (q.mT @ gram @ q).diagonal().argsort(descending=True)
            self.v = self.v.index_select(side, order) if torch.is_tensor(self.v) else self.v
            self.bases[side] = torch.linalg.qr(gram @ q[:, order])[0]


class NorMuon:
    def __init__(self, lr):
        self.lr, self.m, self.v = lr, 0.0, 0.0

    def __call__(self, w, g, t):
        self.m = 0.95 * self.m + 0.05 * g
        o = muon_direction(0.05 * g + 0.95 * self.m)
        self.v = 0.95 * self.v + 0.05 * (o**2).mean(1 if o.shape[0] >= o.shape[1] else 0, keepdim=True)
        scaled = o / self.v.clamp_min(1e-10).sqrt()
        w.mul_(1 - self.lr(t) * 0.025).sub_(self.lr(t) * scaled * o.norm() / scaled.norm().clamp_min(1e-10))


class Spectral:
    def __init__(self, lr):
        self.lr = lr

    def __call__(self, w, g, t):
        w.mul_(1 - self.lr(t) * 0.015).sub_(self.lr(t) * muon_direction(g))


class Shampoo:
    def __init__(self, lr):
        self.lr, self.m, self.v, self.grams, self.roots = lr, 0.0, 0.0, [0.0, 0.0], []

    def __call__(self, w, g, t):
        n, c = t + 1, 1 - 0.95 ** (t + 1)
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.95 * self.v + 0.05 * g**2
        self.grams = [0.95 * gram + 0.05 * outer for gram, outer in zip(self.grams, (g @ g.mT, g.mT @ g), strict=True)]
        if n % 5 == 0:
            self.roots = [self.root(gram / c) for gram in self.grams]
        mean = self.m / (1 - 0.9**n)
        p = mean / ((self.v / c).sqrt() + 1e-10)
        if n >= 5:
            x = self.roots[0] @ mean @ self.roots[1]
            p = x * p.norm() / (x.norm() + 1e-16)
        w.sub_(self.lr(t) * (p + 0.2 * w))

    @staticmethod
    def root(gram):
        values, vectors = torch.linalg.eigh(gram)
        if values.min() < 1e-12:
            values = values - values.min() + 1e-12
        return vectors @ values.pow(-0.25).diag() @ vectors.mT
