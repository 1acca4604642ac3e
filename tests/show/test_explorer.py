"""The page on NF4 and rank: its numbers are the library's, and the errors those of numpy's arithmetic on them."""

import base64
import json
import re

import numpy as np
import pytest
from command_line import ok, refused

from minipeft.nf4 import NF4Weight
from minipeft.show.explorer import some_weight


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def test_the_numbers_are_the_librarys_and_the_page_stands_alone(tmp_path):
    page = tmp_path / "page.html"
    ok("docs", "--explorer", page)
    text = page.read_text()
    assert not re.search(r"https?://|src=|href=", text) and "DATA_OF" not in text
    data = json.loads(re.search(r'application/json">(.*?)</script>', text, re.S)[1])
    W = some_weight()
    dense = W.numpy().astype(np.float64)
    assert np.array_equal(floats(data["weight"]).reshape(dense.shape), W.numpy())
    levels = floats(data["levels"])
    assert len(data["choices"]) == 2 * len(data["blocksizes"])
    for choice in data["choices"]:
        packed = NF4Weight.quantize(W, choice["blocksize"], choice["double"])
        codes = np.frombuffer(base64.b64decode(choice["codes"]), "u1")
        # The page's arithmetic.
        read = levels[codes] * np.repeat(floats(choice["scales"]), choice["blocksize"])[: codes.size]
        assert np.array_equal(read.reshape(dense.shape), packed.dequantize().numpy())
        assert choice["code_bytes"] + choice["scale_bytes"] == packed.nbytes
        A, B = floats(choice["A"]).reshape(-1, dense.shape[1]), floats(choice["B"]).reshape(dense.shape[0], -1)
        lost = dense - read.reshape(dense.shape)
        singular = np.linalg.svd(lost, compute_uv=False)
        for rank in data["ranks"]:
            rest = lost - B[:, :rank].astype(float) @ A[:rank].astype(float)
            assert choice["error"][rank] == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(dense), rel=1e-9)
            # Eckart and Young: no matrix of that rank comes nearer.
            best = np.linalg.norm(singular[rank:]) / np.linalg.norm(dense)
            assert choice["error"][rank] == pytest.approx(best, rel=1e-5)
            assert choice["largest"][rank] == pytest.approx(np.abs(rest).max(), rel=1e-9)
            assert choice["factor_bytes"][rank] == 2 * rank * sum(dense.shape)
    first = {(c["blocksize"], c["double"]): c for c in data["choices"]}
    assert first[32, False]["error"][0] < first[1024, False]["error"][0]
    assert first[64, True]["scale_bytes"] - 1024 < first[64, False]["scale_bytes"]


def test_every_control_can_be_reached_by_keyboard(tmp_path):
    ok("docs", "--explorer", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    labelled = set(re.findall(r'<label for="(\w+)"', text))
    assert labelled == set(re.findall(r'<input id="(\w+)"', text)) == {"rank", "block", "double"}
    assert text.count('tabindex="0"') == 3 and "keydown" in text and "pointerdown" in text
    assert "cannot write" in refused("docs", "--explorer", tmp_path / "no" / "page.html")
