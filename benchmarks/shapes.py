"""Problem sizes: T tokens, D hidden width, V vocabulary, S tokens of one sequence."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    T: int
    D: int
    V: int
    S: int

    @property
    def B(self) -> int:
        return self.T // self.S


CPU_MAIN = Shape(T=2048, D=512, V=65536, S=512)
CPU_LONG = Shape(T=16384, D=512, V=65536, S=512)
CPU_BF16 = Shape(T=512, D=512, V=65536, S=128)
CPU_QUICK = Shape(T=64, D=16, V=512, S=16)
