"""What the compiled extension offers; amalgam.kernels.native is its only user."""

from enum import Enum
from typing import final

class DType(Enum):
    float32 = 0
    bfloat16 = 1

@final
class Kernels:
    @property
    def isa(self) -> str: ...
    def rms_norm(
        self,
        x: int,
        weight: int,
        out: int,
        rows: int,
        hidden: int,
        eps: float,
        x_dtype: DType,
        weight_dtype: DType,
    ) -> None: ...

def supported_isas() -> list[str]: ...
def kernels(isa: str) -> Kernels: ...
