"""JAX: its arrays as arrays, and a dense layer whose backward is densegrad's.

Left out without JAX, as tests/test_torch.py is without PyTorch. The callback that GPUs have, in XLA's own buffers, is
run on the CPU too, by a stand-in for its context.
"""
import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import densegrad as dg
from densegrad import calls, device, reference
from densegrad.plans import ACTIVATIONS
from densegrad.testing import activation_roundings, bits, check_within, dz_bound, error_bound, integers, normal
from tests.docstring_examples import check_example

jax = pytest.importorskip("jax")
pytest.importorskip("jax.experimental.buffer_callback")

import jax.numpy as jnp  # noqa: E402

import densegrad.jax as dj  # noqa: E402
from densegrad.jax import dense  # noqa: E402

DTYPES = ("float16", "bfloat16", "float32")  # float64 JAX has only if it is told so before its first array
PARAMETER = 0.1


def drawn(*shapes, dtype="float32", draw=normal):
    """Arrays of JAX."""
    return [jnp.asarray(draw(shape, dtype, seed)) for seed, shape in enumerate(shapes)]


def theirs(x, w, b, activation):
    """The layer in JAX alone."""
    z = x @ w + b
    return z if activation is None else jax.nn.leaky_relu(z, PARAMETER) if activation == "leaky_relu" else (
        dj._FORWARD[activation](z))


def net(layer, activation):
    """A loss of two layers, by a list of their weights and biases, and of x."""
    def loss(parameters, x):
        (w, b), (v, c) = parameters
        return (layer(layer(x, w, b, activation=activation), v, c, activation=activation) ** 2).sum()

    return loss


# -- arrays


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_are_read_where_they_lie_and_come_back_as_arrays(dtype, monkeypatch):
    x, w, dz = drawn((6, 4), (4, 3), (6, 3), dtype=dtype)
    slots, launch = [], calls._launch
    monkeypatch.setattr(calls, "_launch", lambda kept, values, stream: (slots.append(dict(values)),
                                                                         launch(kept, values, stream))[1])
    for _ in range(2):
        slots.clear()
        found = dg.dense_grads(x, w, dz)
        expected = dg.dense_grads(*map(np.asarray, (x, w, dz)))
        for one, other in zip(found, expected, strict=True):
            assert isinstance(one, jax.Array)
            np.testing.assert_array_equal(bits(np.asarray(one)), bits(other))
        if device.current().kind == "simulator" or dz.devices() != {jax.devices("cpu")[0]}:
            assert {name: int(slots[0][name]) for name in ("x", "w", "dz")} == {
                "x": x.unsafe_buffer_pointer(), "w": w.unsafe_buffer_pointer(), "dz": dz.unsafe_buffer_pointer()}
            assert [int(slots[0][f"out.{name}"]) for name in ("dx", "dw", "db")] == [
                one.unsafe_buffer_pointer() for one in found]


def test_slips_are_answered():
    x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
    with pytest.raises(TypeError, match=r"dense\(\) takes no bias; got bias=\w+ \(write b=\)"):
        dense(x, w, bias=jnp.ones(4))
    with pytest.raises(TypeError, match="the approximation is an activation of its own"):
        dense(x, w, activation="gelu", approximate="tanh")
    with pytest.raises(TypeError, match=r"takes x, w, b by position; got 4 arguments"):
        dense(x, w, jnp.ones(4), "gelu")


def test_what_is_no_memory_or_cannot_be_written_is_refused_with_the_cure():
    dz, out = jnp.ones((6, 3)), jnp.zeros(3)
    with pytest.raises(dg.OutError, match="no array of JAX can be written"):
        dg.bias_grad(dz, out=out)
    for transform in (jax.jit, jax.vmap, jax.grad):
        with pytest.raises(TypeError, match=r"dz must be .*call densegrad\.jax\.dense there"):
            transform(dg.bias_grad)(dz)
    with pytest.raises(TypeError, match="x is an array of NumPy and dz one of JAX"):
        dg.weight_grad(np.ones((6, 2), "float32"), dz)
    with pytest.raises(dg.DTypeError, match="got int32"):
        dg.bias_grad(jnp.ones((6, 3), "int32"))
    with pytest.raises(dg.PrepareError, match="arrays of JAX need not show"):
        dg.prepare(dg.bias_grad, dz)
    dz.delete()
    with pytest.raises(TypeError, match="donated or deleted"):
        dg.bias_grad(dz)


# -- the layer


@pytest.mark.parametrize(("through", "dtype"), [
    ("jit", "float32"), ("jit", "bfloat16"), ("grad", "float16"), ("value_and_grad", "float32"),
    ("checkpoint", "bfloat16")])
def test_gradients_of_two_layers_equal_jaxs_own(through, dtype):
    """Integers, whose sums are exact: both have the same bits."""
    x, *weights = drawn((6, 4), (4, 3), (3,), (3, 2), (2,), dtype=dtype,
                        draw=lambda shape, dtype, seed: np.clip(integers(shape, dtype, seed), -1, 1))
    parameters = [weights[:2], weights[2:]]
    ways = {"grad": jax.grad, "jit": lambda loss: jax.jit(jax.grad(loss)),
            "value_and_grad": lambda loss: lambda *given: jax.jit(jax.value_and_grad(loss))(*given)[1],
            "checkpoint": lambda loss: jax.grad(jax.checkpoint(loss))}
    found, expected = (ways[through](net(layer, "relu"))(parameters, x) for layer in (dense, theirs))
    assert float(jnp.abs(expected[0][0]).max()) > 0
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one, "float64"), np.asarray(other, "float64"))


@pytest.mark.parametrize(("activation", "dtype"), [
    *[(one, "float32") for one in (None, *ACTIVATIONS)], (None, "bfloat16"), ("gelu", "bfloat16"), ("mish", "float16")])
def test_gradients_keep_the_bounds_of_their_layer(activation, dtype, monkeypatch):
    """Of two layers under jit, each from what reached it; the forward has JAX's bits."""
    seen, own = [], dj.dense_grads
    monkeypatch.setattr(dj, "dense_grads", lambda *given, **options: seen.append(
        (given, options, own(*given, **options))) or seen[-1][2])
    x, *weights = drawn((6, 4), (4, 3), (3,), (3, 2), (2,), dtype=dtype)
    layer = functools.partial(dense, negative_slope=PARAMETER) if activation == "leaky_relu" else dense
    loss, parameters = net(layer, activation), [weights[:2], weights[2:]]
    value, found = jax.jit(jax.value_and_grad(loss))(parameters, x)
    assert value == jax.jit(net(theirs, activation))(parameters, x)
    above, below = seen
    for (given, options, grads), (dw, db) in zip((below, above), found, strict=True):
        np.testing.assert_array_equal(bits(np.asarray(dw)), bits(np.asarray(grads.dw)))
        np.testing.assert_array_equal(bits(np.asarray(db)), bits(np.asarray(grads.db)))
        hold_to_bounds(given, options, grads, dtype)
    assert below[2].dx is None  # x is no parameter


def hold_to_bounds(given, options, grads, dtype):
    """Hold the gradients of one layer to float64, by what dz below its activation may be off by, and then the sums."""
    x, w, da = (np.asarray(one).astype("float64") for one in given)
    activation = options["activation"]
    dz, off = da, np.zeros_like(da)
    if activation is not None:
        z = np.asarray(options["z"]).astype("float64")
        slope = {"negative_slope": PARAMETER} if activation == "leaky_relu" else {}
        dz = reference.activation_grad(da, z, activation, **slope)[0]
        off = dz_bound(dz, np.abs(da) * 2, activation_roundings(activation, dtype), dtype)
    for grad, left, right, lost in ((grads.dx, dz, w.T, off @ np.abs(w.T)), (grads.dw, x.T, dz, np.abs(x.T) @ off),
                                    (grads.db, np.ones((1, len(dz))), dz, off.sum(axis=0, keepdims=True))):
        if grad is not None:
            exact, magnitude = left @ right, np.abs(left) @ (np.abs(right) + (off if right is dz else 0))
            bound = error_bound(magnitude, exact, left.shape[1], left.shape[1], dtype, lost=lost)
            check_within(np.asarray(grad).reshape(exact.shape), exact, bound)


@pytest.mark.parametrize("argnums", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_is_needed_is_computed(argnums, monkeypatch):
    asked, own = [], dj.dense_grads
    monkeypatch.setattr(dj, "dense_grads", lambda *given, need, **options: asked.append(need) or own(
        *given, need=need, **options))
    given = drawn((6, 4), (4, 3), (3,))
    found = jax.jit(jax.grad(lambda *given: dense(*given).sum(), argnums=argnums))(*given)
    jax.block_until_ready(found)
    assert asked == [tuple(("dx", "dw", "db")[number] for number in argnums)]


def test_layers_without_a_bias_of_one_sample_of_none_and_of_several_axes():
    x, w = drawn((2, 3, 4), (4, 3))
    for given in (x, x[0, 0], x[:0]):
        found = jax.grad(lambda given, w: dense(given, w, activation="relu").sum(), argnums=(0, 1))(given, w)
        expected = jax.grad(lambda given, w: jax.nn.relu(given @ w).sum(), argnums=(0, 1))(given, w)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_samples_are_mapped_one_by_one():
    x, w, b = drawn((5, 4), (4, 3), (3,), draw=integers)

    def of_sample(layer):
        return jax.vmap(jax.grad(lambda x, w: layer(x, w, b, activation="relu").sum(), argnums=(0, 1)), (0, None))(x, w)

    for one, other in zip(of_sample(dense), of_sample(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


def test_numpy_arrays_are_taken_as_jax_takes_them():
    x, w = np.ones((6, 4), "float32"), np.ones((4, 3), "float32")
    assert isinstance(dense(x, w), jax.Array)
    with pytest.raises(dg.DTypeError, match="x is float64, which JAX would round"):
        dense(x.astype("float64"), w.astype("float64"))
    with pytest.raises(TypeError, match="w must be an array of JAX or NumPy; got list"):
        dense(x, w.tolist())


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"w": (3, 4)}, dg.ShapeError, r"w must have shape \(4, out_features\).*got \(3, 4\); w\.T would fit"),
    ({"w": (5, 3)}, dg.ShapeError, r"w must have shape \(4, out_features\), as x has shape .*; got \(5, 3\)(?!;)"),
    ({"w": (4,)}, dg.ShapeError, r"w must have shape \(4, out_features\)"),
    ({"b": (4,)}, dg.ShapeError, r"b must have shape \(3,\), as w has shape \(4, 3\); got \(4,\)"),
    ({"x": ()}, dg.ShapeError, "x must have at least 1 dimension"),
    ({"w": "float16"}, dg.DTypeError, "w and x must have the same dtype; w is float16 and x is float32"),
    ({"b": "int32"}, dg.DTypeError, "b must be float16, bfloat16, float32 or float64; got int32"),
    ({"activation": "swish"}, ValueError, "activation must be one of"),
    ({"negative_slope": 0.5}, TypeError, "negative_slope is the derivative of"),
    ({"activation": "leaky_relu", "negative_slope": 1e39}, ValueError, "negative_slope must be within"),
    ({"activation": "leaky_relu", "negative_slope": "x"}, TypeError, "negative_slope must be a number"),
])
def test_mistakes_are_answered_while_tracing(change, error, message):
    shapes = {"x": (6, 4), "w": (4, 3), "b": (3,)}
    options = {name: value for name, value in change.items() if name not in shapes}
    given = [jax.ShapeDtypeStruct(change[name] if isinstance(change.get(name), tuple) else shape,
                                  change[name] if isinstance(change.get(name), str) else "float32")
             for name, shape in shapes.items()]
    with pytest.raises(error, match=message):
        jax.eval_shape(functools.partial(dense, **options), *given)
    with pytest.raises(error, match=message):
        jax.jit(jax.grad(lambda *given: dense(*given, **options).sum())).trace(*given)


def test_derivatives_that_there_are_none_of():
    x, w, b = drawn((6, 4), (4, 3), (3,))

    def loss(w):
        return (dense(x, w, b, activation="gelu") ** 2).sum()

    for second in (lambda: jax.grad(lambda w: jax.grad(loss)(w).sum())(w), lambda: jax.jit(jax.hessian(loss))(w)):
        with pytest.raises(NotImplementedError, match=r"gradients of densegrad\.jax\.dense cannot be differentiated"):
            second()
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (w,), (w,))


def test_an_output_that_nobody_uses_has_no_gradient():
    x, w = drawn((6, 4), (4, 3))
    found = jax.grad(lambda w: (dense(x, w), w.sum())[1])(w)
    np.testing.assert_array_equal(found, np.ones((4, 3)))


SHARDED = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from densegrad.jax import dense
mesh = jax.sharding.Mesh(jax.devices(), ("batch",))
x = jax.device_put(jnp.ones((4, 3)), NamedSharding(mesh, PartitionSpec("batch")))
w = jnp.ones((3, 2))
grad = jax.grad(lambda w, x: dense(x, w).sum())
for way in grad, jax.jit(grad):
    try:
        way(w, x)
    except Exception as error:
        print("densegrad.jax.dense has gradients of arrays on one device alone" in str(error))
print(jax.jit(lambda x, w: dense(x, w))(x, w).shape)
try:
    import densegrad
    densegrad.bias_grad(x)
except TypeError as error:
    print("addressable_data(0)" in str(error))
"""

WIDE = """
import jax, jax.numpy as jnp
jax.config.update("jax_enable_x64", True)
from densegrad.jax import dense
x, w, b = jnp.arange(24.).reshape(6, 4), jnp.arange(12.).reshape(4, 3) - 6, jnp.ones(3)
found, expected = (jax.jit(jax.grad(lambda w: (layer(x, w, b) ** 2).sum()))(w)
                   for layer in (lambda *given: dense(*given, activation="relu"),
                                 lambda x, w, b: jax.nn.relu(x @ w + b)))
print(found.dtype, bool((found == expected).all()))
"""


@pytest.mark.only("simulator")
@pytest.mark.parametrize(("program", "flags", "expected"), [
    (SHARDED, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, "True\nTrue\n(4, 2)\nTrue\n"),
    (WIDE, {}, "float64 True\n")], ids=["sharded", "float64"])
def test_in_a_process_of_its_own(program, flags, expected):
    """Several devices, which have to be asked for before JAX starts: an error with a sentence. And float64."""
    import os

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
                           env=os.environ | flags | {"NUMBA_ENABLE_CUDASIM": "1"})
    assert (found.returncode, found.stdout) == (0, expected), found.stderr


# -- the callback in XLA's own buffers, which GPUs have


@pytest.fixture
def in_buffers(monkeypatch):
    """The callback of GPUs on the CPU, whose context has no stream: what each call was given."""
    given, real = [], dj.buffer_callback

    def without_stream(callback, results, **options):
        def run(context, out, *arrays):
            given.append((out, arrays))
            return callback(SimpleNamespace(stream=None), out, *arrays)

        return real(run, results, **options)

    monkeypatch.setattr(dj, "buffer_callback", without_stream)
    monkeypatch.setattr(dj.jax, "pure_callback", lambda callback, results, *arrays, vmap_method: dj._by_buffers(
        *callback.args, results, *arrays))
    return given


@pytest.mark.only("simulator")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_written_into_the_buffers_that_xla_has_for_them(dtype, in_buffers, monkeypatch):
    x, w, b = drawn((6, 4), (4, 3), (3,), dtype=dtype, draw=integers)

    def grads(layer):
        return jax.jit(jax.grad(lambda given: layer(*given, activation="relu").sum()))((x, w, b))

    slots, launch = [], calls._launch
    monkeypatch.setattr(calls, "_launch", lambda kept, values, stream: (slots.append(dict(values)),
                                                                         launch(kept, values, stream))[1])
    found = jax.block_until_ready(grads(dense))
    (out, _), = in_buffers
    assert len(out) == 3
    assert int(slots[0]["out.dw"]) == found[1].unsafe_buffer_pointer()  # no copy on the way
    for one, other in zip(found, grads(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(one, "float64"), np.asarray(other, "float64"))


@pytest.mark.only("simulator")
def test_in_buffers_samples_are_mapped_and_errors_arrive(in_buffers, monkeypatch):
    x, w, b = drawn((5, 4), (4, 3), (3,), draw=integers)
    found = jax.vmap(jax.grad(lambda x: dense(x, w, b).sum()))(x)
    np.testing.assert_array_equal(found, jnp.broadcast_to(w.sum(axis=1), (5, 4)))

    def fail(*given, **options):
        raise dg.DeviceError("no device today")

    monkeypatch.setattr(dj, "dense_grads", fail)
    with pytest.raises(Exception, match="no device today"):
        jax.block_until_ready(jax.grad(lambda x: dense(x, w).sum())(x))


class Buffer:
    """A buffer of XLA's on a GPU, as far as densegrad looks at one."""

    def __init__(self, array):
        self.array, self.asked = array, []
        self.shape, self.dtype = array.shape, array.dtype

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, stream=None, max_version=None, dl_device=None, copy=None):
        self.asked.append(stream)
        return self.array.__dlpack__(stream=-1, max_version=max_version)


@pytest.mark.only("gpu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_launches_go_to_xlas_stream_and_its_buffers(dtype, xp, monkeypatch):
    """By stand-ins for the buffers and the context."""
    x, w, da = (xp.asarray(integers(shape, dtype, seed)) for seed, shape in enumerate([(6, 4), (4, 3), (6, 3)]))
    outs = xp.zeros((6, 4), x.dtype), xp.zeros(3, x.dtype)
    stream, launched = xp.cuda.Stream(non_blocking=True), []
    launch = calls._launch
    monkeypatch.setattr(calls, "_launch", lambda kept, values, on: (launched.append(on), launch(kept, values, on))[1])
    monkeypatch.setattr(device.Gpu, "settle", lambda *_: pytest.fail("XLA keeps its buffers itself"))
    given, out = [Buffer(one) for one in (da, x, w)], tuple(map(Buffer, outs))
    how = dj._How(dj._Options(None, None), ("dx", "db"))
    assert dj._into_buffers(how, SimpleNamespace(stream=stream.ptr), out, *given, None) is None
    assert set(launched) == {stream.ptr}
    assert {one for buffer in (*given[::2], *out) for one in buffer.asked} == {stream.ptr}
    expected = dg.dense_grads(None, w, da, need=("dx", "db"))
    for one, other in zip(outs, (expected.dx, expected.db), strict=True):
        np.testing.assert_array_equal(bits(xp.asnumpy(one)), bits(xp.asnumpy(other)))


# -- what a reader is told


@pytest.mark.only("simulator")
def test_the_example_gives_what_it_shows():
    check_example(dense, {"dense": dense, "jax": jax, "jnp": jnp})


@pytest.mark.only("simulator")
def test_the_page_runs():
    from tests.test_documentation import PAGES, blocks

    for _, block in blocks(PAGES["docs/arrays.md"], "python"):
        if "import jax" in block:
            exec(compile(block, "docs/arrays.md", "exec"), {})


def test_without_jax_the_module_says_how_to_install_it():
    program = "import sys; sys.modules['jax'] = None; import densegrad.jax"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
                           cwd=Path(__file__).parents[1])
    assert found.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: densegrad.jax needs JAX, 0.6.1 or newer (pip install 'jax>=0.6.1')")
