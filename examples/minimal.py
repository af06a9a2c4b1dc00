"""A small GPT, trained by Muon and AdamW on one process, or sharded over any number: the losses are the same.

python examples/minimal.py        or        torchrun --nproc-per-node 2 examples/minimal.py
"""

import gc
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, os.path.dirname(sys.path[0]))  # the checkout
from data.sources.sample import SampleText  # noqa: E402
from optim import Muon  # noqa: E402  in code of your own: from nanomuon import Muon

LAYERS, HEADS, WIDTH, CONTEXT, BATCH, STEPS = 2, 4, 64, 64, 32, 100


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, CONTEXT, WIDTH]
        h = self.norm1(x)
        q, k, v = (project(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for project in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, CONTEXT] -> logits [batch, CONTEXT, 256]
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position.weight)))


def main(rank: int, ranks: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = dist.init_device_mesh(device, (ranks,)) if ranks > 1 else None  # starts the process group, too
    torch.manual_seed(0)  # the same weights and the same batches on every rank
    model = GPT().to(device)
    for module in (*model.blocks, model) if mesh else ():
        fully_shard(module, mesh=mesh)
    matrices = {name: p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    optimizers = Muon(list(matrices.items()), lr=0.02), torch.optim.AdamW(others, lr=0.003)
    text = bytearray("\n".join(SampleText().texts), "utf-8")
    windows = torch.frombuffer(text, dtype=torch.uint8).unfold(0, CONTEXT + 1, 1)  # each CONTEXT bytes and the next one

    for step in range(STEPS + 1):
        tokens = windows[torch.randint(len(windows), (BATCH,))[rank::ranks]].long().to(device)  # this rank's share
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0:
            mean = loss.detach() / ranks
            if mesh:
                dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step:3}  loss {mean.item():.3f}")


if __name__ == "__main__":
    main(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # gloo's threads must end before Python does
