"""A sample of hostile saved contexts: see context_fuzz.py."""

from context_fuzz import fuzz


def test_hostile_files_are_refused_or_harmless() -> None:
    endings = fuzz(2_000, seed=0)
    assert endings["refused"] > 1_500
    assert endings["loaded"] > 5  # such as another budget, sealed again by whoever changed it
    assert endings.total() - endings["refused by the first question"] == 2_000
