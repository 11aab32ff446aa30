"""A site's part of swarm learning: train, seal for the site that aggregates, or aggregate what others have sealed.

Nothing that leaves here can be read by the server, but for the one metric by which the job selects its model. The
script that trains is the executor of ``client/train`` at this site, called here and not by the server.
"""

from __future__ import annotations

__all__ = ["SwarmSite"]

import logging
import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from fedbio.errors import FederationError, ProtocolError, RefusedError
from fedbio.federation.executor import Executor, SiteContext
from fedbio.federation.introductions import Statement, fingerprint
from fedbio.federation.model import FLModel, Parameters, ParamsType, Task
from fedbio.federation.swarm_folder import ModelName, SwarmFolder, Update, model_name
from fedbio.federation.swarm_mail import Mail, SealedModel
from fedbio.federation.workflows import script
from fedbio.federation.workflows.study import meta, read_meta
from fedbio.federation.workflows.swarm_words import KEY, MODEL, UPDATE, Aggregated, Answered, Errand, Met
from fedbio.tensors import check_matches, manifest, weighted_mean

log = logging.getLogger(__name__)

MIN_UPDATES = 2
"""A mean of fewer is one site's update, which the others would see."""

NOTHING = np.empty(0, np.uint8)
"""In the place of sealed bytes where there are none to send."""


class SwarmSite:
    """Does the tasks of swarm learning, and remembers the keys of one exchange for each job.

    Parameters
    ----------
    local : mapping of str to Executor
        Executors of this site by task, among which are, once a task comes, those of training scripts.
    """

    def __init__(self, local: Mapping[str, Executor]) -> None:
        self._local = local
        self._mails: dict[str, Mail] = {}

    @property
    def at_rest(self) -> bool:
        """Whether there are no keys here that another process would lack."""
        return not self._mails

    def forget(self, job: str) -> None:
        """Forget the keys of a job's last exchange: what was sealed with them is shut for good."""
        self._mails.pop(job, None)

    def meet(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Make fresh keys; those of the job's last exchange are forgotten, and what was sealed with them is shut."""
        errand = read_meta(model.meta, Errand)
        folder = SwarmFolder(context.workspace, task.job, errand.run)
        if context.identity is None:
            raise RefusedError(f"{context.site} has no certificate, with which sites prove to each other who they are")
        mail = self._mails[task.job] = Mail(
            identity=context.identity,
            site=context.site,
            job=task.job,
            run=errand.run,
            exchange=errand.exchange,
            examples=_examples(errand, context),
        )
        return FLModel(meta=meta(Met(mail.introduction, folder.held())))

    def begin(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Have the script make the model of round 0."""
        errand, folder, _ = self._open(task, model, context)
        made = self._call(script.INIT, task, FLModel(), context)
        if not made.params:
            raise FederationError(f"the script of {context.site} made an initial model without parameters")
        check_matches(made.params, manifest(made.params), source="the initial model")
        folder.put(_name(errand), made.params)
        return FLModel()

    def share(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Seal a model that is here for sites that lack it."""
        errand, folder, mail = self._open(task, model, context)
        refused: dict[str, str] = {}
        receivers = self._peers(mail, errand, refused).values()
        made = _sealed(mail.seal_model(folder.model(_name(errand)), errand.round, receivers))
        return msgspec.structs.replace(made, meta=meta(Aggregated((), refused)))

    def train(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Train the model that is here; seal the update for the site that aggregates, if that is another."""
        try:
            errand, folder, mail = self._open(task, model, context)
            base = folder.model(_name(errand))
            receiver = None if errand.site == context.site else mail.read(errand.site, errand.introductions)
        except (ProtocolError, RefusedError) as error:
            # no fault of the job's: another exchange, perhaps with another aggregator, may go well
            context.events.write("exchange refused", job=task.job, reason=str(error))
            log.warning("exchange refused job=%s reason=%s", task.job, error)
            return FLModel(params={UPDATE: NOTHING}, meta=meta(Answered(str(error))))
        update = folder.update(_name(errand))
        if update is None:
            update = self._trained(task, base, errand, model, context)
            folder.put_update(_name(errand), update)
        sealed = NOTHING
        if receiver is not None:
            sealed = mail.seal_update(update.params, update.weight, errand.round, receiver)
            # sites can compare by telephone whom they seal for
            seen = fingerprint(errand.introductions[receiver.site])
            context.events.write(
                "update sealed", job=task.job, round=errand.round, receiver=receiver.site, certificate=seen
            )
        metrics = {name: value for name, value in update.metrics.items() if name == errand.metric}
        return FLModel(params={UPDATE: sealed}, metrics=metrics, meta=meta(Answered()))

    def aggregate(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Open what the others have sealed for this site, average it with its own, and seal the mean for them."""
        errand, folder, mail = self._open(task, model, context)
        name = _name(errand)
        base, own = folder.model(name), folder.update(name)
        updates: dict[str, tuple[Parameters, float]] = {}
        refused: dict[str, str] = {}
        peers = self._peers(mail, errand, refused)
        if own is not None:
            try:
                _check(own.params, own.weight, mail.examples, base)
                updates[context.site] = own.params, own.weight
            except ProtocolError as error:
                refused[context.site] = str(error)
        for title, sealed in model.params.items():
            site = title.removeprefix(f"{UPDATE}/")
            if site not in peers:
                refused.setdefault(site, "the server sent no introduction of it")
                continue
            try:
                params, weight = mail.open_update(sealed, errand.round, peers[site])
                _check(params, weight, peers[site].examples, base)
                updates[site] = params, weight
            except ProtocolError as error:
                refused[site] = str(error)
        for site, reason in refused.items():
            context.events.write("update refused", job=task.job, site=site, round=errand.round, reason=reason)
            log.warning("update refused job=%s site=%s reason=%s", task.job, site, reason)
        counted = [(site, params, weight) for site, (params, weight) in updates.items() if weight > 0]
        # who abstains has answered; but a mean of too few would give single updates away
        if len(updates) < errand.least or len(counted) < MIN_UPDATES:
            raise FederationError(
                f"{len(updates)} sites have sound updates at {context.site}, {errand.least} are needed; {len(counted)} "
                f"of them do not abstain, {MIN_UPDATES} are needed; "
                + "; ".join(f"{site}: {reason}" for site, reason in refused.items())
            )
        result = {key: _like(value, base[key]) for key, value in weighted_mean(counted).items()}
        folder.propose(ModelName(errand.round + 1, errand.exchange), result)
        made = _sealed(mail.seal_model(result, errand.round + 1, peers.values()))
        return msgspec.structs.replace(made, meta=meta(Aggregated(tuple(sorted(each[0] for each in counted)), refused)))

    def adopt(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Keep the model that a site has sealed for this one, or that this one has made."""
        errand, folder, mail = self._open(task, model, context)
        name = _name(errand)
        if errand.site == context.site:
            folder.adopt(name)
        elif name not in folder.held():
            maker = mail.read(errand.site, errand.introductions)
            key = model.params.get(KEY + context.site)
            if key is None or MODEL not in model.params:
                raise ProtocolError(f"{errand.site} has sealed nothing for {context.site}")
            params = mail.open_model(model.params[MODEL], key, errand.round, maker)
            before = [held for held in folder.held() if held.round < name.round]
            check_matches(params, manifest(folder.model(before[-1]) if before else params), source=errand.site)
            folder.put(name, params)
        context.events.write("model adopted", job=task.job, round=name.round, exchange=name.tag, made_by=errand.site)
        folder.keep_only({name, *(model_name(*each) for each in errand.keep)})
        return FLModel()

    def evaluate(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Measure a model that is here."""
        errand, folder, _ = self._open(task, model, context)
        asked = FLModel(params=folder.model(_name(errand)), current_round=errand.round, total_rounds=model.total_rounds)
        found = self._call(script.EVALUATE, task, asked, context)
        return FLModel(metrics={name: value for name, value in found.metrics.items() if name == errand.metric})

    def finish(self, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Give the best and the last model their names."""
        errand, folder, _ = self._open(task, model, context)
        card = folder.publish(model_name(*errand.best), _name(errand), job=task.job, metric=errand.metric)
        context.events.write("models kept", **card)
        folder.keep_only({_name(errand), model_name(*errand.best)})
        self.forget(task.job)
        return FLModel()

    def _open(self, task: Task, model: FLModel, context: SiteContext) -> tuple[Errand, SwarmFolder, Mail]:
        """Return what a task says, the job's folder, and the exchange, if it is the one under way here."""
        errand = read_meta(model.meta, Errand)
        mail = self._mails.get(task.job)
        if mail is None or (mail.run, mail.exchange) != (errand.run, errand.exchange):
            raise ProtocolError(
                f"{context.site} has no keys of exchange {errand.exchange}; it takes part in the next one"
            )
        return errand, SwarmFolder(context.workspace, task.job, errand.run), mail

    def _peers(self, mail: Mail, errand: Errand, refused: dict[str, str]) -> dict[str, Statement]:
        """Return what the other sites say of themselves; note those who cannot be who they are said to be."""
        peers = {}
        for site in sorted(errand.introductions):
            try:
                peers[site] = mail.read(site, errand.introductions)
            except RefusedError as error:
                refused[site] = str(error)
        return peers

    def _trained(self, task: Task, base: Parameters, errand: Errand, model: FLModel, context: SiteContext) -> Update:
        """Return what the script makes of a model, whole, after this site's filters."""
        asked = FLModel(params=base, current_round=errand.round, total_rounds=model.total_rounds)
        found = context.outgoing(self._call(script.TRAIN, task, asked, context), task=script.TRAIN)
        weight = found.weight
        if not math.isfinite(weight) or weight < 0:
            raise FederationError(f"the script of {context.site} gave its model the weight {weight}")
        metrics = {name: value for name, value in found.metrics.items() if math.isfinite(value)}
        if weight == 0:
            return Update(0.0, metrics)
        params = found.params
        if found.params_type is ParamsType.DIFF:
            params = {name: base[name] + change for name, change in params.items() if name in base}
        check_matches(params, manifest(base), source="the script's model")
        return Update(weight, metrics, params)

    def _call(self, name: str, task: Task, model: FLModel, context: SiteContext) -> FLModel:
        """Do a script's task here; nothing of it leaves by itself."""
        executor = self._local.get(name)
        if executor is None:
            raise FederationError(f"{context.site} has nothing that does {name}")
        return executor.execute(Task(name=name, model=model, job=task.job), model, context)


def _examples(errand: Errand, context: SiteContext) -> int:
    """Return how many examples this site has registered; the server repeats it, its own settings decide."""
    registered = errand.examples.get(context.site, 0)
    if context.examples is not None and registered != context.examples:
        raise ProtocolError(f"{context.site} registers {context.examples} examples, the server says {registered}")
    return registered


def _name(errand: Errand) -> ModelName:
    return model_name(errand.round, errand.tag)


def _sealed(found: SealedModel) -> FLModel:
    return FLModel(params={MODEL: found.model, **{KEY + site: key for site, key in found.keys.items()}})


def _check(params: Parameters, weight: float, examples: int, base: Parameters) -> None:
    """Refuse an update that is not like the model it was made of, or claims more than its site has registered."""
    if not math.isfinite(weight) or not 0 <= weight <= examples:
        raise ProtocolError(f"weight {weight:g} is not between 0 and the {examples} examples that the site registered")
    if weight:
        check_matches(params, manifest(base))


def _like(mean: np.ndarray[Any, Any], base: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a mean in the dtype that the model has."""
    if base.dtype.kind not in "fc":
        mean = np.rint(mean)
    return mean.astype(base.dtype, copy=False)
