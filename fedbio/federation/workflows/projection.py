"""One 2-D map of all sites' proteins: principal components of all embeddings, found from sums over each site's own.

Only sites whose policy allows ``map`` take part. What leaves them: sums of products of standardized features over at
least `min_proteins` proteins, and then two coordinates, class and split of a sample of proteins, without ids.
"""

from __future__ import annotations

__all__ = ["Projection"]

import numpy as np
from numpy.typing import NDArray

from fedbio.federation.controller import Controller, Runtime
from fedbio.federation.model import FLModel, Parameters
from fedbio.federation.workflows.moments import federated_standardizer, federated_sums
from fedbio.federation.workflows.study import Description, Points, Sample, Study, meta, read_meta
from fedbio.federation.workflows.study_checks import description_answer, of_most, points_answer, scatter_answer
from fedbio.results import MAP_COLUMNS, MAP_FILE, MapPoint, write_table
from fedbio.settings import ProjectionJob


class Projection(Controller):
    """Fits principal components from federated sums, has sites project, and gives every such site the whole map."""

    def __init__(self, runtime: Runtime, job: ProjectionJob) -> None:
        super().__init__(runtime)
        self.points = job.points

    def run(self) -> None:
        """Draw the map of the sites that allow it."""
        sites = [site for site in self.sites() if self.runtime.desk.allows(site, "map")]
        refused = sorted(set(self.sites()) - set(sites))
        if refused:
            self.runtime.record.remarks.append(f"{', '.join(refused)} did not allow the 2-D map and are not on it.")
        if not sites:
            return
        study = self.state.noted("", "study", Study) or Study()
        described = self.broadcast_and_wait(
            "describe", FLModel(meta=meta(study)), sites, check=description_answer(study.classes)
        )
        descriptions = {each.site: read_meta(each.model.meta, Description) for each in described}
        agreeing = of_most(descriptions)
        for site in sorted(descriptions.keys() - set(agreeing)):
            self.runtime.refused(site, "describe", "its embeddings are of another encoder than those of most sites")
        counts = {site: descriptions[site].total("train") for site in agreeing}
        encoder = descriptions[agreeing[0]].encoder
        standardizer = self.state.stored("", "standardizer") or federated_standardizer(self, study, encoder, counts)
        components = self.components(study, standardizer, encoder.whole_width, counts)
        points = self.project(study, {**standardizer, "components": components}, sorted(counts))
        write_table(self.runtime.workspace / MAP_FILE, MAP_COLUMNS, points)
        self.broadcast_and_wait("show_map", FLModel(meta=meta(Points(points))), sorted(counts))

    def components(
        self, study: Study, standardizer: Parameters, width: int, counts: dict[str, int]
    ) -> NDArray[np.float32]:
        """Return the two directions of most variance of the standardized features, shape (width, 2)."""
        task = FLModel(params=standardizer, meta=meta(study))
        count, sums = federated_sums(
            self, "scatter", task, {"products": (width, width)}, counts, sorted(counts), check=scatter_answer
        )
        # ascending eigenvalues; standardized features have mean zero
        _, vectors = np.linalg.eigh(sums["products"] / count)
        chosen = vectors[:, ::-1][:, :2]
        # a component's sign is arbitrary: its largest entry is made positive, on every machine
        signs = np.sign(chosen[np.abs(chosen).argmax(axis=0), [0, 1]])
        components: NDArray[np.float32] = (chosen * signs).astype(np.float32)
        return components

    def project(self, study: Study, params: Parameters, sites: list[str]) -> list[MapPoint]:
        """Have each site place a sample of its proteins, and return the points of all."""
        results = self.broadcast_and_wait(
            "project",
            FLModel(params=params, meta=meta(Sample(study, self.points))),
            sites,
            check=points_answer(study.classes),
        )
        return [
            point._replace(site=each.site)
            for each in results
            for point in read_meta(each.model.meta, Points).points[: self.points]
        ]
