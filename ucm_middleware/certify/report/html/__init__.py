"""The report as one page that needs nothing else: no network, no script, no file."""

from ucm_middleware.certify.report.html.page import as_html

__all__ = ["as_html"]
