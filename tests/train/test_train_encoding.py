import pytest
import torch

from minipeft.train import ConfigError, DataError, encode_pair, encode_prompt, encode_records, make_records
from minipeft.train.encoding import IGNORE, encode_record, split_examples
from minipeft.train.models import resolve_max_length

PAIRS = [
    ("The film was", " very good"),
    ("The film was ", "very good"),
    ("The fi", "lm was very good"),
    ("The film was\n", "negative"),
    ("", "positive"),
]


def encode(obj, tokenizer):
    return encode_record(make_records([obj])[0], tokenizer)


def learned(example):
    return [label for label in example.labels if label != IGNORE]


@pytest.mark.parametrize("name", ["tokenizer", "llama_tokenizer", "spanning_tokenizer"])
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_prompt_tokens_at_generation_are_a_prefix_of_training_tokens(name, prompt, completion, request):
    tokenizer = request.getfixturevalue(name)
    example = encode({"prompt": prompt, "completion": completion}, tokenizer)
    at_generation = tokenizer(prompt)["input_ids"]
    assert example.input_ids[: len(at_generation)] == at_generation
    assert example.labels[: len(at_generation)] == [IGNORE] * len(at_generation)
    assert learned(example) == example.input_ids[len(at_generation) :]
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.input_ids[:-1], skip_special_tokens=True) == prompt + completion


def test_a_token_that_spans_the_boundary_is_not_used(spanning_tokenizer):
    prompt, completion = "The film was ver", "y good"
    joint = spanning_tokenizer(prompt + completion)["input_ids"]
    alone = spanning_tokenizer(prompt)["input_ids"]
    assert joint[: len(alone)] != alone, "this case must have a token over the boundary"
    prompt_ids, completion_ids = encode_pair(spanning_tokenizer, prompt, completion)
    assert prompt_ids == alone
    assert spanning_tokenizer.decode(prompt_ids + completion_ids) == prompt + completion


def test_tokenizer_that_appends_an_end_token_does_not_end_the_prompt(tokenizer):
    class Ending:
        eos_token_id, sep_token_id = tokenizer.eos_token_id, None
        convert_ids_to_tokens = tokenizer.convert_ids_to_tokens

        def __call__(self, text):
            return {"input_ids": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]}

    assert encode_prompt(Ending(), "The film") == tokenizer("The film")["input_ids"]


def test_text_is_learned_whole(tokenizer):
    example = encode({"text": "The film"}, tokenizer)
    assert example.input_ids == [*tokenizer("The film")["input_ids"], tokenizer.eos_token_id]
    assert example.labels == example.input_ids
    assert example.loss_tokens == len(example) - 1


def test_end_token_that_is_there_is_not_doubled(tokenizer):
    for obj in ({"text": "The film<|im_end|>"}, {"prompt": "The", "completion": " film<|im_end|>"}):
        ids = encode(obj, tokenizer).input_ids
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_only_assistant_turns_are_learned(tokenizer):
    turns = [("system", "one"), ("user", "two"), ("assistant", "good"), ("user", "three"), ("assistant", "bad")]
    example = encode(chat(*turns), tokenizer)
    assert tokenizer.decode(learned(example)) == "good<|im_end|>bad<|im_end|>"
    generation = tokenizer.apply_chat_template(
        chat(*turns[:-1])["messages"], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(generation, add_special_tokens=False)["input_ids"]
    assert example.input_ids[: len(ids)] == ids
    assert tokenizer.decode(example.input_ids) == generation + "bad<|im_end|>"


def test_template_that_drops_earlier_thoughts_still_shows_the_turns(tokenizer):
    # As Qwen3: only the last assistant turn keeps the thinking block.
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    thinking = tokenizer.__class__(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", chat_template=template
    )
    turns = [("user", "one"), ("assistant", "good"), ("user", "two"), ("assistant", "bad")]
    example = encode(chat(*turns), thinking)
    assert thinking.decode(learned(example)) == "good<|im_end|><think></think>bad<|im_end|>"


def test_template_without_end_token_gets_one(tokenizer):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    plain = tokenizer.__class__(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", chat_template=template
    )
    example = encode(chat(("user", "one"), ("assistant", "good")), plain)
    assert plain.decode(learned(example)) == " good\n<|im_end|>"


def test_chat_template_refusals_are_data_errors(tokenizer, llama_tokenizer):
    with pytest.raises(DataError, match=r"^record 1: records with 'messages' need a tokenizer with a chat template"):
        encode(chat(("assistant", "good")), llama_tokenizer)
    strict = tokenizer.__class__(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template="{{ raise_exception('roles must alternate') }}",
    )
    with pytest.raises(DataError, match=r"^record 1: .*refuses the messages: roles must alternate"):
        encode(chat(("assistant", "good")), strict)


LONG = {"prompt": "The film was", "completion": " very good and very funny in every way"}
SHORT = {"prompt": "The", "completion": " film"}
HOPELESS = {"prompt": "A very bad film, negative in every way. " * 3, "completion": " bad"}


def test_too_long_record_is_an_error_unless_told_otherwise(tokenizer):
    with pytest.raises(DataError, match=r"^record 2: the record has \d+ tokens, more than max_length \(8\)"):
        encode_records(make_records([SHORT, LONG]), tokenizer, 8)


def test_too_long_records_are_dropped_and_counted(tokenizer):
    data = encode_records(make_records([SHORT, LONG, SHORT]), tokenizer, 8, "drop")
    assert (len(data), data.dropped, data.truncated) == (2, 1, 0)
    assert data.notices == ["1 of 3 records longer than 8 tokens left out"]


def test_too_long_records_are_cut_and_counted_and_hopeless_ones_left_out(tokenizer):
    data = encode_records(make_records([SHORT, LONG, HOPELESS]), tokenizer, 8, "truncate")
    assert (len(data), data.dropped, data.truncated) == (2, 1, 1)
    assert len(data.examples[1]) == 8 and data.examples[1].loss_tokens > 0
    # A record that was cut does not teach the model to stop there.
    assert data.examples[1].input_ids[-1] != tokenizer.eos_token_id
    assert data.notices == [
        "1 of 3 records cut to 8 tokens",
        "1 of 3 records left out: the prompt alone fills 8 tokens",
    ]


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_nothing_left_is_an_error(tokenizer, too_long):
    with pytest.raises(DataError, match="no record is left: all 1 exceed 8 tokens; raise max_length"):
        encode_records(make_records([HOPELESS]), tokenizer, 8, too_long)


def test_max_length_is_held_to_the_models_positions():
    assert resolve_max_length(None, None) == 1024
    assert resolve_max_length(None, 512) == 512
    assert resolve_max_length(300, 512) == 300
    with pytest.raises(ConfigError, match=r"max_length \(600\) exceeds the model's max_position_embeddings \(512\)"):
        resolve_max_length(600, 512)


def test_content_hash_is_that_of_ids_and_labels(tokenizer):
    def content(*objects):
        return encode_records(make_records(objects), tokenizer, 64).content_hash()

    assert content(SHORT, LONG) == content(SHORT | {"id": 1}, LONG)
    assert len({content(SHORT, LONG), content(LONG, SHORT), content({"text": "The film"}), content(SHORT)}) == 4


def test_held_out_examples_depend_on_the_seed_and_are_not_trained_on(tokenizer):
    objects = [{"text": f"The film {i}"} for i in range(20)]
    data = encode_records(make_records(objects), tokenizer, 64)
    train, held = split_examples(data, 0.25, seed=3)
    assert (len(train), len(held)) == (15, 5)
    parts = [tuple(e.input_ids) for e in [*train.examples, *held.examples]]
    assert sorted(parts) == sorted(tuple(e.input_ids) for e in data.examples)
    assert split_examples(data, 0.25, seed=3)[1].content_hash() == held.content_hash()
    assert split_examples(data, 0.25, seed=4)[1].content_hash() != held.content_hash()
    one = encode_records(make_records(objects[:1]), tokenizer, 64)
    with pytest.raises(DataError, match="leaves nothing to train on"):
        split_examples(one, 0.5, seed=0)


def test_labels_line_up_with_what_the_model_predicts(tokenizer):
    example = encode(SHORT, tokenizer)
    labels = torch.tensor(example.labels)
    assert example.loss_tokens == int((labels[1:] != IGNORE).sum())
