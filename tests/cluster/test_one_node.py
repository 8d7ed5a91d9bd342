"""A store of several servers, of which one is down: what stands on the others is kept."""

import pytest

from support.members import LEASE, Cluster
from ucm_middleware.cluster.policy import WhenUnavailable
from ucm_middleware.errors import ClusterUnavailableError


@pytest.mark.parametrize("policy", ["closed", "local"])
def test_only_what_stands_on_it_is_lost(cluster: Cluster, policy: WhenUnavailable) -> None:
    worker = cluster.worker(policy)
    there, elsewhere = cluster.acquire(worker, "alice"), cluster.acquire(worker, "bob")
    assert there.key.bucket != elsewhere.key.bucket
    cluster.server.lost_buckets = {there.key.bucket}

    cluster.wait(3 * LEASE, worker)

    assert elsewhere.is_held
    assert cluster.server.live_of(elsewhere.key) == [elsewhere.slot()]
    if policy == "closed":
        assert worker.lost == [there]
        with pytest.raises(ClusterUnavailableError):
            cluster.acquire(worker, "alice")
    else:
        assert there.is_held

    cluster.server.lost_buckets = set()
    cluster.wait(2 * LEASE, worker)

    assert worker.state == "up"
    assert elsewhere.is_held
    assert cluster.server.live_of(elsewhere.key) == [elsewhere.slot()]
