"""Answers to slips: what those who come from another library write, and what to write here instead.

Each table is of one kind of slip. Errors are raised where arguments are checked, which says what came and what was
expected; what was meant comes from here.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

_BATCH_AXIS = "the axis that is summed is that of the samples: batch_axis=0, or 1 where outputs come first"
#: (argument elsewhere, argument here, what to write): of several rows the first whose argument the function has
_ARGUMENTS = (
    ("approximate", "activation", 'the approximation is an activation of its own: activation="gelu_tanh"'),
    ("axis", "batch_axis", _BATCH_AXIS),
    ("bias", "b", "write b="),
    ("beta", "accumulate", "to add into what is there pass out= and accumulate=True"),
    ("dim", "batch_axis", _BATCH_AXIS),
    ("dtype", "out", "a result has the dtype of the arrays: for another pass out="),
    ("keepdim", "keepdims", "write keepdims="),
    ("mask", "sample_weight", "pass the mask as sample_weight="),
    ("reduction", "alpha", "gradients are summed over the samples: for those of a mean pass alpha=1 / samples"),
    ("target", "labels", "write labels="),
    ("weight", "class_weight", "write class_weight="),
    ("weight", "w", "write w="),
)
#: a name elsewhere, in small letters and digits alone -> the name here
_NAMES = {
    "swish": "silu", "logistic": "sigmoid", "linear": "identity", "none": "identity", "lrelu": "leaky_relu",
    "gelunew": "gelu_tanh", "gelufast": "gelu_tanh", "gelupytorchtanh": "gelu_tanh",
    "geluapproximatetanh": "gelu_tanh", "geluapproximatenone": "gelu",
    "avg": "mean", "average": "mean", "batchmean": "mean",
    "half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "single": "float32",
    "fp32": "float32", "double": "float64", "fp64": "float64",
}


def answered(function: Function) -> Function:
    """The function, which says what to write where Python only says that arguments do not fit the signature.

    Its signature stays what editors complete and checkers hold calls to.
    """
    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except TypeError:  # of the signature, or of what lies behind it
            answer = _answer(function, arguments, options)
            if answer is None:
                raise
            raise TypeError(answer) from None

    return cast(Function, call)


def _answer(function: Callable[..., Any], arguments: tuple, options: dict[str, Any]) -> str | None:
    """What to write instead of a call whose arguments do not fit the signature; None if they do, or are too few."""
    takes = signature(function).parameters
    called = f"{function.__name__}()"
    for name, value in options.items():
        if name not in takes:
            cures = [cure for elsewhere, here, cure in _ARGUMENTS if elsewhere == name and here in takes]
            cures += [f"did you mean {close}=?" for close in get_close_matches(name, takes, 1)]
            cures += [f"it takes {', '.join(takes)}"]
            return f"{called} takes no {name}; got {name}={_shown(value)} ({cures[0]})"
    by_position = [name for name, one in takes.items() if one.kind is not Parameter.KEYWORD_ONLY]
    if len(arguments) > len(by_position):
        others = [f"{name}=" for name in takes if name not in by_position]
        return (f"{called} takes {', '.join(by_position)} by position; got {len(arguments)} arguments (name the "
                f"others: {', '.join(others)})")
    return None


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, (str, int, float)) or value is None else type(value).__name__


def meant(given: Any, names: Iterable[str]) -> str:
    """The question which of the names was meant, to be put behind a message; empty where none is near.

    Besides strings, types and functions may have been given that have such a name: numpy.float32, torch.nn.GELU().
    """
    known = {_bare(name): name for name in names}
    known |= {elsewhere: here for elsewhere, here in _NAMES.items() if here in known.values()}
    printed = "" if hasattr(given, "shape") else str(given)  # an array would be fetched from its device
    said = [given] if isinstance(given, str) else [
        getattr(given, "__name__", ""), getattr(given, "name", ""), printed.removeprefix("torch."),
        type(given).__name__]
    for one in said:
        near = get_close_matches(_bare(str(one)), known, 1, 0.8)
        if near:
            return f' (did you mean "{known[near[0]]}"?)'
    return ""


def _bare(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def meant_capability(given: Any) -> str:
    """The same of a compute capability that is no tuple: 9.0, 90 or "sm_90" instead of (9, 0)."""
    found = re.fullmatch(r"(?:sm_|compute_)?(\d+)\.?(\d)[af]?", str(given))
    return f" (did you mean ({found[1]}, {found[2]})?)" if found else ""


def in_place_of(name: str, given: Any) -> str:
    """What to pass by this name instead of something that is no array: the cure."""
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(given).__mro__}
    if "torch.Module" in kinds:
        return "pass one of its tensors, for example its weight"
    if hasattr(given, "to_numpy"):  # pandas, polars, pyarrow, xarray
        return f"pass {name}.to_numpy().astype('float32'), for example"
    if hasattr(given, "toarray"):  # SciPy's sparse matrices
        return f"pass {name}.toarray()"
    return "convert it with numpy.asarray or cupy.asarray"
