"""Pre-train an encoder in a folder, in one go or in stretches; a run that was broken off goes on exactly."""

from __future__ import annotations

__all__ = ["Options", "Outcome", "Start", "pretrain"]

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import torch

from fedbio.encoder.inference import choose_device
from fedbio.encoder.pretraining.allocation import keep_freed_memory
from fedbio.encoder.pretraining.batches import Packs
from fedbio.encoder.pretraining.beginning import first_weights
from fedbio.encoder.pretraining.checkpoints import Progress as RunProgress
from fedbio.encoder.pretraining.checkpoints import State, read_last, write_state
from fedbio.encoder.pretraining.corpus import FACTS_FILE, Corpus, Inputs, corpus_of
from fedbio.encoder.pretraining.feed import Portion, portions
from fedbio.encoder.pretraining.learner import Learner, Update
from fedbio.encoder.pretraining.masking import Masker
from fedbio.encoder.pretraining.metrics import Metrics
from fedbio.encoder.pretraining.perplexity import HeldOut, Measured
from fedbio.encoder.pretraining.processes import Processes, joined_processes
from fedbio.encoder.pretraining.recipe import Recipe, changed_keys, settled_steps
from fedbio.encoder.pretraining.writing import write_encoder
from fedbio.errors import SettingsError
from fedbio.files import exclusive_lock
from fedbio.progress import Progress
from fedbio.weights import EncoderConfig, Weights, weights_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run starts from.

    Parameters
    ----------
    config : EncoderConfig
    weights : dict of str to ndarray, optional
        Of an existing encoder, with or without head; from a seed if not given.
    name : str, optional
        What was named as that encoder.
    """

    config: EncoderConfig
    weights: Weights | None = None
    name: str | None = None


@dataclass(frozen=True)
class Options:
    """How a run is carried out; none of it changes what is learnt.

    Parameters
    ----------
    minutes : float, optional
        Stop after so long, with a checkpoint.
    device : str
    threads : int, optional
        CPU threads of this process; by default its part of those that are allowed.
    save_minutes : float
        Time between checkpoints.
    valid_every : int
        Updates between validations.
    valid_residues : int
        Held-out residues for these; at the end all are used.
    log_every : int
        Updates between two lines of ``metrics.jsonl``.
    tensorboard : bool
    """

    minutes: float | None = None
    device: str = "auto"
    threads: int | None = None
    save_minutes: float = 10.0
    valid_every: int = 500
    valid_residues: int = 200_000
    log_every: int = 10
    tensorboard: bool = True


@dataclass(frozen=True)
class Outcome:
    """What a call of `pretrain` came to."""

    output: Path
    finished: bool
    step: int
    steps: int
    tokens: int
    tokens_per_second: float
    perplexity: float | None
    perplexity_step: int | None
    """After how many updates it was measured; those after it are not in it."""
    weights_sha256: str
    first: bool = True
    """Whether this process is the one that speaks for all."""


def pretrain(
    output: Path, inputs: Inputs, start: Start, recipe_for: Callable[[Corpus], Recipe], options: Options
) -> Outcome:
    """Train until the schedule or the time is over; a run that was broken off goes on from its last checkpoint.

    Parameters
    ----------
    output : Path
        Becomes an encoder folder; ``corpus/`` and ``checkpoints/`` in it are what the run goes on from.
    inputs : Inputs
        What to learn from.
    start : Start
    recipe_for : callable
        Makes the recipe, whose length may depend on the corpus.
    options : Options

    Raises
    ------
    SettingsError
        If the folder holds a run with other settings, in which case the message names each, or no run but other files.
    KeyboardInterrupt
        After Ctrl-C, once the checkpoint is written.
    """
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(joined_processes(options.device))
        device = choose_device(options.device)
        if processes.world > 1 and device.type == "cuda":
            device = torch.device("cuda", processes.local)
        torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) // processes.local_world))
        keep_freed_memory()
        if processes.rank == 0:
            _refuse_foreign(output)
            output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive_lock(output / ".lock", f"output folder {output}"))
            corpus = corpus_of(output / "corpus", inputs)
        processes.wait()
        if processes.rank != 0:
            corpus = corpus_of(output / "corpus", inputs, build=False)
        recipe = recipe_for(corpus)
        if recipe.packs < processes.world:
            raise SettingsError(
                f"--packs {recipe.packs}: an update has fewer packs than there are processes ({processes.world}), of "
                f"which some would do nothing; give --packs {processes.world} or more, or start fewer processes"
            )
        run = _Run(output, corpus, start, recipe, options, processes, device)
        return run.go(begun)


def _refuse_foreign(output: Path) -> None:
    """Refuse a folder that holds something, and no run to go on with: what lies there is not to be replaced."""
    if output.exists() and not output.is_dir():
        raise SettingsError(f"-o {output}: is a file; name a folder for the encoder")
    if (output / "corpus" / FACTS_FILE).is_file() or any(output.glob("checkpoints/step-*.safetensors")):
        return
    # a run that was killed while it packed its proteins has left hidden names only
    if found := sorted(each.name for each in output.glob("*") if not each.name.startswith(".")):
        raise SettingsError(
            f"-o {output}: the folder holds {found[0]}{' and more' if len(found) > 1 else ''}, and is not one that "
            "fedbio pretrain goes on with (no corpus/, no checkpoints/); name a new or an empty folder"
        )


@dataclass
class _Run:
    output: Path
    corpus: Corpus
    start: Start
    recipe: Recipe
    options: Options
    processes: Processes
    device: torch.device
    progress: RunProgress = field(default_factory=RunProgress)

    def __post_init__(self) -> None:
        config = self.start.config
        self.learner = Learner(
            config, self.start.weights or first_weights(config, self.recipe.seed), self.recipe, device=self.device
        )
        self.bound = self._bound()
        (self.output / "checkpoints").mkdir(exist_ok=True)
        state = read_last(self.output / "checkpoints")
        if state is not None:
            self._restore(state)
        self.progress.stretches.append(
            {
                "step": self.progress.step,
                "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
                "threads": torch.get_num_threads(),
                "processes": self.processes.world,
            }
        )
        masker = Masker(
            config.alphabet,
            share=self.recipe.mask_share,
            mask_token_share=self.recipe.mask_token_share,
            random_share=self.recipe.random_share,
        )
        self.packs = Packs(
            self.corpus.train,
            alphabet=config.alphabet,
            masker=masker,
            max_residues=config.max_residues,
            budget=self.recipe.pack_tokens,
            seed=self.recipe.seed,
        )
        self.held_out = HeldOut(self.corpus.valid, alphabet=config.alphabet, max_residues=config.max_residues)
        self.share = (self.processes.rank, self.processes.world)
        self.first = self.processes.rank == 0

    def _bound(self) -> dict[str, Any]:
        """All that a run must go on with unchanged, by key."""
        weights = self.start.weights
        architecture = msgspec.structs.asdict(self.start.config)
        for noise in ("format", "version", "trained"):
            del architecture[noise]
        return {
            **architecture,
            **msgspec.structs.asdict(self.recipe),
            "from": None if weights is None else weights_digest(weights),
        }

    def _restore(self, state: State) -> None:
        before = {"decay_share": 1.0, "optimizer": "adamw", **state.recipe}  # an older release knew no other
        if self._only_length_differs(before, state.progress.step):
            before["steps"] = self.recipe.steps
        if changes := changed_keys(before, self.bound):
            raise SettingsError(
                f"{self.output}: this run began with other settings: {'; '.join(changes)}; "
                "go on with the same, or choose another output folder"
            )
        self.learner.restore(state.vectors, state.numbers)
        self.progress = state.progress
        threads = torch.get_num_threads()
        if state.progress.stretches and state.progress.stretches[-1]["threads"] != threads:
            log.warning("another number of threads than before: the last bits of the result will differ")
        log.info("going on step=%d of %d tokens=%d", self.progress.step, self.recipe.steps, self.progress.tokens)

    def _only_length_differs(self, before: dict[str, Any], step: int) -> bool:
        """Whether each update until now would have been the same with today's length of the schedule."""
        recipe = msgspec.structs.replace(self.recipe, steps=before.get("steps", 0))
        return step <= min(settled_steps(recipe), settled_steps(self.recipe))

    def go(self, begun: float) -> Outcome:
        """Train, save, measure and write."""
        seconds_before, tokens_before = self.progress.seconds, self.progress.tokens
        with _stop_signals() as stopping:
            if self.progress.step < self.recipe.steps:
                self._train(begun, stopping)
            finished = self.progress.step >= self.recipe.steps
            if finished and not (self.progress.curve and self.progress.curve[-1].get("final")):
                self._validate(final=True)
                self._save()
        digest = self._write(finished=finished) if self.first else ""
        if stopping.asked:
            raise KeyboardInterrupt
        seconds = self.progress.seconds - seconds_before
        return Outcome(
            self.output,
            finished,
            self.progress.step,
            self.recipe.steps,
            self.progress.tokens,
            (self.progress.tokens - tokens_before) / seconds if seconds else 0.0,
            self.progress.curve[-1]["perplexity"] if self.progress.curve else None,
            self.progress.curve[-1]["step"] if self.progress.curve else None,
            digest,
            self.first,
        )

    def _train(self, begun: float, stopping: _Stopping) -> None:
        options, progress = self.options, self.progress
        left = self.recipe.steps - progress.step
        with contextlib.ExitStack() as stack:
            if self.first:
                known = progress.step if progress.step or progress.curve else -1
                metrics = Metrics(self.output, step=known, tensorboard=options.tensorboard)
                stack.callback(metrics.close)
                bar = stack.enter_context(Progress(f"{self.start.config.name}: updates", total=left, unit="updates"))
            coming = stack.enter_context(
                portions(
                    self.packs,
                    progress.place,
                    packs_per_update=self.recipe.packs,
                    share=self.share,
                    pinned=self.device.type == "cuda",
                )
            )
            if progress.step == 0 and not progress.curve:
                measured = self._validate()
                if self.first and measured:
                    metrics.add(0, _values(measured))
            saved = ticked = time.monotonic()
            line = _Line(progress.tokens)
            while progress.step < self.recipe.steps:
                update = self._update(next(coming))
                progress.seconds += time.monotonic() - ticked
                line.add(update)
                if self.first:
                    bar.advance(1)
                    if progress.step % options.log_every == 0:
                        metrics.add(progress.step, line.values(update, progress.tokens))
                if progress.step % options.valid_every == 0 and progress.step < self.recipe.steps:
                    measured = self._validate()
                    if self.first and measured:
                        metrics.add(progress.step, _values(measured))
                ticked = time.monotonic()
                late = options.minutes is not None and ticked - begun >= 60 * options.minutes
                if self.processes.any(stopping.asked or late, self.device):
                    break
                if ticked - saved >= 60 * options.save_minutes:
                    self._save()
                    saved = ticked = time.monotonic()
        self._save()

    def _update(self, portion: Portion) -> Update:
        for batch in portion.batches:
            self.learner.add(batch)
        update = self.learner.update(self.processes.sum if self.processes.world > 1 else None)
        progress = self.progress
        progress.step, progress.place = self.learner.step, portion.after
        progress.tokens += portion.tokens
        progress.masked += update.masked
        return update

    def _validate(self, *, final: bool = False) -> Measured | None:
        """Measure with what would be written as the encoder, and add to the curve."""
        if not len(self.held_out):
            return None
        with self.learner.averaged():
            measured = self.held_out.measure(
                self.learner,
                most_residues=None if final else self.options.valid_residues,
                share=self.share,
                join=self.processes.sum if self.processes.world > 1 else None,
            )
        point = {"step": self.progress.step, "tokens": self.progress.tokens, **_values(measured), "final": final}
        self.progress.curve.append({**point, "masked": measured.masked, "residues": measured.residues})
        if self.first:
            log.info(
                "validation step=%d tokens=%d perplexity=%.3f residues=%d",
                self.progress.step,
                self.progress.tokens,
                measured.perplexity,
                measured.residues,
            )
        return measured

    def _save(self) -> None:
        if self.first:
            write_state(self.output / "checkpoints", State(*self.learner.state(), self.progress, self.bound))

    def _write(self, *, finished: bool) -> str:
        return write_encoder(
            self.output,
            self.start,
            self.recipe,
            self.learner.weights(),
            self.corpus.facts,
            self.progress,
            finished=finished,
            parameters=self.learner.parameters,
        )


def _values(measured: Measured) -> dict[str, float]:
    return {"valid_loss": measured.loss, "perplexity": measured.perplexity}


class _Line:
    """Sum up updates until the next line of metrics."""

    def __init__(self, tokens: int) -> None:
        self._tokens, self._begun = tokens, time.monotonic()
        self._loss = 0.0
        self._masked = 0

    def add(self, update: Update) -> None:
        self._loss += update.loss * update.masked
        self._masked += update.masked

    def values(self, update: Update, tokens: int) -> dict[str, float]:
        now = time.monotonic()
        values = {
            "loss": self._loss / max(self._masked, 1),
            "learning_rate": update.learning_rate,
            "gradient_norm": update.gradient_norm,
            "tokens": tokens,
            "tokens_per_second": (tokens - self._tokens) / (now - self._begun),
        }
        self._tokens, self._begun, self._loss, self._masked = tokens, now, 0.0, 0
        return values


@dataclass
class _Stopping:
    asked: bool = False


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stopping]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after this update; the second one stops at once."""
    stopping = _Stopping()

    def ask(number: int, frame: FrameType | None) -> None:
        if stopping.asked:
            raise KeyboardInterrupt
        stopping.asked = True
        log.info("stopping after this update; once more stops at once, without a checkpoint")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
