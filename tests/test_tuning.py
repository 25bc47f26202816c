"""Tuned plans: what a file must be, which calls take it and for how long, and which plans are believed to be faster."""
import json
import logging
import threading
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import densegrad
from densegrad import device, plans, testing, tuned, warming
from densegrad.calls import recorded
from densegrad.commands import cli, race, timing, tune
from densegrad.commands.checks import Case
from densegrad.errors import PlanError
from densegrad.plans import BatchSumPlan, MatmulPlan, TensorCorePlan, ThinPlan
from densegrad.tuned import Entry, Table, use_plans
from tests.stub_clock import StubClock

SAMPLES, IN_FEATURES, OUT_FEATURES = LAYER = 40, 24, 16
#: for each gradient of that layer in float32: what the model chooses, and another plan
SUM = plans.plan_batch_sum(SAMPLES, OUT_FEATURES, "float32", "flat")
OTHER_SUM = replace(SUM, in_flight=4)
WEIGHT = plans.plan_product(IN_FEATURES, OUT_FEATURES, SAMPLES, "float32", order="across")
OTHER_WEIGHT = MatmulPlan(IN_FEATURES, OUT_FEATURES, SAMPLES, "float32", 16, 16, 8, 4, 4)
INPUT = plans.plan_product(SAMPLES, IN_FEATURES, OUT_FEATURES, "float32", order="along")
OTHER_INPUT = MatmulPlan(SAMPLES, IN_FEATURES, OUT_FEATURES, "float32", 16, 16, 8, 4, 4)
ENTRIES = (Entry(OTHER_SUM, None, 1.5, 2.0), Entry(OTHER_WEIGHT, "across", 3.0, 4.0),
           Entry(OTHER_INPUT, "along", 5.0, 6.0))


@pytest.fixture(autouse=True)
def nothing_is_left_over(monkeypatch):
    """No test takes plans after it, and what one has heard is said to the next one again."""
    tuned._say_once.cache_clear()
    monkeypatch.setattr(tuned, "_process", ())
    yield
    assert tuned._within.get() == ()


@pytest.fixture
def write(tmp_path):
    """Write a table for this device, with changes to it; its path."""
    def write(*entries, name="plans.json", **changes):
        path, where = tmp_path / name, device.current()
        facts = {"densegrad": densegrad.__version__, "gpu": where.name_of(device.HOST),
                 "compute_capability": where.capability(device.HOST), "date": "2026-11-30", "command": "densegrad tune"}
        path.write_text(str(Table(str(path), entries=entries or ENTRIES, **facts | changes)))
        return path
    return write


@pytest.fixture
def layer(xp):
    """x, w and dz."""
    draw = np.random.default_rng(0)
    return [xp.asarray(draw.standard_normal(shape).astype("float32")) for shape in (
        (SAMPLES, IN_FEATURES), (IN_FEATURES, OUT_FEATURES), (SAMPLES, OUT_FEATURES))]


def planned(function, *arguments, **options):
    """The plans of what a call launches, but not how parts are added."""
    with recorded() as launches:
        function(*arguments, **options)
    return [launch.plan for launch in launches if isinstance(launch.plan, tuple(tuned.PLANS.values()))]


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "densegrad"]


# Which calls take plans


def test_nothing_is_taken_by_itself(layer, write):
    write()
    x, w, dz = layer
    assert not {OTHER_SUM, OTHER_WEIGHT, OTHER_INPUT} & {SUM, WEIGHT, INPUT}
    assert planned(densegrad.bias_grad, dz) == [SUM]
    assert planned(densegrad.weight_grad, x, dz) == [WEIGHT]
    assert planned(densegrad.input_grad, dz, w) == [INPUT]


def test_calls_take_the_plans_of_their_sizes_and_orders(layer, write):
    x, w, dz = layer
    with use_plans(write()):
        assert planned(densegrad.bias_grad, dz) == [OTHER_SUM]
        assert planned(densegrad.weight_grad, x, dz) == [OTHER_WEIGHT]
        assert planned(densegrad.weight_bias_grad, x, dz) == [OTHER_WEIGHT]
        assert planned(densegrad.input_grad, dz, w) == [OTHER_INPUT]
        assert planned(densegrad.dense_grads, x, w, dz) == [OTHER_INPUT, OTHER_WEIGHT]
        assert planned(densegrad.dense_grads, None, None, dz, need=("db",)) == [OTHER_SUM]


def test_results_are_within_their_bounds_all_the_same(layer, write):
    x, w, dz = layer
    with use_plans(write()):
        found = densegrad.dense_grads(x, w, dz)
    arrays = [testing.host(array) for array in layer]
    for got, function, given, plan in ((found.dx, "input_grad", (arrays[2], arrays[1]), OTHER_INPUT),
                                       (found.dw, "weight_grad", (arrays[0], arrays[2]), OTHER_WEIGHT),
                                       (found.db, "bias_grad", (arrays[2],), OTHER_WEIGHT)):
        exact, bound = testing.expected(function, given, {}, plan.chain)
        testing.check_within(got, exact, bound)


def test_a_plan_passed_by_hand_wins(layer, write):
    x, w, dz = layer
    with use_plans(write()):
        assert planned(densegrad.bias_grad, dz, plan=SUM) == [SUM]
        assert planned(densegrad.weight_grad, x, dz, plan=WEIGHT) == [WEIGHT]
        only = densegrad.DenseGrads(dx=INPUT, dw=WEIGHT)
        assert set(planned(densegrad.dense_grads, x, w, dz, plan=only, need=("dx", "dw"))) == {INPUT, WEIGHT}


@pytest.mark.parametrize("kind", ["float64", "compensated", "samples"])
def test_calls_of_other_kinds_take_nothing(kind, layer, write):
    _, _, dz = layer
    options = {"compensated": True} if kind == "compensated" else {}
    if kind != "compensated":
        dz = dz.astype("float64") if kind == "float64" else dz[:-1]
    with use_plans(write()):
        found = planned(densegrad.bias_grad, dz, **options)
    assert found == planned(densegrad.bias_grad, dz, **options)


@pytest.mark.parametrize(("change", "words"), [
    ({"gpu": "NVIDIA H20000"}, "NVIDIA H20000"),
    ({"compute_capability": (9, 9)}, "compute capability 9.9"),
    ({"densegrad": "0.0.1"}, "densegrad 0.0.1"),
])
def test_of_another_gpu_or_version_nothing_is_taken_which_is_said_once(change, words, layer, write, caplog):
    x, w, dz = layer
    path = write(**change)
    with caplog.at_level(logging.WARNING, "densegrad"), use_plans(path):
        assert not said(caplog)
        assert planned(densegrad.bias_grad, dz) == [SUM]
        assert planned(densegrad.weight_grad, x, dz) == [WEIGHT]
        assert planned(densegrad.input_grad, dz, w) == [INPUT]
    (line,) = said(caplog)
    for part in (str(path), words, device.current().name, densegrad.__version__, "densegrad tune"):
        assert part in line


def test_a_plan_for_another_order_is_not_taken_which_is_said_once(xp, write, caplog):
    w = xp.ones((OUT_FEATURES, IN_FEATURES), "float32").T  # as PyTorch has weights
    dz = xp.ones((SAMPLES, OUT_FEATURES), "float32")
    with caplog.at_level(logging.WARNING, "densegrad"), use_plans(write()):
        for alpha in (1.0, 0.5):
            for out in (None, xp.empty((SAMPLES, IN_FEATURES), "float32")):
                found = planned(densegrad.input_grad, dz, w, alpha=alpha, out=out)
                assert found == [plans.plan_product(SAMPLES, IN_FEATURES, OUT_FEATURES, "float32", order="across")]
    (line,) = said(caplog)
    for part in ("40 x 24 x 16 x float32", "order along", "order across", "plans.json"):
        assert part in line


def test_what_is_kept_between_calls_goes_by_the_table(layer, write):
    """Of one layout, again and again: a switch counts from the next call on."""
    _, _, dz = layer
    path, other = write(), write(Entry(replace(SUM, in_flight=2), None, 1.0, 2.0), name="other.json")
    for _ in range(2):
        assert planned(densegrad.bias_grad, dz) == [SUM]
        with use_plans(path):
            assert planned(densegrad.bias_grad, dz) == [OTHER_SUM]
            with use_plans(other):
                assert planned(densegrad.bias_grad, dz) == [replace(SUM, in_flight=2)]
            assert planned(densegrad.bias_grad, dz) == [OTHER_SUM]


def test_reading_the_same_file_again_keeps_what_is_kept(layer, write, monkeypatch):
    _, _, dz = layer
    path = write()
    with use_plans(path):
        densegrad.bias_grad(dz)

    def described(*anything):
        raise RuntimeError("described anew")

    monkeypatch.setattr(Table, "instead_of", described)
    with use_plans(path):
        assert planned(densegrad.bias_grad, dz) == [OTHER_SUM]
    path.write_text(path.read_text() + "\n")
    with use_plans(path), pytest.raises(RuntimeError, match="described anew"):
        densegrad.bias_grad(dz)


def test_prepared_calls_keep_their_plans(layer, write):
    _, _, dz = layer
    before = densegrad.prepare(densegrad.bias_grad, dz)
    with use_plans(write()):
        assert planned(before) == [SUM]
        assert planned(before.rebind(dz=dz, alpha=0.5)) == [SUM]
        within = densegrad.prepare(densegrad.bias_grad, dz)
        assert planned(within) == [OTHER_SUM]
    assert planned(within) == [OTHER_SUM]


def test_tuned_kernels_are_compiled_ahead_for_their_gpu(write):
    name, capability = "NVIDIA H20000", (9, 0)
    path = write(Entry(OTHER_INPUT, "along", 5.0, 6.0), gpu=name, compute_capability=capability)

    def foreseen(**options):
        with use_plans(path):
            return {launch.plan for launch in warming.foreseen([LAYER], ["float32"], [], capability, **options)}

    assert INPUT in foreseen()
    assert INPUT not in foreseen(gpu=name)
    assert OTHER_INPUT in foreseen(gpu=name)


# For how long


def test_blocks_nest_and_restore(layer, write):
    _, _, dz = layer
    path = write()

    def taken():
        return planned(densegrad.bias_grad, dz) == [OTHER_SUM]

    with use_plans(path) as outer:
        assert taken()
        with use_plans(None):
            assert not taken()
            with outer:  # again, within itself
                assert taken()
            assert not taken()
        assert taken()
        with pytest.raises(RuntimeError, match="on purpose"), use_plans(None):
            raise RuntimeError("on purpose")
        assert taken()
    assert not taken()


def test_called_alone_it_holds_for_the_process(layer, write):
    _, _, dz = layer
    path, found = write(), []

    def call():
        found.append(planned(densegrad.bias_grad, dz) == [OTHER_SUM])

    def here_and_in_a_thread():
        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    use_plans(path)
    here_and_in_a_thread()
    with use_plans(None):  # here, and not elsewhere
        here_and_in_a_thread()
    here_and_in_a_thread()
    use_plans(None)
    here_and_in_a_thread()
    assert found == [True, True, False, True, True, True, False, False]


def test_a_block_holds_for_its_thread_alone(layer, write):
    _, _, dz = layer
    path, inside, done, found = write(), threading.Event(), threading.Event(), []

    def within():
        with use_plans(path):
            inside.set()
            assert done.wait(60)
            found.append(planned(densegrad.bias_grad, dz))

    thread = threading.Thread(target=within)
    thread.start()
    assert inside.wait(60)
    assert planned(densegrad.bias_grad, dz) == [SUM]
    done.set()
    thread.join()
    assert found == [[OTHER_SUM]]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_blocks_that_begin_at_the_same_time_leave_nothing_behind(order, write):
    """As in several threads, each of which has called and not yet entered."""
    use_plans(write())
    before = tuned.active()
    waiting = {number: use_plans(write(name=f"{number}.json")) for number in range(len(order))}
    for number in order:
        with waiting.pop(number):
            assert tuned.active().name.endswith(f"{number}.json")
        if waiting:
            assert tuned.active().name.endswith(f"{max(waiting)}.json")
    assert tuned.active() is before


# What a file must be


def test_every_class_of_plans_comes_back_as_it_was_written(write):
    capability = device.current().capability(device.HOST)
    made = [Entry(plan, None, 1.0, 2.0) for layout in plans.LAYOUTS for compensated in (False, True)
            for plan in plans.batch_sum_candidates(5000, 24, "float32", layout, compensated)[:1]]
    made += [Entry(plans.matmul_candidates(99, 65, 4000, dtype)[-1], order, 1.0, 2.0)
             for dtype in ("float64", "bfloat16") for order in ("across", "along")]
    made += [Entry(plans.tensor_core_candidates(99, 65, 4000, dtype, precision)[0], "along", 0.5, 1.25)
             for dtype, precision in (("bfloat16", None), ("float32", "tf32"), ("float32", "tf32x3"))
             if capability >= plans.TENSOR_CORE_CAPABILITY]
    made += [Entry(plans.thin_candidates(2, 65, 4000, dtype, "across")[0], "across", 0.5, 1.25)
             for dtype in ("bfloat16", "float32")]
    if capability == plans.HOPPER:
        made += [Entry(plans.hopper_candidates(99, 65, 4000, "bfloat16")[0], "along", 0.5, 1.25)]
    left_out = {"HopperPlan"} if capability != plans.HOPPER else set()
    assert {type(entry.plan).__name__ for entry in made} == set(tuned.PLANS) - left_out
    text = write(*made).read_text()
    assert list(tuned.table_of(text, "plans.json").entries) == made
    assert str(tuned.table_of(text, "plans.json")) == text
    assert len(text.splitlines()) == len(made) + 10  # a plan a line
    assert json.loads(text)["format"] == tuned.FORMAT


def test_every_field_of_a_plan_has_a_type_that_is_read():
    assert {str(field.type) for kind in tuned.PLANS.values() for field in fields(kind)} <= set(tuned._TYPES)


def changed(*path, to):
    """A file whose value at this path is another one, or is left out."""
    def change(read):
        *way, last = path
        place = read
        for step in way:
            place = place[step]
        if to is ...:
            del place[last]
        else:
            place[last] = to
        return json.dumps(read)
    return change


@pytest.mark.parametrize(("change", "words"), [
    (lambda read: "", ("JSON",)),
    (lambda read: json.dumps(read)[:-2], ("JSON",)),
    (lambda read: "[" * 100_000, ("JSON",)),
    (lambda read: "[]", ("an object", "[]")),
    (changed("format", to=2), ("format 1", "got 2")),
    (changed("format", to="1"), ("format 1", "got '1'")),
    (changed("format", to=...), ("format",)),
    (changed("gpu", to=...), ("no gpu",)),
    (changed("gpu", to=7), ("a string as gpu", "got 7")),
    (changed("compute_capability", to="9.0"), ("two whole numbers as compute_capability", "got '9.0'")),
    (changed("more", to=1), ("more",)),
    (changed("plans", to={}), ("a list as plans", "got {}")),
    (changed("plans", 1, to=7), ("plan 2", "an object", "got 7")),
    (changed("plans", 1, "order", to=...), ("plan 2", "no order")),
    (changed("plans", 1, "order", to="sideways"), ("plan 2", '"across" or "along"', "sideways")),
    (changed("plans", 1, "order", to=None), ("plan 2", '"across" or "along"', "None")),
    (changed("plans", 0, "order", to="along"), ("plan 1", "null", "along")),
    (changed("plans", 0, "operation", to="product"), ("plan 1", "batch sum", "product")),
    (changed("plans", 1, "plan", to="UpstreamPlan"), ("plan 2", "MatmulPlan", "UpstreamPlan")),
    (changed("plans", 1, "plan", to="TensorCorePlan"), ("plan 2: fields", "no capability")),
    (changed("plans", 1, "microseconds", to=0), ("plan 2", "a number above 0", "got 0")),
    (changed("plans", 1, "microseconds", to=float("nan")), ("plan 2", "a number above 0", "nan")),
    (changed("plans", 1, "fields", "tile_rows", to=...), ("plan 2: fields", "no tile_rows")),
    (changed("plans", 1, "fields", "tile_rows", to=32.0), ("plan 2: fields", "whole number as tile_rows", "32.0")),
    (changed("plans", 1, "fields", "tile_rows", to=31), ("plan 2", "power of two", "31")),
    (changed("plans", 1, "fields", "stages", to=3), ("plan 2: fields", "stages")),
    (changed("plans", 0, "fields", "compensated", to=0), ("plan 1: fields", "true or false as compensated", "got 0")),
    (changed("plans", 0, "fields", "outputs", to=0), ("plan 1", "outputs")),
    (changed("plans", 0, "fields", "layout", to=[]), ("plan 1: fields", "a string as layout")),
])
def test_a_broken_file_is_an_error_that_names_it_and_changes_nothing(change, words, write):
    path = write()
    use_plans(path)
    before = tuned.active()
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(PlanError) as error:
        use_plans(path)
    for part in (str(path), "densegrad tune", *words):
        assert part in str(error.value)
    assert tuned.active() is before


def test_one_plan_for_one_question(write):
    path = write(ENTRIES[1], ENTRIES[0], Entry(WEIGHT, "across", 1.0, 2.0))
    with pytest.raises(PlanError, match=r"plan 3 must be the only one .* but plan 1 is for the same"):
        use_plans(path)
    use_plans(write(ENTRIES[1], Entry(WEIGHT, "along", 1.0, 2.0)))


def test_instructions_must_be_those_of_the_gpu(write):
    plan = plans.tensor_core_candidates(99, 65, 40, "bfloat16", None)[0]
    path = write(Entry(plan, "along", 1.0, 2.0), compute_capability=(7, 5))
    with pytest.raises(PlanError, match=r"plan 1 .* compute capability 8\.0"):
        use_plans(path)


def test_what_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, why in (("missing.json", "No such file"), ("", "Is a directory"), ("bytes", "can't decode byte 0xff")):
        with pytest.raises(PlanError, match=why) as error:
            use_plans(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(TypeError, match="path must be that of a file of plans, or None; got int"):
        use_plans(3)


def refusal(text):
    """Which plan of a file is refused, or nothing."""
    try:
        tuned.table_of(text, "plans.json")
    except PlanError as error:
        return str(error)[:len("plans.json: plan 1")]
    return ""


@pytest.mark.parametrize("value", [None, True, -1, 0, 1, 3, 10 ** 30, 1.5, "float32", "", [], [8, 0], {}])
def test_whatever_a_field_holds_a_file_is_read_or_refused(value, write):
    read = json.loads(write().read_text())
    for number, entry in enumerate(read["plans"], 1):
        for place, names in ((entry, [*entry]), (entry["fields"], [*entry["fields"]])):
            for name in names:
                old, place[name] = place[name], value
                assert refusal(json.dumps(read)) in ("", f"plans.json: plan {number}")
                place[name] = old


# Which plans are believed


class PlanClock(StubClock):
    """A clock on which a launch takes the seconds that are stated for its plan, by how often it ran before."""

    def __init__(self, launches, seconds, late=0):
        super().__init__(late)
        self.launches, self.seconds_of = launches, seconds

    def mark(self):
        ran = {}
        for launch in self.launches:
            ran.setdefault(launch.plan, []).append(launch)
        return sum(self.seconds_of[plan](number) for plan, found in ran.items() if plan in self.seconds_of
                   for number in range(len(found)))


@pytest.fixture
def clocked(monkeypatch):
    """Make these plans the candidates for dL/db, which take these microseconds; what a race of them comes to."""
    monkeypatch.setattr(timing, "QUICK", timing.Effort(warm_up=0, sample=1e-6, samples=1, calls=1))

    def clocked(microseconds, late=0):
        monkeypatch.setattr(race, "batch_sum_candidates", lambda *_: [*microseconds])
        seconds = {plan: one if callable(one) else lambda number, one=one: one * 1e-6
                   for plan, one in microseconds.items()}
        with recorded() as launches:
            clock = PlanClock(launches, seconds, late)
            return race.Race(Case("bias_grad", *LAYER, "float32", 0, "in_out"), clock, timing.QUICK).run()

    return clocked


THIRD_SUM = replace(SUM, in_flight=8)


def test_the_fastest_plan_wins(clocked):
    outcome = clocked({SUM: 10.0, OTHER_SUM: 8.0, THIRD_SUM: 9.0})
    assert outcome.entry == Entry(OTHER_SUM, None, pytest.approx(8.0), pytest.approx(10.0))
    assert (outcome.timed, outcome.faults, outcome.doubtful) == (3, (), ())


def test_the_models_choice_takes_part_however_slow_it_is(clocked):
    others = [replace(SUM, in_flight=2 ** number, folders=2) for number in range(1, 2 + race.FINALISTS)]
    outcome = clocked({SUM: 20.0} | {plan: 10.0 + number for number, plan in enumerate(others)})
    assert outcome.entry == Entry(others[0], None, pytest.approx(10.0), pytest.approx(20.0))


@pytest.mark.parametrize(("other", "written"), [(10.5, False), (9.8, False), (9.72, False), (9.6, True)])
def test_a_plan_must_beat_the_models_choice_by_more_than_noise(other, written, clocked):
    outcome = clocked({SUM: 10.0, OTHER_SUM: other})
    assert (outcome.entry is not None) == written
    assert outcome.winner == (OTHER_SUM if written else SUM)
    assert outcome.model_seconds == pytest.approx(1e-5)


def test_a_median_that_does_not_repeat_is_not_believed(clocked):
    """Faster than the others each time, but never the same: a twentieth slower than before."""
    outcome = clocked({SUM: 10.0, OTHER_SUM: lambda number: 1e-6 * 1.05 ** number, THIRD_SUM: 9.0})
    assert outcome.winner == THIRD_SUM
    ((plan, medians),) = outcome.doubtful
    assert plan == OTHER_SUM
    assert len(medians) == 1 + race.ROUNDS


def test_a_median_that_repeats_later_is_believed(clocked):
    outcome = clocked({SUM: 10.0, OTHER_SUM: lambda number: 9e-6 if number < 4 else 5e-6})
    assert outcome.entry == Entry(OTHER_SUM, None, pytest.approx(5.0), pytest.approx(10.0))


def test_without_a_believed_time_of_the_models_choice_nothing_is_faster(clocked):
    outcome = clocked({SUM: lambda number: 1e-4 * 1.05 ** number, OTHER_SUM: 1.0})
    assert (outcome.entry, outcome.winner, outcome.seconds) == (None, SUM, None)


def test_a_time_in_which_the_gpu_may_have_waited_is_none(clocked):
    outcome = clocked({SUM: 10.0, OTHER_SUM: 1.0}, late=10 ** 9)
    assert (outcome.entry, outcome.seconds, len(outcome.doubtful)) == (None, None, 2)


@pytest.mark.parametrize("case", [
    Case("bias_grad", *LAYER, "float32", 1, "in_out"),
    Case("weight_grad", *LAYER, "float32", 1, "out_in"),
    Case("input_grad", *LAYER, "float32", 0, "out_in"),
    Case("weight_grad", 40, 1, 1, "float32", 0, "in_out"),
    Case("weight_grad", *LAYER, "float32", 0, "in_out", precision="tf32"),
    Case("input_grad", *LAYER, "bfloat16", 0, "in_out"),
], ids=str)
def test_what_has_won_is_what_such_calls_take(case, write, monkeypatch):
    """In every orientation and precision: the file answers what the very functions ask."""
    monkeypatch.setattr(race, "candidates", lambda model, *_: ([model, another(model)], 0))
    with recorded() as launches:
        clock = PlanClock(launches, {})
        made = race.Race(case, clock, timing.Effort(warm_up=0, samples=1, calls=1))
        clock.seconds_of = dict.fromkeys(forms(made.model), lambda number: 2e-6)
        clock.seconds_of |= dict.fromkeys(forms(another(made.model)), lambda number: 1e-6)
        outcome = made.run()
    given, _ = made.sets[0]
    function = getattr(densegrad, case.function)
    assert planned(function, *given, **made.options)[0] in forms(made.model)
    with use_plans(write(outcome.entry)):
        assert planned(function, *given, **made.options)[0] in forms(another(made.model))


def forms(plan):
    """A plan as it may be launched: that of a transposed result is transposed."""
    return {plan, getattr(plan, "T", plan)}


def another(model):
    """Another plan for the same."""
    if isinstance(model, BatchSumPlan):
        return replace(model, in_flight=2 * model.in_flight)
    if isinstance(model, TensorCorePlan):
        return replace(model, stages=model.stages - 1)
    if isinstance(model, ThinPlan):
        return replace(model, threads_along=model.threads_along // 2)
    return replace(model, tile_depth=2 * model.tile_depth)


def test_calls_rotate_over_buffers_that_fill_the_cache():
    clock, effort = StubClock(), timing.Effort(samples=1, calls=50)
    made = race.Race(Case("bias_grad", *LAYER, "float32", 0, "in_out"), clock, effort)
    assert len(made.sets) == -(-3 * clock.l2_bytes // (4 * OUT_FEATURES * (SAMPLES + 1)))
    for most, nbytes, count in ((50, 10 ** 9, 1), (50, 1, 50), (1, 1, 1)):
        assert timing.sets_of_buffers(clock, most, nbytes) == count


def spoiled(monkeypatch, wrong, spoil):
    """Spoil what a prepared call of one plan computes."""
    prepare = densegrad.prepare

    def spoiling(function, *arguments, **options):
        call = prepare(function, *arguments, **options)
        if options.get("plan") != wrong:
            return call

        def wrongly():
            return spoil(call())
        return wrongly

    monkeypatch.setattr(densegrad, "prepare", spoiling)


def one_element(result):
    result[3] += 1e-3
    return result


def nothing(result):
    result[3] = np.nan
    return result


def an_error(result):
    raise RuntimeError("out of\nmemory")


@pytest.mark.parametrize(("spoil", "words"), [
    (one_element, "wrong: an error of 0.001"), (nothing, "wrong: an error of inf"),
    (an_error, "RuntimeError: out of memory")])
def test_a_plan_that_is_wrong_is_named_and_never_taken(spoil, words, clocked, monkeypatch):
    spoiled(monkeypatch, OTHER_SUM, spoil)
    outcome = clocked({SUM: 10.0, OTHER_SUM: 1.0, THIRD_SUM: 9.0})
    assert outcome.winner == THIRD_SUM
    ((plan, fault),) = outcome.faults
    assert plan == OTHER_SUM
    assert fault.startswith(words)


def test_the_models_choice_may_be_wrong_too(clocked, monkeypatch):
    spoiled(monkeypatch, SUM, one_element)
    outcome = clocked({SUM: 10.0, OTHER_SUM: 1.0})
    assert (outcome.entry, outcome.model_seconds, len(outcome.faults)) == (None, None, 1)


def test_a_race_leaves_the_active_plans_alone_and_is_not_ruled_by_them(clocked, write):
    with use_plans(write()):
        before = tuned.active()
        assert clocked({SUM: 10.0, OTHER_SUM: 1.0}).model == SUM
        assert tuned.active() is before


@pytest.mark.parametrize("sizes", [(8192, 768, 3072), (1, 4096, 64), (64, 1, 10)])
@pytest.mark.parametrize(("dtype", "precision"), [("float32", None), ("float32", "tf32"), ("bfloat16", None),
                                                  ("float64", None)])
def test_candidates_answer_what_the_models_choice_does(sizes, dtype, precision):
    model = plans.plan_product(*sizes, dtype, precision, (8, 0), order="along")
    found, left_out = race.candidates(model, "along", precision, (8, 0))
    assert found[0] == model
    assert len(set(found)) == len(found) > 1
    assert {tuned.question_of(plan, "along") for plan in found} == {tuned.question_of(model, "along")}
    everything = plans.product_candidates(*sizes, dtype, precision, (8, 0), order="along")
    assert left_out == len(everything) - len(found)
    if (sizes[0], dtype, precision) == (8192, "float32", None):
        assert left_out > 0
        assert any(plan.cost("along") is None for plan in found)  # what nobody has measured takes part
    kinds = {type(plan) for plan in found}
    if (sizes[0], precision) == (1, None) and dtype != "float64":
        assert ThinPlan in kinds
    # float64 has the same bits on FMA units and on tensor cores.
    assert len(kinds - {ThinPlan}) == 1 or (dtype == "float64" and kinds == {MatmulPlan, TensorCorePlan})


@pytest.mark.parametrize("layout", plans.LAYOUTS)
@pytest.mark.parametrize("compensated", [False, True])
def test_candidates_of_sums_are_sums_of_the_same(layout, compensated):
    for samples, outputs in ((0, 3), (3, 0), (1, 1), (7, 5), (8192, 3072), (1_000_003, 10), (64, 16384)):
        for dtype in plans.ITEM_BYTES:
            model, *others = plans.batch_sum_candidates(samples, outputs, dtype, layout, compensated)
            assert model == plans.plan_batch_sum(samples, outputs, dtype, layout, compensated)
            assert len({model, *others}) == 1 + len(others)
            assert {tuned.question_of(plan, None) for plan in others} <= {tuned.question_of(model, None)}
            assert others or samples * outputs < 2


@pytest.mark.parametrize(("samples", "outputs", "dtype", "axis"), [
    (300, 7, "float32", 0), (66, 67, "bfloat16", 0), (300, 7, "float64", 1)])
def test_candidates_of_sums_are_right(samples, outputs, dtype, axis):
    """All of them: of rows without gaps, of wide ones, and of outputs whose samples lie side by side."""
    effort = timing.Effort(samples=1, calls=1)
    made = race.Race(Case("bias_grad", samples, 1, outputs, dtype, axis, "in_out"), StubClock(), effort)
    found, _ = race.candidates(made.model, made.order, None, (8, 0))
    assert len(found) > 3
    assert not [fault for fault in map(made._fault, found) if fault]


# The command


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command with a stated clock and few plans: exit status, stdout, stderr, and the file."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(timing, "QUICK", timing.Effort(warm_up=0, sample=1e-6, samples=1, calls=1))
    microseconds = {SUM: 10.0, OTHER_SUM: 8.0, WEIGHT: 20.0, OTHER_WEIGHT: 19.9, INPUT: 40.0, OTHER_INPUT: 30.0}
    monkeypatch.setattr(race, "batch_sum_candidates", lambda *_: [SUM, OTHER_SUM])
    monkeypatch.setattr(race, "product_candidates", lambda rows, *_, **__: (
        [WEIGHT, OTHER_WEIGHT] if rows == IN_FEATURES else [INPUT, OTHER_INPUT]))
    monkeypatch.setattr(race, "FAR", 1e9)
    path = tmp_path / "tuned.json"

    def run(*arguments, out=path):
        words = ["tune", "40,24,16", "--quick", "--out", str(out), *arguments]
        monkeypatch.setattr("sys.argv", ["densegrad", *words])
        with recorded() as launches:
            clock = PlanClock(launches, {plan: lambda number, one=one: one * 1e-6
                                         for plan, one in microseconds.items()})
            monkeypatch.setattr(tune, "gpu_clock", lambda: clock)
            done = CliRunner().invoke(cli.app, words)
        return SimpleNamespace(status=done.exit_code, stdout=done.stdout, stderr=done.stderr, path=path)

    return run


def test_the_command_writes_what_is_faster_and_shows_all(run, layer):
    done = run()
    assert done.status == 0, done.stderr
    table = tuned.table_of(done.path.read_text(), "tuned.json")
    assert {entry.plan for entry in table.entries} == {OTHER_SUM, OTHER_INPUT}
    assert table.command == f"densegrad tune 40,24,16 --quick --out {done.path}"
    assert (table.gpu, table.densegrad) == (device.current().name, densegrad.__version__)
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("dL/")}
    assert "in_flight 4" in rows["dL/db"]
    for row, words in (("dL/db", ("8.0", "10.0")), ("dL/dW", ("the model's", "20.0")), ("dL/dX", ("30.0", "40.0"))):
        for part in ("40, 24, 16", "float32", *words):
            assert part in rows[row], rows[row]
    assert "6 plans were timed. Left out were 0" in done.stderr
    assert f"{done.path} has 2 plans faster than the model's choice, for 3 gradients" in done.stderr
    with use_plans(done.path):
        assert planned(densegrad.bias_grad, layer[2]) == [OTHER_SUM]
        assert planned(densegrad.weight_grad, layer[0], layer[2]) == [WEIGHT]


def test_an_equal_sum_of_another_layer_is_timed_once(run):
    done = run("40,24,16")
    assert done.status == 0, done.stderr
    assert f"{done.path} has 2 plans faster than the model's choice, for 3 gradients" in done.stderr
    use_plans(done.path)


def test_plans_that_are_wrong_are_named_and_the_command_fails(run, monkeypatch):
    spoiled(monkeypatch, OTHER_SUM, one_element)
    done = run()
    assert done.status == 1
    assert "not taken: wrong: an error of 0.001" in done.stderr
    assert str(OTHER_SUM) in done.stderr
    assert {entry.plan for entry in tuned.table_of(done.path.read_text(), "").entries} == {OTHER_INPUT}


def test_a_file_is_overwritten_only_by_force_and_only_whole(run, monkeypatch, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_bytes(b"precious")
    refused = run()
    assert refused.status == 1
    assert refused.stderr.splitlines()[-1] == f"error: {path} exists (--force overwrites it)"

    def broken(*_):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(race.Race, "run", broken)
        failed = run("--force")
    assert (failed.status, failed.stderr.splitlines()[-1]) == (1, "error: out of luck")
    assert path.read_bytes() == b"precious"
    assert [*tmp_path.iterdir()] == [path]
    assert run("--force").status == 0
    use_plans(path)


@pytest.mark.parametrize(("arguments", "words"), [
    (("40,24",), "a layer must be S,D,M"), (("--precision", "tf33"), "tf33"), (("--weight-layout", "out"), "out_in"),
    (("--precision", "tf32", "--dtype", "bfloat16"), "--precision is a choice that float32 has"),
])
def test_what_is_no_layer_or_option_is_refused(run, arguments, words):
    done = run(*arguments)
    assert done.status == 1
    assert words in done.stderr.splitlines()[-1]
    assert not done.path.exists()


@pytest.mark.only("simulator")
def test_without_a_gpu_nothing_is_timed(tmp_path):
    done = CliRunner().invoke(cli.app, ["tune", "40,24,16", "--out", str(tmp_path / "plans.json")])
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    for words in ("error: plans are timed on a GPU", "the simulator's times say nothing"):
        assert words in line
    assert not list(tmp_path.iterdir())


def test_a_generator_takes_back_its_own_plans(write):
    """Its block may end within another one that began later."""
    first, second = write(), write(ENTRIES[0], name="other.json")

    def generator():
        with use_plans(first):
            yield tuned.active()

    ended = generator()
    own = next(ended)
    with use_plans(second):
        inner = tuned.active()
        assert inner is not own
        ended.close()
        assert tuned.active() is inner
    assert tuned.active() is None
