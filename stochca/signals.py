"""The signals that stop a run, noted instead of died of."""

import os
import signal
import threading
from abc import ABC, abstractmethod
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Noted(ABC):
    """Notes SIGINT and SIGTERM while it is entered, in the main thread, to which Python leaves them."""

    def __enter__(self) -> Any:
        is_main = threading.current_thread() is threading.main_thread()
        self.previous = {number: signal.signal(number, self._came) for number in STOPPING if is_main}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @abstractmethod
    def note(self, signum: int) -> None:
        """Called when a signal comes."""

    def _came(self, signum: int, _frame: object) -> None:
        self.note(signum)


def say(signum: int, text: str) -> None:
    """Tell what follows, by the descriptor of stderr: the signal may have come in the middle of a print."""
    os.write(2, f"\n{signal.Signals(signum).name}: {text}\n".encode())
