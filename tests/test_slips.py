"""Slips: what is said to those who write what another library takes, and swap or mistake arguments."""
import numpy as np
import pytest

import densegrad as dg
from densegrad import plans
from densegrad.slips import in_place_of, meant

X, W, DZ = (np.ones(shape, "float32") for shape in ((32, 64), (64, 10), (32, 10)))
LABELS = np.zeros(32, "int64")

#: what is written -> what is said, to its end
ARGUMENTS = {
    "bias_grad axis": (lambda: dg.bias_grad(DZ, axis=0),
                       "bias_grad() takes no axis; got axis=0 (the axis that is summed is that of the samples: "
                       "batch_axis=0, or 1 where outputs come first)"),
    "weight_grad dim": (lambda: dg.weight_grad(X, DZ, dim=-1), "weight_grad() takes no dim; got dim=-1 (the axis that"),
    "keepdim": (lambda: dg.bias_grad(DZ, keepdim=True),
                "bias_grad() takes no keepdim; got keepdim=True (write keepdims=)"),
    "keepdim where there is none": (lambda: dg.input_grad(DZ, W, keepdim=True),
                                    "input_grad() takes no keepdim; got keepdim=True (it takes dz, w, batch_axis, "),
    "reduction": (lambda: dg.dense_grads(X, W, DZ, reduction="mean"),
                  "dense_grads() takes no reduction; got reduction='mean' (gradients are summed over the samples: for "
                  "those of a mean pass alpha=1 / samples)"),
    "approximate": (lambda: dg.activation_grad(DZ, DZ, "gelu", approximate="tanh"),
                    "activation_grad() takes no approximate; got approximate='tanh' (the approximation is an "
                    'activation of its own: activation="gelu_tanh")'),
    "approximate of a layer": (lambda: dg.dense_grads(X, W, DZ, z=DZ, activation="gelu", approximate="tanh"),
                               "dense_grads() takes no approximate; got"),
    "dtype": (lambda: dg.bias_grad(DZ, dtype=np.float64), "bias_grad() takes no dtype; got dtype=type (a result has"),
    "beta": (lambda: dg.weight_bias_grad(X, DZ, beta=1.0), "takes no beta; got beta=1.0 (to add into what is there"),
    "mask": (lambda: dg.activation_grad(DZ, mask=LABELS == 0), "got mask=ndarray (pass the mask as sample_weight=)"),
    "weight of classes": (lambda: dg.cross_entropy(DZ, LABELS, weight=W), "got weight=ndarray (write class_weight=)"),
    "weight": (lambda: dg.input_grad(DZ, weight=W), "input_grad() takes no weight; got weight=ndarray (write w=)"),
    "target": (lambda: dg.cross_entropy_grad(DZ, target=LABELS), "got target=ndarray (write labels=)"),
    "a letter": (lambda: dg.bias_grad(DZ, batchaxis=1), "got batchaxis=1 (did you mean batch_axis=?)"),
    "what nothing is like": (lambda: dg.bias_grad(DZ, quux=1), "got quux=1 (it takes dz, batch_axis, keepdims, "),
    "by position": (lambda: dg.bias_grad(DZ, 0),
                    "bias_grad() takes dz by position; got 2 arguments (name the others: batch_axis=, keepdims=, "),
    "of a prepared call": (lambda: dg.prepare(dg.bias_grad, DZ, axis=0), "bias_grad() takes no axis; got axis=0 (the "),
    "too few": (lambda: dg.weight_grad(X), "weight_grad() missing 1 required positional argument: 'dz'"),
}


@pytest.mark.parametrize("slip", ARGUMENTS)
def test_arguments_of_other_libraries(slip):
    write, said = ARGUMENTS[slip]
    with pytest.raises(TypeError) as error:
        write()
    assert said in str(error.value)
    assert type(error.value) is TypeError
    assert error.value.__suppress_context__ is not (slip == "too few")


def test_what_is_raised_within_a_call_is_left_alone():
    with pytest.raises(TypeError, match="batch_axis must be the int 0 or 1; got '0'"):
        dg.bias_grad(DZ, batch_axis="0")


ACTIVATIONS = {"swish": "silu", "Swish": "silu", "GELU": "gelu", "ReLU": "relu", "LeakyReLU": "leaky_relu",
               "leaky-relu": "leaky_relu", "hard_swish": "hardswish", "gelu_new": "gelu_tanh", "linear": "identity",
               "sigmod": "sigmoid"}


@pytest.mark.parametrize("given", ACTIVATIONS)
def test_activations_by_other_names(given):
    for call in (lambda: dg.activation_grad(DZ, DZ, given), lambda: dg.dense_grads(X, W, DZ, activation=given, z=DZ),
                 lambda: plans.plan_upstream(32, 10, "float32", "rows", given)):
        with pytest.raises(ValueError, match=rf'got {given!r} \(did you mean "{ACTIVATIONS[given]}"\?\)$'):
            call()


def test_nothing_is_meant_where_nothing_is_near():
    for given in ("quux", "", 3, DZ, len):
        assert meant(given, ("relu", "gelu", "identity")) == ""


def test_a_function_for_the_name_of_an_activation():
    def gelu(z):
        return z

    with pytest.raises(ValueError, match=r'got function \(did you mean "gelu"\?\)$'):
        dg.activation_grad(DZ, DZ, gelu)
    for approximate, name in (("none", "gelu"), ("tanh", "gelu_tanh")):
        module = type("GELU", (), {"__str__": lambda self, how=approximate: f"GELU(approximate={how!r})"})()
        with pytest.raises(ValueError, match=rf'\(did you mean "{name}"\?\)$'):
            dg.activation_grad(DZ, DZ, module)
    with pytest.raises(ValueError, match=r"got ndarray \(pass a name; in activation_grad the order is da, z, activ"):
        dg.activation_grad(DZ, "relu", DZ)


@pytest.mark.parametrize("call", [
    lambda: plans.tensor_core_candidates(64, 64, 64, "float16", None, 9.0),
    lambda: plans.plan_of_tile(64, 64, 64, "float16", None, (64, 64, 32, 32, 3), capability=9.0),
    lambda: plans.check_precision(plans.plan_product(64, 64, 64, "float32"), None, 9.0)])
def test_a_capability_is_a_tuple_in_every_function_of_plans(call):
    with pytest.raises(dg.PlanError, match=r"capability must be a tuple of two ints.*\(did you mean \(9, 0\)\?\)$"):
        call()


@pytest.mark.parametrize(("call", "said"), [
    (lambda: dg.weight_grad(X, DZ, precision="TF32"), 'got \'TF32\' (did you mean "tf32"?)'),
    (lambda: dg.weight_grad(X, DZ, weight_layout="out-in"), "got 'out-in' (did you mean \"out_in\"?)"),
    (lambda: dg.cross_entropy(DZ, LABELS, reduction="avg"), "got 'avg' (did you mean \"mean\"?)"),
    (lambda: dg.warmup([(1, 2, 3)], [np.float32], capability=(9, 0)),
     "got <class 'numpy.float32'> (did you mean \"float32\"?)"),
    (lambda: dg.warmup([(1, 2, 3)], capability=9.0), "got 9.0 (did you mean (9, 0)?)"),
])
def test_other_names(call, said):
    with pytest.raises(ValueError, match="must be") as error:
        call()
    assert str(error.value).endswith(said)


#: arguments in another order, whose shapes give it away -> what is said of that
SWAPPED = {
    "x, dz, w": (lambda: dg.dense_grads(X, DZ, W), "(w and dz fit if they are swapped)"),
    "dz, w, x": (lambda: dg.dense_grads(DZ, W, X), "(x and dz fit if they are swapped)"),
    "w, x, dz": (lambda: dg.dense_grads(W, X, DZ), "(x and w fit if they are swapped)"),
    "w, dz of a batch of sequences": (lambda: dg.input_grad(W, np.ones((4, 32, 10), "float32")),
                                      "(w and dz fit if they are swapped)"),
    "w, dz, outputs first": (lambda: dg.input_grad(W.T, DZ, weight_layout="out_in"),
                             "(w and dz fit if they are swapped)"),
    "labels, z": (lambda: dg.cross_entropy(LABELS, DZ), "(z and labels fit if they are swapped)"),
    "labels, z, outputs first": (lambda: dg.cross_entropy(LABELS, DZ.T, batch_axis=1),
                                 "(z and labels fit if they are swapped)"),
    "dz, x into dw": (lambda: dg.weight_grad(DZ, X, out=np.empty((64, 10), "float32")),
                      'got (64, 10); did you mean weight_layout="out_in", or x and dz swapped?'),
    "dz, x into dw and db": (lambda: dg.weight_bias_grad(DZ, X, out=dg.WeightBiasGrads(dw=np.empty((64, 10), "f4"))),
                             'got (64, 10); did you mean weight_layout="out_in", or x and dz swapped?'),
}


@pytest.mark.parametrize("order", SWAPPED)
def test_swapped_arguments(order):
    call, said = SWAPPED[order]
    with pytest.raises(dg.DensegradError) as error:
        call()
    assert str(error.value).endswith(said)


def test_arguments_that_would_not_fit_either_are_not_called_swapped():
    for call in (lambda: dg.weight_grad(X, DZ[:7]), lambda: dg.input_grad(DZ, W[:, :7]),
                 lambda: dg.cross_entropy(LABELS, DZ[:7]), lambda: dg.cross_entropy(LABELS, None),
                 lambda: dg.weight_grad(X, DZ, out=np.empty((64, 9), "float32"))):
        with pytest.raises(dg.DensegradError) as error:
            call()
        assert "swapped" not in str(error.value)


class Frame:
    """What pandas, polars and others call a table."""

    def to_numpy(self):
        return DZ


class Sparse:
    """A matrix as SciPy's sparse ones are."""

    def toarray(self):
        return DZ


class Module:
    """A stand-in for PyTorch's, which lies in torch.nn.modules.module."""

    __module__ = "torch.nn.modules.module"


class Layer(Module):
    """As users define them."""


@pytest.mark.parametrize(("given", "said"), [
    (Frame(), "got Frame (pass dz.to_numpy().astype('float32'), for example)"),
    (Sparse(), "got Sparse (pass dz.toarray())"),
    (Layer(), "got Layer (pass one of its tensors, for example its weight)"),
    ([[1.0]], "got list (convert it with numpy.asarray or cupy.asarray)"),
], ids=lambda value: type(value).__name__)
def test_what_is_no_array(given, said):
    with pytest.raises(TypeError) as error:
        dg.bias_grad(given)
    assert str(error.value).endswith(said)


def test_what_is_no_array_by_its_own_name():
    assert in_place_of("w", Frame()) == "pass w.to_numpy().astype('float32'), for example"
