"""From records to token ids and labels.

The one rule: **the tokens of a prompt as they are at generation time are an exact prefix of the training
tokens**. Tokenizing prompt and completion as one string breaks it wherever a token spans the boundary, so
text is tokenized span by span (`extend_ids`), and the joint tokenization is used only where it keeps the
rule.

Labels are -100 wherever nothing is to be learned. A model's logits at position t predict label t + 1.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minipeft.train.chats import assistant_turns, left_out
from minipeft.train.config import TrainConfig
from minipeft.train.errors import DataError
from minipeft.train.models import resolve_max_length
from minipeft.train.records import Record, as_object, iterate_records, read_records
from minipeft.train.tokens import TokenStore

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """One tokenized document.

    Attributes:
        input_ids, labels: of equal length, labels -100 where not learned.
        left_out: of a conversation, the role of a message whose words the chat template does not write as they are.
    """

    input_ids: list[int]
    labels: list[int]
    left_out: str | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def loss_tokens(self) -> int:
        """Labels that take part in the loss; the first token has nothing before it to be predicted from."""
        return sum(label != IGNORE for label in self.labels[1:])

    def shown(self, tokenizer: Any) -> str:
        """The text of the tokens, special ones too, with what is learned between ">>>" and "<<<"."""
        parts = []
        groups = itertools.groupby(zip(self.labels, self.input_ids, strict=True), key=lambda pair: pair[0] != IGNORE)
        for is_learned, group in groups:
            text = tokenizer.decode([token for _, token in group])
            parts.append(f">>>{text}<<<" if is_learned else text)
        return "".join(parts)


@dataclass
class EncodedDataset:
    """Tokenized documents, with counts of the records that were cut or left out.

    Attributes:
        examples: the documents, in order (a `TokenStore`, or any sequence of them).
        max_length: longest sequence in tokens, or with packing the tokens of a row.
        records: how many records there were; `truncated` of them were cut, `dropped` left out.
        notices: sentences on cut and left-out records, for the user.
        dated: the identity of data whose tokens are others on another day, see `content_hash`.
        shares: of each document, how often an epoch takes it on average; empty where that is once (see `by_shares`).
    """

    examples: Sequence[Example]
    max_length: int
    records: int
    truncated: int = 0
    dropped: int = 0
    notices: list[str] = field(default_factory=list)
    chat: bool = False  # True if the records were conversations, put into the chat template
    dated: str | None = None
    shares: array[float] = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """Tokens in all documents."""
        return sum(lengths(self.examples))

    @property
    def loss_tokens(self) -> int:
        """Tokens that are learned."""
        if isinstance(self.examples, TokenStore):
            return sum(int((tokens[1:] >= 0).sum()) for tokens in self.examples.marked())
        return sum(example.loss_tokens for example in self.examples)

    def content_hash(self) -> str:
        """sha256 over ids and labels in order: equal exactly when training sees the same data.

        Of data in a template that prints the date, over the records, the template and the tokenizer's vocabulary.
        """
        if self.dated is not None:
            return self.dated
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(len(example).to_bytes(8, "little"))
            digest.update(np.asarray([example.input_ids, example.labels], dtype="<i8").tobytes())
        return digest.hexdigest()


def lengths(examples: Sequence[Example]) -> list[int]:
    """The tokens of each document."""
    return examples.lengths() if isinstance(examples, TokenStore) else [len(example) for example in examples]


SHORTEN = "raise max_length, or choose too_long: truncate or too_long: drop"


def encode_records(
    records: Iterable[Record], tokenizer: Any, max_length: int, too_long: str = "error", advice: str = SHORTEN
) -> EncodedDataset:
    """Tokenize records, one after the other as they come.

    Args:
        max_length: longest sequence, end-of-sequence token included.
        too_long: "error" refuses a longer record, "drop" leaves it out, "truncate" cuts its end off. A record
            whose learned part would be cut off entirely is left out. What was done is counted in `notices`.
        advice: what the user can do about a record that is refused.

    Raises:
        DataError: a record too long under "error", a record the tokenizer or chat template refuses, or
            nothing left.
    """
    store = TokenStore(Example, IGNORE)
    data = EncodedDataset(store, max_length, 0)
    template = json.dumps(getattr(tokenizer, "chat_template", None))  # a text, or several by name
    dated = _DatedHash(template, max_length, too_long) if "strftime_now" in template else None
    hopeless = 0
    silent: list[tuple[Record, str]] = []
    first: Record | None = None
    for record in records:
        first = first or record
        data.records += 1
        data.chat = data.chat or record.messages is not None
        if dated is not None:
            dated.add(record)
        example = encode_record(record, tokenizer)
        if example.left_out is not None:
            silent.append((record, example.left_out))
        if len(example) > max_length:
            if too_long == "error":
                raise record.error(
                    f"the record has {len(example)} tokens, more than max_length ({max_length}): {advice}"
                )
            cut = Example(example.input_ids[:max_length], example.labels[:max_length])
            if too_long == "drop" or not cut.loss_tokens:
                data.dropped += 1
                hopeless += too_long == "truncate"
                continue
            data.truncated += 1
            example = cut
        store.append(example.input_ids, example.labels)
        data.shares.append(record.share)
    if dated is not None and data.chat:
        data.dated = dated.finish(tokenizer)
    _describe_losses(data, hopeless)
    if silent:
        record, role = silent[0]
        where = "" if record.line is None else f", first in record {record.line}"
        data.notices.append(
            f"{len(silent)} of {data.records} records have a message (role {role!r}{where}) whose words the chat "
            "template does not write as they are: the model does not see them"
        )
    if not data.examples:
        path = first.path if first else None
        raise DataError(f"no record is left: all {data.records} exceed {max_length} tokens; raise max_length", path)
    return data


class _DatedHash:
    """sha256 of what makes the tokens of conversations in a template that prints the date, record by record.

    It is that of the JSON list [template, max_length, too_long, [records], vocabulary].
    """

    def __init__(self, template: str, max_length: int, too_long: str) -> None:
        self.digest = hashlib.sha256(json.dumps([template, max_length, too_long])[:-1].encode() + b", [")
        self.between = ""

    def add(self, record: Record) -> None:
        """Take in the next record."""
        shown = as_object(record) if record.share == 1 else [as_object(record), record.share]
        self.digest.update((self.between + json.dumps(shown)).encode())
        self.between = ", "

    def finish(self, tokenizer: Any) -> str:
        """The hash, once all records are in."""
        vocabulary = sorted(tokenizer.get_vocab().items())
        self.digest.update(b"], " + json.dumps(vocabulary).encode() + b"]")
        return self.digest.hexdigest()


def encode_record(record: Record, tokenizer: Any) -> Example:
    """Tokenize one record, end-of-sequence token appended.

    Raises:
        DataError: nothing to learn in it, or the chat template refuses it.
    """
    if record.messages is not None:
        example = _encode_messages(record, tokenizer)
    elif record.text is not None:
        ids = _ended(tokenizer, encode_prompt(tokenizer, record.text))
        example = Example(ids, list(ids))
    else:
        assert record.prompt is not None and record.completion is not None
        prompt, completion = encode_pair(tokenizer, record.prompt, record.completion)
        completion = _ended(tokenizer, completion)
        example = Example(prompt + completion, [IGNORE] * len(prompt) + completion)
    if not example.loss_tokens:
        raise record.error("expected something to learn, found no token that a token precedes")
    return example


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt, as training has them and as generation must start from.

    Special tokens in front are the tokenizer's own, once: a text that was rendered before may begin with one. An
    end-of-sequence token that some tokenizers append is taken off, because the text goes on.
    """
    ids = list(tokenizer(prompt)["input_ids"])
    start, first = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "bos_token", None) or ""
    if start is not None and ids[:2] == [start, start] and prompt.startswith(first):
        ids = ids[1:]
    ends = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)} - {None}
    while ids and ids[-1] in ends and not prompt.endswith(tokenizer.convert_ids_to_tokens(ids[-1])):
        ids.pop()
    return ids


def encode_pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the completion after it; the first equal `encode_prompt(prompt)`."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    joint = extend_ids(prompt_ids, prompt, completion, lambda text: encode_prompt(tokenizer, text))
    return prompt_ids, joint[len(prompt_ids) :]


def extend_ids(ids: list[int], text: str, more: str, encode: Callable[[str], list[int]]) -> list[int]:
    """`ids`, the tokens of `text`, extended by those of `more`; `ids` stays an exact prefix.

    The joint tokenization is taken where it keeps the prefix. Elsewhere a token spans the boundary, and
    `more` is tokenized after an anchor, which keeps tokenizers from putting a space or a start token in front
    of it.
    """
    joint = encode(text + more)
    if joint[: len(ids)] == ids:
        return joint
    for anchor in ("\n", "=", "a"):
        anchor_ids, anchored = encode(anchor), encode(anchor + more)
        if anchored[: len(anchor_ids)] == anchor_ids:
            return ids + anchored[len(anchor_ids) :]
    start = encode("")
    alone = encode(more)
    return ids + (alone[len(start) :] if alone[: len(start)] == start else alone)


def _encode_messages(record: Record, tokenizer: Any) -> Example:
    """Render with the chat template, tokenize, and label the assistant's turns only."""
    assert record.messages is not None
    try:
        full, turns = assistant_turns(record.messages, tokenizer, record.tools)
    except DataError as error:
        raise record.error(str(error)) from None
    except Exception as error:
        # Templates raise jinja2's TemplateError, or any error of the expressions in them.
        detail = " ".join(str(error).split())
        raise record.error(f"the tokenizer's chat template refuses the messages: {detail}") from None
    # The template writes the special tokens itself.
    encode = lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    ids: list[int] = []
    labels: list[int] = []
    done = 0
    for turn in turns:
        for stop, learned in ((turn.start, False), (turn.end, True)):
            ids = extend_ids(ids, full[:done], full[done:stop], encode)
            labels += [*ids[len(labels) :]] if learned else [IGNORE] * (len(ids) - len(labels))
            done = stop
    # The text after the last assistant turn is never learned from, so it is left out.
    if turns and not turns[-1].ends:
        ids = _ended(tokenizer, ids)
        labels += ids[len(labels) :]
    silent = left_out(record.messages, full)
    return Example(ids, labels, silent[0]["role"] if silent else None)


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """`ids` with the end-of-sequence token, if the tokenizer has one, exactly once at the end."""
    eos = tokenizer.eos_token_id
    return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]


def _describe_losses(data: EncodedDataset, hopeless: int) -> None:
    if data.truncated:
        data.notices.append(f"{data.truncated} of {data.records} records cut to {data.max_length} tokens")
    if data.dropped - hopeless:
        count = data.dropped - hopeless
        data.notices.append(f"{count} of {data.records} records longer than {data.max_length} tokens left out")
    if hopeless:
        data.notices.append(
            f"{hopeless} of {data.records} records left out: the prompt alone fills {data.max_length} tokens"
        )


def check_vocabulary(examples: Sequence[Example], tokens: int | None) -> None:
    """Refuse token ids that a model with embeddings of so many tokens lacks; None refuses nothing.

    Raises:
        DataError: the first of them.
    """
    for number, example in enumerate(examples, 1):
        largest = max(example.input_ids)
        if tokens is not None and largest >= tokens:
            raise DataError(
                f"example {number} has the token {largest}, and the model has embeddings of {tokens} tokens: the "
                "tokenizer is larger than the model; take the tokenizer that belongs to it, or resize the model's "
                "embeddings and save it"
            )


def split_examples(data: EncodedDataset, fraction: float, seed: int) -> tuple[EncodedDataset, EncodedDataset]:
    """Hold out `round(fraction * n)` examples, at least one, chosen by `seed`. Order is kept in both parts.

    Raises:
        DataError: one of the parts would be empty.
    """
    count = max(1, round(fraction * len(data)))
    if count >= len(data):
        raise DataError(f"eval_fraction {fraction} of {len(data)} record(s) leaves nothing to train on")
    held = set(np.random.default_rng(seed).permutation(len(data))[:count].tolist())
    return _subset(data, (i for i in range(len(data)) if i not in held)), _subset(data, sorted(held))


def _subset(data: EncodedDataset, indices: Iterable[int]) -> EncodedDataset:
    indices = list(indices)
    chosen = data.examples
    examples = chosen.select(indices) if isinstance(chosen, TokenStore) else [chosen[i] for i in indices]
    dated = None
    if data.dated is not None:
        dated = hashlib.sha256(f"{data.dated} {indices}".encode()).hexdigest()
    shares = array("d", (data.shares[i] for i in indices)) if data.shares else array("d")
    return EncodedDataset(examples, data.max_length, len(examples), chat=data.chat, dated=dated, shares=shares)


def by_shares(data: EncodedDataset, seed: int) -> EncodedDataset:
    """The data of an epoch: a document whose share is 2.5 two times or three, as many of each as makes the share.

    Raises:
        DataError: nothing is left, of shares far below 1.
    """
    if all(share == 1 for share in data.shares):
        return data
    times = [int(share) for share in data.shares]
    draw = np.random.default_rng(seed)
    for share in sorted(set(data.shares)):
        members = [i for i, own in enumerate(data.shares) if own == share]
        more = round((share - int(share)) * len(members))
        for place in draw.permutation(len(members))[:more].tolist():
            times[members[place]] += 1
    chosen = _subset(data, (i for i, count in enumerate(times) for _ in range(count)))
    if not chosen.examples:
        raise DataError(f"no record is left: shares of {sorted(set(data.shares))} of {len(data)} records round to none")
    chosen.notices, chosen.shares = data.notices, array("d")
    chosen.notices.append(f"{len(chosen)} records an epoch of {len(data)}, by the shares of the files")
    return chosen


def prepare_data(
    config: TrainConfig, tokenizer: Any, position_limit: int | None, virtual: int = 0
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """Training data and, where the config asks for it, evaluation data.

    Needs no model, so that bad data is found before one is loaded.

    Args:
        position_limit: the longest sequence the model can take, see `models.model_position_limit`.
        virtual: how many of these positions the adapter's virtual tokens take.

    Raises:
        DataError: a bad record, with file and line; an empty data set.
        ConfigError: max_length exceeds what the model can take.
    """
    max_length = resolve_max_length(config.max_length, position_limit, virtual)
    data = encode_records(iterate_records(config.data), tokenizer, max_length, config.too_long)
    held_out = None
    if config.eval_data is not None:
        held_out = encode_records(read_records(config.eval_data), tokenizer, max_length, config.too_long)
    elif config.eval_fraction:
        notices = data.notices
        data, held_out = split_examples(data, config.eval_fraction, config.seed)
        data.notices = notices
    # Only now, so that no record is learned that is held out.
    return by_shares(data, config.seed), held_out
