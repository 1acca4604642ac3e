import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY
from tiny_runs import make_data, make_model
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from minipeft.train import Batches, ConfigError, Example
from minipeft.train.batches import check_isolation, collate, collate_packed, pack_lengths
from minipeft.train.encoding import IGNORE
from minipeft.train.loss import token_loss_sum
from minipeft.train.models import eval_mode, training_mode


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_every_document_is_packed_once_and_no_row_overflows(lengths):
    rows = pack_lengths(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for row in rows)
    # Best fit leaves at most one row half empty: two such rows would have been one.
    assert sum(sum(lengths[i] for i in row) <= 10 for row in rows) <= 1


def test_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"document 1 has 9 tokens, more than a row holds \(8\)"):
        pack_lengths([3, 9], 8)


def documents(*lengths):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [Example(i, list(i)) for i in ids]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["eval", "train", "checkpointing"])
def test_packed_logits_equal_those_of_each_document_alone(attention, mode):
    model = make_model(attention=attention)
    rows = [documents(5, 7, 4), documents(6), documents(1, 2, 9)]  # batch of 3, two rows padded
    with torch.no_grad():
        alone = [[model(torch.tensor([d.input_ids])).logits[0] for d in row] for row in rows]
    batch = collate_packed(rows, pad_id=0)
    with eval_mode(model) if mode == "eval" else training_mode(model, mode == "checkpointing"):
        packed = model(**batch.inputs, use_cache=False).logits
    for row, expected in enumerate(alone):
        at = 0
        for logits in expected:
            torch.testing.assert_close(packed[row, at : at + len(logits)], logits, rtol=0, atol=1e-5)
            at += len(logits)


def test_packed_gradient_equals_the_unpacked_one():
    data = make_data(12)
    gradients = []
    for packing in (False, True):
        model = make_model(dtype=torch.float64)
        for batch in Batches(data.examples, 4, packing=packing, max_length=32):
            token_loss_sum(model, batch).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_first_token_of_a_document_is_not_predicted_from_the_one_before():
    batch = collate_packed([documents(3, 4)], pad_id=0)
    assert batch.labels[0, 3] == IGNORE and batch.labels[0, 0] == IGNORE
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.loss_tokens == int((batch.labels != IGNORE).sum()) == 5


def test_padding_counts_as_no_token():
    examples = documents(3, 5)
    padded, packed = collate(examples, 9), collate_packed([examples, examples[:1]], 9)
    assert (padded.tokens, packed.tokens) == (8, 11)
    assert padded.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert padded.inputs["input_ids"][0, 3:].tolist() == [9, 9]
    assert (padded.labels[0, 3:] == IGNORE).all() and (packed.labels[1, 3:] == IGNORE).all()


def test_isolation_check_accepts_models_that_isolate_and_leaves_the_mode():
    model = make_model(dropout=0.5)
    model.train()
    check_isolation(model)
    assert model.training
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97, bos_token_id=1, eos_token_id=2))
    check_isolation(gpt2)


def test_isolation_check_refuses_a_model_that_leaks():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 32, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(**sizes, vocab_size=97, word_embed_proj_dim=32))
    with pytest.raises(ConfigError, match="OPTForCausalLM lets packed documents see each other"):
        check_isolation(opt)


def order(batches, epoch, start=0):
    return [batch.inputs["input_ids"].tolist() for batch in batches.epoch(epoch, start)]


@pytest.mark.parametrize("packing", [False, True])
def test_order_depends_on_seed_and_epoch_alone(packing):
    examples = make_data(40).examples

    def batches(seed):
        return Batches(examples, 3, packing=packing, max_length=32, seed=seed)

    assert order(batches(1), 2) == order(batches(1), 2)
    assert order(batches(1), 2) != order(batches(1), 3)
    assert order(batches(1), 2) != order(batches(2), 2)
    assert order(batches(1), 2, start=2) == order(batches(1), 2)[2:]
    assert order(batches(1), 2, start=len(batches(1))) == []


def test_an_epoch_is_every_example_once():
    examples = make_data(20).examples
    batches = Batches(examples, 3)
    seen = [row for batch in batches.epoch(5) for row in batch.labels]
    assert len(seen) == 20 and len(batches) == 7 == len(list(batches))
    assert sum(batch.tokens for batch in batches.epoch(5)) == sum(map(len, examples))
