"""How long an update takes, from its costs and from what a device is assumed to reach: nothing here was measured."""

from planning.costs import Costs, sequences
from planning.devices import DEVICES, Device

from trainer.metrics.environment import PEAK_FLOPS
from trainer.model import GPT

NODE = 8  # devices with NVLink between them
NETWORK = 8 * 50e9  # bytes/s of a node in one direction, eight adapters of 400 Gbit/s
# Assumptions, shares of the above first.
ATTENTION = 0.35  # of the peak, by fused attention; products of matrices reach what --efficiency says
STREAMED = 0.8  # of the memory's bandwidth, by elementwise kernels
SENT = 0.7  # of a link
TOUCHED = 3  # times that a kept activation is written or read beside the products: forward, and twice backward
LOGITS = 4  # times that all logits are, beside the head's products
STATE = 8  # times that weights and state are: by clipping, momentum, the weights' update, the guard's copy
KERNELS, LAUNCH = 300, 4e-6  # of the optimizer step (tests/cuda/budget.json) and seconds of each, which hide nothing
HOP, NODE_HOP = 1e-6, 5e-6  # seconds of latency from one rank of a ring to the next, inside a node and between two


def projected(costs: Costs) -> bool:
    """Whether its time is: a peak is known for bfloat16 on GPUs only."""
    return costs.device in DEVICES and costs.width == 2


def step_time(costs: Costs, efficiency: float) -> dict[str, float]:
    """Seconds by part, of the busiest rank; ``travel`` is what work does not hide."""
    device, peak = DEVICES[costs.device], PEAK_FLOPS[costs.device.upper()]
    streamed, local = device.bandwidth * STREAMED, sequences(costs.config, costs.ranks)
    forward_backward, _, busiest = costs.flops()
    attention, model = 0.0, costs.config.model
    if isinstance(costs.model, GPT):  # counted without causality; a fused backward pass makes the scores again
        attention = 12.0 * model.n_layer * model.n_embd * costs.train.seq_len * costs.train.batch_tokens
    kept = local * model.activation_bytes(costs.train.seq_len, costs.width)  # compiled
    vocabulary = getattr(costs.model, "padded_vocab", costs.model.vocab_size)
    held = costs.stays["weights"] + costs.stays["optimizer state"]
    parts = {
        "products": (forward_backward - attention) / costs.ranks / (peak * efficiency),
        "attention": attention / 2 * 7 / 6 / costs.ranks / (peak * ATTENTION),
        "activations": TOUCHED * kept / streamed,
        "logits": LOGITS * local * costs.train.seq_len * vocabulary * costs.width / streamed,
    }
    moved, calls = costs.model_traffic()
    exchanged, exchanges = costs.exchange_traffic()
    travel, units = moved / rate(costs, device) + calls.total() * latency(costs), len(costs.model.blocks) + 1
    hidden = sum(parts.values())
    parts["matrix rules"] = busiest / (peak * efficiency) + KERNELS * LAUNCH
    parts["weights, states"] = STATE * held / streamed
    parts["exchange"] = max(exchanged) / rate(costs, device) + exchanges.total() * latency(costs)
    parts["travel"] = max(travel / units, travel - hidden)  # the first gather and the last reduction at least
    return parts


def rate(costs: Costs, device: Device) -> float:
    """Bytes/s that a rank sends in a ring; between nodes all rings share the adapters."""
    return SENT * (device.link if costs.ranks <= NODE else min(device.link, NETWORK))


def latency(costs: Costs) -> float:
    """Seconds of a collective around a ring."""
    between = costs.ranks // NODE if costs.ranks > NODE else 0
    return (costs.ranks - 1 - between) * HOP + between * NODE_HOP
