"""Asks a host whether to stop; its answer may be an exception of its own, which waits until everything is saved."""

from collections.abc import Callable

from storymem_dist.errors import StoryMemError


class Interrupted(StoryMemError):
    """A render was stopped between two steps; nothing is lost, and the same call continues there."""


class StopAsker:
    """Asks ``ask_host`` (a true value or an exception: stop) until the answer is to stop."""

    def __init__(self, ask_host: Callable[[], object]) -> None:
        self._ask_host = ask_host
        self._own: BaseException | None = None
        self._stops = False

    def should_stop(self) -> bool:
        """Whether to stop now. Never raises."""
        if not self._stops:
            try:
                self._stops = bool(self._ask_host())
            except BaseException as error:  # the host's way to interrupt: it is raised when everything is saved
                self._own, self._stops = error, True
        return self._stops

    def guard(self, call: Callable[[], object]) -> None:
        """Call the host with news; an exception of its own is an answer to stop."""
        try:
            call()
        except BaseException as error:
            self._own, self._stops = self._own or error, True

    def check(self, message: str) -> None:
        """Raise the host's own exception, or ``Interrupted`` with ``message``, if the host asks to stop."""
        if self.should_stop():
            raise self._own or Interrupted(message)
