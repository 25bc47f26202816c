"""What each kernel is made of and what it takes: a record of its constants and one of its arguments.

They load without Numba: whoever makes a launch fills them in, the kernel's file reads them. An argument is an Address
(where an operand's first element lies), an Integer of 64 bits, a Number, whose type is `number_of` the constants, or a
TensorMap, by which copies find the boxes of a matrix.
What travels together is a record of its own; the kernel's parameters are its parts, in order: `z`, `z_down`,
`z_across`. What a field means, and its unit, stands where its name comes first, and holds where the same name comes
again without a word.
"""
from __future__ import annotations

from typing import Any, NamedTuple

Address = Any
Integer = Any
Number = Any
TensorMap = Any


class MatrixAt(NamedTuple):
    """Where a matrix lies."""

    address: Address  # of element (0, 0)
    down: Integer  # elements from one row to the next
    across: Integer  # elements from one column to the next


class ColumnAt(NamedTuple):
    """Where one value for each sample lies."""

    address: Address
    step: Integer  # elements from one sample to the next


class Scale(NamedTuple):
    """What a result is multiplied by: number, times the one at the address on the device unless that is 0."""

    number: Number  # of the host
    address: Address  # of a number of the type of the sums


#: in place of a matrix or a column that a kernel does not take
NO_MATRIX, NO_COLUMN = MatrixAt(0, 0, 0), ColumnAt(0, 0)


class Epilogue(NamedTuple):
    """What becomes of alpha times a sum: computed in `wide`, plus the result if accumulate, rounded once to dtype."""

    dtype: str  # of the result
    access: int  # elements that may be read or written at a time
    wide: str  # type in which the sum is scaled and added to what is there
    accumulate: bool  # whether the result is added to


class Side(NamedTuple):
    """How an operand lies in memory: contiguous along the depth or not, and how many elements may be read at a time."""

    along_depth: bool  # whether its elements lie side by side along the depth
    access: int


# -- batch_sum


class SumStrided(NamedTuple):
    """The sum of rows whose elements lie side by side."""

    dtype: str  # of the source
    accumulator: str  # type of the sums
    result: str  # dtype of the result, or the accumulator's for another launch to add
    threads_x: int  # side by side along a row
    lanes: int  # of such threads in a block
    vectors: int  # of 16 bytes a thread, in each row
    in_flight: int  # rows under way
    blocks_per_multiprocessor: int  # that registers leave room for
    accumulate: bool  # whether the result is added to
    compensated: bool  # whether what additions lose is added up beside the sums
    keeps_lost: bool  # whether what each sum lost is kept beside it, for another launch to add


class SumStridedArguments(NamedTuple):
    """source[s, m] lies at s * row_stride + m."""

    source: Address  # of element (0, 0)
    row_stride: Integer  # elements
    samples: Integer  # rows that are added
    outputs: Integer  # sums
    samples_per_part: Integer  # of every part but the last
    tile_cols: Integer  # columns of a block
    target: Address  # where the sums go, those of the first part if there are several
    part_stride: Integer  # elements of the target from one part's sums to the next
    col_stride: Integer  # elements of the target from one output to the next
    lost_step: Integer  # elements of the target from a sum to what it lost
    alpha: Scale  # what sums are multiplied by


class SumFlat(NamedTuple):
    """The sum of a matrix in C order along one run."""

    dtype: str
    accumulator: str
    result: str
    most_threads: int  # of a block
    in_flight: int  # lines under way
    line_pitch: int  # cells of shared memory that a line has room for
    blocks_per_multiprocessor: int
    accumulate: bool
    compensated: bool
    keeps_lost: bool


class SumFlatArguments(NamedTuple):
    """Element i of the run belongs to column i % period."""

    source: Address
    length: Integer  # elements of the run
    length_per_part: Integer  # elements of every part but the last
    period: Integer  # elements after which the columns repeat: the outputs
    folders: Integer  # threads that fold the sums of a column
    copies: Integer  # of a column in a line that each of them adds at the least
    target: Address
    part_stride: Integer
    col_stride: Integer
    lost_step: Integer
    alpha: Scale


class SumRuns(NamedTuple):
    """The sum along runs in which the samples lie side by side."""

    dtype: str
    accumulator: str
    result: str
    threads_x: int  # side by side along a run
    most_lanes: int  # runs of a block at a time
    in_flight: int  # lines under way
    folders: int  # threads that fold the sums of a run
    line_pitch: int  # cells of shared memory from one lane's line to the next
    fold_pitch: int  # cells from one folder's sums to the next
    blocks_per_multiprocessor: int
    accumulate: bool
    compensated: bool
    keeps_lost: bool


class SumRunsArguments(NamedTuple):
    """Sample s of run r lies at r * run_stride + s."""

    source: Address
    run_stride: Integer  # elements
    run_length: Integer  # elements: the samples
    runs: Integer  # the outputs
    runs_per_block: Integer  # that a block adds one after another
    length_per_part: Integer  # elements of a run
    target: Address
    part_stride: Integer
    col_stride: Integer
    lost_step: Integer
    alpha: Scale


class SumParts(NamedTuple):
    """The sum of rows that follow one another in the workspace."""

    accumulator: str
    result: str
    most_threads: int
    accumulate: bool
    compensated: bool
    has_beside: bool  # whether the last column is a sum of something else, with a place of its own


class SumPartsArguments(NamedTuple):
    """source[p, m] lies at p * row_pitch + m; if compensated, what was lost has rows of its own."""

    source: Address
    row_pitch: Integer  # elements
    rows: Integer  # of sums
    outputs: Integer
    tile_cols: Integer  # columns of a block
    lanes: Integer  # that add the rows of a column
    target: Address
    col_stride: Integer
    beside: Address  # where the last column's sum goes, as it is, if it is no column of the target
    alpha: Scale


# -- add_parts


class AddParts(NamedTuple):
    """The sum of matrices that follow one another."""

    accumulator: str  # of the parts and of the sums
    result: Epilogue
    threads: int  # of a block
    in_flight: int  # parts under way


class AddPartsArguments(NamedTuple):
    """Part p of element (r, c) lies at p * part_stride + r * row_pitch + c of the workspace."""

    workspace: Address  # where the parts begin
    parts: Integer  # matrices that are added
    part_stride: Integer
    row_pitch: Integer  # a multiple of 16 bytes
    target: MatrixAt
    rows: Integer
    cols: Integer  # elements of a row
    alpha: Scale


# -- matmul_simt, matmul_tensor_core and matmul_thin


class MatmulSimt(NamedTuple):
    """A product on FMA units."""

    dtype: str  # of the operands
    accumulator: str
    tile_rows: int  # of a block
    tile_cols: int
    tile_depth: int  # of a stage
    thread_rows: int  # results of a thread
    thread_cols: int  # results of a thread in a row
    blocks_per_multiprocessor: int
    offset_bits: int  # that count the bytes from a tile's first element to any other: 32, or 64 for huge strides
    left: Side  # how the left operand lies
    right: Side  # how the right operand lies
    result: Epilogue
    sums_of: str  # "left" or "right": that operand is added up along the depth, too; or ""
    sums: Epilogue | None  # what becomes of those sums; None if there are none


class MatmulTensorCore(NamedTuple):
    """A product on tensor cores."""

    dtype: str
    kind: str  # what is multiplied: "float16", "bfloat16", "tf32", "tf32x3", "float64"; see primitives.mma
    tile_rows: int
    tile_cols: int
    warp_rows: int  # results of a warp
    warp_cols: int  # results of a warp in a row
    stages: int  # slots for tiles in shared memory
    offset_bits: int  # that count the bytes from one of a thread's copies to the next
    left: Side
    right: Side
    result: Epilogue
    sums_of: str
    sums: Epilogue | None


class MatmulThin(NamedTuple):
    """A product of which one operand is thin, on FMA units."""

    dtype: str
    accumulator: str
    threads_across: int  # side by side across the depth
    threads_along: int  # that share the depth
    thread_rows: int  # results of a thread: at least all rows of the left operand
    thread_cols: int
    thread_depth: int  # depths of a thread in each step
    blocks_per_multiprocessor: int
    left: Side
    right: Side
    result: Epilogue
    sums: Epilogue | None  # what becomes of the right operand's sums along the depth; None if there are none


class MatmulArguments(NamedTuple):
    """result[r, c] = alpha * sum over k of left[r, k] right[k, c]."""

    left: Address
    left_stride: Integer  # elements from one row to the next, or from one depth to the next
    right: Address
    right_stride: Integer  # elements from one column to the next, or from one depth to the next
    result: MatrixAt
    part_stride: Integer  # elements of the result from one part to the next
    rows: Integer
    cols: Integer
    depth: Integer  # terms of a sum
    depth_per_part: Integer  # of every part but the last
    group_bits: Integer  # binary logarithm of how many tile rows are walked together
    alpha: Scale
    depth_sums: ColumnAt  # of the operand that is added up along the depth
    depth_sums_part_stride: Integer  # elements from one part's sums to the next


class MatmulHopper(NamedTuple):
    """A product on Hopper's tensor cores."""

    kind: str  # what is multiplied: "float16", "bfloat16", "tf32", "tf32x3"
    tile_rows: int  # 64 for each of two warpgroups
    tile_cols: int
    tile_depth: int  # of a stage
    stages: int
    most_staged: int  # boxes of results that a warpgroup stores at a time
    left_across: bool  # whether it is contiguous across the depth
    right_across: bool  # whether it is contiguous across the depth
    target: str  # dtype of the result
    accumulate: bool  # whether the result, float32, is added to
    sums_of: str  # "left" or "right": that operand, contiguous across the depth, is added up along it, too; or ""
    adders: int  # threads that do so


class MatmulHopperArguments(NamedTuple):
    """result[part, r, c] = alpha * sum over the part's k of left[r, k] right[k, c]."""

    left: TensorMap
    right: TensorMap
    result: TensorMap
    maps: Address  # of the workspace, where each block writes these three
    pieces_of_work: Integer  # tiles times parts
    tiles_down: Integer  # of the result
    tiles_across: Integer  # of the result
    steps: Integer  # of the depth of a stage
    steps_per_part: Integer  # of every part but the last
    alpha: Scale
    depth_sums: Address  # rows of sums in the workspace: of each part those of all sharers
    depth_sums_pitch: Integer  # elements from one row to the next
    sharers: Integer  # tiles that share the rounds of a part among them


# -- turn_operand


class TurnOperand(NamedTuple):
    """An operand of float32 as Hopper's tensor cores take it, along the depth."""

    along_depth: bool  # whether it lies so already
    access: int  # depths that may be read at a time
    terms: int  # 1, or 2 with what is left of the first


class TurnOperandArguments(NamedTuple):
    """result[o, s, t, k] = term t of source[o, 32 s + k]."""

    source: Address
    stride: Integer  # elements from one outer index to the next, or from one depth to the next
    result: Address
    pitch: Integer  # elements of a row of the result
    outer: Integer  # rows of the operand, or columns
    depth: Integer
    steps: Integer  # of 32 depths


# -- cross_entropy


class Targets(NamedTuple):
    """What softmax is held against, and what losses are weighted by: dtypes, each empty where there is none."""

    labels: str  # empty where targets are probabilities
    class_weights: str  # of outputs
    weights: str  # of samples; "bool" for a mask

    @property
    def dense(self) -> bool:
        """Whether a sample's targets have to be added up: else their sum is 1."""
        return not self.labels or self.class_weights != ""


class LogSumExp(NamedTuple):
    """Each sample's largest logit and the logarithm of its sum of exponentials less that."""

    dtype: str
    accumulator: str
    adders: int  # threads of a sample
    samples_of_block: int  # of which each block finds the sums
    features_first: bool  # whether samples lie side by side
    targets: Targets  # what there is of labels and weights
    loss: str  # "each" sample's, "sum" of each block's, or ""
    mean: bool  # whether each block's sum of the samples' weights is asked for


class LogSumExpArguments(NamedTuple):
    """All matrices are (samples, outputs), the result (3, samples)."""

    z: MatrixAt  # logits
    probabilities: MatrixAt  # of classes, in place of labels
    labels: ColumnAt
    class_weights: ColumnAt
    weights: ColumnAt
    losses: ColumnAt  # of samples
    left: Address  # (2, blocks): the sums of the weights and of the losses
    ignored: Integer  # label of samples that are left out
    smoothing: Number  # share of the targets that all classes have alike
    samples: Integer
    outputs: Integer
    result: Address


class WeighSamples(NamedTuple):
    """What a mean is divided by: the sum of the samples' weights."""

    accumulator: str
    targets: Targets
    threads: int


class WeighSamplesArguments(NamedTuple):
    """Block b leaves its sum in result[b]."""

    labels: ColumnAt
    class_weights: ColumnAt
    weights: ColumnAt
    ignored: Integer
    samples: Integer
    outputs: Integer
    result: Address


class CrossEntropyRows(NamedTuple):
    """dZ below softmax and cross-entropy, its sum and the loss, from one reading of rows that registers hold."""

    dtype: str
    accumulator: str
    result: str
    width: int  # elements of an access
    threads_x: int  # of a row, a power of two
    lanes: int  # rows of a block at a time
    pieces: int  # of 16 bytes that a thread holds of a row
    targets: Targets
    divisor: str  # of a mean: "known", the number of samples; what "samples" weigh, or what is left in "parts"; or ""
    loss: str  # "each" sample's, the "sum", "part": each part's, behind its last output, or ""
    accumulate: bool


class CrossEntropyRowsArguments(NamedTuple):
    """All matrices are (samples, outputs); the elements of a row of z lie side by side."""

    z: MatrixAt
    dz: MatrixAt  # where it is written
    probabilities: MatrixAt
    labels: ColumnAt
    class_weights: ColumnAt
    weights: ColumnAt
    losses: ColumnAt
    divisors: Address  # what weigh_samples left
    divisors_count: Integer  # of these, or the samples
    ignored: Integer
    smoothing: Number
    alpha: Scale
    samples: Integer
    outputs: Integer
    samples_per_part: Integer
    target: Address
    part_stride: Integer
    col_stride: Integer


# -- upstream


class UpstreamSum(NamedTuple):
    """dZ from what lies above the layer, and its sum."""

    above: str  # the name of an activation, or "cross_entropy"
    dtype: str
    accumulator: str
    result: str
    elements: int  # of a thread in each step
    width: int  # elements of an access
    threads_x: int
    lanes: int
    features_first: bool
    blocks_per_multiprocessor: int
    targets: Targets
    weights_width: int  # weights of samples of an access: all of a piece, or 1
    mean: bool  # whether dz is divided by the sum of what log_sum_exp left of weights
    with_loss: bool  # whether what it left of losses is added up
    accumulate: bool


class UpstreamSumArguments(NamedTuple):
    """All matrices are (samples, outputs)."""

    gradient: MatrixAt  # or class probabilities
    z: MatrixAt
    dz: MatrixAt
    weights: ColumnAt
    labels: ColumnAt
    class_weights: ColumnAt
    totals: Address  # what log_sum_exp found
    left_by_blocks: Address  # of log_sum_exp
    left_count: Integer  # of these blocks
    loss: Address
    ignored: Integer
    parameter: Number  # of the activation, or the smoothing of labels
    alpha: Scale  # of dz and of its sum
    sum_alpha: Scale  # of the sum alone
    samples: Integer
    outputs: Integer
    samples_per_part: Integer
    target: Address
    part_stride: Integer
    col_stride: Integer
