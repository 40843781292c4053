"""What the command line makes of numbers and of others' words."""

import pytest

from koinon.operate.words import show, words


def test_what_a_stranger_wrote_is_no_markup(capsys):
    """Neither a reason for which a job failed nor a site's trouble is taken for a style, or ends the listing."""
    show([{"id": "one", "reason": "[data] train is [/gone]"}], as_json=False)
    assert "[data] train is [/gone]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.81234, "0.8123"),
        (9999.4, "9999"),
        (35123.4, "35,123"),
        (-2.5e7, "-25,000,000"),
        (1e300, "1e+300"),
        (1e-7, "1e-07"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (3, "3"),
        (None, "–"),
        ([], "none"),
        ({"a": 0.5, "b": [1, 2]}, "a 0.5, b 1 2"),
    ],
)
def test_numbers_are_said_as_people_read_them(value, said):
    """Bytes and counts in full, scores in four digits."""
    assert words(value) == said
