"""Tasks of split learning: agree on the rows, train this site's part for an epoch, and keep it."""

from __future__ import annotations

__all__ = ["AlignRows", "FinishPart", "Meet", "SplitParts", "TrainPart"]

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedbio.client.split import Rows, train_bottom, train_top
from fedbio.errors import FederationError, ProtocolError, RefusedError
from fedbio.executors.script import Scripts
from fedbio.executors.split_part import Part
from fedbio.executors.split_script import SplitScript
from fedbio.federation.executor import Executor, SiteContext
from fedbio.federation.model import FLModel, Parameters, Task
from fedbio.federation.split_site import Channel
from fedbio.federation.workflows.split_words import ALIGN, FINISH, LOSS, MEET, TRAIN, Aligned, Met, SplitOrder
from fedbio.federation.workflows.study import meta, read_meta

if TYPE_CHECKING:
    from fedbio.federation.split_rows import Meeting

KEY, DIGESTS = "key", "digests"
"""Names of tensors while rows are agreed on."""


@dataclass(slots=True)
class _Member:
    """A site in one run of a job."""

    order: SplitOrder
    script: SplitScript
    rows: Rows
    meeting: Meeting | None = None
    common: NDArray[np.int64] | None = None
    part: Part | None = None


class SplitParts:
    """The parts of split networks that are at this site; shared by the executors of their tasks.

    Parameters
    ----------
    scripts : Scripts
        Of the site's jobs.
    """

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts
        self._members: dict[str, _Member] = {}
        self._channels: dict[str, Channel] = {}

    def meet(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Read the rows and return a signed introduction, for the other site."""
        from fedbio.federation.split_rows import Meeting

        order = _order(model, context)
        if context.identity is None:
            raise RefusedError(f"{context.site} has no certificate, with which sites prove to each other who they are")
        member = self._members.get(task.job)
        if member is None or member.order.run != order.run:
            script = SplitScript(task.job, self._scripts.of(task.job, context).spec, context)
            member = self._members[task.job] = _Member(order, script, script.rows(order.role(context.site)))
        member.meeting = Meeting(
            context.identity, site=context.site, job=task.job, session=order.session, examples=len(member.rows.ids)
        )
        return FLModel(meta=meta(Met(member.meeting.introduction)))

    def align(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Find the rows that both sites have, and return how many they are."""
        from fedbio.federation.split_rows import common_rows, digests

        order, member = _order(model, context), self._member(task.job, model, context)
        peer = order.other(context.site)
        introduction = order.introductions.get(peer, b"")
        if member.meeting is None:
            raise FederationError(f"{context.site} has not introduced itself to {peer} before its rows are asked for")
        with self._open(task.job, order, context) as channel:
            if order.role(context.site) == "bottom":
                key, sealed = member.meeting.draw(peer, introduction)
                own = digests(member.rows.ids, key)
                channel.send(0, {KEY: sealed, DIGESTS: _sorted(own)})
                found = _only(channel.receive(1), {DIGESTS}, peer)
            else:
                found = _only(channel.receive(0), {KEY, DIGESTS}, peer)
                own = digests(member.rows.ids, member.meeting.open(peer, introduction, found[KEY]))
                channel.send(1, {DIGESTS: _sorted(own)})
        others = found[DIGESTS]
        member.meeting = None
        member.common = common_rows(member.rows.ids, own, others)
        context.events.write(
            "rows agreed", job=task.job, other=peer, own=len(own), others=len(others), common=len(member.common)
        )
        return FLModel(meta=meta(Aligned(len(member.common))))

    def train(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Train this site's part for an epoch, write its checkpoint, and return the loss if this site has it."""
        import torch

        from fedbio.encoder.inference import choose_device
        from fedbio.federation.split_rows import batches

        order, member = _order(model, context), self._member(task.job, model, context)
        if member.common is None or len(member.common) != order.rows:
            raise FederationError(
                f"{context.site} has not agreed with {order.other(context.site)} on {order.rows} rows"
            )
        epoch = model.current_round
        part = self._part(task.job, order, member, epoch, context)
        # it counts again when the epoch is whole: broken off in the middle it is of no use
        member.part = None
        plan = batches(order.rows, order.batch_size, seed=order.seed, epoch=epoch)
        total = 0.0
        device = choose_device(context.device)
        part.module.train()
        with (
            self._open(task.job, order, context) as channel,
            # what a part draws in an epoch is the same after a break
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(_seed(order, epoch))
            for step, batch in enumerate(plan):
                rows = member.rows.values[torch.from_numpy(member.common[batch])].to(device)
                if order.role(context.site) == "bottom":
                    train_bottom(part.module, part.optimizer, rows, channel, step)
                else:
                    loss = train_top(part.module, part.optimizer, member.script.loss, rows, channel, step)
                    total += loss * len(batch)
        part.epoch = epoch + 1
        part.save()
        member.part = part
        if order.role(context.site) == "bottom":
            return FLModel(current_round=epoch)
        mean = total / order.rows
        context.track(LOSS, mean, epoch, job=task.job)
        return FLModel(metrics={LOSS: mean}, current_round=epoch)

    def finish(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Keep the trained part as a file of this site; nothing leaves."""
        order, member = _order(model, context), self._member(task.job, model, context)
        part = self._part(task.job, order, member, model.current_round, context)
        path = context.workspace / "split" / task.job / f"{order.role(context.site)}.safetensors"
        part.finish(path)
        context.events.write("part kept", job=task.job, path=str(path))
        self._forget(task.job)
        return FLModel()

    def abandon(self, job: str) -> None:
        """Have who waits for the other site stop waiting."""
        if (channel := self._channels.get(job)) is not None:
            channel.end(f"job {job} is over")
        self._forget(job)

    @property
    def at_rest(self) -> bool:
        """Whether nothing is here that is not in files."""
        return not self._members

    def _forget(self, job: str) -> None:
        """Give back the memory of a job; a task that is still done has its own hold on it."""
        self._members.pop(job, None)
        self._channels.pop(job, None)

    def _member(self, job: str, model: FLModel, context: SiteContext) -> _Member:
        member, order = self._members.get(job), _order(model, context)
        if member is None or member.order.run != order.run:
            raise FederationError(f"{context.site} was started anew and has no rows for job {job} yet")
        return member

    def _part(self, job: str, order: SplitOrder, member: _Member, epoch: int, context: SiteContext) -> Part:
        """Return this site's part as it is after so many epochs."""
        import torch

        if member.part is not None and member.part.epoch == epoch:
            return member.part
        from fedbio.encoder.inference import choose_device

        role = order.role(context.site)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(order.seed)
            module, optimizer = member.script.part(role, choose_device(context.device))
        folder = context.workspace / "split" / job / role
        part = member.part = Part(folder, order.run, module, optimizer)
        if epoch:
            part.load(epoch)
        else:
            part.forget()
        return part

    def _open(self, job: str, order: SplitOrder, context: SiteContext) -> Channel:
        if context.split is None:
            raise FederationError(f"{context.site} has no connection on which parts of a network are trained")
        channel = self._channels[job] = context.split.channel(order.session)
        return channel


def _order(model: FLModel, context: SiteContext) -> SplitOrder:
    order = read_meta(model.meta, SplitOrder)
    if context.site not in (order.bottom, order.top) or order.bottom == order.top or order.batch_size < 1:
        raise ProtocolError(
            f"{context.site} has no part in a network that is cut between {order.bottom} and {order.top}"
        )
    return order


def _only(items: Parameters, names: set[str], peer: str) -> Parameters:
    """Return a message that has what it should."""
    if items.keys() != names:
        raise ProtocolError(f"{peer} has sent {sorted(items)}, expected {sorted(names)}, to agree on rows")
    return items


def _seed(order: SplitOrder, epoch: int) -> int:
    return int(np.random.default_rng([order.seed, epoch, 1]).integers(2**62))


def _sorted(digests: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return digests in an order that says nothing of the rows'."""
    return digests[np.lexsort(digests.T[::-1])]


class _SplitTask(Executor):
    """A task of split learning; the parts are shared."""

    kind: ClassVar[str] = "split"
    leaves: ClassVar[str] = "metrics"
    stage: ClassVar[str] = "split"

    def __init__(self, parts: SplitParts) -> None:
        self.parts = parts

    def abandon(self, job: str) -> None:
        self.parts.abandon(job)

    @property
    def at_rest(self) -> bool:
        return self.parts.at_rest


class Meet(_SplitTask):
    """Introduces this site to the other one."""

    name: ClassVar[str] = MEET
    leaves: ClassVar[str] = "control"

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return a signed introduction."""
        return self.parts.meet(task, model, context)


class AlignRows(_SplitTask):
    """Agrees with the other site on the rows that both have."""

    name: ClassVar[str] = ALIGN
    leaves: ClassVar[str] = "counts"

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return how many rows both have."""
        return self.parts.align(task, model, context)


class TrainPart(_SplitTask):
    """Trains this site's part for an epoch."""

    name: ClassVar[str] = TRAIN

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return the loss, at the site with the labels."""
        return self.parts.train(task, model, context)


class FinishPart(_SplitTask):
    """Keeps this site's part."""

    name: ClassVar[str] = FINISH
    leaves: ClassVar[str] = "control"

    def execute(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Return nothing: the part stays here."""
        return self.parts.finish(task, model, context)
