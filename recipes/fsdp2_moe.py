"""A MoE model of your own under plain FSDP2, with expert parallelism; its checkpoints load under any other layout.
torchrun --nproc-per-node 4 recipes/fsdp2_moe.py EP STEPS FOLDER [resume]"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from epv2_plugin import ElasticBuffer, fsdp
from epv2_plugin.elastic import autograd

HIDDEN, FFN, EXPERTS, TOPK, VOCAB, LENGTH, BATCH = 32, 64, 8, 2, 64, 16, 8


class Experts(nn.Module):
    def __init__(self, mesh):
        super().__init__()
        up, down = torch.randn(EXPERTS, HIDDEN, FFN) / 6, torch.randn(EXPERTS, FFN, HIDDEN) / 8
        self.up, self.down = (nn.Parameter(distribute_tensor(each, mesh, [Shard(0)])) for each in (up, down))

    def forward(self, rows, rows_per_expert):
        weights = zip(rows.split(rows_per_expert), self.up.to_local(), self.down.to_local(), strict=True)
        return torch.cat([nn.functional.silu(part @ up) @ down for part, up, down in weights])


class MoE(nn.Module):
    def __init__(self, mesh, buffer):
        super().__init__()
        self.router, self.experts, self.buffer = nn.Linear(HIDDEN, EXPERTS), Experts(mesh), buffer

    def forward(self, x):
        weights, idx = self.router(x).softmax(-1).topk(TOPK)
        options = {"num_experts": EXPERTS, "do_expand": True}  # a row per token and expert, by expert
        rows, _, weights, handle, _ = autograd.dispatch(self.buffer, x, idx, weights, **options)
        out = self.experts(rows, handle.num_recv_tokens_per_expert_list) * weights.unsqueeze(1)
        return x + autograd.combine(self.buffer, out, handle)[0]


def train(ep, steps, folder, resume=False, config=None):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks // ep, ep), mesh_dim_names=("shard", "ep"))
    everyone, buffer = init_device_mesh("cpu", (ranks,)), ElasticBuffer(mesh["ep"].get_group())
    torch.manual_seed(0)
    moes = [MoE(mesh["ep"], buffer) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(VOCAB, HIDDEN), *moes, nn.Linear(HIDDEN, VOCAB))
    for moe in moes:
        fully_shard(moe.experts, mesh=mesh["shard"], shard_placement_fn=lambda _: Shard(1))
        moe.experts.set_gradient_divide_factor(ranks)  # they hold gradients of tokens of all ranks
        fully_shard(moe, mesh=everyone)
    fsdp.apply(fully_shard(model, mesh=everyone), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)  # foreach can't mix meshes
    saved = {"step": 0}
    if resume:
        saved["model"], saved["optimizer"] = get_state_dict(model, optimizer)
        dcp.load(saved, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    for step in range(saved["step"], steps):
        random = torch.Generator().manual_seed(step)
        mine = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=random).chunk(ranks)[rank]
        loss = nn.functional.cross_entropy(model(mine[:, :-1].flatten()), mine[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(total := loss.detach() / ranks)
        yield total.item(), model
    trained, moments = get_state_dict(model, optimizer)
    dcp.save({"step": steps, "model": trained, "optimizer": moments}, checkpoint_id=folder)


if __name__ == "__main__":
    dist.init_process_group("gloo") if len(sys.argv) > 3 else sys.exit(__doc__)
    for loss, _ in train(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], resume=sys.argv[4:] == ["resume"]):
        print(f"rank {dist.get_rank()}: loss {loss:.4f}\n", end="", flush=True)
