"""Real chat templates: what is learned of a talk, beside the marks that trl's training versions of them have.

trl ships the templates of thirty models, each beside a version that marks the assistant's part by {% generation %}.
"""

import itertools
import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
from downloads import wheel
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from minipeft import LoraConfig, get_peft_model
from minipeft.train import DataError, TrainConfig, Trainer, encode_records, make_records
from minipeft.train.chats import end_of_turn
from minipeft.train.encoding import IGNORE, EncodedDataset, encode_record, split_examples

TRL = "trl==1.16.0"
# What templates write as tokens of their own.
_SPECIAL = re.compile(
    r"<\|[^|<>'\" {}]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|</?s>|\[/?[A-Z_]+\]|<\|[a-z_]+>|<[a-z_]+\|>"
    r"|<end_of_utterance>|<turn\|>"
)


def tokenizer_for(template: str, end: str | None = None, specials: list[str] | None = None) -> Any:
    """A tokenizer of bytes and of the special tokens of `template`; `end` is its end of text."""
    found = specials if specials is not None else sorted(set(_SPECIAL.findall(template)))
    tokens = list(dict.fromkeys(["<|endoftext|>", "<bos>", *found]))
    inner = Tokenizer(
        models.BPE({t: i for i, t in enumerate([*tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, [])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=end or "<|endoftext|>", bos_token="<bos>", pad_token="<|endoftext|>",
        additional_special_tokens=tokens, chat_template=template,
    )  # fmt: skip


def learned_parts(messages: list[dict[str, Any]], tokenizer: Any, **more: Any) -> list[str]:
    """The texts that are learned, one after the other."""
    example = encode_record(make_records([{"messages": messages, **more}])[0], tokenizer)
    pairs = zip(example.labels, example.input_ids, strict=True)
    groups = itertools.groupby(pairs, key=lambda pair: pair[0] != IGNORE)
    return [tokenizer.decode([token for _, token in group]) for is_learned, group in groups if is_learned]


def marked_parts(messages: list[dict[str, Any]], template: str, tokenizer: Any) -> list[str]:
    """The texts that a template marks."""
    rendered, indices = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return [rendered[0][start:end] for start, end in indices[0]]


def talks() -> Iterator[tuple[str, list[dict[str, str]]]]:
    for turns in (1, 2, 3):
        for system in (False, True):
            talk = [{"role": "system", "content": "SYSTEM words"}] if system else []
            for turn in range(turns):
                talk.append({"role": "user", "content": f"QUESTION {turn}?"})
                talk.append({"role": "assistant", "content": f"Answer number {turn}."})
            yield f"{turns} turns{', system' if system else ''}", talk


def without_thoughts(text: str) -> str:
    """`text` without the empty thoughts that templates put in front of answers, and without spaces.

    The prompt may open a thought; a model that was trained without thoughts closes it.
    """
    return re.sub(r"<think>|</think>|\s", "", text)


@pytest.fixture(scope="module")
def templates() -> dict[str, tuple[str, str]]:
    """name -> (the model's own template, trl's training version)."""
    with zipfile.ZipFile(wheel(TRL)) as archive:
        found = {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".jinja")}
    return {
        name.rpartition("/")[2].removesuffix(".jinja"): (text, found[name.replace(".jinja", "_training.jinja")])
        for name, text in found.items()
        if name.replace(".jinja", "_training.jinja") in found
    }


@pytest.mark.parametrize("end_of_text", ["of a turn", "another"])
def test_real_templates_teach_the_answers_and_the_ends_of_turns(
    templates: dict[str, tuple[str, str]], end_of_text: str
) -> None:
    assert len(templates) >= 30
    checked = 0
    for name, (own, training) in templates.items():
        for kind, talk in talks():
            probe = tokenizer_for(own + training)
            try:
                first = marked_parts(talk, training, probe)[0]
            except Exception:  # a template that takes no system message
                continue
            # GLM's turns end where the next begins.
            ends = [token for token in _SPECIAL.findall(first) if token not in ("<|user|>", "<｜Assistant｜>")]
            end = ends[-1] if ends else None
            specials = sorted(set(_SPECIAL.findall(own + training)))
            tokenizer = tokenizer_for(own, end if end_of_text == "of a turn" else None, specials)
            parts = learned_parts(talk, tokenizer)
            answers = [m["content"] for m in talk if m["role"] == "assistant"]
            where = (name, kind, parts)
            assert len(parts) == len(answers), where
            for number, (part, answer) in enumerate(zip(parts, answers, strict=True)):
                assert answer in part, where
                last = number + 1 == len(answers)
                if end is not None and not (last and name == "gptoss"):
                    assert part.rstrip().endswith(end), where
                    # Some write whom their words are for, too.
                    words = _SPECIAL.sub("", re.sub(r"(<\|channel\|>final| to=user)<\|message\|>", "", part))
                    assert without_thoughts(words) == without_thoughts(answer), where
                elif last:
                    # gpt-oss ends the last turn of all by another token, GLM by none: then by the end of the text.
                    assert without_thoughts(part).rpartition(without_thoughts(answer))[2], where
            assert not re.search("QUESTION|SYSTEM", "".join(parts)), where
            checked += 1
    assert checked >= 166


# Templates of other kinds

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OLMO = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>\n{{ m['content'] }}"
    "{% if not loop.last %}\n{% else %}{{ eos_token }}{% endif %}{% else %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n"
    "{% endif %}{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
TALK = [
    {"role": "user", "content": "QUESTION-1"},
    {"role": "assistant", "content": "answer-1"},
    {"role": "user", "content": "QUESTION-2"},
    {"role": "assistant", "content": "answer-2"},
]


@pytest.mark.parametrize(
    ("template", "specials", "parts"),
    [
        (CHATML, ["<|im_start|>", "<|im_end|>"], ["answer-1<|im_end|>", "answer-2<|im_end|>"]),
        (CHATML, [], ["answer-1<|im_end|>\n", "answer-2<|im_end|>\n<|endoftext|>"]),
        (OLMO, [], ["answer-1", "answer-2<|endoftext|>"]),
        (OLMO, ["<|user|>", "<|assistant|>"], ["answer-1", "answer-2<|endoftext|>"]),
        (PHI3, ["<|user|>", "<|assistant|>", "<|end|>"], ["answer-1<|end|>", "answer-2<|end|>"]),
        (PHI3, [], ["answer-1<|end|>\n", "answer-2<|end|>\n<|endoftext|>"]),
        (LLAMA2, ["<s>", "</s>"], [" answer-1 </s>", " answer-2 </s>"]),
    ],
)
def test_ends_of_turns(template: str, specials: list[str], parts: list[str]) -> None:
    assert learned_parts(TALK, tokenizer_for(template, specials=specials)) == parts


def test_an_answer_may_hold_the_end_of_a_turn() -> None:
    answer = "Every turn ends with <|im_end|>, and then the next one begins."
    talk = [TALK[0], {"role": "assistant", "content": answer}, *TALK]
    parts = learned_parts(talk, tokenizer_for(CHATML))
    assert parts == [f"{answer}<|im_end|>", "answer-1<|im_end|>", "answer-2<|im_end|>"]


def test_an_assistant_that_speaks_first_and_a_default_system_prompt() -> None:
    tokenizer = tokenizer_for(DEFAULT_SYSTEM)
    assert learned_parts(TALK[1:], tokenizer) == ["answer-1<|im_end|>", "answer-2<|im_end|>"]


def test_thoughts_that_the_prompt_opens_and_thoughts_that_are_dropped() -> None:
    opened = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    dropped = opened.replace("m['content'] }}", "m['content'].split('</think>')[-1] }}")
    ask = TALK[0]
    for template, answer, part in [
        (opened, "4", "4<|im_end|>"),
        (opened, "<think>\nadd\n</think>\n\n4", "add\n</think>\n\n4<|im_end|>"),
        (dropped, "<think>\nadd\n</think>4", "4<|im_end|>"),
    ]:
        assert learned_parts([ask, {"role": "assistant", "content": answer}], tokenizer_for(template)) == [part]


def test_a_templates_own_marks_decide() -> None:
    marked = CHATML.replace(
        "{{ m['content'] }}<|im_end|>",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}",
    )
    # The marks leave the end of the turn out, so that the end of the text is what stops a model.
    assert learned_parts(TALK, tokenizer_for(marked)) == ["answer-1", "answer-2<|endoftext|>"]


def test_words_that_a_template_changes_are_refused() -> None:
    cut = CHATML.replace("{{ m['content'] }}", "{{ m['content'][:5] }}")
    with pytest.raises(DataError, match=r"does not write assistant message 2 as it is: 'answer-1' is not in 'answe'"):
        learned_parts(TALK, tokenizer_for(cut))
    silent = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"leaves message 2 out: give a chat template that marks"):
        learned_parts(TALK, tokenizer_for(silent))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("ab<|>_im endQ\n7."), min_size=1).filter(str.strip), min_size=1, max_size=3),
    st.sampled_from([CHATML, PHI3, LLAMA2, DEFAULT_SYSTEM]),
)
def test_whatever_is_said_is_what_is_learned(answers: list[str], template: str) -> None:
    tokenizer = tokenizer_for(template)
    talk = [m for answer in answers for m in (TALK[0], {"role": "assistant", "content": answer})]
    parts = learned_parts(talk, tokenizer)
    end = "</s>" if template is LLAMA2 else "<|end|>" if template is PHI3 else "<|im_end|>"
    assert [part.removesuffix(end).strip() for part in parts] == [answer.strip() for answer in answers]
    assert all(part.endswith(end) for part in parts)


# Records as the field writes them


def test_turns_of_no_weight_are_read_and_not_learned() -> None:
    for mark in ({"weight": 0}, {"train": False}):
        talk = [TALK[0], {**TALK[1], **mark}, *TALK[2:]]
        assert learned_parts(talk, tokenizer_for(CHATML)) == ["answer-2<|im_end|>"]
    with pytest.raises(DataError, match="which is not excepted by its weight"):
        make_records([{"messages": [TALK[0], {**TALK[1], "weight": 0}]}])
    with pytest.raises(DataError, match=r"'weight' of message 2 to be 0 or 1 .* got \{'weight': 0.5\}"):
        make_records([{"messages": [TALK[0], {**TALK[1], "weight": 0.5}]}])


def test_prompts_and_completions_as_messages() -> None:
    record = make_records([{"prompt": TALK[:3], "completion": TALK[3:]}])[0]
    tokenizer = tokenizer_for(CHATML)
    example = encode_record(record, tokenizer)
    assert tokenizer.decode([label for label in example.labels if label != IGNORE]) == "answer-2<|im_end|>"
    assert "answer-1" in tokenizer.decode(example.input_ids)
    with pytest.raises(DataError, match="both as lists of messages, found for 'completion' a string"):
        make_records([{"prompt": TALK[:1], "completion": "words"}])


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\nTOOLS: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% if m.get('tool_calls') %}CALL {{ m['tool_calls'] | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("content", [None, "", "Let me see. "])
def test_calls_of_tools_are_learned_and_tools_are_shown(content: str | None) -> None:
    tokenizer = tokenizer_for(WITH_TOOLS)
    call = {"role": "assistant", "content": content, "tool_calls": CALLS}
    talk = [TALK[0], call, {"role": "tool", "content": "7 C"}, {"role": "assistant", "content": "It is 7 C."}]
    example = encode_record(make_records([{"messages": talk, "tools": TOOLS}])[0], tokenizer)
    assert (
        tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(talk, tools=TOOLS, tokenize=False).rstrip()
    )
    parts = learned_parts(talk, tokenizer, tools=TOOLS)
    assert parts == [f"{content or ''}CALL {json.dumps(CALLS)}<|im_end|>", "It is 7 C.<|im_end|>"]


def test_wrong_records_are_named(tmp_path: Any) -> None:
    from minipeft.train import read_jsonl

    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "q", "completion": "one", "completion": "two"}')
    with pytest.raises(DataError, match=r"data.jsonl.*1.*'completion' twice in one object"):
        read_jsonl(file)
    with pytest.raises(DataError, match="'tools' to be a list of objects, found a string"):
        make_records([{"messages": TALK, "tools": "weather"}])
    with pytest.raises(DataError, match="'tool_calls' of message 1 to be a list of objects"):
        make_records([{"messages": [{"role": "assistant", "tool_calls": "weather"}]}])
    with pytest.raises(DataError, match="'content' of message 1 to be a string, found null"):
        make_records([{"messages": [{"role": "assistant", "content": None}]}])


def test_the_end_of_a_turn_is_known() -> None:
    assert end_of_turn(tokenizer_for(CHATML)) == "<|im_end|>"
    assert end_of_turn(tokenizer_for(OLMO)) == "<|endoftext|>"
    assert end_of_turn(tokenizer_for("{% for m in messages %}{{ m['content'] }}{% endfor %}")) is None
    assert end_of_turn(tokenizer_for("{{ raise_exception('no') }}")) is None


# A tokenizer that is larger than its model, and a template that prints the date


def test_a_token_that_the_model_lacks_is_named_and_padding_does_no_harm(tmp_path: Any) -> None:
    tokenizer = tokenizer_for(CHATML)
    size = len(tokenizer)
    model = get_peft_model(tiny_llama(vocab_size=size), LoraConfig())
    config = TrainConfig(model="m", data="d", output_dir=str(tmp_path / "run"), max_steps=1, batch_size=2)
    data = encode_records(make_records([{"text": "ab"}, {"text": "abcdef"}]), tokenizer, 64)
    trained = Trainer(model, data, config, pad_id=size + 3, progress_bar=False).train()
    assert trained.steps == 1
    tokenizer.add_tokens(["[NEW]"])
    data = encode_records(make_records([{"text": "ab[NEW]"}]), tokenizer, 64)
    with pytest.raises(DataError, match=rf"has the token {size}, and the model has embeddings of {size} tokens"):
        Trainer(model, data, config, progress_bar=False)


def test_data_in_a_template_with_a_date_are_the_same_data_on_another_day() -> None:
    def data_of(template: str, day: str, answer: str = "answer-1") -> EncodedDataset:
        talk = [TALK[0], {"role": "assistant", "content": answer}]
        date = "{% set today = strftime_now('%d') %}{{ DAY }}"
        tokenizer = tokenizer_for(date.replace("DAY", day) + template)
        tokenizer.chat_template = tokenizer.chat_template.replace("DAY", day)
        return encode_records(make_records([{"messages": talk}] * 3), tokenizer, 200)

    first = data_of(CHATML, "today")
    assert data_of(CHATML, "today").content_hash() == first.content_hash()
    assert data_of(CHATML, "today", "another").content_hash() != first.content_hash()
    assert data_of(PHI3, "today").content_hash() != first.content_hash()
    # The tokens do not decide, which are others on another day.
    first.examples[0].input_ids[0] += 1
    assert data_of(CHATML, "today").content_hash() == first.content_hash()
    one, other = split_examples(first, 0.34, seed=0)
    assert len({first.content_hash(), one.content_hash(), other.content_hash()}) == 3


def test_a_warm_up_as_long_as_the_run_is_said(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_for(CHATML)
    model = get_peft_model(tiny_llama(vocab_size=len(tokenizer)), LoraConfig())
    data = encode_records(make_records([{"text": "ab"}]), tokenizer, 64)
    for warmup, said in ((4, True), (5, True), (3, False)):
        caplog.clear()
        settings: dict[str, Any] = {"max_steps": 4, "warmup_steps": warmup, "output_dir": str(tmp_path)}
        Trainer(model, data, TrainConfig(model="m", data="d", **settings), progress_bar=False)
        assert ("never reaches" in caplog.text) == said
