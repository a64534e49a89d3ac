"""Two processors for the controller to steer, made of what it does not know.

Layer by layer, a device whose bandwidth depends on how much it reads at once, and host threads that get in each other's
way, slow down with their load and while pages move, start late, and are sometimes held up. Measurements come late.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridgen.scheduler.feedback import (
    Decision,
    FeedbackConfig,
    FeedbackController,
    Reason,
    SequenceLoad,
    StepMeasurement,
)
from hybridgen.scheduler.machine import Device, Machine, MemoryNode, Tier

Counts = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PlantConfig:
    layers: int = 32
    page_bytes: int = 4 << 20  # K and V, all layers
    host_read_share: float = 1.0  # of a host page, that the policy reads
    device_bandwidth: float = 1.5e12
    device_half_bytes: float = 4e6  # a layer's bytes at which the device gets half of its bandwidth
    device_launch_s: float = 12e-6  # a layer
    host_bandwidth: float = 150e9  # with enough threads, when nothing disturbs
    host_knee: int = 16  # threads beyond which more only disturb
    host_disturbance: float = 0.02  # of the bandwidth, lost for each such thread
    host_superlinear: float = 0.15  # slower by this for every doubling of a layer's bytes beyond 8 MiB
    host_submit_s: float = 15e-6  # a layer
    linear_s: float = 6e-3  # of the step, matrices
    overlap: float = 0.0  # of that, which the host can work under when it looks a layer ahead
    link_bandwidth: float = 25e9
    link_disturbance: float = 0.3  # of the host's speed, lost while pages move
    max_moves: int = 1 << 30  # pages a step, that the scheduler carries out
    noise: float = 0.05  # standard deviation of a side's time in a step, as a factor
    layer_noise: float = 0.1  # the same in a layer
    outliers: float = 0.02  # share of the steps in which a side takes up to four times as long
    delay: int = 1  # steps between a step and its measurement


@dataclass
class Plant:
    config: PlantConfig
    num_pages: dict[int, int]  # by sequence
    device_pages: dict[int, int]
    budget: int
    seed: int
    page_size: int = 32
    threads: int = 16
    layer_ahead: bool = False
    rng: random.Random = field(init=False)
    steps: int = 0
    late: deque[StepMeasurement] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        assert sum(self.device_pages.values()) <= self.budget

    @property
    def total(self) -> int:
        return sum(self.num_pages.values())

    @property
    def on_device(self) -> int:
        return sum(self.device_pages.values())

    def change(self, **changes: float) -> None:
        self.config = replace(self.config, **changes)

    def ideal_s(self, on_device: int) -> float:
        """A step with so many device pages, without noise and moves."""
        return float(self._ideal_s(np.array([on_device]))[0])

    def best_s(self) -> float:
        """Of all splits, by trying every one."""
        lowest = min(self.budget, 2 * len(self.num_pages))
        return float(self._ideal_s(np.arange(lowest, min(self.budget, self.total) + 1)).min())

    def _ideal_s(self, on_device: Counts) -> Seconds:
        device_s, host_s, hidden_s = self._layer(on_device, moving=0.0)
        attention_s = np.maximum(device_s + hidden_s, host_s) - hidden_s
        return self.config.linear_s + self.config.layers * attention_s

    def _layer(self, on_device: Counts, moving: float) -> tuple[Seconds, Seconds, float]:
        """Seconds of both sides for a layer, and of the device's work that the host's goes on under."""
        c = self.config
        device_bytes = on_device * c.page_bytes / c.layers
        device_s = c.device_launch_s + (device_bytes + c.device_half_bytes) / c.device_bandwidth
        host_bytes = (self.total - on_device) * c.page_bytes * c.host_read_share / c.layers
        threads = min(self.threads, c.host_knee) / c.host_knee
        crowd = 1 - c.host_disturbance * max(0, self.threads - c.host_knee)
        load = 1 + c.host_superlinear * np.log2(np.maximum(1.0, host_bytes / (8 << 20)))
        speed = c.host_bandwidth * threads**0.7 * crowd / load * (1 - c.link_disturbance * moving)
        host_s = c.host_submit_s + host_bytes / speed
        hidden_s = c.linear_s * c.overlap / c.layers * self.layer_ahead
        return np.where(on_device > 0, device_s, 0.0), np.where(host_bytes > 0, host_s, 0.0), hidden_s

    def step(self) -> StepMeasurement | None:
        """Run one; the measurement that is known after it, if any."""
        c, rng = self.config, self.rng
        moved = self._moved if self.steps else 0
        moved_s = moved * c.page_bytes / c.link_bandwidth
        sides = self._layer(np.array([self.on_device]), moving=min(1.0, moved_s / c.linear_s))
        device_s, host_s, hidden_s = float(sides[0][0]), float(sides[1][0]), sides[2]
        factors = [math.exp(rng.gauss(0, c.noise)) for _ in range(2)]
        for side in range(2):
            if rng.random() < c.outliers:
                factors[side] *= 1 + 3 * rng.random()
        total = device_total = host_total = device_wait = host_wait = 0.0
        for _ in range(c.layers):
            device = device_s * factors[0] * math.exp(rng.gauss(0, c.layer_noise))
            host = host_s * factors[1] * math.exp(rng.gauss(0, c.layer_noise))
            end = max(device + hidden_s, host)
            total += end - hidden_s
            device_total, host_total = device_total + device, host_total + host
            if host:
                device_wait += end - device - hidden_s
                host_wait += end - host
        linear_s = c.linear_s * math.exp(rng.gauss(0, c.noise / 2))
        measurement = StepMeasurement(
            sequences=tuple(SequenceLoad(k, n, self.device_pages[k]) for k, n in self.num_pages.items()),
            step_s=total + linear_s + moved_s,
            device_s=device_total,
            host_s=host_total,
            device_wait_s=device_wait,
            host_wait_s=host_wait,
            device_bytes=self.on_device * c.page_bytes,
            node_bytes=((0, int((self.total - self.on_device) * c.page_bytes * c.host_read_share)),),
            moved_bytes=moved * c.page_bytes,
            moved_s=moved_s,
            num_threads=self.threads,
            layer_ahead=self.layer_ahead,
        )
        self.late.append(measurement)
        self.steps += 1
        self._moved = 0
        if self.steps % self.page_size == 0:
            for key in self.num_pages:
                self.num_pages[key] += 1
        return self.late.popleft() if len(self.late) > c.delay else None

    _moved: int = 0

    def carry_out(self, decision: Decision) -> None:
        splits = dict(decision.splits)
        assert sum(splits.values()) <= self.budget, "more device pages than there are"
        assert all(wanted >= 0 for wanted in splits.values())
        left = self.config.max_moves
        for key, wanted in sorted(splits.items(), key=lambda item: item[1] - self.device_pages[item[0]]):
            # The measurement was late: a context may be shorter by now.
            wanted = min(wanted, self.num_pages[key])
            change = max(-left, min(left, wanted - self.device_pages[key]))
            self.device_pages[key] += change
            left -= abs(change)
            self._moved += abs(change)
        self.threads, self.layer_ahead = decision.num_threads, decision.layer_ahead


def machine(
    *, device_bandwidth: float = 2e12, host_bandwidth: float = 200e9, link_bandwidth: float = 32e9
) -> Machine:
    """A description for the controller to begin with. It is not the plant's."""
    memory = MemoryNode(-1, "hbm", Tier.DEVICE, device_bandwidth, 1e-6, 1 << 40)
    node = MemoryNode(0, "dram0", Tier.DRAM, host_bandwidth, 1e-7, 1 << 40)
    return Machine("described", Device("gpu", memory, link_bandwidth, 1e14), (node,), 16, 1e11, "a test")


def controller(plant: Plant, **changes: Any) -> FeedbackController:
    """One that knows of the plant what an engine knows of its machine: sizes, and a description that is wrong."""
    values: dict[str, Any] = {
        "machine": machine(),
        "device_page_bytes": plant.config.page_bytes,
        "host_page_read_bytes": plant.config.page_bytes * plant.config.host_read_share,
        "num_device_pages": plant.budget,
        "max_threads": 16,
        "max_num_seqs": 64,
    }
    return FeedbackController(FeedbackConfig(**(values | changes)))


def draw(seed: int, **changes: float) -> Plant:
    """A plant at random: hosts and devices of like and unlike speed, sparse and full reads, roomy and small devices.

    It begins as prompts leave it, with as much on the device as there is room for.
    """
    rng = random.Random(seed)
    config = PlantConfig(
        layers=rng.choice([16, 32, 64]),
        page_bytes=rng.choice([1, 2, 4, 8]) << 20,
        host_read_share=rng.choice([1, 0.5, 0.25, 0.1, 0.05]),
        device_bandwidth=10 ** rng.uniform(11.2, 12.5),
        host_bandwidth=rng.uniform(60e9, 400e9),
        host_knee=rng.choice([12, 16, 24]),
        host_superlinear=rng.uniform(0, 0.25),
        linear_s=rng.uniform(2e-3, 20e-3),
        link_bandwidth=rng.uniform(12e9, 50e9),
        noise=rng.uniform(0.01, 0.08),
        outliers=rng.uniform(0, 0.04),
        delay=rng.choice([0, 1, 2]),
        device_half_bytes=rng.uniform(0, 16e6),
        host_submit_s=rng.uniform(5e-6, 60e-6),
    )
    count = rng.choice([1, 1, 2, 4, 8, 16])
    pages = {key: max(64, int(rng.uniform(256, 8192) / max(1, count / 2))) for key in range(count)}
    budget = int(sum(pages.values()) * rng.choice([0.2, 0.6, 0.9, 1.2]))
    held = {key: min(total, max(2, budget // count)) for key, total in pages.items()}
    return Plant(replace(config, **changes), pages, held, budget, seed)


def drive(plant: Plant, controller: FeedbackController, steps: int) -> Iterator[Decision]:
    """Let the controller steer for so many steps; its decisions, as far as there are measurements."""
    for _ in range(steps):
        measurement = plant.step()
        if measurement is not None:
            decision = controller.decide(measurement)
            plant.carry_out(decision)
            yield decision


def best_s(plant: Plant) -> float:
    """The best fixed split's step, with all threads or with those chosen, whichever is better."""
    chosen, results = plant.threads, []
    for plant.threads in sorted({chosen, 16}):
        results.append(plant.best_s())
    plant.threads = chosen
    return min(results)


def balanced(seed: int, **changes: Any) -> Plant:
    """Host and device are both worth something, and there is room for more on the device."""
    config = PlantConfig(
        page_bytes=2 << 20,
        host_read_share=(0.1, 0.25, 0.5, 1.0)[seed % 4],
        device_bandwidth=(3 + seed % 7) * 1e11,
        host_bandwidth=(80 + 40 * (seed % 6)) * 1e9,
        link_bandwidth=(25e9, 50e9)[seed % 2],
        linear_s=4e-3 + 1e-3 * (seed % 10),
        noise=0.04,
        delay=seed % 3,
    )
    count = (1, 2, 4)[seed % 3]
    pages = dict.fromkeys(range(count), (600 + 137 * (seed % 10)) // count)
    budget = int(sum(pages.values()) * (0.7, 1, 5)[seed % 3])
    held = {key: int(0.4 * total) for key, total in pages.items()}
    return Plant(replace(config, **changes), pages, held, budget, seed)


def scale(name: str, factor: float) -> Callable[[Plant], None]:
    return lambda plant: plant.change(**{name: factor * getattr(plant.config, name)})


def longer(plant: Plant) -> None:
    plant.num_pages = {key: 4 * total for key, total in plant.num_pages.items()}


def shorter(plant: Plant) -> None:
    plant.num_pages = {key: total // 4 for key, total in plant.num_pages.items()}
    plant.device_pages = {key: min(held, plant.num_pages[key]) for key, held in plant.device_pages.items()}


FOURFOLD: dict[str, Callable[[Plant], None]] = {
    "host slower": scale("host_bandwidth", 0.25),
    "host faster": scale("host_bandwidth", 4),
    "device slower": scale("device_bandwidth", 0.25),
    "device faster": scale("device_bandwidth", 4),
    "contexts longer": longer,
    "contexts shorter": shorter,
}


def turns(decisions: Sequence[Decision]) -> int:
    """How often the share was moved in the other direction than the last time."""
    ways = [d.reason for d in decisions if d.reason in (Reason.HOST_SLOWER, Reason.DEVICE_SLOWER)]
    return sum(one is not other for one, other in pairwise(ways))


def settle(plant: Plant, change: Callable[[Plant], None]) -> int:
    """Steps after a change until the plant is within 110 % of its best split for good; 41: not within 40."""
    steering = controller(plant)
    for _ in drive(plant, steering, 60):
        pass
    change(plant)
    last = 0
    for step in range(1, 41):
        for _ in drive(plant, steering, 1):
            pass
        if plant.ideal_s(plant.on_device) > 1.1 * best_s(plant):
            last = step + 1
    return last


def compare(plant: Plant) -> tuple[list[Decision], float]:
    """180 steps: all decisions, and of the last 120 the time in multiples of the best fixed split's."""
    steering = controller(plant)
    decisions = list(drive(plant, steering, 60))
    ours_s = best = 0.0
    for _ in range(120):
        decisions += drive(plant, steering, 1)
        ours_s += plant.ideal_s(plant.on_device)
        best += best_s(plant)
    return decisions, ours_s / best


def is_between(plant: Plant) -> bool:
    """Whether the best split is better by 1 % than both the fewest and the most device pages."""
    lowest, highest = 2 * len(plant.num_pages), min(plant.budget, plant.total)
    ends = min(plant.ideal_s(lowest), plant.ideal_s(highest))
    return plant.best_s() < 0.99 * ends
