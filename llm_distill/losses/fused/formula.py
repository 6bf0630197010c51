"""A divergence's formula as source code: traced once with symbols, written in the language of a compiled back end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from llm_distill.divergences import Divergence


class UntranslatableError(Exception):
    """The formula uses what the compiled back ends do not have; torch can run it."""


@dataclass(frozen=True)
class Language:
    statement: str
    """An assignment, of {name} and {value}."""
    number: str
    """A constant, of {}."""
    functions: Mapping[str, str]
    """Torch's name of a function -> the language's."""


class Symbol:
    """A number that is not there yet: arithmetic and torch functions on it are written down as statements."""

    def __init__(self, name: str, language: Language, statements: list[str]) -> None:
        self.name, self.language, self.statements = name, language, statements

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Symbol:
        symbol = next(argument for argument in args if isinstance(argument, Symbol))
        name = getattr(function, "__name__", str(function))
        if kwargs or name not in symbol.language.functions:
            raise UntranslatableError(f"torch.{name}")
        return symbol._new(f"{symbol.language.functions[name]}({', '.join(map(symbol._written, args))})")

    def _new(self, value: str) -> Symbol:
        name = f"t{len(self.statements)}"
        self.statements.append(self.language.statement.format(name=name, value=value))
        return Symbol(name, self.language, self.statements)

    def _written(self, operand: Symbol | float) -> str:
        if isinstance(operand, Symbol):
            return operand.name
        if not math.isfinite(operand):
            raise UntranslatableError(f"the constant {operand}")
        return self.language.number.format(float(operand))

    def __add__(self, other: Symbol | float) -> Symbol:
        return self._new(f"{self.name} + {self._written(other)}")

    def __sub__(self, other: Symbol | float) -> Symbol:
        return self._new(f"{self.name} - {self._written(other)}")

    def __rsub__(self, other: float) -> Symbol:
        return self._new(f"{self._written(other)} - {self.name}")

    def __mul__(self, other: Symbol | float) -> Symbol:
        return self._new(f"{self.name} * {self._written(other)}")

    def __truediv__(self, other: Symbol | float) -> Symbol:
        return self._new(f"{self.name} / {self._written(other)}")

    def __rtruediv__(self, other: float) -> Symbol:
        return self._new(f"{self._written(other)} / {self.name}")

    def __neg__(self) -> Symbol:
        return self._new(f"-{self.name}")

    __radd__, __rmul__ = __add__, __mul__
    __eq__ = __bool__ = __hash__ = None  # type: ignore[assignment]  # a comparison would be that of symbols


def translate(divergence: Divergence, language: Language) -> tuple[list[str], str, str]:
    """Statements over `p`, `q`, `log_p` and `log_q`, and the names that then hold φ and ψ.

    Raises:
        UntranslatableError: the formula needs more than the language has.
    """
    statements: list[str] = []
    inputs = [Symbol(name, language, statements) for name in ("p", "q", "log_p", "log_q")]
    try:
        phi, psi = divergence.formula(*inputs, *astuple(divergence))  # type: ignore[call-overload]
        return statements, phi.name, psi.name
    except (TypeError, AttributeError) as error:  # a method of tensors, an operator that is not above
        raise UntranslatableError(str(error)) from error
