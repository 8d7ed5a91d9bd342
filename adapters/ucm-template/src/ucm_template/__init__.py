"""A timesheet of what each user's contexts did. Copy this distribution to begin an adapter of your own."""

from ucm_template.timesheet import Shift, Timesheet

__all__ = ["Shift", "Timesheet", "timesheet"]

timesheet = Timesheet()
"""What the entry point ``template`` loads. For other settings, give the manager a ``Timesheet`` of your own."""
