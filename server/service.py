"""What every route needs, in one frozen object, and the count of sequences that decides who is let in."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import hybridgen
from hybridgen.configs.settings import Settings
from hybridgen.engine.client import EngineClient
from hybridgen.engine.request import Ready
from hybridgen.engine.tokenizer import Tokenizer
from hybridgen.server.defaults import SamplingDefaults
from hybridgen.server.errors import ApiError, ModelNotFound, QueueFull
from hybridgen.server.lifecycle import Lifecycle
from hybridgen.server.metrics import Metrics


class Admission:
    """How many sequences (prompts times n) are being generated or wait for it.

    Counted here and not asked of the engine, whose numbers are a step old: of requests that arrive together
    exactly as many are let in as there is room for. Invariant: 0 <= num_in_flight <= limit.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit  # max_num_seqs that run and max_num_queued_reqs that wait
        self.num_in_flight = 0

    @contextmanager
    def admit(self, num_sequences: int) -> Iterator[None]:
        """Hold that many places.

        Raises:
            QueueFull: there are fewer now; routine under load.
            ApiError: there never are so many, so that waiting would not help.
        """
        if num_sequences > self.limit:
            raise ApiError(
                400,
                f"{num_sequences} sequences (prompts times n) in one request are more than the {self.limit} "
                "that this server takes. Send several requests.",
                param="n",
                code="invalid_value",
            )
        if self.num_in_flight + num_sequences > self.limit:
            raise QueueFull(self.num_in_flight, num_sequences, self.limit)
        self.num_in_flight += num_sequences
        try:
            yield
        finally:
            self.num_in_flight -= num_sequences
            assert self.num_in_flight >= 0, "more sequences left than came"


@dataclass(frozen=True, slots=True)
class Service:
    """The server's parts."""

    settings: Settings
    engine: EngineClient
    tokenizer: Tokenizer
    lifecycle: Lifecycle
    metrics: Metrics
    admission: Admission
    defaults: SamplingDefaults
    system_fingerprint: str
    created: int  # Unix time

    @property
    def model_name(self) -> str:
        return self.settings.served_model_name[0]

    def check_model(self, model: str | None) -> None:
        """Raises `ModelNotFound` for a name that is not served; none at all means the one that is."""
        if model is not None and model not in self.settings.served_model_name:
            raise ModelNotFound(model, self.settings.served_model_name)


def fingerprint(settings: Settings, ready: Ready) -> str:
    """Changes with what could change the tokens of a seeded request: the version, the model and its dtype."""
    facts = f"{settings.model} {settings.revision} {ready.dtype} {ready.num_parameters}"
    return f"hybridgen-{hybridgen.__version__}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
