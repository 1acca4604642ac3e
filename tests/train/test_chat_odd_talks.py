"""Odd talks in odd templates: what is learned is what marks around the assistant's part say, and never another's words.

Each template is written once, with [[ and ]] where `{% generation %}` and its end would stand: with the marks it is the
oracle, by transformers; without them it is what is read.
"""

import itertools
import re
import zipfile
from typing import Any

import pytest
from downloads import wheel
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_templates import _SPECIAL, CHATML, TALK, TOOLS, TRL, learned_parts, marked_parts, tokenizer_for

from minipeft.train import DataError, encode_records, make_records

NEW = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "{% if m.role == 'assistant' %}<|im_start|>assistant\n[[{{ m.content }}<|im_end|>]]\n{% else %}"
OTHER = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
EACH = "{% for m in messages %}" + TURN + OTHER + "{% endfor %}"
TEMPLATES = {
    "chatml": EACH + NEW,
    "default system": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + EACH
    + NEW,
    "how many messages": "<|im_start|>system\n{{ messages | length }} messages<|im_end|>\n" + EACH + NEW,
    "reminder at the end": EACH + "Remember: {{ messages[0].content }}<|im_end|>\n" + NEW,
    "answer once more at the end": EACH
    + "{% if not add_generation_prompt %}<|im_start|>log\n{{ messages[-1].content }}<|im_end|>\n{% endif %}"
    + NEW,
    "question once more": EACH.replace(OTHER, "<|im_start|>echo\n{{ m.content }}<|im_end|>\n" + OTHER) + NEW,
    "trimmed": EACH.replace("m.content", "m.content | trim") + NEW,
    "end of text at the end": EACH + NEW.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}"),
    "thoughts opened": EACH + NEW.replace("assistant\n", "assistant\n<think>\n"),
    "thoughts closed": EACH + NEW.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n"),
    "thoughts dropped": EACH.replace("[[{{ m.content }}", "[[{{ m.content.split('</think>')[-1] }}") + NEW,
    "end after the last turn only": "{% for m in messages %}{% if m.role == 'assistant' %}### Response:\n"
    "[[{{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}]]{{ '\\n\\n' if not loop.last }}{% else %}"
    "### {{ m.role }}:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'assistant' %}### Response:\n{% endif %}",
    "words alone": "{% for m in messages %}{% if m.role == 'assistant' %}ASSISTANT:[[ {{ m.content }}{{ eos_token }}]]"
    "{% else %}{{ m.role | upper }}: {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "no prompt": "{% for m in messages %}{% if m.role == 'assistant' %}[[ {{ m.content | trim }} {{ eos_token }}]]"
    "{% else %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}",
    "a question is needed": "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{ raise_exception('No user query found') }}{% endif %}" + EACH + NEW,
    "system left out": EACH.replace(OTHER, "{% if m.role == 'user' %}" + OTHER + "{% endif %}") + NEW,
    "system moved": "{% for m in messages %}{% if m.role == 'assistant' %}[[ {{ m.content }}{{ eos_token }}]]"
    "{% elif m.role == 'user' %}[INST] {{ m.content }}{% if loop.last or loop.index0 + 1 == (messages | length) - 1 %}"
    "{% if messages[0].role == 'system' %} {{ messages[0].content }}{% endif %}{% endif %}[/INST]"
    "{% endif %}{% endfor %}",
}
PIECES = [
    *("yes", "the cat", "  padded ", "line\n", "\n\nlead", "é✓", "{{ x }}", "7", "Be kind.", "Zq7x", "kX3j"),
    *("ASSISTANT: hi", "<|im_end|>", "### Response:", "[/INST]", "</s>", "<|im_start|>user"),
]
words = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map(" ".join)


def said(*roles: str) -> Any:
    """Strategy: messages of these roles, each of words of its own."""
    each = [words.map(lambda text, role=role: {"role": role, "content": text}) for role in roles]  # type: ignore[misc]
    return st.tuples(*each).map(list)


def thinking(talk: list[dict[str, str]]) -> list[dict[str, str]]:
    return [*talk[:-1], {**talk[-1], "content": "<think>\nhm\n</think>\n\n" + talk[-1]["content"]}]


rounds = st.one_of(
    said("user", "assistant"),
    said("user", "assistant", "assistant"),
    said("user", "user", "assistant"),
    said("user", "assistant").map(thinking),
    said("user").map(lambda talk: [*talk, {"role": "assistant", "content": ""}]),
    said("user").map(lambda talk: [*talk, {**talk[0], "role": "assistant"}]),  # the same words
)
system = st.sampled_from([[], [], [{"role": "system", "content": "SYSTEM words"}]])
first = st.one_of(st.just([]), st.just([]), said("assistant"))
talks = st.tuples(system, first, rounds, st.one_of(st.just([]), rounds), st.one_of(st.just([]), rounds)).map(
    lambda parts: list(itertools.chain.from_iterable(parts))
)


def plain(parts: list[str], tokenizer: Any) -> str:
    """The texts without spaces, without the thoughts that a prompt may open, and without one end of text at the end."""
    return re.sub(r"<think>|</think>|\s", "", "".join(parts)).removesuffix(tokenizer.eos_token)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(talk=talks)
def test_what_is_learned_is_what_the_marks_say(name: str, talk: list[dict[str, str]]) -> None:
    if not any(m["role"] == "assistant" and m["content"].strip() for m in talk):
        return
    template = TEMPLATES[name]
    marked = template.replace("[[", "{% generation %}").replace("]]", "{% endgeneration %}")
    tokenizer = tokenizer_for(template.replace("[[", "").replace("]]", ""), specials=["<|im_start|>", "<|im_end|>"])
    expected = marked_parts(talk, marked, tokenizer)
    assert plain(learned_parts(talk, tokenizer), tokenizer) == plain(expected, tokenizer)


CALL = [{"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]
QUESTION, ANSWER = {"role": "user", "content": "QUESTION 0?"}, {"role": "assistant", "content": "It is 7 C."}
CALLED = [QUESTION, {"role": "assistant", "content": "", "tool_calls": CALL},
          {"role": "tool", "content": "GIVEN", "name": "weather", "tool_call_id": "abcdefghi"}, ANSWER]  # fmt: skip
ODD = {
    "assistant first": [ANSWER, QUESTION, ANSWER],
    "system, assistant first": [{"role": "system", "content": "SYSTEM words"}, ANSWER, QUESTION, ANSWER],
    "two answers": [QUESTION, ANSWER, {"role": "assistant", "content": "And one more."}, QUESTION, ANSWER],
    "two questions": [QUESTION, QUESTION, ANSWER],
    "an empty answer": [QUESTION, {"role": "assistant", "content": ""}, QUESTION, ANSWER],
    "the question's words": [QUESTION, {"role": "assistant", "content": "QUESTION 0?"}] * 2,
    "spaces around": [QUESTION, {"role": "assistant", "content": "  Well.\n"}, QUESTION, ANSWER],
    "ends inside": [QUESTION, {"role": "assistant", "content": "Say <|im_end|>, <|eot_id|>, </s> or <end_of_turn>."}],
    "calls": CALLED,
    "calls twice": [*CALLED, *CALLED],
    "a call at the end": CALLED[:2],
}
# Where trl's marks begin earlier, at a header that the prompt holds, or are not around the words.
OTHER_MARKS = ("gptoss", "muse_glimmer", "deepseek_r1_distill", "smolvlm", "idefics3", "llava_next")


def test_odd_talks_in_real_templates() -> None:
    """Learned as trl marks it, or refused: where the template refuses it, or does not write the call that is to be."""
    with zipfile.ZipFile(wheel(TRL)) as archive:
        found = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".jinja")}
    alike = refused = 0
    for file, own in found.items():
        name, training = (
            file.rpartition("/")[2].removesuffix(".jinja"),
            found.get(file.replace(".jinja", "_training.jinja")),
        )
        if training is None:
            continue
        for kind, talk in ODD.items():
            tokenizer = tokenizer_for(own, specials=sorted(set(_SPECIAL.findall(own + training))))
            where, tools = (name, kind), {"tools": TOOLS} if "call" in kind else {}
            try:
                parts = learned_parts(talk, tokenizer, **tools)
            except DataError as error:
                assert re.search("refuses the messages|'weather' is not in|cannot be told apart", str(error)), where
                refused += 1
                assert "call" in kind or re.search("refuses the messages", str(error)), where
                continue
            assert "GIVEN" not in "".join(parts) and "SYSTEM" not in "".join(parts), where
            assert "".join(parts).count("QUESTION") == (2 if kind == "the question's words" else 0), where
            if name in OTHER_MARKS or "call" in kind:
                continue
            expected = marked_parts(talk, training, tokenizer)
            bare = [_SPECIAL.sub("", plain(texts, tokenizer)) for texts in (parts, expected)]
            assert bare[0] == bare[1], where
            alike += 1
    assert alike >= 150 and refused <= 70, (alike, refused)


def test_what_a_tool_gave_is_not_learned_where_it_stands_in_the_turn_that_called() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
        "{% elif m.role == 'assistant' %}{% if loop.first or loop.previtem.role != 'tool' %}<|im_start|>assistant\n"
        "{% endif %}{% if m.tool_calls %}CALL {{ m.tool_calls[0].function.name }}{% if loop.nextitem %}"
        " GAVE {{ loop.nextitem.content }}\n{% endif %}{% endif %}{{ m.content or '' }}"
        "{% if not m.tool_calls %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_for(template)
    assert learned_parts(CALLED, tokenizer, tools=TOOLS) == ["CALL weather", "It is 7 C.<|im_end|>"]
    both = [CALLED[0], {**CALLED[1], "content": "Let me see."}, *CALLED[2:]]
    with pytest.raises(
        DataError, match="assistant message 2 cannot be told apart from message 3: give a chat template"
    ):
        learned_parts(both, tokenizer, tools=TOOLS)


def test_words_that_the_template_leaves_out_are_said() -> None:
    talk = [{"role": "system", "content": "SYSTEM words"}, *TALK]
    tokenizer = tokenizer_for(TEMPLATES["system left out"].replace("[[", "").replace("]]", ""))
    data = encode_records(make_records([{"messages": TALK}, {"messages": talk}]), tokenizer, 200)
    assert data.notices == [
        "1 of 2 records have a message (role 'system', first in record 2) whose words the chat template does not write "
        "as they are: the model does not see them"
    ]
    assert not encode_records(make_records([{"messages": talk}]), tokenizer_for(CHATML), 200).notices
