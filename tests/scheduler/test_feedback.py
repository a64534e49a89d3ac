"""The feedback controller, steering processors that it knows little of (`bench/plant.py`)."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.plant import (
    FOURFOLD,
    Plant,
    balanced,
    compare,
    controller,
    draw,
    drive,
    is_between,
    machine,
    settle,
    turns,
)
from hybridgen.scheduler.feedback import (
    Decision,
    FeedbackConfig,
    FeedbackController,
    LimitReason,
    Mode,
    Reason,
    SequenceLoad,
    StepMeasurement,
    replay,
)

PAGE = 2 << 20


def measurement(
    *loads: tuple[int, int, int],
    device_s: float = 5e-3,
    host_s: float = 5e-3,
    rest_s: float = 5e-3,
    **more: Any,
) -> StepMeasurement:
    """Of sequences (key, pages, device pages), where each side takes so long and reads every page in full."""
    sequences = tuple(SequenceLoad(*load) for load in loads)
    on_device = sum(load.num_device_pages for load in sequences)
    on_host = sum(load.num_pages for load in sequences) - on_device
    return StepMeasurement(
        **{
            "sequences": sequences,
            "step_s": rest_s + max(device_s, host_s),
            "device_s": device_s,
            "host_s": host_s,
            "device_wait_s": max(0.0, host_s - device_s),
            "host_wait_s": max(0.0, device_s - host_s),
            "device_bytes": on_device * PAGE,
            "node_bytes": ((0, on_host * PAGE),),
            "num_threads": 16,
        }
        | more
    )


def make(**changes: Any) -> FeedbackController:
    values: dict[str, Any] = {
        "machine": machine(),
        "device_page_bytes": PAGE,
        "host_page_read_bytes": PAGE,
        "num_device_pages": 1000,
        "max_threads": 16,
        "max_num_seqs": 64,
    }
    return FeedbackController(FeedbackConfig(**(values | changes)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("change", FOURFOLD.values(), ids=FOURFOLD.keys())
def test_settles_within_20_steps_of_a_fourfold_change(change: Callable[[Plant], None], seed: int) -> None:
    late = settle(balanced(seed), change)
    assert late <= 20, f"still over 110 % of the best split after {late} steps"


@pytest.mark.parametrize("seed", range(50))
def test_stays_within_5_percent_of_the_best_fixed_split_and_turns_round_at_most_4_times(seed: int) -> None:
    decisions, ratio = compare(draw(seed))
    assert ratio <= 1.05
    assert turns(decisions) <= 4


def test_most_of_the_50_workloads_have_their_best_split_between_the_bounds() -> None:
    """Else the comparison would show only that the device can be filled."""
    assert sum(is_between(draw(seed)) for seed in range(50)) >= 25


@given(
    seed=st.integers(0, 10_000),
    noise=st.floats(0, 0.15),
    layer_noise=st.floats(0, 0.3),
    outliers=st.floats(0, 0.05),
    delay=st.integers(0, 3),
    max_moves=st.sampled_from([1, 50, 1 << 30]),
)
@settings(max_examples=40, deadline=None)
def test_under_any_noise_the_budget_holds_and_the_split_comes_to_rest(
    seed: int, noise: float, layer_noise: float, outliers: float, delay: int, max_moves: int
) -> None:
    plant = draw(
        seed, noise=noise, layer_noise=layer_noise, outliers=outliers, delay=delay, max_moves=max_moves
    )
    decisions = list(drive(plant, controller(plant), 120))  # the plant asserts the budget
    assert turns(decisions) <= 8
    for decision in decisions:
        assert 1 <= decision.num_threads <= 16
        assert 1 <= decision.max_running <= 64
        assert 0 <= decision.device_share <= 1


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_nonsense_measurements_break_no_bound(data: st.DataObject) -> None:
    steering = make(num_device_pages=40, mass_floor=0.98, can_look_ahead=True, target_step_s=0.01)
    times = st.floats(0, 1)
    for _ in range(data.draw(st.integers(1, 25))):
        loads = []
        for key in data.draw(st.sets(st.integers(0, 6), max_size=5)):
            pages = data.draw(st.integers(1, 60))
            loads.append(SequenceLoad(key, pages, data.draw(st.integers(0, min(pages, 8)))))
        step = StepMeasurement(
            tuple(loads),
            *(data.draw(times) for _ in range(5)),
            device_bytes=data.draw(st.integers(0, 1 << 30)),
            node_bytes=((0, data.draw(st.integers(0, 1 << 30))),),
            retained_mass=data.draw(st.none() | st.floats(0, 1)),
            num_threads=data.draw(st.integers(1, 16)),
        )
        decision = steering.decide(step)
        splits = dict(decision.splits)
        assert splits.keys() == {load.key for load in loads}
        assert sum(splits.values()) <= 40
        assert all(0 <= splits[load.key] <= load.num_pages for load in loads)
        assert 1 <= decision.max_running <= 64


def test_the_same_measurements_lead_to_the_same_decisions() -> None:
    plant = draw(3)
    steering = controller(plant)
    recorded, decisions = [], []
    for _ in range(150):
        step = plant.step()
        if step is not None:
            recorded.append(step)
            decisions.append(steering.decide(step))
            plant.carry_out(decisions[-1])
    assert len({d.reason for d in decisions}) > 2
    assert replay(steering.config, recorded) == tuple(decisions)


def test_the_slower_side_gives_up_pages_to_the_other() -> None:
    for device_s, host_s, reason in ((9e-3, 3e-3, Reason.DEVICE_SLOWER), (3e-3, 9e-3, Reason.HOST_SLOWER)):
        steering = make(machine=machine(device_bandwidth=2e11, host_bandwidth=2e11))
        decisions = [
            steering.decide(measurement((0, 800, 400), device_s=device_s, host_s=host_s)) for _ in range(4)
        ]
        assert reason in {d.reason for d in decisions}
        assert (decisions[-1].device_share > 0.5) == (reason is Reason.HOST_SLOWER)
        moved = dict(decisions[-1].splits)[0] - 400
        assert (moved > 0) == (reason is Reason.HOST_SLOWER)


def test_device_work_that_the_host_goes_on_under_counts_for_the_balance() -> None:
    """Looking ahead, the host may take longer than the device's part of attention: what counts is who waits."""
    steering = make()
    hidden = {"device_s": 5e-3, "host_s": 9e-3, "device_wait_s": 0.0, "host_wait_s": 1e-3, "step_s": 0.02}
    decisions = [steering.decide(measurement((0, 800, 400), **hidden)) for _ in range(6)]
    assert decisions[-1].device_share < 0.5
    assert decisions[-1].device_share > 0.3


def test_until_steps_are_measured_the_description_decides() -> None:
    steering = make(num_device_pages=300)
    decision = steering.plan((SequenceLoad(0, 1000, 100),))
    assert decision.reason is Reason.PREDICTED
    assert decision.device_share == 0.3
    assert steering.decide(measurement((0, 1000, 100), host_s=1e-4, device_s=1e-2)).reason is Reason.PREDICTED


def test_mode_predicted_never_learns() -> None:
    steering = make(mode=Mode.PREDICTED, num_device_pages=5000)
    slow_host = measurement((0, 1000, 500), host_s=1.0)
    assert {steering.decide(slow_host).device_share for _ in range(10)} == {
        steering.plan((SequenceLoad(0, 1000, 500),)).device_share
    }


def test_mode_fixed_keeps_its_share_within_the_budget() -> None:
    steering = make(mode=Mode.FIXED, fixed_share=0.25)
    decision = steering.decide(measurement((0, 400, 100), host_s=1.0))
    assert decision.reason is Reason.FIXED
    assert decision.splits == ((0, 100),)
    crowded = make(mode=Mode.FIXED, fixed_share=0.25, num_device_pages=50)
    assert sum(pages for _, pages in crowded.decide(measurement((0, 400, 50))).splits) <= 50


def test_where_the_device_holds_everything_and_the_host_only_costs_it_gets_nothing_and_that_is_said() -> None:
    steering = make(num_device_pages=1000)
    for _ in range(60):
        held = dict(steering._splits).get(0, 300)
        # A slow host: 40 us a page, and 20 ms however few there are.
        decision = steering.decide(
            measurement(
                (0, 400, held), device_s=1e-5 * held, host_s=(0.02 + 4e-5 * (400 - held)) * (held < 400)
            )
        )
    assert decision.reason is Reason.HOST_LOSES
    assert decision.splits == ((0, 400),)
    assert "no page on the host" in decision.message


def test_a_full_device_is_named_as_what_limits() -> None:
    steering = make(num_device_pages=100)
    for _ in range(5):
        decision = steering.decide(measurement((0, 400, 100), device_s=1e-3, host_s=1e-2))
    assert decision.reason is Reason.DEVICE_FULL
    assert decision.splits == ((0, 100),)


def test_a_move_that_does_not_pay_is_not_made() -> None:
    quick, slow = make(horizon_steps=1000), make(horizon_steps=1)
    for steering in (quick, slow):
        for _ in range(5):
            decision = steering.decide(measurement((0, 800, 400), device_s=5e-3, host_s=6e-3, rest_s=1e-3))
    assert dict(slow._splits) == {0: 400}
    assert decision.reason is Reason.MOVE_TOO_DEAR
    assert quick._splits[0] > 400


def test_moves_take_no_more_of_a_step_than_allowed() -> None:
    steering = make(move_share=0.25)
    step = measurement((0, 800, 400), device_s=1e-3, host_s=1e-2, moved_bytes=PAGE * 10, moved_s=1e-3)
    first = make(move_share=0.25)
    for _ in range(3):
        decision = first.decide(step)
        steering.decide(step)
    # 10 pages a millisecond, and a quarter of a step of 14 to 15 ms.
    assert 0 < steering._splits[0] - 400 <= 3 * 38
    assert decision.splits == tuple(steering._splits.items())


def test_retained_mass_below_the_floor_is_said_and_nothing_is_narrowed() -> None:
    steering = make(mass_floor=0.98, can_look_ahead=True)
    ok = measurement((0, 800, 400), device_s=9e-3, host_s=3e-3, retained_mass=0.99)
    low = replace(ok, retained_mass=0.9, layer_ahead=True)
    before = steering.decide(low)
    for _ in range(10):
        decision = steering.decide(low)
        assert decision.reason is Reason.MASS_BELOW_FLOOR
        assert "0.9000" in decision.message
        assert not decision.layer_ahead
        assert decision.device_share >= before.device_share, "pages the device reads in full went to the host"
    for _ in range(4):
        decision = steering.decide(ok)
    assert decision.device_share < before.device_share


def test_no_field_of_a_decision_could_lower_what_is_retained() -> None:
    assert not {f.name for f in fields(Decision)} & {"mass", "attention_mass", "floor", "top_k", "ratio"}


def test_a_sequence_that_ends_is_forgotten_and_a_new_one_begins_with_the_prediction() -> None:
    steering = make(num_device_pages=4000)
    for _ in range(30):
        steering.decide(measurement((7, 800, 400), device_s=5e-3, host_s=5e-3))
    assert 300 <= steering.initial_pages(800) <= 500
    decision = steering.plan((SequenceLoad(8, 200, 150),))
    assert [key for key, _ in decision.splits] == [8]


def test_steps_that_compute_prompts_teach_nothing() -> None:
    steering = make()
    for _ in range(10):
        steering.decide(measurement((0, 800, 400), host_s=1.0, num_prompt_tokens=512))
    assert steering.plan((SequenceLoad(0, 800, 400),)).reason is Reason.PREDICTED


def test_device_pages_go_to_the_sequences_that_have_the_smallest_share() -> None:
    steering = make(num_device_pages=500)
    for _ in range(4):
        decision = steering.decide(
            measurement((0, 400, 300), (1, 400, 50), device_s=1e-3, host_s=2e-2, rest_s=4e-2)
        )
    splits = dict(decision.splits)
    assert splits[0] == 300
    assert splits[1] > 50


def host_bound(steering: FeedbackController, count: int, rest_s: float) -> Decision:
    loads = [(key, 400, 5) for key in range(count)]
    for _ in range(40):
        decision = steering.decide(
            measurement(*loads, device_s=5e-6 * count, host_s=1e-2 * count, rest_s=rest_s)
        )
    return decision


def test_when_the_host_is_the_bottleneck_no_more_run_than_bring_throughput() -> None:
    bound = host_bound(make(num_device_pages=40), 8, rest_s=2e-2)
    assert bound.limit_reason is LimitReason.NO_THROUGHPUT
    assert 8 <= bound.max_running < 64
    free = host_bound(make(num_device_pages=40), 8, rest_s=50.0)
    assert free.limit_reason is LimitReason.CONFIGURED
    assert free.max_running == 64


def test_no_more_run_than_the_step_time_asked_for_allows() -> None:
    bound = host_bound(make(num_device_pages=40, target_step_s=1.05), 4, rest_s=1.0)
    assert bound.limit_reason is LimitReason.STEP_TIME
    assert bound.max_running in (4, 5)


def test_a_device_that_is_the_bottleneck_limits_nobody() -> None:
    steering = make(num_device_pages=100_000, machine=machine(host_bandwidth=1e6))
    for _ in range(40):
        decision = steering.decide(measurement((0, 400, 400), device_s=0.5, host_s=0.0, rest_s=1e-3))
    assert decision.max_running == 64


def test_fewer_threads_are_kept_where_they_get_in_each_others_way() -> None:
    crowded = balanced(3, host_knee=8, host_disturbance=0.06, host_read_share=1.0)
    steering = controller(crowded)
    for _ in drive(crowded, steering, 400):
        pass
    assert crowded.threads < 16
    roomy = balanced(3, host_knee=16, host_read_share=1.0)
    decisions = list(drive(roomy, controller(roomy), 400))
    assert decisions[-1].num_threads == 16
    assert Reason.TRIAL in {d.reason for d in decisions}


def test_looking_ahead_is_kept_where_it_shortens_the_step() -> None:
    plant = balanced(4, overlap=0.8)
    decisions = list(drive(plant, controller(plant, can_look_ahead=True), 200))
    assert decisions[-1].layer_ahead
    plant = balanced(4, overlap=0.0)
    decisions = list(drive(plant, controller(plant, can_look_ahead=True), 200))
    assert not decisions[-1].layer_ahead


def test_settings_that_nobody_carries_out_are_not_tried_again() -> None:
    steering = make()
    decisions = [steering.decide(measurement((0, 800, 400), num_threads=4)) for _ in range(300)]
    assert {d.num_threads for d in decisions[250:]} == {4}


def test_nothing_runs_and_nothing_is_decided() -> None:
    decision = make().plan(())
    assert (decision.reason, decision.splits, decision.predicted_step_s) == (Reason.IDLE, (), 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"device_page_bytes": 0},
        {"num_device_pages": -1},
        {"max_threads": 0},
        {"fixed_share": 1.5},
        {"move_share": 0.0},
        {"host_page_read_bytes": 0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_configuration_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(**wrong)
