"""What a policy may say, and what is never shown of it."""

import pytest

from support.members import SECRET
from ucm_middleware import ClusterPolicy, ConfigurationError, UserContextManager
from ucm_middleware.cluster.policy import LONGEST_LEASE
from ucm_middleware.cluster.store import KEEP_USER


def test_what_stands_of_a_user_outlives_every_lease_of_a_worker_that_is_cut_off() -> None:
    """It is touched when it is half of its life old, at the next renewal, and may be held for a lease from then on."""
    assert KEEP_USER / 2 + LONGEST_LEASE / 3 + LONGEST_LEASE <= KEEP_USER


@pytest.mark.parametrize("url", ["admin:hunter2@cache:6379", "admin:hunter2@cache://6379"])
@pytest.mark.parametrize("policy", [None, ClusterPolicy(application="shop")])
def test_no_part_of_a_url_that_may_be_a_password_is_shown(
    url: str, policy: ClusterPolicy | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCM_CLUSTER_URL", url)
    with pytest.raises(ConfigurationError) as refused:
        UserContextManager(cluster=policy, secret=SECRET)

    assert "hunter2" not in str(refused.value)
