"""Events: what an operation returns so that work can go on while its data travels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Event(Protocol):
    """What `previous_event` arguments accept: anything the current stream can wait for."""

    def current_stream_wait(self) -> None: ...


class HostEvent:
    """The end of an operation of the host backend: `finish` completes it, once."""

    def __init__(self, finish: Callable[[], None] | None = None):
        self._finish = finish
        self._error: BaseException | None = None

    def current_stream_wait(self) -> None:
        """Complete the operation; nothing if it is complete. What failed once fails again.

        Raises:
            CommunicationError: a peer died or did not answer in time.
        """
        if self._error is not None:
            raise self._error
        if self._finish is not None:
            finish, self._finish = self._finish, None
            try:
                # Filling outputs that autograd has already recorded is not an operation of the graph.
                with torch.no_grad():
                    finish()
            except BaseException as error:
                self._error = error
                raise


class StreamEvent:
    """All that the current CUDA stream has been given so far."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def current_stream_wait(self) -> None:
        """Make the current CUDA stream wait for it."""
        torch.cuda.current_stream().wait_event(self._event)


class EventOverlap:
    """Handle on an operation in flight, with DeepEP's interface.

    `with event: work()` runs `work` while the data travels and waits at the end of the block. Outputs of an
    operation called with `async_with_compute_stream=True` hold no data before the wait.

    Args:
        event: to wait for. extra_tensors: kept alive as long as this.
    """

    def __init__(self, event: Event | None = None, extra_tensors: tuple[torch.Tensor, ...] | None = None):
        self.event, self.extra_tensors = event, extra_tensors
        self._release_on_exit = False
        self._hook: Callable[[], None] | None = None

    def register_hook_after_wait(self, hook_after_wait: Callable[[], None]) -> None:
        """Call it, once, after the next wait. Raises RuntimeError if there is one already."""
        if self._hook is not None:
            raise RuntimeError("this EventOverlap has a hook already: one at a time")
        self._hook = hook_after_wait

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Make the current stream (on the host: the caller) wait for the operation.

        Args:
            release_handle: drop the event afterwards, and with it what it keeps alive.

        Raises:
            CommunicationError: a peer died or did not answer in time.
        """
        if self.event is not None:
            self.event.current_stream_wait()
        if (hook := self._hook) is not None:
            self._hook = None
            hook()
        if release_handle:
            self.event = None

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        self._release_on_exit = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *exc_info: object) -> None:
        release, self._release_on_exit = self._release_on_exit, False
        if error_type is None:  # an error of the block must not be hidden behind a wait that may fail, too
            self.current_stream_wait(release_handle=release)
