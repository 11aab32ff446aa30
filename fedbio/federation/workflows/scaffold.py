"""The server's part of SCAFFOLD, whose control variates keep sites with unlike data from drifting apart.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", Algorithm 1 with option II.
A control variate estimates a gradient: the server's `c` the one over all sites, a site's `c_i` its own. A site that
adds ``c - c_i`` to each of its gradients walks along the common one.

To a site travel the model and `c`; back come the trained model (or its change) and the change of `c_i`, both times
under the model's names and, with `CONTROL` before them, the same names again: `c_i` itself stays at its site (see
`fedbio.client.algorithms`).
"""

from __future__ import annotations

__all__ = ["CONTROL", "COUNTED", "initial_control", "split_control", "updated_control", "with_control"]

from collections.abc import Mapping, Sequence

import numpy as np

from fedbio.errors import FederationError
from fedbio.federation.model import Parameters
from fedbio.federation.workflows.server_optimizers import is_trained
from fedbio.tensors.combine import MEAN_DTYPE, BlockMean, aligned, shares

CONTROL = "scaffold/"
"""Before the names of the model's tensors: the control variate of each, or its change."""

COUNTED = "scaffold_counted"
"""Key in the meta of a training task: for each site the last round in which the change of its variate was counted.

A site whose answer came late or was refused learns from it that its variate must go back to what it was: `c` would else
never again be the mean of all `c_i`, and the model would settle beside the optimum.
"""


def initial_control(model: Parameters) -> Parameters:
    """Return the variates to begin with: zeros for each tensor of the model that is trained, in float32."""
    return {name: np.zeros(each.shape, MEAN_DTYPE) for name, each in model.items() if is_trained(name, each.dtype)}


def with_control(model: Parameters, control: Parameters) -> Parameters:
    """Put variates beside the model's tensors, under their names on the way.

    Raises
    ------
    FederationError
        If a tensor of the model already has such a name.
    """
    for name in model:
        if name.startswith(CONTROL):
            raise FederationError(f"tensor {name!r} of the model has the name of a control variate; rename it")
    return {**model, **{CONTROL + name: each for name, each in control.items()}}


def split_control(params: Parameters) -> tuple[Parameters, Parameters]:
    """Undo `with_control`: return the model's tensors and the variates."""
    model = {name: each for name, each in params.items() if not name.startswith(CONTROL)}
    control = {name.removeprefix(CONTROL): each for name, each in params.items() if name not in model}
    return model, control


def updated_control(
    control: Parameters,
    control_changes: Sequence[tuple[str, Parameters]],
    sites_in_all: int,
    *,
    weights: Mapping[str, float] | None = None,
) -> Parameters:
    """Return the next `c`: the sum of the sites' changes over the number of *all* sites, added to the last one.

    Once the variates are right, every site walks along `c`, and so the common optimum is that of the losses as `c`
    weighs them, however the models are averaged.

    Parameters
    ----------
    control : dict of str to ndarray
    control_changes : sequence of (site, dict of str to ndarray)
        The changes of those whose models were averaged in this round, in any order.
    sites_in_all : int
        The sites of the job, whether they took part in this round or not.
    weights : mapping of str to float, optional
        The weight of each site's loss, of *all* sites, the same in every round. The paper's are all the same.

    Returns
    -------
    dict of str to ndarray, dtype=np.float32

    Raises
    ------
    ProtocolError
        If a site's names or shapes are not those of `control`.
    """
    if sites_in_all < len(control_changes):
        raise ValueError(f"{len(control_changes)} sites changed the variate, but there are {sites_in_all} in all")
    # the server's own comes first: no site has an empty name
    ordered = aligned([("", control, 1.0), *((site, change, 1.0) for site, change in control_changes)])
    changed = [site for site, _, _ in ordered[1:]]
    parts = dict.fromkeys(changed, 1 / sites_in_all) if weights is None else shares(weights)
    add = BlockMean([1.0, *(parts[site] for site in changed)])
    updated = {}
    for name, each in control.items():
        updated[name] = np.empty(each.shape, MEAN_DTYPE)
        add([tensors[name].reshape(-1) for _, tensors, _ in ordered], updated[name].reshape(-1))
    return updated
