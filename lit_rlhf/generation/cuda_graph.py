"""Replaying a decode step from a CUDA graph: one launch by the host in place of some hundred."""

from collections.abc import Callable

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel


def can_capture_steps(model: PreTrainedModel) -> bool:
    """Whether a pass of the model is launches alone: it is on a CUDA device, and nothing else runs at its layers.

    Hooks are not replayed: those of a sharded model gather weights, those of accelerate move them.
    """
    if model.device.type != "cuda":
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in model.modules())


class CapturedStep:
    """A step that is run the first time, captured the second time, and replayed from then on.

    Where it cannot be captured, one line says why, and it is run every time.

    Args:
        step: takes the number of the step, on which its launches may not depend. It reads and writes tensors that stay
            where they are, and nowhere waits for the device.
    """

    def __init__(self, step: Callable[[int], None]) -> None:
        self.step, self.has_run, self.refused = step, False, False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, index: int) -> None:
        """Run the step."""
        if self.graph is None and self.has_run and not self.refused:
            self.graph = self._capture(index)
        if self.graph is not None:
            self.graph.replay()
            return
        self.step(index)  # libraries allocate and compile at their first call, which must not be captured
        self.has_run = True

    def _capture(self, index: int) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step(index)  # is recorded, not run
        except RuntimeError as error:
            self.refused = True
            rank_zero_warn(f"generator: decoding without CUDA graphs: {str(error).splitlines()[0]}")
            return None
        return graph
