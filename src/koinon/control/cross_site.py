"""Cross-site evaluation: how good each site's model is at every other site."""

from __future__ import annotations

from dataclasses import dataclass

from koinon.aggregate import sgd
from koinon.control.federation import Federation
from koinon.payload import Arrays


@dataclass(frozen=True)
class CrossSite:
    """Every site's model on every site's held-out data.

    In round i, site i alone trains the job's model on, and all who hold held-out data judge what came of it; in the
    last round they judge the model as it came.  So the run's table holds, of site j in round i, the metrics of site
    i's model at j; its report shows them as a matrix, which is also in `cross-site.csv`.

    The model is what a run before has trained: `job.replace(controller=koinon.CrossSite(), model=run.model())`.
    What an upload filter keeps at the sites, or what they remember, is not carried over from that run.

    Each site's model crosses to every other: as many evaluations as there are sites, squared.  A site that fails has
    no row; too many of them (the job's quorum) end the run.
    """

    asks = ("train", "evaluate")
    needs = "each"

    def run(self, fed: Federation, model: Arrays) -> Arrays:
        """Returns the model as it came; after a crash, goes on with the next site."""
        at, step = fed.start(model=model, common=model, failed=0), sgd()
        for number in fed.rounds(len(fed.sites) + 1):
            at.model = at.common
            if number <= len(fed.sites):
                fed.broadcast("train", at.common, to=[fed.sites[number - 1]])
                _, update = fed.next()
                if update is None:
                    at.failed += 1
                    if at.failed > (1 - fed.job.quorum) * len(fed.sites):
                        fed.abort(f"{at.failed} of {len(fed.sites)} sites failed, of which failures.log says why")
                    continue
                at.model, _ = step.step(at.common, update.arrays, step.init(at.common))
            fed.commit(at)
        common: Arrays = at.common
        return common
