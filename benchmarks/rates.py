"""The rate of a large matrix product, of which the floors of the other scripts are made."""

import time

import torch

from support.products import onednn_is_faster, onednn_product


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(device, n, dtype):
    """Floating-point operations per second of an n x n matrix product, the best of ten, by the product that the linear
    layers of a run take: in fp32 on AMD's CPUs oneDNN's, elsewhere torch's own."""
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    product = torch.matmul
    if device == "cpu" and dtype == "fp32" and onednn_is_faster():
        product = onednn_product
    times = []
    for _ in range(10):
        began = now(device)
        product(a, b)
        times.append(now(device) - began)
    return 2 * n**3 / min(times)
