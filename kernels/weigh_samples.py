"""The divisor of a mean of losses: what the samples weigh, in parts.

    result[b] = sum over the samples s of block b of weight[s] class_weights[label of s]

Samples that are left out, by their label or by a mask, weigh nothing. Of class probabilities a sample weighs weight[s].

How the work is cut
    Thread t of block b takes the samples b * threads + t, and on in steps of the whole grid. The threads are combined
    in pairs. The kernels that need the divisor add up the parts; of few samples they add up all weights themselves.
Threads
    A power of two, whole warps.
Grid
    As many blocks as parts are wanted.
Shared memory
    An accumulator for each warp.
Bytes and flops
    Reads labels and weights once, and a class weight for each label.

Source: Harris, "Optimizing Parallel Reduction in CUDA", 2007.
"""

from numba import cuda

from . import primitives
from .lanes import over_row
from .primitives.factories import cache
from .primitives.layout import LANES


@cache
def weight_of_sample(accumulator, targets):
    """(sample, labels, their step, class weights, their step, weights, their step, ignored, outputs) -> its weight.

    What is left out, or has a label that is no class, weighs nothing.
    """
    labels, class_weights, weights = targets
    of_labels, of_classes, weighted, masked = labels != "", class_weights != "", weights not in ("", "bool"), (
        weights == "bool")
    fill, weigh = primitives.fill(accumulator, 1), primitives.weigh(accumulator, 1, 1)
    number = primitives.typed(accumulator)
    load_label = primitives.load_integers(labels or "int64", (0,))
    load_kept = primitives.load_integers("bool", (0,))
    load_class = primitives.load_each(class_weights or accumulator, 1, accumulator)
    load_weight = primitives.load_each(weights if weighted else accumulator, 1, accumulator)

    @cuda.jit(device=True, inline="always")
    def weight_of(sample, labels, labels_step, class_weights, class_weights_step, weights, weights_step, ignored,
                  outputs):
        weight = fill(number(1))
        if weighted:
            weight = load_weight(weights, sample * weights_step, 1, 1)
        if of_labels:
            label = load_label(labels, sample * labels_step, 1, 1, ignored)[0]
            known = label != ignored and label >= 0 and label < outputs
            if of_classes:
                weight = weigh(weight, load_class(class_weights, label * class_weights_step, 1, 1 if known else 0))
            if not known:
                weight = fill(number(0))
        if masked and load_kept(weights, sample * weights_step, 1, 1, 0)[0] == 0:
            weight = fill(number(0))
        return weight

    return weight_of


@cache
def make_weigh_samples(constants):
    """The kernel for these types and threads."""
    accumulator, targets, threads = constants
    weight_of = weight_of_sample(accumulator, targets)
    zero, add = primitives.zeros(accumulator, 1), primitives.add(accumulator, 1)
    total_of = over_row(accumulator, add, 1, threads)
    cell_array = primitives.shared_array("cells", accumulator, threads // LANES)
    store = primitives.store_vector(accumulator, 1, accumulator)

    @primitives.jit(threads)
    def weigh_samples(labels, labels_step, class_weights, class_weights_step, weights, weights_step, ignored, samples,
                      outputs, result):
        thread = cuda.threadIdx.x
        total = zero()
        for sample in range(cuda.blockIdx.x * threads + thread, samples, cuda.gridDim.x * threads):
            total = add(total, weight_of(sample, labels, labels_step, class_weights, class_weights_step, weights,
                                         weights_step, ignored, outputs))
        total = total_of(cell_array(), 0, thread, total)
        if thread == 0:
            store(result, cuda.blockIdx.x, total)

    return weigh_samples
