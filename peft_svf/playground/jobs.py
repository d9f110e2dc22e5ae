"""Work on the one model of the page: one job at a time, which can be watched and stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any


class Jobs:
    """
    Runs one job at a time. The weights of the mixture are state of the model, so two jobs at once would mix them up.

    Attributes:
        stopped: Set when the running job should end with what it has.
    """

    def __init__(self) -> None:
        self.stopped = Event()
        self._running = Lock()

    def stop(self) -> None:
        """Ask the running job to end."""
        self.stopped.set()

    def run(self, job: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
        """
        Run a job in its own thread, and yield what it emits. What is emitted while nobody waits is dropped, except the
        last.

        Args:
            job: Gets the function that emits.

        Raises:
            Exception: The error of the job.
        """
        emitted: SimpleQueue[Any] = SimpleQueue()
        end, failed = object(), list[BaseException]()

        def work() -> None:
            with self._running:  # by the thread that works: the reader of a closed page may never come back
                self.stopped.clear()
                try:
                    job(emitted.put)
                except BaseException as error:
                    failed.append(error)
                finally:
                    emitted.put(end)

        thread = Thread(target=work, daemon=True)
        thread.start()
        ended = False
        try:
            while not ended:
                waiting = [emitted.get()]
                while True:
                    try:
                        waiting.append(emitted.get_nowait())
                    except Empty:
                        break
                ended = waiting[-1] is end
                if items := [item for item in waiting if item is not end]:
                    yield items[-1]
        finally:
            if not ended:
                self.stop()  # nobody reads any more
        if failed:
            raise failed[0]
