"""A tokenizer as GGUF has it: its tokens and merges, and which of llama.cpp's ways to split a text is its own.

llama.cpp has no general pre-tokenizer: it knows each by name. Those that are recognized here are told apart by what the
tokenizer itself does; another one is refused, since under a wrong name texts would become other tokens in silence.
"""

from __future__ import annotations

import json
from typing import Any

from minipeft.export.families import ExportError
from minipeft.train.chats import end_of_turn

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# By the steps that split a text, what llama.cpp calls them. The last tells that whole words that are tokens stay whole.
_SPLITS: dict[tuple[Any, ...], str] = {
    (("bytes", True), False): "gpt-2",
    (("digits", True), ("bytes", True), False): "smollm",
    (("split", _WORDS + r"\p{N}{1,3}" + _REST), ("bytes", False), True): "llama-bpe",
    (("split", _WORDS + r"\p{N}" + _REST), ("bytes", False), False): "qwen2",
}


def write_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Give a GGUFWriter a tokenizer, its special tokens and its chat template.

    Args:
        rows: of the embeddings; those beyond the tokens are marked as unused.

    Raises:
        ExportError: a tokenizer of a kind that is not written.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json, from which GGUF's is made")
    said = json.loads(backend.to_str())
    model = said["model"]
    if model["type"] != "BPE":
        raise ExportError(f"a tokenizer of the kind {model['type']} is not written as GGUF: only BPE is")
    if not model["merges"]:
        raise ExportError("the tokenizer has no merges, and llama.cpp reads none without")
    if model.get("byte_fallback"):
        _write_sentencepiece(writer, said)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_of(said))
        writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]])
    tokens, kinds = _tokens(tokenizer, model, rows)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if model.get("byte_fallback"):
        writer.add_token_scores(_scores(tokens, model))
    _write_special(writer, tokenizer)


def _tokens(tokenizer: Any, model: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    known = {id: token for token, id in tokenizer.get_vocab().items()}
    if max(known) >= rows:
        raise ExportError(f"the tokenizer has the token {max(known)}, and the model embeddings of {rows} tokens")
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids)
    tokens, kinds = [], []
    for id in range(rows):
        token = known.get(id)
        tokens.append(f"[PAD{id}]" if token is None else token)
        if token is None:
            kinds.append(UNUSED)
        elif model.get("byte_fallback") and token == model.get("unk_token"):
            kinds.append(UNKNOWN)
        elif id in special or (id in added and added[id].special):
            kinds.append(CONTROL)
        elif id in added:
            kinds.append(USER_DEFINED)
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            kinds.append(BYTE)
        else:
            kinds.append(NORMAL)
    return tokens, kinds


def _split_of(said: dict[str, Any]) -> str:
    """The name by which llama.cpp knows how this tokenizer splits a text."""
    steps: list[Any] = []
    for part in _parts(said.get("pre_tokenizer")):
        if part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
            steps.append(("bytes", part.get("use_regex", True)))
        elif part["type"] == "Digits":
            steps.append(("digits", part.get("individual_digits")))
        elif part["type"] == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            steps.append(("split", part["pattern"].get("Regex")))
        else:
            steps.append(part["type"])
    kinds = [part["type"] for part in _parts(said.get("normalizer"))]
    name = _SPLITS.get((*steps, bool(said["model"].get("ignore_merges"))))
    if name is None or kinds not in ([], ["NFC"]):
        raise ExportError(
            f"how this tokenizer splits texts is none of {', '.join(_SPLITS.values())}, which alone are written as "
            f"GGUF: it has {[*kinds, *steps]}"
        )
    return name


def _write_sentencepiece(writer: Any, said: dict[str, Any]) -> None:
    """A SentencePiece model of merges, as Llama 2's: spaces are a token's own, unknown characters their bytes."""
    normalizers, splits = _parts(said.get("normalizer")), _parts(said.get("pre_tokenizer"))
    kinds = [part["type"] for part in (*normalizers, *splits)]
    if kinds == ["Prepend", "Replace"] or kinds == ["Replace"]:
        prefix = "Prepend" in kinds
    elif kinds == ["Metaspace"]:
        prefix = splits[0].get("prepend_scheme", "always") != "never"
    else:
        raise ExportError(f"a SentencePiece tokenizer with the steps {kinds} is not written as GGUF")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(prefix)


def _scores(tokens: list[str], model: dict[str, Any]) -> list[float]:
    """The order in which two tokens become one: of those that may, the one with the greatest score comes first."""
    order: dict[str, int] = {}
    for at, pair in enumerate(model["merges"]):
        order.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), at)
    return [-float(order.get(token, len(order))) for token in tokens]


def _parts(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    return step.get("pretokenizers") or step.get("normalizers") or [step] if step["type"] == "Sequence" else [step]


def _write_special(writer: Any, tokenizer: Any) -> None:
    for kind in ("bos", "eos", "unk", "sep", "pad"):
        id = getattr(tokenizer, f"{kind}_token_id", None)
        if id is not None:
            getattr(writer, f"add_{kind}_token_id")(id)
    ids = list(tokenizer("a")["input_ids"])
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return
    if not isinstance(template, str):
        template = template.get("default") or next(iter(template.values()))
    writer.add_chat_template(template)
    end = end_of_turn(tokenizer)
    if end is not None:
        writer.add_eot_token_id(tokenizer.convert_tokens_to_ids(end))
