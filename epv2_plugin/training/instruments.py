"""Instruments of an A/B run that know no framework: a clock for the stages of a step, and peak memory.

The stages are bracketed by identity functions in the graph, which note the time when the forward and when the backward
pass comes through. Between the bracket before dispatch and the one behind it lies the dispatch, and so on; the
backward pass meets the brackets in reverse. Waiting for slower ranks falls into the stage that waits.
"""

from __future__ import annotations

import functools
import itertools
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from epv2_plugin.training import devices

# The brackets in the order in which the forward pass meets them, and the stage that ends at each.
BRACKETS = ("before dispatch", "after dispatch", "before combine", "after combine")
STAGE_ENDING_AT = {"after dispatch": "dispatch", "before combine": "expert", "after combine": "combine"}
STAGE_STARTING_AT = dict(zip(BRACKETS, ("dispatch", "expert", "combine"), strict=False))
STAGES = ("dispatch", "expert", "combine")


class _Bracket(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, clock: StageClock, name: str) -> torch.Tensor:
        ctx.clock, ctx.name = clock, name
        clock.forward(name)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.clock.backward(ctx.name)
        return grad, None, None


class StageClock:
    """Seconds per stage since `reset`, summed over the layers and micro-batches whose methods are `bracketed`.

    On a GPU the time is that of the stream that runs the layer: work on other streams counts where that one waits.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self._passed: list[tuple[str | None, Any]] = []  # stage that ended, time
        self._spans: list[tuple[str, Any, Any]] = []  # what has a stream of its own: name, begin, end

    def seconds(self) -> dict[str, float]:
        """Forward seconds by stage, and backward seconds by stage + "_backward", and of what is `timed` by its name.

        Waits for the device.
        """
        devices.synchronize()
        sums = {stage + suffix: 0.0 for suffix in ("", "_backward") for stage in STAGES}
        for (_, begin), (stage, end) in itertools.pairwise(self._passed):
            if stage is not None:
                sums[stage] += devices.seconds_between(begin, end)
        for name, begin, end in self._spans:
            sums[name] = sums.get(name, 0.0) + devices.seconds_between(begin, end)
        return sums

    def forward(self, bracket: str) -> None:
        """The forward pass is at `bracket`."""
        self._pass(STAGE_ENDING_AT.get(bracket))

    def backward(self, bracket: str) -> None:
        """The backward pass is at `bracket`."""
        stage = STAGE_STARTING_AT.get(bracket)
        self._pass(stage and stage + "_backward")

    def _pass(self, stage: str | None) -> None:
        self._passed.append((stage, devices.mark()))

    def bracketed(self, method: Callable, before: str | None, after: str | None) -> Callable:
        """`method`, whose first argument and (first) result go through the brackets that are named."""

        @functools.wraps(method)
        def call(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if before is not None:
                hidden_states = _Bracket.apply(hidden_states, self, before)
            result = method(hidden_states, *args, **kwargs)
            if after is None:
                return result
            if isinstance(result, tuple):
                return (_Bracket.apply(result[0], self, after), *result[1:])
            return _Bracket.apply(result, self, after)

        return call

    def timed(self, call: Callable, name: str) -> Callable:
        """`call`, timed on the stream that it is made on; what runs beside it does not count."""

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = devices.mark()
            result = call(*args, **kwargs)
            self._spans.append((name, begin, devices.mark()))
            return result

        return timed


class PeakMemory:
    """Peak memory of this process in bytes since `reset`: on a GPU, what torch allocated there; on the CPU, resident
    memory, since the start of the process where Linux can't reset it."""

    _clear, _status = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def reset(self) -> None:
        """Forget the peak so far."""
        if devices.on_gpu():
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            self._clear.write_text("5")
            self._resettable = True
        except OSError:
            self._resettable = False

    def read(self) -> int:
        """The peak in bytes."""
        if devices.on_gpu():
            return torch.cuda.max_memory_allocated()
        if self._resettable:
            for line in self._status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
