"""The part of a conversation that the assistant has to write: its words and the token that ends its turn, every time.

A chat template is a program; nothing but its output says where a message went. Where it marks the assistant's part
itself (`{% generation %}`), the marks decide. Elsewhere the words of a message are found by rendering the conversation
again with other words in their place: what differs is theirs. So it does not matter whether a template trims them,
drops earlier thoughts, writes an end of text after the last turn only, or adds a system prompt; and what is found is
checked against the message.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minipeft.train.errors import DataError

Messages = Sequence[Mapping[str, Any]]

# Stand in for a message's words: no two of them begin or end alike.
_OTHER_WORDS = ("Zq7x", "kX3j")
_ASK = ({"role": "user", "content": _OTHER_WORDS[0]},)
_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
ADVICE = "give a chat template that marks the assistant's words with {% generation %} (--chat-template FILE)"


class _LeftOutError(DataError):
    """A message whose words the template does not write."""


@dataclass(frozen=True)
class Turn:
    """The assistant's part of a rendered conversation.

    Attributes:
        start, end: characters, the end token included; `ends` is False if the template writes none.
    """

    start: int
    end: int
    ends: bool


def assistant_turns(messages: Messages, tokenizer: Any, tools: Any = None) -> tuple[str, list[Turn]]:
    """The rendered conversation and the parts of it that are learned, in order.

    Args:
        messages: with "weight": 0 or "train": false, an assistant's turn is left out.

    Raises:
        DataError: no chat template, or a turn that cannot be told apart.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("records with 'messages' need a tokenizer with a chat template: this one has none")
    chat = _Chat(tokenizer, tools)
    return chat.marked(messages) if chat.marks else chat.compared(messages)


def is_learned(message: Mapping[str, Any]) -> bool:
    """True for an assistant's message that is not excepted."""
    return message["role"] == "assistant" and message.get("train", True) is not False and message.get("weight", 1) != 0


def left_out(messages: Messages, full: str) -> list[Mapping[str, Any]]:
    """The messages of others than the assistant and tools whose words are not in the rendered conversation as they are.

    What a tool gave may be written in another form; of the assistant's words that would be an error.
    """
    told = (m for m in messages if m["role"] not in ("assistant", "tool") and isinstance(m.get("content"), str))
    return [message for message in told if message["content"].strip() not in full]


def end_of_turn(tokenizer: Any) -> str | None:
    """The special token with which the chat template ends an assistant's turn; None if it has none."""
    ask = {"role": "user", "content": "Zq7x"}
    try:
        full, turns = assistant_turns([ask, {"role": "assistant", "content": "kX3j"}], tokenizer)
    except Exception:  # templates raise what they like
        return None
    text = full[turns[0].start : turns[0].end].rstrip() if turns else ""
    tokens = [token for token in _special_tokens(tokenizer) if text.endswith(token)]
    return max(tokens, key=len, default=None)


class _Chat:
    """Renderings of one tokenizer's template."""

    def __init__(self, tokenizer: Any, tools: Any) -> None:
        self.tokenizer, self.tools = tokenizer, tools
        template = tokenizer.chat_template
        self.marks = isinstance(template, str) and _MARKED.search(template) is not None
        tokens = sorted(_special_tokens(tokenizer), key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self.blocks = False
        try:
            # Templates for images may want a list of parts, and then show nothing of a string.
            self.blocks = _OTHER_WORDS[0] not in self.render([{"role": "user", "content": _OTHER_WORDS[0]}])
        except Exception:  # a template that takes no such conversation refuses the real ones, too, by its own words
            self.blocks = False

    def render(self, messages: Messages, **options: Any) -> str:
        """The conversation as text; the empty one is empty, since many templates refuse it."""
        if not messages:
            return ""
        return self.tokenizer.apply_chat_template(self._plain(messages), tools=self.tools, tokenize=False, **options)

    def _plain(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages as the template takes them."""
        plain = [{k: v for k, v in m.items() if v is not None and k not in ("weight", "train")} for m in messages]
        for message in plain:
            if self.blocks and isinstance(message.get("content"), str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        return plain

    def marked(self, messages: Messages) -> tuple[str, list[Turn]]:
        """As the template's own marks say."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, indices = render_jinja_template(
            conversations=[self._plain(messages)],
            tools=self.tools,
            chat_template=self.tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        full, parts = rendered[0], [(start, end) for start, end in indices[0] if end > start]
        skipped = [m for m in messages if m["role"] == "assistant" and not is_learned(m)]
        turns = [Turn(start, end, self._ends_special(full[start:end])) for start, end in parts]
        if not skipped:
            return full, turns
        assistants = [m for m in messages if m["role"] == "assistant"]
        if len(assistants) != len(turns):
            raise DataError(
                f"the chat template marks {len(turns)} parts for {len(assistants)} assistant messages, so those with "
                "weight 0 cannot be told apart"
            )
        return full, [turn for turn, message in zip(turns, assistants, strict=True) if is_learned(message)]

    def compared(self, messages: Messages) -> tuple[str, list[Turn]]:
        """By comparing renderings."""
        full = self.render(messages)
        turns: list[Turn] = []
        done = 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            turn = self._turn(messages, number, full, done)
            done = turn.end
            if is_learned(message):
                turns.append(turn)
        return full, turns

    def _turn(self, messages: Messages, number: int, full: str, done: int) -> Turn:
        return self._plain_turn(messages, number, full) or self._searched_turn(messages, number, full, done)

    def _plain_turn(self, messages: Messages, number: int, full: str) -> Turn | None:
        """The turn where nothing is to be searched for: the prompt, the words as they are, the usual end."""
        words, calls = (messages[number].get("content") or "").strip(), messages[number].get("tool_calls")
        prompt = self._prompt(messages[:number])
        usual = _usual_ends(self.tokenizer, self.tokenizer.chat_template)[number + 1 == len(messages)]
        end = len(prompt) + len(words)
        plain = bool(words and prompt and usual and not calls) and full.startswith(prompt + words)
        if not plain or not full.startswith(usual, end):
            return None
        return Turn(len(prompt), end + len(usual), True)

    def _searched_turn(self, messages: Messages, number: int, full: str, done: int) -> Turn:
        start, end = self._words(messages, number, full)
        before = max(done, self._words_before(messages, number, full, start))
        if start < before:
            raise DataError(
                f"assistant message {number + 1} cannot be told apart from the messages before it: {ADVICE}"
            )
        end = self._own_end(messages, number, full, start, end)
        _check_shown(messages[number], number, full[start:end])
        # What the model is given when it has to go on from here is the prompt, whatever the template puts after it.
        prompt = self._prompt(messages[:number])
        asking = self._asking(messages[:number], prompt)
        common = len(_common([prompt, full]))
        # Where what comes before is not rendered alike (an end of text after the last turn only), what asks decides.
        between = full[before:start]
        unasked = _after(between, asking or self._asking(_ASK, self._prompt(_ASK)))
        if full.startswith(prompt) and asking and len(prompt) <= end:
            start = len(prompt)
        elif unasked is not None:
            start = before + unasked
        elif between.strip() and prompt.endswith(between.rstrip()):
            start = before + len(between.rstrip())
        elif common >= max(before, 1):
            start = min(common, start)
        length, ends = self._end_after(messages, number, full, end)
        return Turn(start, end + length, ends)

    def _prompt(self, messages: Messages, asking: bool = True) -> str:
        """The prompt from which the model goes on after `messages`; empty if the template refuses such a beginning.

        Without `asking` it is the conversation so far.
        """
        try:
            return self.render(messages, add_generation_prompt=asking)
        except Exception:  # templates raise what they like
            return ""

    def _asking(self, messages: Messages, prompt: str) -> str:
        """The end of `prompt` that asks the model to go on after `messages`."""
        return prompt[len(_common([prompt, self._prompt(messages, asking=False)])) :]

    def _words_before(self, messages: Messages, number: int, full: str, start: int) -> int:
        """The end of the words in front of message `number`, whose own start at `start`; 0 if there are none.

        A message that the template leaves out, or moves to a later place, is not in front.
        """
        for earlier in range(number - 1, -1, -1):
            try:
                found = self._words(messages, earlier, full)
            except _LeftOutError:
                continue
            if found[0] <= start:
                return found[1]
        return 0

    def _own_end(self, messages: Messages, number: int, full: str, start: int, end: int) -> int:
        """`end`, or the place before it from which on a template writes what tools gave into the turn that called."""
        for later in range(number + 1, len(messages)):
            if messages[later]["role"] == "assistant":
                break
            try:
                found = self._words(messages, later, full)
            except _LeftOutError:
                continue
            if found[0] < end and start < found[1]:
                so_far = self.render(messages[: number + 1])
                own = so_far[slice(*self._words(messages[: number + 1], number, so_far))]
                if own and full.startswith(own, start):
                    return start + len(own)
                raise DataError(
                    f"assistant message {number + 1} cannot be told apart from message {later + 1}: {ADVICE}"
                )
        return end

    def _words_after(self, messages: Messages, number: int, full: str, end: int) -> int:
        """The start of the words that follow message `number`, whose own end at `end`; the text's end without any."""
        for later in range(number + 1, len(messages)):
            try:
                found = self._words(messages, later, full)
            except _LeftOutError:
                continue
            if found[0] >= end:
                return found[0]
        return len(full)

    def _words(self, messages: Messages, number: int, full: str) -> tuple[int, int]:
        """The characters of `full` that depend on the words of message `number`, and nothing around them.

        Those of the first place, if the template writes them at several.
        """
        start, rest = len(full), len(full)
        others = [self.render(_with_words(messages, number, words)) for words in _OTHER_WORDS]
        for words, other in zip(_OTHER_WORDS, others, strict=True):
            if words not in other:
                raise _LeftOutError(f"the chat template leaves message {number + 1} out: {ADVICE}")
            start = min(start, len(_common([full, other])))
            rest = min(rest, _common_end(full, other))
        end = max(start, len(full) - rest)
        if others[0].count(_OTHER_WORDS[0]) <= others[1].count(_OTHER_WORDS[0]) + 1:
            return start, end
        words = messages[number].get("content") or ""
        spaces = len(full[start:]) - len(full[start:].lstrip())
        for first, written in ((start, words), (start + spaces, words.strip())):
            if full.startswith(written, first):
                return start, first + len(written)
        raise DataError(f"the chat template writes message {number + 1} more than once: {ADVICE}")

    def _end_after(self, messages: Messages, number: int, full: str, end: int) -> tuple[int, bool]:
        """(characters after the words that end the turn, whether a special token does)."""
        alone = self._text_after(messages[: number + 1])
        last = number + 1 == len(messages)
        if not last:
            after = full[end : self._words_after(messages, number, full, end)]
        else:
            asked = [*messages, {"role": "user", "content": _OTHER_WORDS[0]}]
            try:
                going_on = self.render(asked)
                after = going_on[self._words(asked, number, going_on)[1] :]
            except Exception:  # a template that allows no further message
                after = alone
        here, at_the_end = self._tokens_in_front(after), self._tokens_in_front(alone)
        # A turn may end by several tokens in a row: by those with which it ends whether it is the last one or not.
        common = [a for a, b in zip(here, at_the_end, strict=False) if a.group() == b.group()][: len(at_the_end)]
        if common and here[0].group() == at_the_end[0].group():
            return common[-1].end(), True
        if last and at_the_end:
            return at_the_end[0].end(), True
        # gpt-oss ends the last turn of all by another token. One token alone between two messages begins the second.
        if at_the_end and here and len(list(self.special.finditer(after))) > 1:
            return here[0].end(), True
        if at_the_end or here:
            return 0, False
        # No token that the tokenizer knows: what stands after the words in every case.
        same = _common([alone, after])
        if same != alone:
            same = same[: max(same.rfind("\n"), same.rfind(" ")) + 1]
        return len(same), False

    def _text_after(self, messages: Messages) -> str:
        """The text after the last message's words, of a talk that ends with it."""
        try:
            so_far = self.render(messages)
        except Exception:  # a template that refuses an assistant who speaks first, with nothing after it
            messages = [*_ASK, messages[-1]]
            so_far = self.render(messages)
        return so_far[self._words(messages, len(messages) - 1, so_far)[1] :]

    def _tokens_in_front(self, text: str) -> list[re.Match[str]]:
        """The special tokens, one right after the other, that `text` begins with after spaces."""
        found: list[re.Match[str]] = []
        for token in self.special.finditer(text):
            if (found and found[-1].end() != token.start()) or (not found and text[: token.start()].strip()):
                break
            found.append(token)
        return found

    def _ends_special(self, text: str) -> bool:
        found = list(self.special.finditer(text))
        return bool(found) and not text[found[-1].end() :].strip()


@functools.lru_cache(maxsize=8)
def _usual_ends(tokenizer: Any, template: str) -> tuple[str, str]:
    """The text between the words and the end of an assistant's turn, of one that goes on and of the last one.

    Empty where the tokenizer knows no token that ends it.
    """
    talk = [{"role": "user", "content": "Zq7x"}, {"role": "assistant", "content": "kX3j"}]
    found = []
    for messages in ([*talk, talk[0]], talk):
        chat = _Chat(tokenizer, None)
        try:
            full = chat.render(messages)
            turn = chat._searched_turn(messages, 1, full, 0)
        except Exception:  # templates raise what they like
            found.append("")
            continue
        found.append(full[turn.start : turn.end].partition("kX3j")[2] if turn.ends else "")
    return found[0], found[1]


def _with_words(messages: Messages, number: int, words: str) -> list[Mapping[str, Any]]:
    """`messages` with nothing but these words in message `number`."""
    kept = {k: v for k, v in messages[number].items() if k in ("role", "name", "tool_call_id")}
    return [*messages[:number], {**kept, "content": words}, *messages[number + 1 :]]


def _check_shown(message: Mapping[str, Any], number: int, text: str) -> None:
    """Raise unless a rendered message holds its words; earlier thoughts may be left out."""
    visible = (message.get("content") or "").rpartition("</think>")[2].strip()
    names = [call.get("function", call).get("name", "") for call in message.get("tool_calls") or ()]
    missing = [part for part in (visible, *names) if part not in text]
    if missing:
        raise DataError(
            f"the chat template does not write assistant message {number + 1} as it is: {missing[0][:40]!r} is not in "
            f"{text[:60]!r}; {ADVICE}"
        )


def _after(between: str, asking: str) -> int | None:
    """The place in `between` after `asking`, or after a beginning of it, but for spaces the last of all; else None."""
    if asking and asking in between:
        return between.rindex(asking) + len(asking)
    for text in (between, between.rstrip()):
        begun = (asking[:length] for length in range(len(asking) - 1, 0, -1))
        if any(part.strip("\n <|[>") and text.endswith(part) for part in begun):
            return len(text)
    return None


def _common(texts: list[str]) -> str:
    """The beginning that all texts have."""
    one, other = min(texts), max(texts)
    return one[
        : next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    ]


def _common_end(one: str, other: str) -> int:
    return len(_common([one[::-1], other[::-1]]))


def _special_tokens(tokenizer: Any) -> set[str]:
    added: dict[str, int] = tokenizer.get_added_vocab()
    return {token for token in (*added, *tokenizer.all_special_tokens) if token.strip()}
