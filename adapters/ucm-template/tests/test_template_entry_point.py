"""The distribution as it is installed: its entry point, and what it says of itself."""

from importlib.metadata import entry_points

import ucm_template
from ucm_middleware import IsolatedEnvironment, UserContextManager


def test_the_entry_point_leads_to_the_plugin() -> None:
    (found,) = entry_points(group="ucm_middleware", name="template")
    assert found.load() is ucm_template.timesheet
    assert found.dist is not None
    assert found.dist.name == "ucm-template"


def test_a_deployment_can_allow_it_by_name() -> None:
    allowed = UserContextManager(environment=IsolatedEnvironment(environ={"UCM_PLUGINS": "template"}))
    assert allowed.hooks.around_context
    assert not UserContextManager(environment=IsolatedEnvironment(environ={})).hooks.around_context


def test_code_can_name_it() -> None:
    assert UserContextManager(plugins=["template"]).hooks.bind_session
