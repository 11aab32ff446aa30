"""One update of an encoder by masked-language modelling: batches in, better weights out.

It knows no files, no processes and no clock, so that whoever calls it decides where batches come from and where
weights go.
"""

from __future__ import annotations

__all__ = ["Learner", "Update"]

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedbio.encoder.alphabet import ALPHABETS
from fedbio.encoder.network import Encoder
from fedbio.encoder.pretraining.batches import Batch
from fedbio.encoder.pretraining.beginning import first_head
from fedbio.encoder.pretraining.forward import hidden_states, masked_logits
from fedbio.encoder.pretraining.optimizers import Optimizers
from fedbio.encoder.pretraining.recipe import Recipe, learning_rate
from fedbio.errors import FormatError, MachineError
from fedbio.weights import EncoderConfig, Weights


@dataclass(frozen=True)
class Update:
    """What an update was: the mean loss of its masked residues, their number, the gradient's length, and the rate."""

    loss: float
    masked: int
    gradient_norm: float
    learning_rate: float


class Learner:
    """An encoder in training.

    Master weights, gradient and the optimizer's moments are one float32 vector each, so an update is a few operations
    whatever the number of layers; the linear maps' weights that the network multiplies with are a copy in `dtype`.

    Parameters
    ----------
    config : EncoderConfig
    weights : dict of str to ndarray
        As `fedbio.encoder.pretraining.beginning.first_weights` or an encoder folder gives them; a head that is
        missing is made from the recipe's seed.
    recipe : Recipe
    device : torch.device
    """

    def __init__(self, config: EncoderConfig, weights: Weights, recipe: Recipe, *, device: torch.device) -> None:
        self.config, self.recipe, self.device = config, recipe, device
        self.step = 0
        self._mask = ALPHABETS[config.alphabet].pieces.index("<mask>")
        if "lm_head.dense.weight" not in weights:
            weights = weights | first_head(config, recipe.seed)
        with torch.device("meta"):
            self.network = Encoder(config, head=True)
        self._names, copied, decaying = _in_order(self.network)
        shapes = {name: parameter.shape for name, parameter in self.network.named_parameters()}
        self._sizes = [shapes[name].numel() for name in self._names]
        self._shapes = [shapes[name] for name in self._names]
        self._values = torch.cat([torch.from_numpy(weights[name]).reshape(-1) for name in self._names]).to(device)
        self._gradient = torch.zeros_like(self._values)
        self._average = self._values.clone() if recipe.average != "none" else None
        self._averaged = 0
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
        self._place_parameters(sum(self._sizes[:copied]))
        matrices = _matrices(self._names[:decaying], self._shapes)
        self._optimizers = Optimizers(recipe, self._values, self._gradient, matrices)

    def _place_parameters(self, copied: int) -> None:
        """Make the network's parameters views of the master vector, or of its copy in the dtype of the arithmetic."""
        self._copied = self._values[:copied]
        self._copies = self._copied.to(self._dtype) if self._dtype != torch.float32 else self._copied
        views = [*self._cut(self._values)]
        done = 0
        for place, size in enumerate(self._sizes):
            if done + size <= copied:
                views[place] = self._copies[done : done + size].view(self._shapes[place])
            done += size
        self.network.load_state_dict(dict(zip(self._names, views, strict=True)), assign=True)
        parameters = dict(self.network.named_parameters())
        for name, gradient in zip(self._names, self._cut(self._gradient), strict=True):
            parameters[name].register_post_accumulate_grad_hook(_adder(gradient))  # type: ignore[no-untyped-call]

    def add(self, batch: Batch) -> None:
        """Add the gradient of a batch's loss, summed over its masked residues, to what will be the next update."""
        loss, masked = self._loss(batch)
        if masked:
            loss.backward()  # type: ignore[no-untyped-call]
        self._sums += torch.stack((loss.detach().double(), loss.new_tensor(masked, dtype=torch.float64)))

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Return a batch's loss, summed over its masked residues, and their number; nothing is learnt."""
        with torch.no_grad():
            loss, masked = self._loss(batch)
        return float(loss), masked

    def _loss(self, batch: Batch) -> tuple[Tensor, int]:
        tokens, places, targets = (
            each.to(self.device, non_blocking=True) for each in (batch.tokens, batch.places, batch.targets)
        )
        hidden = hidden_states(self.network, tokens, batch.runs, mask=self._mask)
        logits = masked_logits(self.network, hidden, places)
        return F.cross_entropy(logits, targets, reduction="sum"), len(batch.targets)

    def update(self, join: Callable[[Tensor], None] | None = None) -> Update:
        """Change the weights by all batches that were added since the last time.

        Parameters
        ----------
        join : callable, optional
            Makes a vector the sum of all processes' vectors, in place.

        Raises
        ------
        MachineError
            If the gradient is not finite; the weights are left as they were.
        """
        if join is not None:
            join(self._sums)
            join(self._gradient)
        loss, masked = self._sums.tolist()
        norm = float(torch.linalg.vector_norm(self._gradient)) / max(masked, 1.0)
        if not math.isfinite(norm) or not math.isfinite(loss):
            raise MachineError(
                f"step {self.step}: the loss or its gradient is no longer finite; "
                "begin again in another folder with a lower --learning-rate or a longer --warmup-steps"
            )
        self._gradient.mul_(min(1.0, self.recipe.clip / max(norm, 1e-12)) / max(masked, 1.0))
        rate = learning_rate(self.recipe, self.step)
        self._optimizers.step(rate)
        self.step += 1
        self._refresh()
        self._gradient.zero_()
        self._sums.zero_()
        self._add_to_average()
        return Update(loss / max(masked, 1.0), int(masked), norm, rate)

    def _add_to_average(self) -> None:
        recipe = self.recipe
        if self._average is None:
            return
        if recipe.average == "ema":
            # a young average forgets faster, or it would keep the random beginning for a thousand updates
            decay = min(recipe.average_decay, (1 + self.step) / (10 + self.step))
            self._averaged += 1
            self._average.lerp_(self._values, 1 - decay)
        elif self.step > recipe.steps * (1 - recipe.average_share):
            self._averaged += 1
            self._average.lerp_(self._values, 1 / self._averaged)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average in the weights' place while the block runs, if there is one."""
        if self._average is None or not self._averaged:
            yield
            return
        kept = self._values.clone()
        try:
            self._values.copy_(self._average)
            self._refresh()
            yield
        finally:
            self._values.copy_(kept)
            self._refresh()

    def weights(self) -> Weights:
        """Copy the weights out: the average, or those of the last update where there is none yet."""
        source = self._average if self._average is not None and self._averaged else self._values
        return {name: view.cpu().numpy().copy() for name, view in zip(self._names, self._cut(source), strict=True)}

    @property
    def parameters(self) -> int:
        """How many numbers are learnt."""
        return len(self._values)

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return all that the next update depends on, besides batches: vectors (not copied), and numbers as text."""
        vectors = {"values": self._values, **self._optimizers.vectors}
        if self._average is not None:
            vectors["average"] = self._average
        return vectors, {"layout": self._layout(), "step": str(self.step), "averaged": str(self._averaged)}

    def restore(self, vectors: Mapping[str, Tensor], numbers: Mapping[str, str]) -> None:
        """Go back to a state.

        Raises
        ------
        FormatError
            If it is that of another network or recipe.
        """
        mine, _ = self.state()
        if numbers.get("layout") != self._layout() or vectors.keys() != mine.keys():
            raise FormatError("the checkpoint is that of another network; choose another output folder")
        for name, vector in mine.items():
            if vectors[name].shape != vector.shape or vectors[name].dtype != torch.float32:
                raise FormatError(f"the checkpoint's vector {name!r} has another shape; choose another output folder")
            vector.copy_(vectors[name])
        self.step, self._averaged = int(numbers["step"]), int(numbers["averaged"])
        self._optimizers.go_on_after(self.step)
        self._refresh()

    def _refresh(self) -> None:
        if self._copies is not self._copied:
            self._copies.copy_(self._copied)

    def _cut(self, vector: Tensor) -> list[Tensor]:
        """Views of a vector, one for each parameter."""
        parts = torch.split(vector, self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _layout(self) -> str:
        text = ";".join(f"{name}:{tuple(shape)}" for name, shape in zip(self._names, self._shapes, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()


def _in_order(network: Encoder) -> tuple[list[str], int, int]:
    """Put linear maps' matrices first, then their biases, then the rest; count the linear and the decaying ones."""
    linear = {
        f"{name}.{part}": part
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        for part in ("weight", "bias")
    }
    matrices = [name for name, part in linear.items() if part == "weight"]
    biases = [name for name, part in linear.items() if part == "bias"]
    rest = [name for name, _ in network.named_parameters() if name not in linear]
    return [*matrices, *biases, *rest], len(linear), len(matrices)


def _matrices(names: list[str], shapes: list[torch.Size]) -> list[tuple[int, int]]:
    """Shapes of the matrices; queries, keys and values are three, though they lie in one."""
    found: list[tuple[int, int]] = []
    for name, (rows, columns) in zip(names, shapes, strict=False):
        found += [(rows // 3, columns)] * 3 if name.endswith(".qkv.weight") else [(rows, columns)]
    return found


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    """Sum up a parameter's gradients in float32, whatever their own dtype."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    return add
