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
    "04-bottleneck": (
        ("32 * 2 * 4096 * 64", "2 * 4096 * 64 + 64 + 4096", "32 * 4096 * 4096"),
        (
            "lambda h, down, up: up(torch.relu(down(h)))",
            "lambda h, down, up: h + up(down(h))",
            "lambda h, down, up: h + torch.relu(up(down(h)))",
        ),
        ("{'lora'}", "{'lora', 'dora', 'bottleneck'}", "{'lora', 'prefix'}", "set()"),
    ),
    "05-prefix-and-prompt": (
        ("(20 * 32 * 8 * 128, 20 * 4096)", "(20 * 32 * 2 * 8 * 128, 20 * 32 * 4096)", "(20 * 4096, 20 * 4096)"),
        (
            "lambda q, K, V, K_p, V_p: torch.softmax(q @ K.T / 8**0.5, -1) @ V",
            "lambda q, K, V, K_p, V_p: torch.softmax(q @ torch.cat([K_p, K]).T, -1) @ torch.cat([V_p, V])",
            "lambda q, K, V, K_p, V_p: torch.softmax(q @ K.T / 8**0.5, -1) @ V"
            " + torch.softmax(q @ K_p.T / 8**0.5, -1) @ V_p",
        ),
        ("0.5", "0.0", "1.0"),
    ),
    "06-nf4": (
        ("4.5", "4 + 8 / 128", "32 / 128"),
        (
            "lambda byte, absmax: [float(NF4_LEVELS[byte & 15]) * absmax, float(NF4_LEVELS[byte >> 4]) * absmax]",
            "lambda byte, absmax: [float(NF4_LEVELS[byte >> 4]), float(NF4_LEVELS[byte & 15])]",
            "lambda byte, absmax: [(byte >> 4) * absmax, (byte & 15) * absmax]",
        ),
        ("0.3", "0.0796 * 8", "-0.0910 * 8"),
    ),
    "07-qlora-memory": (
        ("0.262144", "4 * 2048 * 32_000 * 2 / 1e9", "2048 * 32_000 * 4 / 1e9"),
        ("lambda i, o, r: 12 * r * (i + o)", "lambda i, o, r: 16 * i * o", "lambda i, o, r: 16 * r * i * o"),
        ("{'smaller r', '8-bit AdamW'}", "{'gradient checkpointing'}", "{'loss in chunks', 'smaller r'}"),
    ),
    "08-triton": (
        ("(4096**2 / 2, 4096**2 / 2 / 3350e9 * 1e6)", "(4096**2 * 4.5 / 8, 2.8e-6)", "(4096**2 * 4.5, 22.5)"),
        ("broken",),
        ("600 / (64 * 128)", "600 / (64 * 128 / 2)", "600 / 64"),
    ),
    "09-paged-adamw": (
        ("(28, 14.21)", "(56, 28)", "(56, 7)"),
        (
            "lambda n, k, size: (n - k) * size",
            "lambda n, k, size: 2 * n * size",
            "lambda n, k, size: 2 * (n - k) * size",
        ),
        (
            "lambda g, lr, b1, b2: -answer_3(g, lr, b1, b2)",
            "lambda g, lr, b1, b2: -lr * g[-1]",
            "lambda g, lr, b1, b2: -lr * (1 if g[-1] > 0 else -1)",
        ),
    ),
    "10-comparing": (
        ("0.0244", "100 * math.sqrt(0.61 / 400)", "100 * 0.61 * 0.39 / 400"),
        (
            "lambda a, b: ((a - b).mean(), math.sqrt((a.var() + b.var()).item() / len(a)))",
            "lambda a, b: ((a - b).mean(), (a - b).std())",
            "lambda a, b: ((b - a).mean(), (a - b).std() / math.sqrt(len(a)))",
        ),
        ("'a larger model'", "'more parameters for the prompt'"),
    ),
}
