"""What ranks do in tests/test_distributed.py: `python -m tests.ranks ENGINE FOLDER CASE ...`, one process a rank.

The cases run one after another over the same communicator, which shows that it can be used after an error on which the
ranks agree. What each gives, or how it failed, is left in the folder, a file a rank.
"""
import os
import pickle
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest

import densegrad as dg
from densegrad import distributed
from densegrad.distributed import (
    DistributedError,
    Ranks,
    agreement,
    all_reduce,
    fold_along_ranks,
    reductions,
    together,
)
from densegrad.facts import accumulator_of
from densegrad.testing import ROUNDOFF, UNDERFLOW, bits, normal

DTYPES = ("float16", "bfloat16", "float32", "float64")
SHAPES = [((5, 3), (3,)), ((), (0, 4), (33, 7)), ((1,),), ((300, 41), (41,), (2, 3, 4))]
#: how long an error may take on any rank
SECONDS = 10


def drawn(rank, shapes, dtype, seed=0):
    return [normal(shape, dtype, 1000 * seed + 10 * rank + index) for index, shape in enumerate(shapes)]


def wide(array):
    return np.asarray(array).astype(np.float64)


def bound(magnitude, exact, roundings, wire, dtype):
    """How far a sum may be off that was rounded so often in `wire`, and once to `dtype`."""
    sums = roundings * (ROUNDOFF[wire] * magnitude + UNDERFLOW[wire]) + roundings * 2.0 ** -52 * magnitude
    return sums + ROUNDOFF[dtype] * (np.abs(exact) + sums) + UNDERFLOW[dtype]


def reduced(comm, rank, size, op, order, samples=None, **options):
    """Reduce random gradients of every dtype, and hold each element to the bound; gives all bits."""
    found = []
    for seed, shapes in enumerate(SHAPES):
        for dtype in DTYPES:
            given = [drawn(one, shapes, dtype, seed) for one in range(size)]
            weights = np.ones(size) if op == "sum" else (
                np.full(size, 1 / size) if samples is None else np.array(samples) / sum(samples))
            mine = [None, *given[rank]]
            if weights[rank] == 0:
                mine = [None, *(np.full_like(one, np.nan) for one in given[rank])]
            named = {} if samples is None else {"samples": samples[rank]}
            result = all_reduce(mine, comm, op, order=order, **named, **options)
            assert type(result) is list
            assert result[0] is None
            for index, one in enumerate(result[1:]):
                terms = [weights[other] * wide(given[other][index]) for other in range(size)]
                exact, magnitude = sum(terms), sum(map(np.abs, terms))
                roundings = size - 1 if op == "sum" else size + 1
                limit = bound(magnitude, exact, roundings, accumulator_of(dtype), dtype)
                assert (one.dtype, one.shape) == (mine[index + 1].dtype, mine[index + 1].shape)
                assert (np.abs(wide(one) - exact) <= limit).all(), (dtype, shapes)
                found.append(bits(one).tobytes())
    return found


def case_sums_are_within_the_bound(comm, rank, size):
    return [reduced(comm, rank, size, "sum", None), reduced(comm, rank, size, "sum", None, check=False)]


def case_sums_in_the_order_of_the_ranks_have_equal_bits(comm, rank, size):
    first = reduced(comm, rank, size, "sum", "ranks")
    for _ in range(2):
        assert reduced(comm, rank, size, "sum", "ranks") == first
    shape = (97, 11)
    folds = [normal(shape, "float32", one) for one in range(size)]
    expected = folds[0].copy()
    for one in folds[1:]:
        expected = expected + one
    for _ in range(10):
        assert (bits(all_reduce(folds[rank], comm, order="ranks")) == bits(expected)).all()
    return first


def case_means_weight_ranks_by_their_samples(comm, rank, size):
    found = [reduced(comm, rank, size, "mean", order) for order in (None, "ranks")]
    for samples in ([3 * one for one in range(size)], [5] * size, [0] * (size - 1) + [7]):
        for options in ({}, {"check": False}):
            found.append(reduced(comm, rank, size, "mean", "ranks", samples, **options))
    with pytest.raises(DistributedError, match="no rank has a sample"):
        all_reduce(np.ones(3), comm, "mean", samples=0)
    return found


def case_results_are_of_the_kind_that_came_in(comm, rank, size):
    grads = dg.DenseGrads(None, np.full((2, 3), rank, "float32"), np.full(3, 1.0, "float16"))
    found = all_reduce(grads, comm)
    total = sum(range(size))
    assert type(found) is dg.DenseGrads
    assert found.dx is None
    assert found.dw.tolist() == [[total] * 3] * 2
    assert found.db.tolist() == [size] * 3
    assert grads.dw.tolist() == [[rank] * 3] * 2
    assert all_reduce(grads, comm, out=grads) is grads
    assert grads.dw.tolist() == [[total] * 3] * 2
    turned = np.arange(6, dtype="float32").reshape(3, 2).T
    assert all_reduce((turned,), comm)[0].tolist() == (size * turned).tolist()
    torch = sys.modules.get("torch")
    if torch is not None:
        tensor = torch.full((2, 3), 1.5, dtype=torch.bfloat16, requires_grad=True)
        result, = all_reduce((tensor,), comm)
        assert (type(result), result.dtype, result.requires_grad) == (torch.Tensor, torch.bfloat16, False)
        assert result.tolist() == [[1.5 * size] * 3] * 2


def case_what_travels_is_of_the_dtype_that_is_asked_for(comm, rank, size):
    """1 + 2^-9 is no number of bfloat16's, and 2^-20 is lost beside 1 in float16 alone."""
    half = np.array([1, 2.0 ** -9], "float32") if rank == 0 else np.array([2.0 ** -20, 1], "float32")
    plain = all_reduce(half, comm, order="ranks")
    assert plain[0] == 1 + (size - 1) * 2.0 ** -20
    if sys.argv[1] == "gloo":
        assert all_reduce(half, comm, wire="float16", order="ranks")[0] == 1
        assert all_reduce(half, comm, wire="bfloat16")[0] == 1
    else:
        with pytest.raises(dg.DTypeError, match="MPI adds float32, float64; got wire='bfloat16'"):
            all_reduce(half, comm, wire="bfloat16")
    large = np.full(1, 60000, "float16")
    assert all_reduce(large, comm, "mean")[0] == 60000
    wider = all_reduce((np.ones(1, "float32"), np.full(1, 1 + 2.0 ** -40)), comm)
    assert [one.dtype.name for one in wider] == ["float32", "float64"]
    assert wider[1] == size + size * 2.0 ** -40


def two_sum(state, addend):
    """A sum, and beside it what its additions have lost: Neumaier's."""
    total, lost = state
    new = total + addend
    part = new - total
    lost += (total - (new - part)) + (addend - part)
    return new, lost


def case_folds_along_ranks_have_the_bits_of_one_process(comm, rank, size):
    reductions.PIECE_BYTES = 64
    shapes, draws = [(7, 9), (5,), ()], np.random.default_rng(3)
    compensated = distributed.Fold(lambda addend: (addend.copy(), np.zeros_like(addend)), two_sum, 2)
    found = []
    for counts in ([2] * size, [0] * size, [0] * (size - 1) + [3], [4] + [0] * (size - 1),
                   *draws.integers(0, 4, (6, size)).tolist()):
        for dtype in ("float32", "float64"):
            everyones = [drawn(one, shapes, dtype, 7) for one in range(sum(counts))]
            begin = sum(counts[:rank])
            mine = everyones[begin:begin + counts[rank]]
            for fold in (distributed.SUM, compensated):
                planes = fold_along_ranks(comm, mine, [np.empty(shape, dtype) for shape in shapes], fold=fold)
                assert len(planes) == fold.planes
                for index, shape in enumerate(shapes):
                    state = tuple(np.zeros((fold.planes, *shape), dtype))
                    for number, addend in enumerate(everyones):
                        one = np.array(addend[index])
                        state = fold.add(state, one) if number else fold.begin(one)
                    for plane, expected in zip(planes, state, strict=True):
                        assert plane[index].shape == shape
                        assert (bits(plane[index]) == bits(np.asarray(expected))).all(), (counts, dtype)
                        found.append(bits(plane[index]).tobytes())
    minus = [[np.full(3, -0.0, "float32")]] if rank == size - 1 else []
    (total,), = fold_along_ranks(comm, minus, [np.empty(3, "float32")], check=False)
    assert np.signbit(total).all()
    return found


def case_shards_that_do_not_fit_are_refused_on_all_ranks(comm, rank, size):
    def accept(numbers):
        assert numbers == (tuple(range(size)), (1,) * size)
        raise dg.ShapeError(f"shards of {numbers.samples} samples")

    for check in (None, False):
        with pytest.raises(dg.ShapeError, match="shards of"):
            fold_along_ranks(comm, [[np.ones(2)]], [np.ones(2)], samples=rank, accept=accept, check=check)


def raising(work, *, rank, blamed, words, own=None):
    """Hold it to raise on every rank in time: DistributedError that names a rank, or on that rank its own error."""
    begun = time.monotonic()
    with pytest.raises((DistributedError, own or DistributedError)) as caught:
        work()
    assert time.monotonic() - begun < SECONDS
    error = caught.value
    if own is not None and rank == blamed:
        assert type(error) is own, repr(error)
    else:
        assert type(error) is DistributedError, repr(error)
        assert error.agreed
        assert error.ranks == (blamed,)
        assert f"rank {blamed}" in str(error)
        assert words in str(error)


def case_a_rank_that_raises_is_named_on_every_rank(comm, rank, size):
    for blamed in range(size):
        def in_a_block(blamed=blamed):
            with together(comm):
                if rank == blamed:
                    raise KeyError("no such file")
                all_reduce(np.ones(3), comm)

        def behind_the_last_reduction(blamed=blamed):
            with together(comm):
                all_reduce(np.ones(3), comm)
                if rank == blamed:
                    raise KeyError("no such file")

        def by_an_argument(blamed=blamed):
            with together(comm):
                all_reduce(np.ones(3, "int32" if rank == blamed else "float32"), comm)

        raising(in_a_block, rank=rank, blamed=blamed, words="failed: KeyError: 'no such file'", own=KeyError)
        raising(behind_the_last_reduction, rank=rank, blamed=blamed, words="no such file", own=KeyError)
        raising(by_an_argument, rank=rank, blamed=blamed, words="failed: DTypeError: grads must be", own=dg.DTypeError)
        raising(lambda blamed=blamed: all_reduce(np.ones(3), comm, "mean", samples=2**70 if rank == blamed else 1),
                rank=rank, blamed=blamed, words="failed: ValueError: samples must be", own=ValueError)
    for deadline, error in (("5", TypeError), (0, ValueError), (float("nan"), ValueError), (float("inf"), ValueError)):
        with pytest.raises(error, match="deadline must be"):
            all_reduce(np.ones(1), comm, deadline=deadline)
    with together(Ranks(comm, deadline=30)):
        assert all_reduce(np.ones(1), comm)[0] == size


def case_ranks_that_differ_are_named_on_every_rank(comm, rank, size):
    """Of two ranks the second differs from the first."""
    ones = np.ones((3, 2), "float32")
    for blamed in range(1, size):
        different = rank == blamed
        for other, words in (
                (lambda: all_reduce(ones.T, comm), "(2, 3)"),
                (lambda: all_reduce(ones.astype("float16"), comm), "float16 (3, 2)"),
                (lambda: all_reduce(ones, comm, "mean"), "mean, ranks alike"),
                (lambda: all_reduce(ones, comm, order="ranks"), "in the order of the ranks"),
                (lambda: all_reduce(ones.astype("float64"), comm, wire="float32"), "float64 (3, 2)"),
                (lambda: all_reduce((ones, None), comm), "None"),
                (lambda: all_reduce([ones] * 500, comm), "float32 (3, 2)"),
                (lambda: fold_along_ranks(comm, [], [ones]), "fold in 1 planes")):
            raising(other if different else lambda: all_reduce(ones, comm), rank=rank, blamed=blamed, words=words)
        version, agreement.__version__ = agreement.__version__, "0.0.7" if different else agreement.__version__
        raising(lambda: all_reduce(ones, comm), rank=rank, blamed=blamed, words="has 0.0.7")
        agreement.__version__ = version
    assert all_reduce(ones, comm)[0, 0] == size


def case_a_rank_that_comes_late_is_named_or_waited_for(comm, rank, size):
    blamed = size - 1
    if rank == blamed:
        time.sleep(1)
    assert all_reduce(np.ones(2), comm)[0] == size
    if rank == blamed:
        time.sleep(2.5)
    raising(lambda: all_reduce(np.ones(2), comm, deadline=1), rank=rank, blamed=blamed,
            words="did not come within 1 s")
    assert all_reduce(np.ones(2), comm)[0] == size


def case_reductions_that_are_under_way_keep_their_order(comm, rank, size):
    started = [all_reduce(np.full(1000, number + rank, "float32"), comm, order="ranks", async_op=True)
               for number in range(4)]
    assert all_reduce(np.ones(1), comm)[0] == size
    for number, one in enumerate(started):
        assert one.done
        assert one.wait().tolist() == [size * number + sum(range(size))] * 1000
    failing = all_reduce(np.ones(3 + (rank == size - 1)), comm, async_op=True)
    raising(failing.wait, rank=rank, blamed=size - 1, words="float64 (4,)")


def case_main_gradients_are_reduced(comm, rank, size):
    torch = sys.modules.get("torch")
    if torch is None:
        return
    import densegrad.torch as dt

    model = torch.nn.Sequential(torch.nn.Linear(3, 2, dtype=torch.bfloat16), torch.nn.LayerNorm(2))
    dt.convert(model, main_grad=True)
    main = model[0].weight.main_grad
    main.fill_(1 + rank)
    model[0].bias.main_grad.fill_(2.0 ** -12)
    model[1].weight.grad = torch.full((2,), float(rank))
    given = () if sys.argv[1] == "gloo" else (comm,)
    dt.reduce_main_grads(model, *given)
    mean = sum(range(size)) / size
    assert model[0].weight.main_grad is main
    assert main.tolist() == [[1 + mean] * 3] * 2
    assert model[0].bias.main_grad.tolist() == [2.0 ** -12] * 2
    assert model[1].weight.grad.tolist() == [mean] * 2
    assert model[1].bias.grad is None
    model[1].bias.grad = torch.ones(2) if rank == 0 else None
    raising(lambda: dt.reduce_main_grads(model, *given), rank=rank, blamed=1 if size == 2 else 0, words="None")
    for wrong, error, words in ((torch.nn.Linear(2, 1), ValueError, "neither main gradients"),
                                (model.parameters(), TypeError, r"must be a torch\.nn\.Module")):
        with pytest.raises(error, match=words):
            dt.reduce_main_grads(wrong, *given)


def case_dense_grads_start_their_reduction(comm, rank, size):
    """In the simulator, on two ranks alone: the others show nothing more."""
    x, w, dz = normal((6, 4), "float32", rank), normal((4, 3), "float32", 9), normal((6, 3), "float32", 20 + rank)
    grads = dg.dense_grads(x, w, dz, comm=comm)
    dx, dw, db = grads
    assert grads.reduction.wait().dw is dw
    assert grads.reduction.done
    own = dg.dense_grads(x, w, dz)
    assert own.reduction is None
    assert (bits(dx) == bits(own.dx)).all()
    expected = all_reduce(own._replace(dx=None), comm)
    assert (bits(dw) == bits(expected.dw)).all()
    assert (bits(db) == bits(expected.db)).all()
    raising(lambda: dg.dense_grads(x, w[:4 - (rank == 1)], dz, comm=comm).reduction.wait(), rank=rank, blamed=1,
            words="failed: ShapeError", own=dg.ShapeError)


def case_accumulators_have_the_bits_of_one_process(comm, rank, size):
    """On two ranks: shards of whole blocks, the last block excepted; an empty one; one that is no whole number."""
    x, dz = normal((15, 3), "float32"), normal((15, 2), "float32", 1)

    def accumulated(rows, **options):
        accumulator = dg.GradientAccumulator(3, 2, "float32", block=4, compensated=True, keep_blocks=True, **options)
        if rows.start < rows.stop:
            accumulator.add(x[rows], dz[rows])
        return accumulator

    expected = accumulated(slice(0, 15)).result()
    for border in (8, 15):
        found = accumulated(slice(0, border) if rank == 0 else slice(border, 15)).all_reduce(comm)
        for name in ("dw", "db"):
            assert (bits(getattr(found, name)) == bits(getattr(expected, name))).all(), (border, name)
    with pytest.raises(DistributedError, match="rank 0"):
        accumulated(slice(0, 6) if rank == 0 else slice(6, 15)).all_reduce(comm)
    for name, other in (("activation", "identity"), ("weight_layout", "out_in"), ("reduction", "mean")):
        options = {name: other} if rank == 1 else {}
        raising(lambda options=options: accumulated(slice(0, 8), **options).all_reduce(comm), rank=rank, blamed=1,
                words=f"{name}='{other}'" if name != "weight_layout" else "(2, 3)")


# What ends a communicator, and so stands alone.


def alone_rank_0_comes_late(comm, rank, size):
    """The others hear nothing, and raise by themselves; rank 0 then waits for them in vain. No sum comes after that."""
    if rank == 0:
        time.sleep(2)
    begun = time.monotonic()
    with pytest.raises(DistributedError) as caught:
        all_reduce(np.ones(2), comm, deadline=0.5)
    assert time.monotonic() - begun < SECONDS
    for use in (lambda: all_reduce(np.ones(2), comm), lambda: fold_along_ranks(comm, [], [np.ones(2)])):
        with pytest.raises(DistributedError, match=f"rank {rank} has given this communicator up"):
            use()
    with pytest.raises(DistributedError, match="has given this communicator up"), together(comm):
        raise AssertionError
    assert time.monotonic() - begun < SECONDS
    return caught.value.agreed, caught.value.ranks, str(caught.value)


def alone_a_rank_is_killed(comm, rank, size):
    """After the ranks have agreed, so that the others are in the sum or wait for the next."""
    all_reduce(np.ones(2), comm)
    if rank == 1:
        Path(sys.argv[2], "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(3):
        all_reduce(np.ones(1 << 16), comm, order="ranks", deadline=2)


def run(comm, rank, size):
    folder, found = sys.argv[2], {}
    for name in sys.argv[3:]:
        begun = time.monotonic()
        try:
            found[name] = "", globals()[name](comm, rank, size), time.monotonic() - begun
        except (Exception, pytest.fail.Exception):
            found[name] = traceback.format_exc(), None, time.monotonic() - begun
            if name.startswith("alone"):
                raise
    Path(folder, f"{rank}.part").write_bytes(pickle.dumps(found))
    Path(folder, f"{rank}.part").rename(Path(folder, f"{rank}.pickle"))
    return all(not error for error, *_ in found.values())


def main():
    if sys.argv[1] == "mpi":
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        good = run(comm, comm.rank, comm.size)
        if not good or sys.argv[3].startswith("alone"):
            until = time.monotonic() + SECONDS
            while len([*Path(sys.argv[2]).glob("*.pickle")]) < comm.size and time.monotonic() < until:
                time.sleep(0.05)
            comm.Abort(0 if good else 1)  # MPI cannot end in good order where ranks wait for one another
        return
    import torch.distributed as group

    group.init_process_group("gloo")  # of what the environment says, as torchrun sets it
    good = False
    try:
        good = run(group.group.WORLD, group.get_rank(), group.get_world_size())
    except DistributedError:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0 if good else 1)  # without waiting for ranks that are gone


if __name__ == "__main__":
    main()
