"""Profiles and lessons, in processes that compile."""

import pytest
from compiled_apart import run_apart


@pytest.mark.parametrize("file", ["test_profile.py", "test_lesson.py"])
def test_profiles_and_lessons(file: str) -> None:
    run_apart(file)
