"""Shapes in types: what an annotation says of a tensor beside that it is one.

Each is a tensor to Python and to type checkers. The words beside it are jaxtyping's: a kind of number, and the names of
dimensions, of which an equal name is an equal size within one call. Only the tests check them.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

Images = Annotated[Tensor, "Float", "n *image"]  # or other inputs, one a row
Labels = Annotated[Tensor, "Integer", "n"]
Logits = Annotated[Tensor, "Float", "n classes"]
PerImage = Annotated[Tensor, "Float", "n"]
Flags = Annotated[Tensor, "Bool", "n"]
Features = Annotated[Tensor, "Float", "*value"]  # of a batch, or a weight: what noise is added to
