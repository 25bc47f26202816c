"""What makers of plans refuse: sizes, dtypes, layouts and capabilities that mean nothing, by errors that name them."""
import numpy as np
import pytest

from densegrad import plans
from densegrad.errors import PlanError
from densegrad.plans import BatchSumPlan, MatmulPlan, TensorCorePlan, ThinPlan

MAKERS = {
    "plan_batch_sum": (plans.plan_batch_sum, {"samples": 64, "outputs": 10, "dtype": "float32", "layout": "flat"}),
    "plan_upstream": (plans.plan_upstream, {"samples": 64, "outputs": 10, "dtype": "float32", "layout": "flat",
                                            "above": "relu"}),
    "log_sum_exp_block": (plans.log_sum_exp_block, {"samples": 64, "outputs": 10, "features_first": False}),
    "plan_matmul": (plans.plan_matmul, {"rows": 4, "cols": 4, "depth": 4, "dtype": "float32"}),
    "plan_tensor_core": (plans.plan_tensor_core, {"rows": 4, "cols": 4, "depth": 4, "dtype": "float32",
                                                  "precision": "tf32", "capability": (8, 0)}),
    "plan_thin": (plans.plan_thin, {"rows": 4, "cols": 4, "depth": 4, "dtype": "float32"}),
    "plan_product": (plans.plan_product, {"rows": 4, "cols": 4, "depth": 4, "dtype": "float32", "precision": None,
                                          "capability": (9, 0)}),
    "BatchSumPlan": (BatchSumPlan, {"samples": 64, "outputs": 10, "dtype": "float32", "layout": "rows", "threads_x": 4,
                                    "lanes": 8, "in_flight": 1, "samples_per_part": 64}),
    "MatmulPlan": (MatmulPlan, {"rows": 4, "cols": 4, "depth": 4, "dtype": "float32", "tile_rows": 8, "tile_cols": 8,
                                "tile_depth": 4, "thread_rows": 4, "thread_cols": 4}),
    "ThinPlan": (ThinPlan, {"rows": 4, "cols": 4, "depth": 4, "dtype": "float32", "threads_across": 8,
                            "threads_along": 4}),
    "TensorCorePlan": (TensorCorePlan, {"rows": 4, "cols": 4, "depth": 4, "dtype": "float32", "precision": "tf32",
                                        "tile_rows": 32, "tile_cols": 32, "tile_depth": 16, "warp_rows": 32,
                                        "warp_cols": 32, "stages": 3}),
}
#: what no plan has: argument -> (value, what is said)
WRONG = {
    "samples": ((-1, "samples must be an int, at least 0; got -1"), (2.5, "samples must be .*; got 2.5")),
    "outputs": ((-10, "outputs must be an int, at least 0; got -10"), ("10", "outputs must be .*; got '10'")),
    "rows": ((-4, "rows must be an int, at least 0; got -4"), (None, "rows must be .*; got None")),
    "cols": ((-4, "cols must be an int, at least 0; got -4"), (4.0, "cols must be .*; got 4.0")),
    "depth": ((-4, "depth must be an int, at least 0; got -4"), (np.int64(4), "depth must be")),
    "dtype": (("float31", "float16, bfloat16, float32.*float31"), ("int32", "float16, bfloat16, float32.*int32"),
              (np.float32, r'got <class .numpy.float32.> \(did you mean "float32"\?\)'),
              (np.dtype("float32"), r'got dtype\(.float32.\) \(did you mean "float32"\?\)'),
              ("fp16", r'got .fp16. \(did you mean "float16"\?\)'), (["float32"], r"got \['float32'\]")),
    "layout": (("nonsense", "layout must be one of rows, flat, features_first; got 'nonsense'"),
               ("C", "layout must be one of rows, flat, features_first; got 'C'"),
               (["rows"], r'got \[.rows.\] \(did you mean "rows"\?\)')),
    "above": (("rellu", r'above must be one of identity, relu.*cross_entropy; got .rellu. \(did you mean "relu"\?\)'),
              ("softmax", "above must be one of .*cross_entropy; got 'softmax'")),
    "capability": ((9.0, r"capability must be a tuple of two ints, such as \(9, 0\); got 9.0 "
                         r"\(did you mean \(9, 0\)\?\)$"),
                   ("9.0", r"got '9.0' \(did you mean \(9, 0\)\?\)$"), (120, r"got 120 \(did you mean \(12, 0\)\?\)$"),
                   ("sm_90a", r"got 'sm_90a' \(did you mean \(9, 0\)\?\)$"), ("hopper", "got 'hopper'$"),
                   ([9, 0], r"capability must be a tuple of two ints, .*got \[9, 0\]"),
                   ((9,), "capability must be a tuple of two")),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_plans_are_made_of_what_there_is(maker):
    make, arguments = MAKERS[maker]
    make(**arguments)
    for name in arguments.keys() & WRONG.keys():
        for value, message in WRONG[name]:
            with pytest.raises(PlanError, match=message):
                make(**arguments | {name: value})


@pytest.mark.parametrize("maker", [name for name, (_, arguments) in MAKERS.items() if "precision" in arguments])
def test_precisions_are_those_there_are(maker):
    make, arguments = MAKERS[maker]
    with pytest.raises(ValueError, match=r"precision .*got .TF32. \(did you mean .tf32.\?\)$"):
        make(**arguments | {"precision": "TF32"})
    if maker == "TensorCorePlan":
        with pytest.raises(PlanError, match=r"precision of float16 must be None; got .tf32.$"):
            make(**arguments | {"dtype": "float16"})
