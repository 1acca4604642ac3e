"""Answers that the lessons' exercises must refuse: by lesson, for each of its three exercises, Python that gives one.

They are what a reader may well say. The names are those that the lesson's cells have made.
"""

WRONG: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "01-one-batch": (
        ("8 * (4 * (64 + 64) + 3 * (64 + 128))", "2 * 8 * 4 * (64 + 64)", "2 * (4 * 64 * 64 + 3 * 64 * 128)"),
        ("lambda dy, W, A, B, s: dy @ W", "lambda dy, W, A, B, s: dy @ W + (dy @ B) @ A", "lambda dy, W, A, B, s: dy"),
        ("3.0", "2.0", "12.0"),
    ),
}
