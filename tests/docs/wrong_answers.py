"""Answers that the lessons' exercises must refuse: by lesson, for each of its three exercises, Python that gives one.

They are what a reader may well say. The names are those that the lesson's cells have made.
"""

WRONG: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "01-one-batch": (
        ("8 * (4 * (64 + 64) + 3 * (64 + 128))", "2 * 8 * 4 * (64 + 64)", "2 * (4 * 64 * 64 + 3 * 64 * 128)"),
        ("lambda dy, W, A, B, s: dy @ W", "lambda dy, W, A, B, s: dy @ W + (dy @ B) @ A", "lambda dy, W, A, B, s: dy"),
        ("3.0", "2.0", "12.0"),
    ),
    "02-why-low-rank": (
        ("16 / 4096", "16 * 4096", "2 * 16 / (4096 + 4096)"),
        (
            "lambda matrix, r: matrix",
            "lambda matrix, r: torch.cat([matrix[:r], 0 * matrix[r:]])",
            "lambda matrix, r: torch.linalg.svd(matrix, full_matrices=False).Vh[:r]",
        ),
        ("4", "2", "1"),
    ),
    "03-lora": (
        ("(16 / 64, 16 / 64)", "(2.0, 2.0)", "(64 / 16, 16 / 8)"),
        ("lambda W, A, B, s: W + B @ A", "lambda W, A, B, s: W", "lambda W, A, B, s: s * B @ A"),
        ("lambda i, o: i", "lambda i, o: i * o", "lambda i, o: 1"),
    ),
}
