"""SOAP-Muon, as track 3's #44 and #46 have it: SOAP preconditions the momentum before Muon orthogonalizes it."""

from typing import Unpack

import torch
from torch import Tensor

from .base import check_choice, check_fraction
from .matrix import EngineSettings, Group, MatrixOptimizer, ParamsT, Tensors
from .muon import SCALES
from .polar import newton_schulz, polar_flops, polar_workspace
from .radius import radius_step, row_sums
from .soap import SIDES, eigenbasis, power_iteration, project
from .stacks import schatten4_norm

BLENDS = ("none", "kept", "gated")
QUINTIC = [(2.0, -1.5, 0.5)] * 12


class SOAPMuon(MatrixOptimizer):
    """M <- mu M + (1-mu) G;  U = (1-mu) G + mu M;  P = QLt U QR;  V <- b2 V + (1-b2) P^2;
    S = QL (P / sqrt(max(V, 1e-16))) QRt, with the Schatten 4-norm of U;  O = scale polar(S);  then ``radius_step``.
    L <- b2 L + (1-b2) G Gt and R alike, with eigenvectors QL, QR, by one power iteration a step; bases lag one step.

    Source: KellerJordan/modded-nanogpt, records/track_3_optimization, results 20260609_soap_f1_auxb2_clean (#44) and
    20260619_cwd_rowfloor_tailema (#46); SOAP-Muon: nikhilvyas.github.io/SOAP_Muon.pdf.

    Args:
        params: weight matrices (fan_out, fan_in); see :class:`MatrixOptimizer`.
        lr: length of a step in spectral norm, before ``scale``, ``floor`` and the fixed norm.
        momentum: mu, in [0, 1).
        beta2: b2, in [0, 1).
        blend: ``none``; ``kept``: the 4-norm of U is restored once more; ``gated``: Z = U + g (S - U) with
            g = clamp((cos(S, U) - .2) / .8) clamp(cos(S, G) / cos(U, G)) in [gate_floor, gate_cap], then ``kept``.
        brake, floor, floor_rows, cautious_decay: see ``radius_step``.
        scale: ``keller``, ``match_rms`` or ``rms_to_rms``.

    Raises:
        ValueError: a setting out of range or an unknown name.
    """

    all_rows = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.0375,
        momentum: float = 0.95,
        beta2: float = 0.9,
        blend: str = "none",
        gate_floor: float = 0.45,
        gate_cap: float = 0.85,
        brake: float = 0.5,
        floor: float = 0.3825,
        floor_rows: bool = True,
        cautious_decay: float = 0.025,
        scale: str = "keller",
        **engine: Unpack[EngineSettings],
    ):
        settings = dict(lr=lr, momentum=momentum, beta2=beta2, blend=blend, gate_floor=gate_floor, gate_cap=gate_cap)
        settings |= dict(brake=brake, floor=floor, floor_rows=floor_rows, cautious_decay=cautious_decay, scale=scale)
        super().__init__(params, settings, **engine)
        for state in self.state.values():
            for side in SIDES.keys() & state.keys():  # a matrix whose first gradient comes late starts under Adam
                state[f"{side}_basis"].diagonal(dim1=-2, dim2=-1).fill_(1)

    def check_group(self, group: Group) -> None:
        if group["constraint"]:
            raise ValueError(f"constraint={group['constraint']}: {type(self).__name__} has its own; give null")
        check_fraction(momentum=group["momentum"], beta2=group["beta2"])
        check_choice(BLENDS, blend=group["blend"])
        check_choice(SCALES, scale=group["scale"])
        if not 0 <= group["gate_floor"] <= group["gate_cap"] <= 1:
            between = f"gate_floor={group['gate_floor']}, gate_cap={group['gate_cap']}"
            raise ValueError(f"{between}: give 0 <= gate_floor <= gate_cap <= 1")

    def owner_state(self, group: Group, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        state: dict[str, tuple[int, ...]] = {"momentum": shape, "second_moment": shape}
        for side, dim in SIDES.items():
            state |= {name: (shape[0], shape[dim], shape[dim]) for name in (side, f"{side}_basis")}
        return state

    def precondition(self, group: Group, stack: Tensor, state: dict[str, Tensor]) -> Tensor:
        grad = stack.to(state["momentum"].dtype)
        momentum = state["momentum"].lerp_(grad, 1 - group["momentum"])
        raw = grad.lerp(momentum, group["momentum"])
        first = group["step"] == 1
        update = raw if first else self._rotated(group, raw, state)
        if group["blend"] != "none":
            if group["blend"] == "gated":
                update = raw + self._gate(group, update, raw, grad) * (update - raw)
            update = update * (schatten4_norm(raw) / schatten4_norm(update).clamp_min(1e-30))
        update = update / schatten4_norm(update).clamp_min(1e-7)
        for side, x in (("left", grad), ("right", grad.mT)):
            state[side].lerp_(x @ x.mT, 1 - group["beta2"])
            if first:
                state[f"{side}_basis"].copy_(eigenbasis(x))
            else:
                power_iteration(state, side)
        return newton_schulz(update, QUINTIC, normalise=False)

    def _rotated(self, group: Group, raw: Tensor, state: dict[str, Tensor]) -> Tensor:
        left, right = state["left_basis"], state["right_basis"]
        inside = project(raw, left, right)
        second = state["second_moment"].mul_(group["beta2"]).addcmul_(inside, inside, value=1 - group["beta2"])
        update = project(inside / second.clamp_min(1e-16).sqrt(), left.mT, right.mT)
        return update * (schatten4_norm(raw) / schatten4_norm(update).clamp_min(1e-8))

    def _gate(self, group: Group, update: Tensor, raw: Tensor, grad: Tensor) -> Tensor:
        def cosine(a: Tensor, b: Tensor) -> Tensor:
            dims = (-2, -1)
            norms = torch.linalg.vector_norm(a, dim=dims) * torch.linalg.vector_norm(b, dim=dims)
            cosines: Tensor = (a * b).sum(dims) / norms.clamp_min(1e-30)
            return cosines

        trust = ((cosine(update, raw) - 0.2) / 0.8).clamp(0, 1)
        ratio = (cosine(update, grad) / cosine(raw, grad).clamp_min(1e-8)).clamp(0, 1)
        gate: Tensor = (trust * ratio).clamp(group["gate_floor"], group["gate_cap"])
        return gate[..., None, None]

    def measure(self, group: Group, params: Tensors, updates: Tensors, states: list[dict[str, Tensor]]) -> Tensors:
        return row_sums(params, updates)

    def apply(
        self, group: Group, params: Tensors, updates: Tensors, scales: list[float], states: list[dict[str, Tensor]],
        sums: Tensors,
    ) -> None:  # fmt: skip
        radius_step(group, params, updates, scales, sums)

    def flops(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        m, n = shape
        sides = sum(3 * 2 * size * m * n + 6 * size**3 for size in shape)
        return polar_flops(shape, "quintic", None, dtype) + sides + 3 * 2.0 * min(shape) * m * n

    def workspace(self, group: Group, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> float:
        wide = torch.promote_types(dtype, torch.float32)
        whole = 4.0 * wide.itemsize * (max(shape) ** 2 + shape[0] * shape[1])
        return whole + polar_workspace(shape, "quintic", None, wide)

    def scale(self, group: Group, shape: tuple[int, int]) -> float:
        return SCALES[group["scale"]](*shape)
