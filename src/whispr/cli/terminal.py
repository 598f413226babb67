"""How progress is shown: a spinner at a terminal, plain lines elsewhere."""

from rich.console import Console
from rich.status import Status

NAME_WIDTH = 12


class TerminalProgress:
    """Prints one line per part; what takes a moment turns a spinner at a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None

    def step(self, text: str) -> None:
        if not self._console.is_terminal:
            self._line(f"{text} …")
        elif self._status is None:
            self._status = self._console.status(f"{text} …")
            self._status.start()
        else:
            self._status.update(f"{text} …")

    def done(self, name: str, text: str) -> None:
        if name == "whispr":
            self.quiet()
            self._line(f"whispr {text}")
        else:
            self._line(f"{name:<{NAME_WIDTH}} {text}")

    def trouble(self, text: str) -> None:
        self._line(text)

    def quiet(self) -> None:
        """Takes the spinner away."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _line(self, text: str) -> None:
        # Addresses are to be copied and searched for: no wrapping, no colour inside them.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
