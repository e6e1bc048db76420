"""What a case is made of: named draws, each from a stream of its own.

A draw depends on the seed, the number of the case and the name of the draw, and on nothing else. So a case is the
same whenever it is repeated, and one draw can be replaced by its simplest value while all others stay: that is how a
failing case is shrunk. Convention: the first option, the lowest number and False are the simplest.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Option = TypeVar("Option")


class Raised:
    """An exception that a call ended with."""

    def __init__(self, error: BaseException):
        self.type, self.message = type(error), str(error)

    def __repr__(self) -> str:
        return f"raised {self.type.__name__}: {self.message[:300]}"


class Draw:
    """One run of a case.

    Attributes:
        side: "stock", "exact" (stock in float64) or "ours".
        values: what was drawn, by name, for the report of a failure.
        simple: names of the draws that are replaced by their simplest value.
        within: what the names of draws begin with, so that a step of a case has draws of its own.
        coarse: stock computes in bfloat16 whatever the dtype of its results says (autocast).
        raised: how many of the attempted calls raised.
    """

    def __init__(self, seed: int, number: int, side: str = "stock", simple: frozenset[str] = frozenset()):
        self.seed, self.number, self.side, self.simple = seed, number, side, simple
        self.values: dict[str, Any] = {}
        self.within = ""
        self.coarse = False
        self.raised = 0
        self.attempted = 0
        self._names: Counter[str] = Counter()
        self._undo: list[Callable[[], None]] = []
        self._patched: list[Callable[[], None]] = []

    @property
    def exact(self) -> bool:
        return self.side == "exact"

    @property
    def ours(self) -> bool:
        return self.side == "ours"

    # Names and streams

    def _stream(self, name: str) -> tuple[str, random.Random]:
        name = self.within + name
        self._names[name] += 1
        name = name if self._names[name] == 1 else f"{name}#{self._names[name]}"
        return name, random.Random(f"{self.seed}:{self.number}:{name}")

    def one_of(self, name: str, options: Sequence[Option], p: float | None = None) -> Option:
        """One of the options; p: the chance that it is another one than the first."""
        name, stream = self._stream(name)
        chosen = stream.randrange(len(options))
        if p is not None:
            chosen = 0 if len(options) < 2 or stream.random() >= p else stream.randrange(1, len(options))
        chosen = 0 if name in self.simple else chosen
        if chosen or (p is None and isinstance(options[0], str)):  # a word says more than its absence
            self.values[name] = options[chosen]
        return options[chosen]

    def chance(self, name: str, p: float = 0.5) -> bool:
        return self.one_of(name, (False, True), p)

    def integer(self, name: str, low: int, high: int) -> int:
        """Between low and high, both included."""
        return self.one_of(name, range(low, high + 1))

    def some_of(self, name: str, options: Sequence[Option], p: float = 0.3) -> list[Option]:
        """Each option by itself, in a drawn order."""
        name, stream = self._stream(name)
        chosen = [option for option in options if stream.random() < p]
        stream.shuffle(chosen)
        chosen = [] if name in self.simple else chosen
        if chosen:
            self.values[name] = chosen
        return chosen

    def stream(self, name: str) -> random.Random:
        """A stream of random numbers, for what is not worth a name."""
        return self._stream(name)[1]

    def generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(self._stream(name)[1].randrange(2**62))

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Draws that no other step changes: when one is left out, the others stay as they are."""
        self.within = f"{number}. "
        try:
            yield
        finally:
            self.within = ""

    # Tensors and modules

    def normal(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normally distributed in `dtype`; in the exact run these same values in float64."""
        return self.real(torch.randn(shape, generator=self.generator(name)).to(dtype))

    def integers(self, name: str, low: int, high: int, *shape: int) -> Tensor:
        """Between low and high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator(name))

    def real(self, x: Any) -> Any:
        """A floating-point tensor, or a module, as it takes part in this run: in the exact one in float64."""
        if not self.exact or (isinstance(x, Tensor) and not x.is_floating_point()):
            return x
        return x.double()

    def weights(self, module: nn.Module, name: str = "weights") -> nn.Module:
        """Fills a module with random numbers; none stays at 0 or 1, so that one that is forgotten is seen."""
        generator = self.generator(name)
        with torch.no_grad():
            for path, parameter in module.named_parameters():
                norm = "norm" in path.lower() and path.endswith("weight")
                spread = 0.3 if parameter.ndim == 1 else 1.0 if "embedding" in path else parameter.shape[-1] ** -0.5
                values = torch.randn(parameter.shape, generator=generator) * spread + norm
                parameter.copy_(values)
        return module

    # Calls

    def attempt(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """The result of a call that may raise, or what it raised. An error anywhere else is a fault of the case."""
        self.attempted += 1
        try:
            return function(*args, **kwargs)
        except Exception as error:
            self.raised += 1
            return Raised(error)

    def patch(self, owner: Any, attribute: str, value: Any) -> None:
        """Sets an attribute until the end of this run, or until all patches are taken back."""
        own = vars(owner) if hasattr(owner, "__dict__") else {}
        if attribute in own:
            before = own[attribute]
            self._patched.append(lambda: setattr(owner, attribute, before))
        else:
            self._patched.append(lambda: delattr(owner, attribute))
        setattr(owner, attribute, value)

    def unpatch(self) -> None:
        while self._patched:
            self._patched.pop()()

    def finally_(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def close(self) -> None:
        self.unpatch()
        while self._undo:
            self._undo.pop()()


def seed_everything(seed: int, number: int) -> None:
    start = random.Random(f"{seed}:{number}").randrange(2**31)
    random.seed(start)
    np.random.seed(start)
    torch.manual_seed(start)


def generator_states() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tobytes() + bytes(str(np.random.get_state()[2:]), "ascii"),
    }
