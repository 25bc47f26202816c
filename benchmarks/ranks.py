"""Checks and times sums over ranks: by torchrun, a process a GPU, or a process a rank on the host with gloo.

    python -m torch.distributed.run --nproc-per-node 8 -m benchmarks.ranks

Each rank has one bucket of random gradients. Sums in the engine's order and in that of the ranks are held to a sum in
float64, those in the ranks' order to equal bits in every repeat. Then, of a layer, dX is computed while dW and db are
reduced, and after it: the difference is what the overlap gains. Rank 0 prints medians of the host's time, which ends
when the sums are there.
"""
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

import densegrad as dg
from densegrad import distributed


def seconds(step: Callable[[], object], repeats: int, comm: object) -> float:
    """The median of the time that a step takes, begun by all ranks together."""
    found = []
    for _ in range(repeats + 1):
        distributed.all_reduce(_one, comm)
        begun = time.perf_counter()
        step()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="*", default=[1, 64, 1024], help="of buckets, in float32")
    parser.add_argument("--layer", type=int, nargs=3, default=[8192, 768, 3072], metavar=("S", "D", "M"))
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    import torch
    import torch.distributed as group

    global _one
    on_gpu = torch.cuda.is_available()
    group.init_process_group("nccl" if on_gpu else "gloo")
    comm, rank, size = group.group.WORLD, group.get_rank(), group.get_world_size()
    where = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(where)
    _one = torch.ones(1, device=where)

    def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(where)

    said = [f"{size} ranks, {group.get_backend()}, {torch.cuda.get_device_name() if on_gpu else 'CPU'}"]
    for megabytes in options.megabytes:
        elements = max(int(megabytes * 2 ** 18), 1)
        own = drawn(elements, seed=rank)
        every = [drawn(elements, seed=one).double() for one in range(size)]
        exact, magnitude = sum(every), sum(one.abs() for one in every)
        for order in (None, "ranks"):
            found = [distributed.all_reduce(own, comm, order=order) for _ in range(3)]
            off = (found[0].double() - exact).abs() - (size - 1) * 2.0 ** -24 * magnitude * (1 + 1e-6)
            if off.max() > 0:
                raise SystemExit(f"rank {rank}: a sum with order={order!r} is beyond its bound by {off.max():g}")
            if order and not all(torch.equal(found[0], one) for one in found):
                raise SystemExit(f"rank {rank}: sums in the order of the ranks differ from run to run")
            took = seconds(lambda: distributed.all_reduce(own, comm, order=order), options.repeats, comm)  # noqa: B023
            said.append(f"{megabytes:g} MB, order={order}: {1e3 * took:.3f} ms, {elements * 4 / took / 1e9:.2f} GB/s")
    s, d, m = options.layer
    x, w, dz = drawn(s, d, seed=rank), drawn(d, m), drawn(s, m, seed=rank + size)

    def after() -> None:
        grads = dg.dense_grads(x, w, dz)
        distributed.all_reduce(grads[1:], comm)
        done()

    def meanwhile() -> None:
        dg.dense_grads(x, w, dz, comm=comm).reduction.wait()
        done()

    def done() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    for name, step in (("dX, then the sums", after), ("dX while dW and db are summed", meanwhile)):
        said.append(f"{s} x {d} x {m}, {name}: {1e3 * seconds(step, options.repeats, comm):.3f} ms")
    if rank == 0:
        print("\n".join(said))
    group.destroy_process_group()


_one: object = np.ones(1)

if __name__ == "__main__":
    main()
