"""The functions of a split network's script at a site: its part of the network, and its rows."""

from __future__ import annotations

__all__ = ["Here", "SplitScript"]

import hashlib
import logging
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedbio.client.split import Rows
from fedbio.errors import DataError, FedbioError, FederationError
from fedbio.federation.executor import SiteContext
from fedbio.federation.workflows.script import ClientSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn, optim

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Here:
    """What `features` and `labels` of a script are told of their site.

    Parameters
    ----------
    site : str
        The site's name.
    data : Path
        Its proteins.
    labels : Path or None
        A table with their labels, where it has one.
    embeddings : Path
        Its embeddings file, which may not be there yet.
    workspace : Path
        A folder for whatever the script wants to keep.
    arguments : tuple of str
        `client.arguments` of the job.
    """

    site: str
    data: Path
    labels: Path | None
    embeddings: Path
    workspace: Path
    arguments: tuple[str, ...] = ()


class SplitScript:
    """A script that its site's operator lets run, loaded into this process.

    Parameters
    ----------
    job : str
    spec : ClientSpec
        Of the deployed script.
    context : SiteContext

    Raises
    ------
    DataError
        If a file is not what the server announced.
    FederationError
        If the script fails.
    """

    def __init__(self, job: str, spec: ClientSpec, context: SiteContext) -> None:
        self._name = spec.script
        folder = context.received(spec.group).resolve()
        sources = {each.name: _content(folder / each.name, each.sha256) for each in spec.files}
        workspace = context.workspace.resolve() / "split" / job / "files"
        workspace.mkdir(parents=True, exist_ok=True)
        self.here = Here(
            site=context.site,
            data=context.data.resolve(),
            labels=None if context.labels is None else context.labels.resolve(),
            embeddings=context.embeddings.resolve(),
            workspace=workspace,
            arguments=spec.arguments,
        )
        self._module = types.ModuleType(f"fedbio_split_{spec.group[:16]}")
        self._module.__file__ = str(folder / spec.script)
        # classes of the script name their module, and look for it when they are used
        sys.modules[self._module.__name__] = self._module
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        code = self._guard("the script", lambda: compile(sources[spec.script], self._name, "exec"))
        self._guard("the script", lambda: exec(code, self._module.__dict__))  # noqa: S102 - the operator allowed these bytes

    def part(self, role: str, device: torch.device) -> tuple[nn.Module, optim.Optimizer]:
        """Return this site's part of the network, made by the function `bottom` or `top`, and its optimizer."""
        import torch

        module = self._guard(role, self._function(role))
        if not isinstance(module, torch.nn.Module):
            raise FederationError(f"{self._name}: {role}() returned a {type(module).__name__}, expected a torch module")
        module.to(device)
        optimizer = self._guard("optimizer", lambda: self._function("optimizer")(module))
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise FederationError(
                f"{self._name}: optimizer() returned a {type(optimizer).__name__}, no torch optimizer"
            )
        return module, optimizer

    def rows(self, role: str) -> Rows:
        """Return the site's rows: what the function `features` or `labels` reads."""
        import torch

        name = "features" if role == "bottom" else "labels"
        found = self._guard(name, lambda: self._function(name)(self.here))
        try:
            ids, values = found
        except (TypeError, ValueError) as error:
            raise FederationError(f"{self._name}: {name}() must return ids and a tensor") from error
        if not isinstance(values, torch.Tensor) or values.ndim == 0 or len(values) != len(ids):
            raise FederationError(f"{self._name}: {name}() must return as many ids as its tensor has rows")
        return Rows([str(each) for each in ids], values)

    def loss(self, output: Any, labels: Tensor) -> Tensor:
        """Return the loss of a batch: the function `loss`, or the mean cross-entropy."""
        import torch

        def value() -> Tensor:
            if hasattr(self._module, "loss"):
                found: Tensor = self._module.loss(output, labels)
                return found
            return torch.nn.functional.cross_entropy(output, labels)

        return self._guard("loss", value)

    def _function(self, name: str) -> Callable[..., Any]:
        found = getattr(self._module, name, None)
        if not callable(found):
            raise FederationError(f"{self._name} has no function {name}(), which split learning calls at this site")
        return found  # type: ignore[no-any-return]

    def _guard(self, what: str, work: Callable[[], T]) -> T:
        """Do what the script's author wrote; what it says when it fails may quote the site's data, and stays here."""
        try:
            return work()
        except FedbioError:
            raise
        except Exception as error:
            log.exception("%s: %s failed", self._name, what)
            raise FederationError(
                f"{self._name}: {what} failed with {type(error).__name__}; the log of {self.here.site} says more"
            ) from error


def _content(path: Path, sha256: str) -> bytes:
    """Return a file's bytes, if they are those that the site's policy has allowed."""
    if not path.is_file():
        raise DataError(f"{path}: the server has announced this file and not sent it")
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise DataError(f"{path}: SHA-256 {found}, the server announced {sha256}")
    return content
