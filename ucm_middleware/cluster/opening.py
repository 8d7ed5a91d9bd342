"""From a setting to a member: which store, and by whose adapter."""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Final

from ucm_middleware.cluster.member import Member
from ucm_middleware.cluster.policy import CLUSTER_VARIABLE, ClusterPolicy, check_url
from ucm_middleware.cluster.store import OpensStore, Store
from ucm_middleware.cluster.users import Users
from ucm_middleware.environment import IsolatedEnvironment
from ucm_middleware.errors import ConfigurationError
from ucm_middleware.installed import sole
from ucm_middleware.secret import SecretRing

GROUP: Final = "ucm_middleware.cluster"
"""The entry points of stores, each named by the scheme of its URLs."""


def open_cluster(
    cluster: ClusterPolicy | str | None,
    environment: IsolatedEnvironment,
    secrets: SecretRing,
    clock: Callable[[], float] | None = None,
) -> Member | None:
    """The member of the cluster that a policy, a URL or ``UCM_CLUSTER_URL`` names; None where nothing does.

    Raises ConfigurationError for a URL that no installed adapter serves, and in production without a secret.
    """
    policy = ClusterPolicy(url=cluster) if isinstance(cluster, str) else cluster
    if policy is not None and not isinstance(policy, ClusterPolicy):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigurationError(f"cluster must be a ClusterPolicy or a URL, not a {type(policy).__name__}")
    url = environment.get(CLUSTER_VARIABLE) if policy is None or policy.url is None else policy.url
    if policy is None:
        if not url:
            return None
        policy = ClusterPolicy(url=url)
    if not url:
        raise ConfigurationError(
            f"cluster: the policy has no url and {CLUSTER_VARIABLE} is not set; give one, such as 'valkey://host:6379/0'"
        )
    check_url(url)
    secrets.require("clusters")
    users = Users(secrets, policy.application)
    return Member(policy, _opened(url, policy, users), users, clock=clock)


def _opened(url: str, policy: ClusterPolicy, users: Users) -> Store:
    scheme = url.partition("://")[0].lower()
    found = sole(GROUP, scheme)
    if found is None:
        installed = sorted({one.name for one in entry_points(group=GROUP)})
        known = f"what is installed serves {', '.join(installed)}" if installed else "no adapter is installed"
        raise ConfigurationError(
            f"cluster: nothing here serves URLs that begin with {scheme}://; {known}. For Valkey and Redis, install "
            "'ucm-valkey[valkey]'"
        )
    try:
        open_store: OpensStore = found.load()
    except (Exception, SystemExit) as error:
        raise ConfigurationError(
            f"cluster: the adapter {found.value} for {scheme}:// cannot be imported: {error}"
        ) from error
    prefix = f"ucm:{policy.application}:"
    return open_store(url, prefix=prefix, seals=users.seals, timeout=policy.timeout)
