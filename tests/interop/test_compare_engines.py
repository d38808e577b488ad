"""Number of verifications of a text: from the counts of the last ones, as each engine counts them."""

import pytest

from interop.compare_engines import count

# drafts accepted after each known token
LEADING = [2, 0, 0, 1, 3, 3, 3]


@pytest.mark.parametrize(
    ("tokens", "whole", "trimmed"),
    [
        (7, (3 + 2 + 4, 3), (3 + 2 + 2, 3)),  # the last has three drafts accepted and room for one
        (6, (3 + 2 + 4, 3), (3 + 2, 2)),  # room for none: that token needs no drafts
        (5, (3 + 2, 2), (3 + 2, 2)),
        (1, (3, 1), (0, 0)),
        (0, (0, 0), (0, 0)),
    ],
)
def test_the_last_verifications_are_counted_as_the_engine_counts_them(tokens, whole, trimmed):
    assert count(LEADING[:tokens], trimmed=False) == whole
    assert count(LEADING[:tokens], trimmed=True) == trimmed
