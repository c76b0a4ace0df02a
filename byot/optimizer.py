"""torch.optim's SGD without torch's compiler, whose import takes every process, a search's workers too, over a second.

torch.optim imports the compiler when it is first used, only to keep itself out of what is compiled; here only the loss
ever is.
"""

import inspect

import torch

DISABLED = "__dynamo_disable"  # attribute of a function: what to call in its place, so that it is not compiled


class SGD(torch.optim.SGD):
    """The same steps and the same state."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))  # without what imports the compiler around it


def leave_compiler_unimported() -> None:
    """Put in place what optimizers would find after the import; where torch has changed, nothing happens."""
    for method in vars(torch.optim.Optimizer).values():
        wrapped = getattr(method, "__wrapped__", None)
        if wrapped is not None and not hasattr(wrapped, DISABLED):
            setattr(wrapped, DISABLED, wrapped)


leave_compiler_unimported()
