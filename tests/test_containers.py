"""Arrays of every library: results are of the kind that came in, nothing is copied, and work is in the right order.

Kinds that a lane lacks are played by stand-ins with their interfaces. PyTorch's tensors have tests/test_tensors.py and
tests/test_torch.py, JAX's arrays tests/test_jax.py.
"""
import ctypes
import functools
import gc
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import densegrad as dg
from benchmarks import counting
from densegrad import calls, containers, device
from densegrad.testing import bits, host, integers

DTYPES = ("float16", "bfloat16", "float32", "float64")
#: bytes from the beginning of what a capsule holds, by whether it says its version, and the type of what stands there
FIELDS = {"major": (None, 0, ctypes.c_uint32), "flags": (None, 24, ctypes.c_uint64), "code": (20, 52, ctypes.c_uint8),
          "lanes": (22, 54, ctypes.c_uint16), "data": (0, 32, ctypes.c_uint64), "offset": (40, 72, ctypes.c_uint64)}


def field(capsule, name):
    """A field of what the capsule holds."""
    versioned = "dltensor_versioned" in repr(capsule)
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer",
                                                                                   ctypes.pythonapi))
    _, _, kind = FIELDS[name]
    return kind.from_address(pointer(capsule, b"dltensor_versioned" if versioned else b"dltensor")
                             + FIELDS[name][versioned])


def capsule_of(array, asked):
    """A capsule of an array of NumPy, bfloat16 too, or of CuPy."""
    if isinstance(array, np.ndarray) and array.dtype.name == "bfloat16":
        made = array.view("uint16").__dlpack__(**asked)
        field(made, "code").value = 4
        return made
    return array.__dlpack__(**asked)


class Producer:
    """An array of a library that hands it over by DLPack: what was asked of it, and its capsules changed as told."""

    def __init__(self, array, changed=None, place=None):
        self.array, self.changed, self.place = array, changed or {}, place
        self.shape, self.dtype, self.asked = array.shape, array.dtype, []

    def __dlpack_device__(self):
        return self.place or self.array.__dlpack_device__()

    def __dlpack__(self, *, stream=None, max_version=None, **options):
        self.asked.append(stream)
        capsule = capsule_of(self.array, {"stream": stream, "max_version": max_version})
        for name, value in self.changed.items():
            field(capsule, name).value = value
        return capsule


class Old(Producer):
    """A producer of before DLPack 1.0, which knows streams and no more."""

    def __dlpack__(self, stream=None):
        return super().__dlpack__(stream=stream)


class Library:
    """A namespace of arrays: takes over what is handed to it, and says when an array goes."""

    def __init__(self, xp):
        self.xp, self.taken = xp, []

    def from_dlpack(self, producer):
        self.taken.append(producer)
        if self.xp is not np:
            return Native(self.xp.from_dlpack(producer), self)
        capsule = producer.__dlpack__(stream=None)
        narrow = field(capsule, "code").value == 4
        if narrow:
            field(capsule, "code").value = 1
        array = np.from_dlpack(SimpleNamespace(__dlpack__=lambda **_: capsule, __dlpack_device__=lambda: (1, 0)))
        return Native(array.view(device.dtype_of("bfloat16")) if narrow else array, self)


class Native(Producer):
    """A producer with a namespace of its own."""

    def __init__(self, array, library):
        super().__init__(array)
        self.library = library

    def __array_namespace__(self):
        return self.library


class Foreign:
    """An array of another library: nothing but the CUDA array interface."""

    def __init__(self, array, stream=None, **changed):
        interface = {**array.__cuda_array_interface__, "stream": stream, **changed}
        self.__cuda_array_interface__ = {key: value for key, value in interface.items() if value != "left out"}
        self.array, self.shape = array, array.shape


@pytest.fixture
def jax_array(xp, monkeypatch):
    """The type of arrays of a stand-in for JAX, which is imported for as long as the test runs."""
    class Array(Native):
        deleted, spread = False, ("one",)

        def is_deleted(self):
            return self.deleted

        def devices(self):
            return self.spread

    class Namespace(Library):
        def from_dlpack(self, producer):
            made = super().from_dlpack(producer)
            return Array(made.array, self)

    tracer = type("Tracer", (Array,), {})
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(Array=Array, core=SimpleNamespace(Tracer=tracer)))
    library = Namespace(xp)
    return lambda array: Array(array, library)


@pytest.fixture
def kinds(xp, lane, jax_array):
    """Name of each kind -> (what makes one of an array of the lane, the type of its results)."""
    from numba import cuda

    library = Library(xp)
    known = {"NumPy" if xp is np else "CuPy": (lambda array: array, xp.ndarray),
             "DLPack": (Producer, xp.ndarray), "DLPack, before versions": (Old, xp.ndarray),
             "DLPack, with a namespace": (lambda array: Native(array, library), Native),
             "JAX": (jax_array, type(jax_array(xp.zeros(1, "float32"))))}
    if lane == "simulator":
        fake = type(cuda.to_device(np.zeros(1)))
        return known | {"Numba": (fake, fake)}
    known["Numba"] = lambda array: cuda.as_cuda_array(array, sync=False), type(cuda.device_array(1))
    return known | {"interface": (Foreign, xp.ndarray)}


INTERFACE = pytest.param("interface", marks=pytest.mark.only("gpu"))
NAMES = (pytest.param("NumPy", marks=pytest.mark.only("simulator")),
         pytest.param("CuPy", marks=pytest.mark.only("gpu")),
         "DLPack", "DLPack, before versions", "DLPack, with a namespace", "JAX", "Numba", INTERFACE)


def values(array):
    """The values of an array of any of these kinds, on the host."""
    if hasattr(array, "copy_to_host"):
        return array.copy_to_host()
    return host(getattr(array, "array", array))


def flat(results):
    """All arrays that a function returned."""
    return [one for one in results if one is not None] if isinstance(results, tuple) else [results]


def laid_out(xp, array, order):
    """The array on the device, in this order."""
    made = xp.asarray(array)
    if order == "F":
        return xp.asarray(np.ascontiguousarray(array.T)).T
    if order == "offset":
        cells = xp.zeros(array.size + 1, made.dtype)
        cells[1:] = made.ravel()
        return cells[1:].reshape(array.shape)
    if order == "spread":
        cells = xp.zeros((2 * array.shape[0], 3 * array.shape[1]), made.dtype)
        cells[::2, ::3] = made
        return cells[::2, ::3]
    return made


ORDERS = "C", "F", "offset"
#: each function by how it is called: x (6, 4), w (4, 3), dz and z (6, 3), labels and weights of samples (6,)
FUNCTIONS = {
    "bias_grad": lambda g: dg.bias_grad(g["dz"]),
    "weight_grad": lambda g: dg.weight_grad(g["x"], g["dz"]),
    "input_grad": lambda g: dg.input_grad(g["dz"], g["w"]),
    "weight_bias_grad": lambda g: dg.weight_bias_grad(g["x"], g["dz"]),
    "dense_grads": lambda g: dg.dense_grads(g["x"], g["w"], g["dz"], activation="relu", z=g["z"],
                                            sample_weight=g["weight"]),
    "activation_grad": lambda g: dg.activation_grad(g["dz"], g["z"], "silu"),
    "cross_entropy": lambda g: dg.cross_entropy(g["z"], g["labels"], sample_weight=g["weight"]),
    "cross_entropy_grad": lambda g: dg.cross_entropy_grad(g["z"], g["labels"], class_weight=g["class_weight"]),
}


def arguments(xp, dtype, order="C"):
    """All arrays of a layer on the device."""
    shapes = {"x": (6, 4), "w": (4, 3), "dz": (6, 3), "z": (6, 3)}
    made = {name: laid_out(xp, integers(shape, dtype, seed), order)
            for seed, (name, shape) in enumerate(shapes.items())}
    return made | {"labels": xp.asarray(np.arange(6) % 3), "weight": xp.asarray(np.arange(6).astype("float32")),
                   "class_weight": xp.asarray(np.arange(1, 4).astype("float32"))}


@pytest.fixture(scope="module")
def expected(xp):
    """By function, dtype and order: what it gives of the lane's own arrays."""
    return functools.cache(lambda function, dtype, order: [
        host(one) for one in flat(FUNCTIONS[function](arguments(xp, dtype, order)))])


@pytest.fixture
def watched(monkeypatch):
    """(values of the slots, stream) of every call that launches."""
    found, launch = [], calls._launch

    def record(kept, slots, stream):
        found.append((dict(slots), stream))
        launch(kept, slots, stream)

    monkeypatch.setattr(calls, "_launch", record)
    return found


class Quiet:
    """Holds that in the with block nothing is copied and nobody waits for the device, where that is counted."""

    def __enter__(self):
        self.machine = sys.modules["rehearsal"].machine() if counting.machine() else None
        if self.machine:
            self.machine.transfers.clear()
            self.machine.synchronised.clear()

    def __exit__(self, *_):
        if self.machine:
            assert not [one for one in self.machine.transfers if one.kind != "memset"]
            assert not self.machine.synchronised


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_results_are_of_the_kind_that_came_in(name, dtype, kinds, xp, watched, expected):
    """In every public function, in one of the orders each: the bits of the lane's own arrays, read where they lie."""
    make, of = kinds[name]
    if dtype == "bfloat16" and name in ("Numba", "interface") and xp is not np:
        with pytest.raises(dg.DTypeError, match="dz must be"):  # the CUDA Array Interface has no bfloat16
            dg.bias_grad(make(arguments(xp, dtype)["dz"]))
        return
    for number, (function, call) in enumerate(FUNCTIONS.items()):
        order = ORDERS[(number + DTYPES.index(dtype)) % len(ORDERS)]
        own = arguments(xp, dtype, order)
        given, right = {key: make(array) for key, array in own.items()}, expected(function, dtype, order)
        for _ in range(2 if function in ("bias_grad", "cross_entropy") else 1):  # as described, and as kept
            watched.clear()
            with Quiet():
                found = flat(call(given))
            assert all(type(one) is of for one in found), (function, order)
            for one, other in zip(found, right, strict=True):
                assert values(one).dtype == other.dtype
                np.testing.assert_array_equal(bits(values(one)), bits(other), (function, order))
            (slots, _), = watched
            assert {key: int(slots[key]) for key in own.keys() & slots.keys()} == {
                key: device.current().memory(own[key]).byte for key in own.keys() & slots.keys()}


@pytest.mark.parametrize("name", ["DLPack, with a namespace", "JAX", "Numba"])
def test_results_are_handed_over_without_a_copy(name, kinds, xp, watched):
    make, _ = kinds[name]
    result = dg.bias_grad(make(arguments(xp, "float32")["dz"]))
    (slots, _), = watched
    if name == "Numba":
        address = result.__array_interface__["data"][0] if xp is np else result.device_ctypes_pointer.value
    else:
        address = device.current().memory(result.array).byte
    assert int(slots["out"]) == address
    assert name == "Numba" or not address % 64  # which JAX asks for


@pytest.mark.parametrize("name", NAMES)
def test_a_view_without_a_contiguous_axis_is_copied_once_and_nobody_waits(name, kinds, xp):
    make, of = kinds[name]
    dz = laid_out(xp, integers((6, 3), "float32"), "spread")
    machine = sys.modules["rehearsal"].machine() if counting.machine() else None
    for _ in range(2):
        if machine:
            machine.synchronised.clear()
        found = dg.bias_grad(make(dz))
        assert not (machine and machine.synchronised)
        assert type(found) is of
        np.testing.assert_array_equal(values(found), host(dz).sum(axis=0))


@pytest.mark.only("gpu")
def test_to_copy_cupy_is_named_no_stream_that_it_would_wait_for_on_the_host(xp, monkeypatch):
    dz, named, asarray = laid_out(xp, integers((12, 5), "float32"), "spread"), [], xp.asarray
    monkeypatch.setattr(xp, "asarray", lambda array: named.append(array.__cuda_array_interface__["stream"]) or asarray(
        array))
    dg.bias_grad(Foreign(dz, stream=xp.cuda.Stream(non_blocking=True).ptr))
    assert named == [None]


@pytest.mark.parametrize("name", NAMES)
def test_arrays_without_elements(name, kinds, xp):
    make, of = kinds[name]
    for shape in ((0, 3), (6, 0)):
        found = dg.bias_grad(make(xp.zeros(shape, "float32")))
        assert type(found) is of
        np.testing.assert_array_equal(values(found), np.zeros(shape[1]))


@pytest.mark.parametrize("name", ["DLPack", "DLPack, before versions", "DLPack, with a namespace", "Numba", INTERFACE])
def test_results_are_written_into_arrays_of_the_kind(name, kinds, xp):
    make, _ = kinds[name]
    given, into = arguments(xp, "float32"), xp.ones((4, 3), "float32")
    out = make(into)
    for _ in range(2):
        assert dg.weight_grad(make(given["x"]), make(given["dz"]), out=out, accumulate=True) is out
    np.testing.assert_array_equal(host(into), 1 + 2 * host(given["x"]).T @ host(given["dz"]))


@pytest.mark.parametrize("name", ["DLPack", "DLPack, with a namespace", "JAX"])
def test_alpha_may_be_of_the_kind(name, kinds, xp):
    make, _ = kinds[name]
    dz = arguments(xp, "float32")["dz"]
    found = dg.bias_grad(make(dz), alpha=make(xp.asarray(np.float32(3))))
    np.testing.assert_array_equal(values(found), 3 * host(dz).sum(axis=0))


def test_what_cannot_be_written_is_refused_with_the_cure(kinds, xp, jax_array):
    dz, out = xp.ones((6, 3), "float32"), xp.zeros(3, "float32")
    with pytest.raises(dg.OutError, match=r"out is read-only \(no array of JAX can be written: leave it out, and take"):
        dg.bias_grad(jax_array(dz), out=jax_array(out))
    with pytest.raises(dg.OutError, match=r"out is read-only \(pass an array that can be written\)"):
        dg.bias_grad(Producer(dz), out=Producer(out, {"flags": 1}))
    assert not host(out).any()
    dg.bias_grad(Producer(dz, {"flags": 1}))  # to be read


def test_mixed_kinds_are_refused_and_named(kinds, xp):
    """Arrays that come back as the device's own may meet: such an array may be the out of another library's input."""
    own = {name: made for name, made in kinds.items() if made[1] is xp.ndarray}
    given = arguments(xp, "float32")
    calls_of = {
        ("x", "dz"): lambda a, b: dg.weight_grad(a(given["x"]), b(given["dz"])),
        ("w", "dz"): lambda a, b: dg.input_grad(b(given["dz"]), a(given["w"])),
        ("z", "da"): lambda a, b: dg.activation_grad(b(given["dz"]), a(given["z"]), "relu"),
        ("sample_weight", "dz"): lambda a, b: dg.dense_grads(b(given["x"]), b(given["w"]), b(given["dz"]),
                                                             sample_weight=a(given["weight"])),
        ("labels", "z"): lambda a, b: dg.cross_entropy(b(given["z"]), a(given["labels"])),
        ("class_weight", "z"): lambda a, b: dg.cross_entropy(b(given["z"]), b(given["labels"]),
                                                             class_weight=a(given["class_weight"])),
        ("out", "dz"): lambda a, b: dg.bias_grad(b(given["dz"]), out=a(xp.zeros(3, "float32"))),
    }
    for (name, other), ((one, two), call) in itertools.product(itertools.permutations(kinds, 2), calls_of.items()):
        if (name in own and other in own) or (name == "JAX" and one == "out"):
            continue
        with pytest.raises(TypeError) as error:
            call(kinds[name][0], kinds[other][0])
        named = [each if each in ("NumPy", "CuPy", "JAX", "Numba") else __name__.partition(".")[0]
                 for each in (name, other)]
        assert f"{one} is an array of {named[0]} and {two} one of {named[1]}" in str(error.value)
    if xp is not np:  # on the host a number is one of the host's
        for one, two in (("CuPy", "JAX"), ("JAX", "CuPy")):
            with pytest.raises(TypeError, match=f"alpha is an array of {one} and the inputs one of {two}"):
                dg.bias_grad(kinds[two][0](given["dz"]), alpha=kinds[one][0](xp.asarray(np.float32(2))))
    for one, two in itertools.permutations(own.values(), 2):
        dg.weight_grad(one[0](given["x"]), two[0](given["dz"]), out=one[0](xp.zeros((4, 3), "float32")))


@pytest.mark.parametrize(("changed", "message"), [
    ({"major": 2}, r"handed over by DLPack 2, of which versions up to 1 are understood"),
    ({"lanes": 2}, r"its elements are vectors of 2"),
    ({"flags": 2}, r"its library hands over a copy"),
    ({"code": 9}, r"its library does not hand it over"),
])
def test_capsules_that_are_not_understood(changed, message, xp):
    array = xp.ones((6, 3), "float32")
    with pytest.raises(TypeError, match=rf"dz must be .*; got Producer \(.*{message}"):
        dg.bias_grad(Producer(array, changed))
    dg.bias_grad(Producer(array))


def test_arrays_that_cannot_be_had(xp, jax_array):
    array = xp.ones((6, 3), "float32")
    with pytest.raises(TypeError, match=r"got Producer \(it lies on a GPU of AMD, where kernels cannot use it"):
        dg.bias_grad(Producer(array, place=(10, 0)))
    broken = Producer(array)
    broken.array = object()
    with pytest.raises(TypeError, match=r"got Producer \(its library does not hand it over: 'object' object has no"):
        dg.bias_grad(broken)
    used = array.__dlpack__()
    (np if xp is np else xp).from_dlpack(SimpleNamespace(__dlpack__=lambda **_: used,
                                                         __dlpack_device__=array.__dlpack_device__))
    taken = Producer(array)
    taken.__class__ = type("Once", (Producer,), {"__dlpack__": lambda self, **_: used})
    with pytest.raises(TypeError, match=r"got Once \(.* gives no capsule that could be taken over"):
        dg.bias_grad(taken)
    for change, cure in (({"deleted": True}, "donated or deleted"), ({"spread": (1, 2)}, r"addressable_data\(0\)"),
                         ({"__class__": sys.modules["jax"].core.Tracer}, r"call densegrad\.jax\.dense there")):
        one = jax_array(array)
        vars(one).update({key: value for key, value in change.items() if key != "__class__"})
        one.__class__ = change.get("__class__", type(one))
        with pytest.raises(TypeError, match=cure):
            dg.bias_grad(one)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_offsets_of_capsules(name, xp):
    """Those of views, and those that a capsule gives beside the address."""
    cells = xp.asarray(integers((7, 3), name))
    moved = Producer(cells[1:])
    np.testing.assert_array_equal(bits(dg.bias_grad(moved)), bits(dg.bias_grad(cells[1:])))

    class Offset(Producer):
        def __dlpack__(self, **asked):
            capsule, row = super().__dlpack__(**asked), 3 * cells.dtype.itemsize
            field(capsule, "data").value -= row
            field(capsule, "offset").value = row
            return capsule

    np.testing.assert_array_equal(bits(dg.bias_grad(Offset(cells[1:]))), bits(dg.bias_grad(cells[1:])))


@pytest.mark.only("gpu")
@pytest.mark.parametrize(("changed", "error", "message"), [
    ({"version": 4}, TypeError, "has version 4, of which 0 to 3 are understood"),
    ({"mask": object()}, TypeError, "its mask would be lost"),
    ({"strides": (12,)}, TypeError, r"has 1 strides for the shape \(6, 3\)"),
    ({"typestr": "left out"}, TypeError, "cannot be read: KeyError: 'typestr'"),
    ({"typestr": "nonsense"}, TypeError, "cannot be read: TypeError"),
    ({"typestr": ">f4"}, dg.DTypeError, "must be in the machine's byte order; got >f4"),
])
def test_interfaces_that_are_not_understood(changed, error, message, xp):
    with pytest.raises(error, match=message):
        dg.bias_grad(Foreign(xp.ones((6, 3), "float32"), **changed))


# -- streams and lifetimes


@pytest.mark.only("gpu")
def test_work_goes_to_the_stream_that_the_interface_names(xp, watched):
    """The current stream waits for it, and a result may be used there."""
    written, current = xp.cuda.Stream(non_blocking=True), xp.cuda.Stream(non_blocking=True)
    dz = xp.asarray(integers((6, 3), "float32"))
    for _ in range(2):
        watched.clear()
        with current, Waits() as waits:
            found = dg.bias_grad(Foreign(dz, stream=written.ptr))
        assert [stream for _, stream in watched] == [written.ptr]
        waits.hold([(current.ptr, written.ptr)])
        np.testing.assert_array_equal(host(found), host(dz).sum(axis=0))


@pytest.mark.only("gpu")
def test_a_stream_that_is_asked_for_waits_for_the_interface_s_and_it_for_that(xp, watched):
    written, asked = xp.cuda.Stream(non_blocking=True), xp.cuda.Stream(non_blocking=True)
    given = arguments(xp, "float32")
    with Waits() as waits:
        dg.weight_grad(Foreign(given["x"]), Foreign(given["dz"], stream=written.ptr), stream=asked)
    assert [stream for _, stream in watched] == [asked.ptr]
    waits.hold([(asked.ptr, written.ptr), (written.ptr, asked.ptr)])


@pytest.mark.only("gpu")
def test_dlpack_is_told_the_stream_and_waited_for(xp, watched):
    producing, asked = xp.cuda.Stream(non_blocking=True), xp.cuda.Stream(non_blocking=True)

    class Ahead(Producer):
        """A library with a stream of its own, which is CuPy's current one while it exports."""

        def __dlpack__(self, **options):
            with producing:
                return super().__dlpack__(**options)

    dz = xp.asarray(integers((6, 3), "float32"))
    for stream in (asked, None):
        watched.clear()
        given = Ahead(dz)
        with Waits() as waits:
            if stream is None:
                with asked:
                    dg.bias_grad(given)
            else:
                dg.bias_grad(given, stream=stream)
        assert given.asked == [asked.ptr]
        assert [stream for _, stream in watched] == [asked.ptr]
        waits.hold([(asked.ptr, producing.ptr)])


@pytest.mark.only("gpu")
def test_results_of_numba_name_the_stream_they_are_written_on(xp, watched):
    from numba import cuda

    stream = xp.cuda.Stream(non_blocking=True)
    dz = cuda.as_cuda_array(xp.ones((6, 3), "float32"), sync=False).bind(cuda.external_stream(stream.ptr))
    found = dg.bias_grad(dz)
    assert int(found.stream) == stream.ptr
    watched.clear()
    dg.bias_grad(dz, out=found)
    assert [stream for _, stream in watched] == [stream.ptr]


class Waits:
    """Which streams wait for which in the with block, where that is counted."""

    def __enter__(self):
        self.machine = sys.modules["rehearsal"].machine() if counting.machine() else None
        if self.machine:
            self.machine.waits.clear()
            self.machine.synchronised.clear()
        return self

    def __exit__(self, *_):
        if self.machine:
            self.found = [*self.machine.waits]
            assert not self.machine.synchronised

    def hold(self, expected):
        """These and no others."""
        if self.machine:
            assert [one for one in self.found if one[0] != one[1]] == expected


@pytest.mark.only("gpu")
@pytest.mark.parametrize("name", ["DLPack", "JAX", "Numba", "interface"])
def test_arrays_that_nobody_needs_are_kept_until_the_launches_are_done(name, kinds, xp, monkeypatch):
    make, _ = kinds[name]
    done = [False]
    monkeypatch.setattr(xp.cuda, "Event", type("Event", (xp.cuda.Event,), {"done": property(lambda self: done[0])}))
    monkeypatch.setattr(device.current(), "_busy", {})
    freed = []

    class Owner:
        """Memory that its library frees with the last array over it."""

        def __del__(self):
            freed.append(True)

    dz = xp.ones((6, 3), "float32")
    given = make(dz)
    given.owner = Owner()
    dg.bias_grad(given)
    del given
    gc.collect()
    assert not freed
    done[0] = True
    dg.bias_grad(make(dz))
    gc.collect()
    assert freed


@pytest.mark.only("gpu")
def test_in_a_graph_order_and_lifetimes_are_the_graph_s(xp):
    dz, out, stream = xp.ones((6, 3), "float32"), xp.zeros(3, "float32"), xp.cuda.Stream(non_blocking=True)
    given, into = Foreign(dz), Foreign(out)
    dg.bias_grad(given, out=into, stream=stream)
    stream.synchronize()
    out[...] = 0
    with stream:
        stream.begin_capture()
        dg.bias_grad(given, out=into)
        graph = stream.end_capture()
    graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(host(out), host(dz).sum(axis=0))


# -- prepared calls


@pytest.mark.parametrize("name", ["DLPack", "DLPack, with a namespace", "Numba", INTERFACE])
def test_prepared_calls_write_into_arrays_of_the_kind_and_rebind_them(name, kinds, xp):
    make, _ = kinds[name]
    first, second = xp.asarray(integers((2, 64, 3), "float32"))  # both aligned to as much
    into = xp.zeros(3, "float32")
    out = make(into)
    step = dg.prepare(dg.bias_grad, make(first), out=out)
    assert step() is out
    np.testing.assert_array_equal(host(into), host(first).sum(axis=0))
    step.rebind(dz=make(second))()
    np.testing.assert_array_equal(host(into), host(second).sum(axis=0))
    with pytest.raises(dg.PrepareError, match="must have the layout"):
        step.rebind(dz=make(second[:4]))


def test_results_that_show_no_later_writing_are_not_prepared(kinds, xp):
    dz = xp.ones((6, 3), "float32")
    for name, cure in (("DLPack, with a namespace", r"\(pass out=, or arrays of"), ("JAX", r"\(pass arrays of")):
        with pytest.raises(dg.PrepareError, match=cure):
            dg.prepare(dg.bias_grad, kinds[name][0](dz))


def test_no_library_is_imported_to_tell_a_kind(monkeypatch):
    for name in ("cupy", "torch", "jax"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would raise
    assert containers.kind_of(np.ones(3)).name == "NumPy"
    assert containers.kind_of("a string") is containers.UNREAD
