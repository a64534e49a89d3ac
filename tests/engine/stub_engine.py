"""An engine process without a model, for tests of the two ends of the wire and of the supervision.

Run as a script in place of `python -m hybridgen.engine.process`. Each step gives each running choice its
next token: the prompt's first token plus the tokens so far. The model's name, and a prompt's first token,
select what goes wrong; STUB_LOAD_S and STUB_STEP_S in the environment are the times of a start and of a step.
"""

import os
import sys
import time
from collections.abc import Sequence

from hybridgen.configs.settings import EngineSettings
from hybridgen.engine.process import main
from hybridgen.engine.request import EngineStats, Output, Ready, Request

REFUSED, RAISES = 400, 500  # first tokens


class StubCore:
    def __init__(self, settings: EngineSettings) -> None:
        if settings.model == "missing":
            raise FileNotFoundError("no such model: missing")
        if settings.model == "too-large":
            raise ValueError("the pages of a context\nneed 9 GiB, there are 4")
        time.sleep(float(os.environ.get("STUB_LOAD_S", "0")))
        if settings.model == "exits":
            os._exit(3)
        self.ready = Ready(
            max_model_len=4096,
            vocab_size=256,
            page_size=settings.page_size,
            num_pages=100,
            dtype="float32",
            num_parameters=int(os.environ["OMP_NUM_THREADS"]),  # to show that it arrives
            load_seconds=0.0,
        )
        self._step_s = float(os.environ.get("STUB_STEP_S", "0.001"))
        self._requests: dict[str, Request] = {}
        self._counts: dict[tuple[str, int], int] = {}
        self._refusals: list[Output] = []
        self._num_steps = 0

    def add(self, request: Request) -> None:
        if request.prompt[0] == REFUSED:
            self._refusals.append(Output(id=request.id, finish_reason="error", error="too long: 9 > 8"))
            return
        self._requests[request.id] = request
        for index in range(request.params.n):
            self._counts[request.id, index] = 0

    def abort(self, ids: Sequence[str]) -> None:
        for id in ids:
            self._requests.pop(id, None)
            for key in [key for key in self._counts if key[0] == id]:
                del self._counts[key]

    def abort_choice(self, id: str, index: int) -> None:
        self._counts.pop((id, index), None)

    def check_integrity(self) -> None:
        pass

    def has_work(self) -> bool:
        return bool(self._counts or self._refusals)

    def step(self) -> list[Output]:
        time.sleep(self._step_s)
        self._num_steps += 1
        outputs, self._refusals = self._refusals, []
        for (id, index), count in list(self._counts.items()):
            request = self._requests[id]
            if request.prompt[0] == RAISES:
                raise RuntimeError("page 7 released twice")
            done = request.params.max_tokens is not None and count + 1 >= request.params.max_tokens
            token = (request.prompt[0] + count) % 128
            outputs.append(
                Output(id=id, index=index, tokens=(token,), finish_reason="length" if done else None)
            )
            self._counts[id, index] = count + 1
            if done:
                del self._counts[id, index]
        return outputs

    def explain(self, page: int | None) -> tuple[str, ...]:
        return ("all pages",) if page is None else (f"page {page}",)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len({id for id, _ in self._counts}), num_pages=100, num_steps_total=self._num_steps
        )


if __name__ == "__main__":
    sys.exit(main(StubCore))
