"""What a machine would do with a model and a load, by every way of serving it, as plain data: `hybridgen plan`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from hybridgen.configs.machines import MachineError, read_machine
from hybridgen.configs.presets import preset_folder, preset_names
from hybridgen.configs.settings import load_settings
from hybridgen.engine.build import load_config
from hybridgen.engine.model_spec import UnsupportedModel, spec_from_config
from hybridgen.engine.shape import shape_of
from hybridgen.engine.this_machine import measure_machine
from hybridgen.engine.weights import WeightError
from hybridgen.scheduler.cost import CostFactors, CostModel, ModelShape, System
from hybridgen.scheduler.describe import factors_of, machine_of
from hybridgen.scheduler.machine import Machine
from hybridgen.scheduler.simulate import DoesNotFit, Limits, SimulationResult, Workload, simulate

THIS_MACHINE = "this"
SYSTEMS = tuple(str(system) for system in System)
OURS = (System.EXACT, System.MASS, System.HYBRIDGEN)


class CannotPlan(Exception):
    """The model, the machine or the load cannot be planned; the message is one sentence with the numbers."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """
    Attributes:
        model: preset, folder, or Hugging Face id (its config.json is fetched, its weights are not).
        machine: name of a description, path of one, or `this`.
        contexts: prompt lengths; each request draws one.
        concurrency: requests at a time; or
        rate: requests a second, arriving at random.
        systems: names of `SYSTEMS`.
        num_steps: decode steps to simulate.
    """

    model: str
    machine: str
    contexts: tuple[int, ...]
    num_cxl: int = 0
    concurrency: int | None = 8
    rate: float | None = None
    num_requests: int = 64
    output_tokens: int = 256
    systems: tuple[str, ...] = SYSTEMS
    num_steps: int = 100
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One system's figures; those of `SimulationResult`, or why there are none."""

    system: str
    loses: str  # quality: in what way; empty: nothing
    refused: str = ""
    step_p50_ms: float = 0.0
    step_p99_ms: float = 0.0
    tokens_per_s: float = 0.0
    ttft_p50_s: float = 0.0
    ttft_p99_s: float = 0.0
    num_running: float = 0.0
    num_waiting: int = 0
    num_fitting: int = 0
    limit: str = ""
    device_share: float = 0.0
    device_kv_bytes: int = 0
    node_role_bytes: Mapping[str, Mapping[str, int]] | None = None
    critical: Mapping[str, float] | None = None
    idle: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """
    Attributes:
        weights_bytes, kv_token_bytes: of the model.
        assumptions: sentences that every figure rests on.
    """

    model: str
    machine: str
    source: str
    weights_bytes: int
    kv_token_bytes: int
    contexts: tuple[int, ...]
    concurrency: int | None
    rate: float | None
    rows: tuple[PlanRow, ...]
    assumptions: tuple[str, ...]


class Planner:
    """A model on a machine, to be asked for several loads and numbers of expanders.

    Raises:
        CannotPlan: the model or the machine is unknown, or cannot be read.
    """

    def __init__(self, model: str, machine: str) -> None:
        self.shape = find_shape(model)
        self._description = None
        self._measured: tuple[Machine, CostFactors] | None = None
        if machine == THIS_MACHINE:
            self._measured = measure_machine(self.shape, tiers=load_settings({}).memory_tiers)
            return
        try:
            self._description = read_machine(machine)
        except MachineError as error:
            raise CannotPlan(
                f"{error}, or `{THIS_MACHINE}`" if "no machine" in str(error) else str(error)
            ) from error

    @property
    def takes_cxl(self) -> bool:
        """Whether expanders can be added."""
        return self._description is not None and self._description.cxl is not None

    def machine(self, num_cxl: int) -> tuple[Machine, CostFactors]:
        if self._description is None:
            assert self._measured is not None
            if num_cxl:
                raise CannotPlan(
                    "--cxl adds expanders to a described machine; this machine is taken as it is"
                )
            return self._measured
        try:
            return machine_of(self._description, num_cxl=num_cxl), factors_of(self._description)
        except MachineError as error:
            raise CannotPlan(str(error)) from error

    def plan(self, request: PlanRequest) -> Plan:
        """Simulate each system that can run on the machine.

        Raises:
            CannotPlan: none can.
        """
        machine, factors = self.machine(request.num_cxl)
        open_loop = request.rate is not None
        workload = Workload(
            contexts=request.contexts,
            output_tokens=request.output_tokens if open_loop else None,
            concurrency=None if open_loop else request.concurrency,
            rate=request.rate,
            num_requests=request.num_requests,
            num_steps=request.num_steps,
            seed=request.seed,
        )
        rows = [
            self._row(System(name), machine, factors, workload)
            for name in request.systems
            if machine.device is not None or System(name) in OURS
        ]
        if not rows:
            raise CannotPlan(
                f"{machine.name} has no device: of the policies only {', '.join(OURS)} run on it"
            )
        if all(row.refused for row in rows):
            raise CannotPlan(rows[0].refused)
        return Plan(
            model=self.shape.name,
            machine=machine.name,
            source=machine.source,
            weights_bytes=self.shape.weights_bytes,
            kv_token_bytes=self.shape.token_bytes,
            contexts=request.contexts,
            concurrency=workload.concurrency,
            rate=request.rate,
            rows=tuple(rows),
            assumptions=assumptions(factors, machine, [System(name) for name in request.systems]),
        )

    def _row(self, system: System, machine: Machine, factors: CostFactors, workload: Workload) -> PlanRow:
        try:
            result = simulate(
                CostModel(machine, self.shape, factors, system),
                workload,
                Limits(max_num_seqs=max(256, workload.concurrency or 0)),
            )
        except DoesNotFit as error:
            return PlanRow(str(system), system.loses_quality, refused=str(error))
        return _row_of(system, result)


def _row_of(system: System, result: SimulationResult) -> PlanRow:
    return PlanRow(
        system=str(system),
        loses=system.loses_quality,
        step_p50_ms=round(1e3 * result.step_p50_s, 3),
        step_p99_ms=round(1e3 * result.step_p99_s, 3),
        tokens_per_s=round(result.tokens_per_s, 2),
        ttft_p50_s=round(result.ttft_p50_s, 3),
        ttft_p99_s=round(result.ttft_p99_s, 3),
        num_running=round(result.num_running, 2),
        num_waiting=result.num_waiting,
        num_fitting=result.num_fitting,
        limit=result.limit,
        device_share=round(result.device_share, 4),
        device_kv_bytes=result.device_kv_bytes,
        node_role_bytes={
            node: {str(role): num_bytes for role, num_bytes in roles.items()}
            for node, roles in result.node_role_bytes.items()
        },
        critical={name: round(share, 4) for name, share in result.critical.items()},
        idle={name: round(max(0.0, 1 - share), 4) for name, share in result.busy.items()},
    )


def find_shape(model: str) -> ModelShape:
    """The shape of a preset, of the model in a folder, or of one of the Hugging Face hub, in 16 bits.

    Raises:
        CannotPlan: there is none, or it is of a kind that is not supported.
    """
    folder = preset_folder(model) or Path(model).expanduser()
    try:
        if folder.is_dir():
            config = load_config(folder)
        elif "/" in model:  # an id of the hub
            found = AutoConfig.from_pretrained(model, trust_remote_code=False)
            assert isinstance(found, PreTrainedConfig)
            config = found
        else:
            raise CannotPlan(
                f"no model {model!r}: it is no folder, no id of the Hugging Face hub, and no preset: "
                + ", ".join(preset_names())
            )
        spec = spec_from_config(config)
    except (OSError, ValueError, WeightError) as error:
        raise CannotPlan(
            f"the config.json of {model} is not to be had: {str(error).splitlines()[0]}"
        ) from error
    except UnsupportedModel as error:
        raise CannotPlan(f"{model}: {error}") from error
    return shape_of(spec, folder.name if folder.is_dir() else model)


def assumptions(factors: CostFactors, machine: Machine, systems: Sequence[System]) -> tuple[str, ...]:
    """What the figures of these systems rest on, beside the machine's description. One sentence each."""
    f = factors
    lines = [
        f"machine: {machine.source}; nothing was measured on it"
        if machine.device
        else f"machine: {machine.source}",
        f"fixed times: {1e3 * f.step_s:.2f} ms a step, {1e6 * f.layer_s:.0f} us a layer,"
        f" {1e6 * f.handover_s:.0f} us more a layer with host pages, {1e6 * f.sequence_s:.0f} us a sequence",
        f"attention on the host reaches {f.scan_share:.0%} of a node's bandwidth, {f.gather_share:.0%} where it reads"
        " single rows",
        "weights and KV in 16 bits, prompts not shared, no speculative decoding; tiers hold each page once",
    ]
    if System.MASS in systems:
        lines.append(
            f"mass reads the 8-bit index of all host tokens and K and V of {f.selected_share:.0%} of them, that of 0.99"
            " on a small model's texts of 2k and 4k tokens"
        )
    if System.HYBRIDGEN in systems or System.HYBRIDGEN_PUBLISHED in systems:
        lines.append(
            f"hybridgen reads all host keys and, for each query head, the values of {f.top_k_ratio:.0%} of the tokens,"
            " no two heads the same; hybridgen-published sends each head's values over the link. The ratio is fixed"
        )
    if System.STREAM in systems or System.STREAM_INT4 in systems:
        lines.append(
            "stream copies every host page over the link in each step, wholly overlapped with the device's work;"
            f" stream-int4 keeps and copies {f.int4_share:.0%} of the bytes, and writes and reads them in 16 bits once"
            " more"
        )
    if System.H2O in systems:
        lines.append(
            f"h2o keeps {f.h2o_share:.0%} of the tokens in all layers but two, which keep all; choosing is free"
        )
    if System.INFINIGEN in systems:
        lines.append(
            f"infinigen has all KV on the host, {f.infinigen_partial:.0%} of K on the device, and fetches"
            f" {f.infinigen_share:.0%} of the tokens in all layers but two, which fetch all; rows are gathered, written"
            " and read by the cores and the link, which is three times the bytes in host memory"
        )
    return tuple(lines)


def sweep(
    planner: Planner, request: PlanRequest, contexts: Sequence[int], cxl: Sequence[int]
) -> dict[tuple[int, int], Plan | CannotPlan]:
    """A plan for each context and number of expanders: (context, expanders) -> plan, or why there is none."""
    plans: dict[tuple[int, int], Plan | CannotPlan] = {}
    for num_cxl in cxl:
        for context in contexts:
            try:
                plans[context, num_cxl] = planner.plan(replace(request, contexts=(context,), num_cxl=num_cxl))
            except CannotPlan as error:
                plans[context, num_cxl] = error
    return plans
