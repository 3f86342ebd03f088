"""The batches that activations are measured on before they get fixed int8 scales."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from td_plugin.errors import TdError
from td_plugin.export.runners import Inputs
from td_plugin.export.session import fit_inputs

_KEPT = 4  # batches to compare the result on


class Calibration:
    """The user's batches, checked one by one as they are read, and the first of them for later.

    Args:
        batches: dicts of tensors or arrays as the model is called; what the graph does not take is left out.
        where: what errors call the file they are for.
    """

    def __init__(self, batches: Iterable[Inputs], where: str) -> None:
        self._batches, self._where = iter(batches), where
        self.seen: list[dict[str, Tensor]] = []
        self.count = 0

    def feeds(self, wanted: list[Any]) -> Iterator[dict[str, Any]]:
        """The batches as numpy arrays.

        Args:
            wanted: the inputs of the graph, as a session or `stated_inputs` gives them.

        Raises:
            TdError: there are none, one does not fit, or one is not finite.
        """
        first = next(self._batches, None)
        if first is None:
            raise TdError(
                "there are no batches to calibrate on",
                where=self._where,
                got="an empty iterable",
                fix="give some hundred rows of the training data; a generator can be read once only",
            )
        for batch in itertools.chain([first], self._batches):
            fitted = fit_inputs(wanted, batch, f"{self._where}, calibration batch {self.count}")
            for name, tensor in fitted.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise TdError(
                        "the calibration data are not finite",
                        where=f"batch {self.count}, input {name!r}",
                        got="NaN" if tensor.isnan().any() else "infinity",
                        fix="every scale would become NaN: leave these rows out",
                    )
            self.count += 1
            if len(self.seen) < _KEPT:
                self.seen.append(fitted)
            yield {name: tensor.numpy() for name, tensor in fitted.items()}
