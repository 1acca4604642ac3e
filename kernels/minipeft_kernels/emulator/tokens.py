"""The pieces that PTX text is made of: statements, comma-separated parts, numbers."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from .errors import PtxSyntaxError

DECIMAL = re.compile(r"[-+]?\d+\.\d*(?:[eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$")
NUMBER = re.compile(r"[-+]?(0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?)$")
_LABEL = re.compile(r"\s*([\w$%]+)\s*:(?!:)")


def number(text: str) -> int | float:
    """The value of a literal that DECIMAL or NUMBER matches, of any base; "0f" and "0d" are the bits of a float."""
    if DECIMAL.match(text):
        return float(text)
    sign, digits = (-1, text[1:]) if text[0] == "-" else (1, text.lstrip("+"))
    if digits[:2] in ("0f", "0F"):
        return sign * float(struct.unpack(">f", bytes.fromhex(digits[2:]))[0])
    if digits[:2] in ("0d", "0D"):
        return sign * float(struct.unpack(">d", bytes.fromhex(digits[2:]))[0])
    digits = digits.rstrip("U")
    octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    return sign * int(digits, 8 if octal else 0)


def split(text: str) -> list[str]:
    """At commas that stand outside of braces and brackets."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}.get(c, 0)
        if c == "," and not depth:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    return [*parts, current.strip()] if current.strip() else parts


def statements(text: str) -> Iterator[str]:
    """Statements without their semicolons, labels with their colon, `{`, `}`, and whole lines of `.loc`."""
    at = 0
    while at < len(text):
        if text[at].isspace() or text[at] == ";":
            at += 1
        elif text[at] in "{}":
            yield text[at]
            at += 1
        elif text.startswith((".loc", ".file"), at):
            end = text.find("\n", at)
            end = len(text) if end < 0 else end
            yield text[at:end].strip()
            at = end
        elif label := _LABEL.match(text, at):
            yield label[1] + ":"
            at = label.end()
        else:
            end = text.find(";", at)
            if end < 0:
                raise PtxSyntaxError(f"statement without a semicolon: {text[at : at + 80]!r}")
            yield text[at:end].strip()
            at = end + 1
