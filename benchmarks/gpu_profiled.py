"""What gpu_check.sh has ncu look at: six kernels, each once, at their headline sizes or a smaller one as slow."""

import os

import torch
from bench_compaction import LLAVA, kv_specs, paged_case, rows_of
from bench_kl import logits

import vtw_kernels as vtw

device = "cuda"
rows = rows_of(LLAVA, device)
cache = [spec.make(device) for spec in kv_specs(LLAVA, 64)]
vtw.compact(cache, rows.plan, token_dims=2)
vtw.compact_(cache, rows.plan, token_dims=2)
caches, block_table, lengths, keep, _ = paged_case("64 KV tensors", LLAVA, 64).make(device)
vtw.compact_paged_(caches, block_table, lengths, keep, layout="NHD")

count = min(1024, int(os.environ.get("ROWS", 1024)))
p, q = logits(count, count, 151_936, torch.bfloat16, grad=False)(device)
state = vtw.kl_state(p, q)
ops, ones = torch.ops.vtw_kernels, torch.ones(count, device=device)
ops.kl_divergence_backward(ones, p, q, state, 1.0, False, True)
ops.kl_divergence_with_gradients(p, q, None, 1.0, False, True)
torch.cuda.synchronize()
