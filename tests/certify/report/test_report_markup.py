"""Elements of a page."""

from ucm_middleware.certify.report.html.markup import tag


def test_whatever_is_no_element_is_escaped() -> None:
    assert tag("p", "<b>", tag("b", "&"), title='"><i>') == '<p title="&quot;&gt;&lt;i&gt;">&lt;b&gt;<b>&amp;</b></p>'


def test_attributes_are_named_as_html_names_them() -> None:
    assert tag("svg", class_="a", aria_hidden="true", width=2.0, role=None) == (
        '<svg class="a" aria-hidden="true" width="2"></svg>'
    )
